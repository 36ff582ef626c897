from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crosscoders import made
from dictionaries import D_MODEL, D_SAE, relative_gap, save_sae
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusion_lens import sparse_coding
from fusion_lens.crosscoders import Crosscoder
from fusion_lens.dictionaries import Card, Centred
from fusion_lens.errors import ConfigError, DictionaryError
from fusion_lens.saes import load_sae
from fusion_lens.sparse_coding import SparseCode, sparse_code


def directions(
    seed: int, *, n_layers: int = 1, d_sae: int = 40, d_model: int = 12, unit: bool = False
) -> Tensor:
    """Directions "layer d_sae d_model" of many lengths, or orthonormal ones."""
    generator = torch.Generator().manual_seed(seed)
    if unit:
        square = torch.randn(n_layers * d_model, n_layers * d_model, generator=generator)
        rows = torch.linalg.qr(square.double())[0][:d_sae]
        return rows.reshape(-1, n_layers, d_model).transpose(0, 1).contiguous()
    lengths = torch.logspace(-3, 3, d_sae)[torch.randperm(d_sae, generator=generator)]
    return torch.randn(n_layers, d_sae, d_model, generator=generator) * lengths[:, None]


def dictionary_of(decoder: Tensor) -> Crosscoder:
    n_layers, d_sae, d_model = decoder.shape
    return Crosscoder(
        card=Card(
            name="made here",
            layers=tuple(range(n_layers)),
            hook_names=tuple(f"blocks.{layer}.hook_resid_post" for layer in range(n_layers)),
            d_model=d_model,
            d_sae=d_sae,
        ),
        encoder_weight=torch.zeros(n_layers, d_model, d_sae, dtype=decoder.dtype),
        encoder_bias=torch.zeros(d_sae, dtype=decoder.dtype),
        decoder_weight=decoder,
        decoder_bias=torch.zeros(n_layers, d_model, dtype=decoder.dtype),
    )


def random_delta(seed: int, n_layers: int = 1, d_model: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(n_layers, d_model, generator=generator) * 5


def pursued(
    decoder: Tensor, delta: Tensor, k: int
) -> tuple[list[int], NDArray[Any], list[float], NDArray[Any]]:
    """The pursuit as the textbook has it, on [D, -D] in NumPy: features, signed weights, errors
    and reconstruction."""
    rows = decoder.double().numpy().transpose(1, 0, 2).reshape(decoder.shape[1], -1)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    both, n = np.concatenate([rows, -rows]), len(rows)
    target = delta.double().numpy().reshape(-1)
    residual, support, errors = target, [], []
    for _ in range(k):
        support.append(int(np.argmax(both @ residual)))
        weights = np.linalg.lstsq(both[support].T, target, rcond=None)[0]
        residual = target - weights @ both[support]
        errors.append(float(np.linalg.norm(residual) / np.linalg.norm(target)))
    signs = np.where(np.array(support) < n, 1, -1)
    fitted = (weights @ both[support]).reshape(delta.shape)
    return [i % n for i in support], weights * signs, errors, fitted


def assert_equal_codes(found: SparseCode, expected: SparseCode, *, rtol: float = 1e-6) -> None:
    assert found.features == expected.features
    assert found.weights == pytest.approx(expected.weights, rel=rtol)
    assert found.errors == pytest.approx(expected.errors, rel=rtol, abs=1e-9)


def test_a_delta_of_orthonormal_directions_is_recovered_with_its_signs() -> None:
    decoder = directions(0, d_sae=12, unit=True)
    chosen = {7: -3.0, 2: 2.0, 9: 1.5, 4: -0.25}
    delta = sum(weight * decoder[:, feature] for feature, weight in chosen.items())
    assert isinstance(delta, Tensor)
    code = sparse_code(delta, dictionary_of(decoder), 10)
    assert code.features == tuple(chosen)
    assert code.weights == pytest.approx(tuple(chosen.values()), abs=1e-12)
    norm = np.sqrt(9 + 4 + 2.25 + 0.0625)
    left = [np.sqrt(4 + 2.25 + 0.0625), np.sqrt(2.25 + 0.0625), 0.25, 0.0]
    assert code.errors == pytest.approx([each / norm for each in left], abs=1e-12)
    assert code.relative_error == code.errors[-1]
    assert code.cosine == pytest.approx(1.0)
    torch.testing.assert_close(code.reconstruction, delta)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 9), n_layers=st.integers(1, 3))
def test_the_code_is_that_of_the_textbook_in_numpy(seed: int, k: int, n_layers: int) -> None:
    decoder = directions(seed, n_layers=n_layers)
    delta = random_delta(seed, n_layers)
    code = sparse_code(delta, dictionary_of(decoder), k)
    features, weights, errors, reconstruction = pursued(decoder, delta, k)
    assert code.features == tuple(features)
    assert code.weights == pytest.approx(weights, rel=1e-8)
    assert code.errors == pytest.approx(errors, rel=1e-8)
    np.testing.assert_allclose(code.reconstruction.numpy(), reconstruction, rtol=1e-4, atol=1e-5)
    assert code.cosine == pytest.approx(
        (reconstruction * delta.numpy()).sum()
        / (np.linalg.norm(reconstruction) * np.linalg.norm(delta.numpy())),
        rel=1e-6,
    )


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), n_layers=st.integers(1, 2))
def test_the_error_never_grows_and_the_longer_code_begins_as_the_shorter(
    seed: int, n_layers: int
) -> None:
    dictionary, delta = dictionary_of(directions(seed, n_layers=n_layers)), random_delta(seed)
    delta = delta.expand(n_layers, -1)
    code = sparse_code(delta, dictionary, 30, tolerance=0.0)
    assert list(code.errors) == sorted(code.errors, reverse=True)
    assert code.errors[0] < 1
    assert code.cosine <= 1
    assert code.cosine**2 + code.relative_error**2 == pytest.approx(1.0)
    shorter = sparse_code(delta, dictionary, 4)
    assert shorter.features == code.features[:4]
    assert shorter.errors == code.errors[:4]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_lengths_of_the_directions_do_not_matter_and_a_turned_one_turns_its_weight(
    seed: int,
) -> None:
    decoder, delta = directions(seed).double(), random_delta(seed)
    code = sparse_code(delta, dictionary_of(decoder), 6)
    factors = torch.logspace(-4, 4, decoder.shape[1], dtype=torch.float64)[:, None]
    assert_equal_codes(sparse_code(delta, dictionary_of(decoder * factors), 6), code)
    turned = sparse_code(delta, dictionary_of(-decoder), 6)
    assert_equal_codes(turned, replace(code, weights=tuple(-w for w in code.weights)))


def test_a_longer_delta_has_the_same_code_times_its_length() -> None:
    dictionary, delta = dictionary_of(directions(3)), random_delta(3)
    code, longer = (sparse_code(d, dictionary, 5) for d in (delta, -1e4 * delta))
    assert_equal_codes(longer, replace(code, weights=tuple(-1e4 * w for w in code.weights)))


def test_the_weights_and_directions_make_the_reconstruction_of_a_real_sae(tmp_path: Path) -> None:
    sae = load_sae(save_sae(tmp_path / "sae"))
    delta = random_delta(0, d_model=D_MODEL)
    code = sparse_code(delta, sae, 5)
    units = sae.decoder / sae.decoder.norm(dim=-1, keepdim=True)
    summed = sum(w * units[:, i] for i, w in zip(code.features, code.weights, strict=True))
    assert isinstance(summed, Tensor)
    torch.testing.assert_close(code.reconstruction, summed)
    gap = relative_gap(code.reconstruction[None], delta[None])
    assert code.relative_error == pytest.approx(gap, rel=1e-4)
    assert (code.card.d_sae, code.card.name) == (D_SAE, "sae")


def test_a_crosscoder_is_coded_with_one_weight_for_all_layers() -> None:
    crosscoder = made()
    units = crosscoder.decoder / torch.linalg.vector_norm(
        crosscoder.decoder, dim=(0, 2), keepdim=True
    )
    delta = 4.0 * units[:, 5] - 2.0 * units[:, 11]
    code = sparse_code(delta, crosscoder, 2)
    features, weights, _, _ = pursued(crosscoder.decoder, delta, 2)
    assert code.features == tuple(features) == (5, 11)
    assert code.weights == pytest.approx(weights)
    assert code.weights == pytest.approx((4.0, -2.0), rel=1e-5)
    assert code.card.layers == (0, 2, 3)
    # the normaliser's widths are in the directions: without them other weights would do
    assert pursued(crosscoder.decoder_weight, delta, 2)[1] != pytest.approx(weights, abs=0.01)


def test_a_direction_of_one_layer_does_not_stand_for_the_same_in_another() -> None:
    decoder = torch.zeros(2, 3, 4)
    decoder[0, 0, 0] = decoder[1, 1, 0] = 1.0
    decoder[:, 2, 0] = 1.0
    both = torch.zeros(2, 4)
    both[:, 0] = 1.0
    code = sparse_code(both, dictionary_of(decoder), 3)
    assert (code.features, code.weights) == ((2,), (pytest.approx(np.sqrt(2)),))
    second = torch.zeros(2, 4)
    second[1, 0] = -3.0
    code = sparse_code(second, dictionary_of(decoder), 3)
    assert (code.features, code.weights) == ((1,), (-3.0,))


def test_a_centred_dictionary_codes_the_delta_without_its_mean() -> None:
    inner, delta = dictionary_of(directions(1)), random_delta(1) + 4.0
    centred = delta - delta.mean(dim=-1, keepdim=True)
    code = sparse_code(delta, Centred(inner), 5)
    assert_equal_codes(code, sparse_code(centred, inner, 5))
    assert sparse_code(delta, inner, 5).weights != pytest.approx(code.weights, rel=0.01)
    assert "the mean over d_model is subtracted" in code.card.notes[-1]


def test_equal_and_scaled_copies_are_chosen_once() -> None:
    first = directions(0, d_sae=6)
    decoder = torch.cat([first, first * 3.3, -first * 0.7, first], dim=1)
    delta = random_delta(0)
    code = sparse_code(delta, dictionary_of(decoder), 24, tolerance=0.0)
    assert sorted(i % 6 for i in code.features) == list(range(6))
    once = sparse_code(delta, dictionary_of(first), 24, tolerance=0.0)
    assert tuple(i % 6 for i in code.features) == once.features
    assert code.relative_error == pytest.approx(once.relative_error, rel=1e-6)
    assert [abs(w) for w in code.weights] == pytest.approx([abs(w) for w in once.weights], rel=1e-4)


def test_of_equal_directions_the_first_is_chosen() -> None:
    decoder = directions(0, d_sae=12, unit=True)[:, [3, 5, 3, 5]]
    delta = 2 * decoder[:, 0] + decoder[:, 1]
    assert sparse_code(delta, dictionary_of(decoder), 4).features == (0, 1)


def test_a_direction_in_the_span_of_the_chosen_ones_is_passed_over() -> None:
    x, y, z = torch.eye(3)
    decoder = torch.stack([x, y, x + 2 * y + 1e-6 * z])[None]
    delta = (3 * x + 2 * y + z)[None]
    code = sparse_code(delta, dictionary_of(decoder), 3, tolerance=0.0)
    assert code.features == (2, 0)
    assert code.relative_error == pytest.approx(1 / np.sqrt(14), rel=1e-5)
    assert max(abs(w) for w in code.weights) < 4


def test_zero_directions_are_never_chosen() -> None:
    decoder = directions(2)
    decoder[:, ::2] = 0.0
    code = sparse_code(random_delta(2), dictionary_of(decoder), 40, tolerance=0.0)
    assert code.features
    assert all(i % 2 for i in code.features)
    empty = sparse_code(random_delta(2), dictionary_of(torch.zeros(1, 4, 12)), 3)
    assert (empty.features, empty.relative_error) == ((), 1.0)


def test_the_pursuit_stops_at_the_tolerance() -> None:
    dictionary, delta = dictionary_of(directions(4)), random_delta(4)
    full = sparse_code(delta, dictionary, 11)
    assert len(full.features) == 11
    wanted = (full.errors[3] + full.errors[4]) / 2
    code = sparse_code(delta, dictionary, 11, tolerance=wanted)
    assert code.errors == full.errors[:5]
    assert code.errors[-1] <= wanted < code.errors[-2]


def test_more_features_than_the_delta_has_dimensions_are_not_chosen() -> None:
    dictionary = dictionary_of(directions(5))
    code = sparse_code(random_delta(5), dictionary, 1000)
    assert len(code.features) <= 12
    assert code.relative_error <= 1e-6
    assert code.cosine == pytest.approx(1.0)


def test_what_no_direction_reaches_is_left_and_ends_the_pursuit() -> None:
    decoder = directions(0, d_sae=12, unit=True)
    some, rest = decoder[:, :4], decoder[:, 7]
    code = sparse_code(3 * some[:, 1] + 4 * rest, dictionary_of(some), 4, tolerance=0.0)
    assert (code.features, code.weights) == ((1,), (pytest.approx(3.0),))
    assert (code.relative_error, code.cosine) == (pytest.approx(0.8), pytest.approx(0.6))
    nothing = sparse_code(rest, dictionary_of(some), 4)
    assert (nothing.features, nothing.weights, nothing.errors) == ((), (), ())
    assert (nothing.relative_error, nothing.cosine) == (1.0, 0.0)
    assert torch.equal(nothing.reconstruction, torch.zeros(1, 12, dtype=torch.float64))


def test_a_delta_of_zero_has_an_empty_code() -> None:
    dictionary = dictionary_of(directions(0))
    code = sparse_code(torch.zeros(1, 12), dictionary, 3)
    assert (code.features, code.weights, code.errors) == ((), (), ())
    assert (code.relative_error, code.cosine) == (0.0, 0.0)
    assert torch.equal(code.reconstruction, torch.zeros(1, 12))


def test_the_rounding_of_a_constant_delta_is_not_coded() -> None:
    constant = torch.full((1, 12), 0.7)
    dictionary = Centred(dictionary_of(directions(0)))
    assert dictionary.to_basis(constant[None]).abs().max() > 0
    code = sparse_code(constant, dictionary, 3)
    assert (code.features, code.relative_error) == ((), 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_arithmetic_is_in_float64_whatever_the_dictionary_is_in(dtype: torch.dtype) -> None:
    decoder = (directions(6) / 100).to(dtype)
    delta = random_delta(6).to(dtype)
    code = sparse_code(delta.double(), dictionary_of(decoder), 6)
    _, weights, errors, _ = pursued(decoder, delta, 6)
    assert code.weights == pytest.approx(weights, rel=1e-9)
    assert code.errors == pytest.approx(errors, rel=1e-9)
    assert code.reconstruction.dtype == dtype


def test_a_delta_of_low_precision_is_taken() -> None:
    dictionary, delta = dictionary_of(directions(7)), random_delta(7).bfloat16()
    assert_equal_codes(
        sparse_code(delta, dictionary, 4), sparse_code(delta.float(), dictionary, 4), rtol=0
    )


def test_neither_the_decoder_nor_the_delta_is_changed() -> None:
    decoder, delta = directions(8).double(), random_delta(8).double()
    dictionary, before = dictionary_of(decoder), (decoder.clone(), delta.clone())
    sparse_code(delta, dictionary, 5)
    assert torch.equal(dictionary.decoder, before[0])
    assert torch.equal(delta, before[1])


class Largest(TorchDispatchMode):
    """The most elements of a float64 result."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float64:
            self.elements = max(self.elements, result.numel())
        return result


def test_a_decoder_is_read_in_chunks_and_coded_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    dictionary = dictionary_of(directions(9, n_layers=2, d_sae=1003))
    delta = random_delta(9, 2)
    with Largest() as largest:
        whole = sparse_code(delta, dictionary, 6)
    assert largest.elements == 1003 * 12
    monkeypatch.setattr(sparse_coding, "_CHUNK_ELEMENTS", 200)
    with Largest() as largest:
        code = sparse_code(delta, dictionary, 6)
    # one number per feature, and no more than that
    assert largest.elements == 1003
    assert_equal_codes(code, whole, rtol=1e-12)


@pytest.mark.parametrize(
    ("shape", "told"), [((2, 12), r"\(2, 12\)"), ((1, 13), r"\(1, 13\)"), ((12, 1), r"\(12, 1\)")]
)
def test_a_delta_of_another_shape_is_refused(shape: tuple[int, int], told: str) -> None:
    with pytest.raises(DictionaryError, match=rf"1 layer\(s\) of width 12, but got {told}; take"):
        sparse_code(torch.ones(shape), dictionary_of(directions(0)), 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_delta_that_is_not_finite_is_refused(value: float) -> None:
    delta = random_delta(0)
    delta[0, 3] = value
    with pytest.raises(DictionaryError, match=r"finite in torch\.float32, but got NaN or infinity"):
        sparse_code(delta, dictionary_of(directions(0)), 3)


def test_a_delta_too_large_for_the_dictionary_s_dtype_is_refused() -> None:
    decoder = (directions(0) / 100).half()
    with pytest.raises(DictionaryError, match=r"finite in torch\.float16"):
        sparse_code(random_delta(0) * 1e5, dictionary_of(decoder), 3)


def test_directions_that_are_not_finite_are_refused() -> None:
    decoder = directions(0)
    decoder[0, 7, 2] = float("nan")
    with pytest.raises(DictionaryError, match="made here must have finite directions"):
        sparse_code(random_delta(0), dictionary_of(decoder), 3)


@pytest.mark.parametrize(
    ("k", "tolerance"), [(0, 1e-6), (-1, 1e-6), (1, 1.0), (1, -1e-9), (1, float("nan"))]
)
def test_settings_outside_their_range_are_refused(k: int, tolerance: float) -> None:
    with pytest.raises(ConfigError, match="k must be at least 1 and tolerance at least 0 and"):
        sparse_code(random_delta(0), dictionary_of(directions(0)), k, tolerance=tolerance)


def test_a_code_whose_parts_do_not_fit_together_is_refused() -> None:
    code = sparse_code(random_delta(0), dictionary_of(directions(0)), 3)
    with pytest.raises(DictionaryError, match="one weight and one error per feature"):
        replace(code, weights=code.weights[:2])
    with pytest.raises(DictionaryError, match="each feature once"):
        replace(code, features=(1, 1, 2))

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from crosscoders import LAYERS, D, F, L, by_formula, inputs, layout, made, write
from dictionaries import parts, relative_gap, residuals, save_sae
from safetensors.torch import load_file

from fusion_lens.crosscoder_files import load_crosscoder
from fusion_lens.crosscoders import CODE_NORMALISATIONS, Crosscoder, make_normaliser
from fusion_lens.dictionaries import Dictionary, decode, fit_to_model
from fusion_lens.errors import ConfigError, DictionaryError
from fusion_lens.models import HookedModel
from fusion_lens.saes import load_sae


@pytest.mark.parametrize("normaliser", ["relative", "per unit", None])
@pytest.mark.parametrize("threshold", [2.0, None])
@pytest.mark.parametrize("mode", CODE_NORMALISATIONS)
def test_codes_and_reconstruction_are_the_formula_in_numpy(
    mode: str, threshold: float | None, normaliser: str | None, tmp_path: Path
) -> None:
    tensors = layout(mode, threshold=threshold, normaliser=normaliser)
    crosscoder = load_crosscoder(write(tmp_path / "cc", tensors), layers=LAYERS)
    x = inputs(0)
    codes, decoded = by_formula(tensors, x)
    assert 0 < (codes > 0).sum() < codes.size
    np.testing.assert_allclose(crosscoder.encode(x).codes.numpy(), codes, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(crosscoder.reconstruct(x).numpy(), decoded, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        decode(crosscoder, crosscoder.encode(x)), crosscoder.reconstruct(x), rtol=1e-4, atol=1e-4
    )
    assert isinstance(crosscoder, Dictionary)


def test_threshold_code_normalisation_and_normaliser_each_change_the_codes(tmp_path: Path) -> None:
    x = inputs(0)
    variants = [
        layout(),
        layout("SAE"),
        layout("NONE"),
        layout(threshold=None),
        layout(threshold=0.5),
        layout(normaliser=None),
        layout(normaliser="per unit"),
    ]
    codes = [
        load_crosscoder(write(tmp_path / str(n), tensors), layers=LAYERS).encode(x).codes
        for n, tensors in enumerate(variants)
    ]
    for i, one in enumerate(codes):
        for other in codes[i + 1 :]:
            assert not torch.equal(one, other)


@pytest.mark.parametrize("normaliser", ["relative", "per unit", None])
def test_effects_and_the_error_sum_to_the_delta_of_every_layer(
    normaliser: str | None, tmp_path: Path
) -> None:
    tensors = layout(normaliser=normaliser)
    crosscoder = load_crosscoder(write(tmp_path / "cc", tensors), layers=LAYERS)
    x, y = inputs(0), inputs(1)
    found = parts(crosscoder, x, y)
    error = torch.from_numpy(
        (y.numpy() - by_formula(tensors, y)[1]) - (x.numpy() - by_formula(tensors, x)[1])
    )
    assert torch.equal(found.offset, torch.zeros_like(found.offset))
    assert relative_gap(found.effects.sum(dim=1) + error, y - x) < 1e-4
    order = torch.roll(torch.arange(F), 1)
    permuted = parts(crosscoder, x, y, decoder=crosscoder.decoder[:, order])
    assert relative_gap(permuted.effects.sum(dim=1) + error, y - x) > 0.1


def test_a_code_does_not_depend_on_the_other_rows(tmp_path: Path) -> None:
    crosscoder = load_crosscoder(write(tmp_path / "cc", layout()), layers=LAYERS)
    x = inputs(0)
    alone = torch.cat([crosscoder.encode(row[None]).codes for row in x])
    torch.testing.assert_close(crosscoder.encode(x).codes, alone)


def test_a_crosscoder_of_one_layer_is_an_sae(tmp_path: Path) -> None:
    folder = save_sae(tmp_path / "sae", "batchtopk", apply_b_dec_to_input=False)
    sae = load_sae(folder)
    tensors = load_file(folder / "sae_weights.safetensors")
    crosscoder = Crosscoder(
        card=sae.card,
        encoder_weight=tensors["W_enc"][None],
        encoder_bias=tensors["b_enc"],
        decoder_weight=tensors["W_dec"][None],
        decoder_bias=tensors["b_dec"][None],
        code_normalisation="NONE",
        threshold=float(tensors["threshold"][0]),
        k=6,
    )
    one, other = (parts(dictionary, residuals(0), residuals(1)) for dictionary in (sae, crosscoder))
    torch.testing.assert_close(one.effects, other.effects)
    torch.testing.assert_close(one.error, other.error)


def test_a_crosscoder_is_fitted_to_a_model_layer_by_layer(tiny: HookedModel) -> None:
    wide = replace(made(tiny).card, d_model=32)
    crosscoder = made(
        card=wide,
        encoder_weight=torch.zeros(L, 32, F),
        decoder_weight=torch.zeros(L, F, 32),
        decoder_bias=torch.zeros(L, 32),
        normaliser=None,
    )
    assert fit_to_model(crosscoder, tiny) is crosscoder
    with pytest.raises(DictionaryError, match=r"of width 12, but .* has 32"):
        fit_to_model(made(tiny), tiny)


def test_what_does_not_fit_together_cannot_be_made() -> None:
    for changes, message in (
        ({"k": None}, "k and threshold must both be given"),
        ({"threshold": None}, "or neither"),
        ({"card": replace(made().card, d_sae=25)}, r"a decoder of shape \(3, 25, 12\)"),
    ):
        with pytest.raises(DictionaryError, match=message):
            made(**changes)
    with pytest.raises(ConfigError, match="code_normalisation must be one of"):
        made(code_normalisation="MIXED")
    with pytest.raises(ConfigError, match="kind must be one of relative, per unit"):
        make_normaliser(torch.ones(L, D), torch.ones(L, D), kind="whitened")


def test_a_relative_normaliser_gives_a_layer_its_target_rms() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, L, D, generator=generator) * torch.tensor([1.0, 5.0, 40.0])[:, None] + 3
    normaliser = make_normaliser(x.mean(dim=0), x.std(dim=0), target_rms=1.5)
    lengths = normaliser.normalise(x).square().sum(dim=-1).mean(dim=0).sqrt()
    torch.testing.assert_close(lengths, torch.full((L,), 1.5), rtol=1e-3, atol=0.0)
    torch.testing.assert_close(
        normaliser.normalise(x) * normaliser.widths + normaliser.mean, x, rtol=1e-4, atol=1e-4
    )

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dictionaries import parts, relative_gap, residuals
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from fusion_lens.dictionaries import (
    Card,
    Centred,
    Dictionary,
    Encoded,
    decode,
    fit_to_model,
    resid_post_layer,
)
from fusion_lens.errors import ConfigError, DictionaryError, HookNameError
from fusion_lens.identity import identify, is_layer_normed, residual_basis
from fusion_lens.models import HookedModel, load_model, resid_post
from fusion_lens.sae_files import FileSAE

D_MODEL, D_SAE = 32, 48


def card_of(**changes: object) -> Card:
    fields = {
        "name": "an SAE",
        "layers": (1,),
        "hook_names": ("blocks.1.hook_resid_post",),
        "d_model": D_MODEL,
        "d_sae": D_SAE,
    }
    return Card(**{**fields, **changes})  # type: ignore[arg-type]


def sae_of(card: Card | None = None) -> FileSAE:
    card = card or card_of()
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    return FileSAE(
        card,
        W_enc=random(card.d_model, card.d_sae),
        b_enc=random(card.d_sae),
        W_dec=random(card.d_sae, card.d_model),
        b_dec=random(card.d_model),
        normalisation="layer_norm",
    )


@pytest.mark.parametrize(
    ("hook_name", "layer"),
    [
        ("blocks.0.hook_resid_post", 0),
        ("blocks.12.hook_resid_post", 12),
        ("blocks.12.hook_resid_pre", 11),
        ("blocks.3.hook_out", 3),
        ("blocks.3.hook_in", 2),
        ("model.layers.5", 5),
        ("transformer.h.0", 0),
    ],
)
def test_a_hook_of_the_residual_stream_is_the_resid_post_of_a_block(
    hook_name: str, layer: int
) -> None:
    assert resid_post_layer(hook_name) == layer


@pytest.mark.parametrize(
    "hook_name",
    [
        "blocks.1.hook_resid_mid",
        "blocks.1.hook_mlp_out",
        "blocks.1.attn.hook_z",
        "blocks.1.ln2.hook_normalized",
        "blocks.1",
        "blocks.01.hook_resid_post",
        "model.layers.5.hook_resid_post",
        "model.layers.5.mlp",
        "hook_embed",
        "",
    ],
)
def test_a_hook_elsewhere_is_refused(hook_name: str) -> None:
    with pytest.raises(DictionaryError, match="must be a block's hook_resid_post or hook_resid_"):
        resid_post_layer(hook_name)


def test_the_residual_before_the_first_block_is_refused_because_nothing_is_steered_there() -> None:
    with pytest.raises(DictionaryError) as caught:
        resid_post_layer("blocks.0.hook_resid_pre")
    assert str(caught.value) == (
        "the hook must lie after a block, but 'blocks.0.hook_resid_pre' is the embedding, before "
        "all of them: nothing is steered there; choose a dictionary of a later layer."
    )


def test_the_input_of_a_block_is_the_output_of_the_one_before(tiny: HookedModel) -> None:
    _, cache = tiny.run_with_cache(torch.tensor([[1, 5, 9]]))
    for layer in (1, 3):
        mapped = resid_post(resid_post_layer(f"blocks.{layer}.hook_resid_pre"))
        assert torch.equal(cache[f"blocks.{layer}.hook_resid_pre"], cache[mapped])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ()}, r"ascending order, but got \(\)"),
        ({"layers": (2, 1), "hook_names": ("a", "b")}, r"but got \(2, 1\)"),
        ({"layers": (1, 1), "hook_names": ("a", "b")}, r"but got \(1, 1\)"),
        ({"layers": (-1,)}, r"but got \(-1,\)"),
        ({"layers": (1, 2)}, "a hook name per layer, but got 1 for 2 layers"),
        ({"d_sae": 0}, "at least 1, but got 32 and 0"),
    ],
)
def test_a_card_that_cannot_be_true_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DictionaryError, match=message):
        card_of(**changes)
    with pytest.raises(ConfigError, match="basis must be one of unprocessed, centred"):
        card_of(basis="folded")


def test_what_is_decoded_is_the_weighted_sum_and_the_offset() -> None:
    encoded = Encoded(
        codes=torch.tensor([[2.0, -1.0]]),
        scale=torch.tensor([[1.0, 3.0]]),
        offset=torch.tensor([[[0.5, 0.0], [0.0, 0.25]]]),
    )

    class Two:
        card = card_of(layers=(0, 1), hook_names=("a", "b"), d_model=2, d_sae=2)
        decoder = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [0.0, 2.0]]])
        to_basis = encode = reconstruct = staticmethod(lambda x: x)

    # [2, -1] + [0.5, 0];  3 * ([2, 2] - [0, 2]) + [0, 0.25]
    expected = torch.tensor([[[2.5, -1.0], [6.0, 0.25]]])
    assert torch.equal(decode(Two(), encoded), expected)  # type: ignore[arg-type]


def test_a_dictionary_that_fits_is_given_back_as_it_is(tiny: HookedModel) -> None:
    sae = sae_of()
    assert isinstance(sae, Dictionary)
    assert fit_to_model(sae, tiny) is sae


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 16}, "an SAE must be used on a model of width 16, but .* has 32"),
        ({"layers": (4,)}, "a model with a block 4, but .* has 4 blocks"),
        ({"weights": "f" * 64}, r"trained on \(None, weights ffffffffffff\), but .* has "),
    ],
)
def test_a_dictionary_of_another_model_is_refused(
    changes: dict[str, object], message: str, tiny: HookedModel
) -> None:
    with pytest.raises(DictionaryError, match=message):
        fit_to_model(sae_of(card_of(**changes)), tiny)


def test_a_named_checkpoint_is_known_again_in_either_wrapper(
    tiny: HookedModel, hooked_transformer: HookedModel, other_folder: Path
) -> None:
    model = identify(tiny)
    sae = sae_of(card_of(weights=model.weights, embedding=model.embedding))
    assert fit_to_model(sae, tiny) is sae
    assert fit_to_model(sae, hooked_transformer) is sae
    with pytest.raises(DictionaryError, match="must be used on the checkpoint it was trained on"):
        fit_to_model(sae, load_model(other_folder))


def test_a_model_without_the_hook_is_refused(
    tiny: HookedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {name: point for name, point in tiny.hook_dict.items() if "blocks.1" not in name}
    monkeypatch.setattr(type(tiny), "hook_dict", known)
    with pytest.raises(HookNameError, match=r"but got 'blocks\.1\.hook_resid_post'"):
        fit_to_model(sae_of(), tiny)


def test_on_an_rms_model_centred_weights_are_unprocessed_ones(tiny: HookedModel) -> None:
    sae = sae_of(card_of(basis="centred"))
    assert not is_layer_normed(tiny)
    assert fit_to_model(sae, tiny) is sae


@pytest.fixture(scope="module")
def gpt2_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LayerNorm model of two blocks with biases everywhere."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("gpt2")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=320,
                n_positions=64,
                n_embd=D_MODEL,
                n_layer=2,
                n_head=4,
                initializer_range=0.3,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(gpt2_folder: Path) -> HookedModel:
    return load_model(gpt2_folder)


Processed = Callable[..., HookedModel]


@pytest.fixture
def processed(gpt2_folder: Path) -> Processed:
    def make(dtype: str = "float32", **options: bool) -> HookedModel:
        model = load_model(gpt2_folder, dtype=dtype)
        off = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed"), False)
        model.enable_compatibility_mode(  # type: ignore[attr-defined]
            disable_warnings=True,
            **{**off, "fold_value_biases": False, "refactor_factored_attn_matrices": False}
            | options,
        )
        return model

    return make


def residuals_of(model: HookedModel, layer: int = 1) -> Tensor:
    """After block `layer`, "batch 1 d_model", a row per token."""
    _, cache = model.run_with_cache(torch.tensor([[1, 5, 9, 200]]))  # type: ignore[attr-defined]
    return cache[resid_post(layer)][0, :, None]


def test_centring_a_residual_is_what_centred_writing_weights_do(
    gpt2: HookedModel, processed: Processed
) -> None:
    plain = residuals_of(gpt2)
    centred = residuals_of(processed(fold_ln=True, center_writing_weights=True))
    assert float(plain.mean(dim=-1).abs().min()) > 1e-2
    torch.testing.assert_close(
        centred, plain - plain.mean(dim=-1, keepdim=True), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "options",
    [
        {"fold_ln": True},
        {"fold_ln": True, "center_unembed": True},
        {"fold_value_biases": True},
        {"refactor_factored_attn_matrices": True},
    ],
)
def test_the_other_options_leave_the_residual_stream_as_it_is(
    options: dict[str, bool], gpt2: HookedModel, processed: Processed
) -> None:
    model = processed(**options)
    assert identify(model).processing == "processed"
    assert residual_basis(model) == residual_basis(gpt2) == "unprocessed"
    torch.testing.assert_close(residuals_of(model), residuals_of(gpt2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_the_basis_is_known_in_every_precision(dtype: str, processed: Processed) -> None:
    assert residual_basis(processed(dtype, fold_ln=True)) == "unprocessed"
    model = processed(dtype, fold_ln=True, center_writing_weights=True)
    assert residual_basis(model) == "centred"


def test_a_centred_dictionary_reads_a_plain_model_as_it_reads_a_centred_one(
    gpt2: HookedModel, processed: Processed
) -> None:
    sae = sae_of(card_of(basis="centred"))
    model = processed(fold_ln=True, center_writing_weights=True)
    assert residual_basis(model) == "centred"
    assert fit_to_model(sae, model) is sae
    on_plain = fit_to_model(sae, gpt2)
    assert isinstance(on_plain, Centred)
    assert isinstance(on_plain, Dictionary)
    assert on_plain.card == replace(
        sae.card, notes=("the mean over d_model is subtracted from residuals and deltas",)
    )
    one, other = on_plain.encode(residuals_of(gpt2)), sae.encode(residuals_of(model))
    torch.testing.assert_close(one.codes, other.codes, rtol=1e-3, atol=1e-3)
    assert bool((one.codes > 0).any())


def test_on_a_plain_model_the_parts_sum_to_the_centred_delta(gpt2: HookedModel) -> None:
    dictionary = fit_to_model(sae_of(card_of(basis="centred")), gpt2)
    x, y = residuals(0, d_model=D_MODEL), residuals(1, d_model=D_MODEL)
    delta = dictionary.to_basis(y - x)
    torch.testing.assert_close(delta, (y - x) - (y - x).mean(dim=-1, keepdim=True))
    assert relative_gap(parts(dictionary, x, y).total, delta) < 1e-4
    shifted = dictionary.encode(x + 5.0)
    torch.testing.assert_close(shifted.codes, dictionary.encode(x).codes, rtol=1e-4, atol=1e-4)


def test_an_unprocessed_dictionary_is_refused_where_the_mean_is_lost(processed: Processed) -> None:
    model = processed(fold_ln=True, center_writing_weights=True)
    with pytest.raises(DictionaryError, match="the mean they took out is lost; open the model"):
        fit_to_model(sae_of(), model)
    folded = processed(fold_ln=True)
    assert fit_to_model(sae_of(), folded).card.basis == "unprocessed"

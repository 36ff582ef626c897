from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dictionaries import (
    D_SAE,
    HOOK,
    NORMALISATIONS,
    SAES,
    edit_config,
    parts,
    relative_gap,
    residuals,
    save_sae,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusion_lens.dictionaries import Dictionary, decode
from fusion_lens.errors import ConfigError, DictionaryError, InputFileError, MissingExtraError
from fusion_lens.sae_files import FileSAE
from fusion_lens.saes import SaeLensSAE, load_sae

WEIGHTS = "sae_weights.safetensors"


def reconstruct(sae: Any, x: Tensor) -> Tensor:
    """What sae-lens makes of residuals, without a line of this package."""
    with torch.no_grad():
        return sae.decode(sae.encode(x[:, 0]))[:, None]


@pytest.fixture(params=[(kind, mode) for kind in SAES for mode in NORMALISATIONS], ids=str)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_sae(tmp_path / "sae", *request.param)


def test_effects_offset_and_the_error_of_sae_lens_sum_to_the_delta(folder: Path) -> None:
    from sae_lens import SAE

    dictionary = load_sae(folder)
    theirs = SAE.load_from_disk(folder)
    x, y = residuals(0), residuals(1)
    delta = y - x
    found = parts(dictionary, x, y)
    error = (y - reconstruct(theirs, y)) - (x - reconstruct(theirs, x))
    assert relative_gap(found.effects.sum(dim=1) + found.offset + error, delta) < 1e-4

    order = torch.roll(torch.arange(D_SAE), 1)
    permuted = parts(dictionary, x, y, decoder=dictionary.decoder[:, order])
    assert relative_gap(permuted.effects.sum(dim=1) + permuted.offset + error, delta) > 0.1


def test_codes_and_what_is_decoded_from_them_are_those_of_sae_lens(folder: Path) -> None:
    from sae_lens import SAE

    dictionary = load_sae(folder, reader="sae-lens")
    theirs = SAE.load_from_disk(folder)
    x = residuals(0)
    expected = reconstruct(theirs, x)
    encoded = dictionary.encode(x)
    with torch.no_grad():
        torch.testing.assert_close(encoded.codes, theirs.encode(x[:, 0]))
    torch.testing.assert_close(decode(dictionary, encoded), expected)
    torch.testing.assert_close(dictionary.reconstruct(x), expected)
    assert isinstance(dictionary, Dictionary)


def test_codes_and_effects_do_not_depend_on_the_batch(folder: Path) -> None:
    dictionary = load_sae(folder, reader="sae-lens")
    x, y = residuals(0), residuals(1)
    together = parts(dictionary, x, y)
    alone = [parts(dictionary, a[None], b[None]) for a, b in zip(x, y, strict=True)]
    for name in ("effects", "offset", "error"):
        separate = torch.cat([getattr(row, name) for row in alone])
        torch.testing.assert_close(getattr(together, name), separate, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalisation", ["layer_norm", "constant_norm_rescale"])
def test_without_the_offset_the_parts_of_a_normalised_sae_do_not_sum(
    normalisation: str, tmp_path: Path
) -> None:
    dictionary = load_sae(save_sae(tmp_path / "sae", "standard", normalisation))
    x, y = residuals(0), residuals(1)
    found = parts(dictionary, x, y)
    assert relative_gap(found.total, y - x) < 1e-4
    assert relative_gap(found.total - found.offset, y - x) > 0.1


def test_an_abstopk_has_codes_of_both_signs_and_a_relu_only_positive(tmp_path: Path) -> None:
    signed = load_sae(save_sae(tmp_path / "signed", "abstopk")).encode(residuals(0)).codes
    assert bool((signed < 0).any())
    assert bool((signed > 0).any())
    plain = load_sae(save_sae(tmp_path / "plain", "gated")).encode(residuals(0)).codes
    assert bool((plain >= 0).all())
    assert bool((plain > 0).any())


@pytest.mark.parametrize("applied", [True, False])
def test_a_matching_pursuit_has_its_bias_on_both_sides_or_on_none(
    applied: bool, tmp_path: Path
) -> None:
    folder = save_sae(tmp_path / "sae", "matching_pursuit", apply_b_dec_to_input=applied)
    dictionary = load_sae(folder)
    encoded = dictionary.encode(residuals(0))
    assert bool(encoded.offset.any()) is applied
    torch.testing.assert_close(decode(dictionary, encoded), dictionary.reconstruct(residuals(0)))


def test_sae_lens_is_only_asked_where_it_is_needed(tmp_path: Path) -> None:
    assert isinstance(load_sae(save_sae(tmp_path / "one", "topk")), FileSAE)
    assert isinstance(load_sae(save_sae(tmp_path / "two", "gated")), SaeLensSAE)
    assert isinstance(load_sae(tmp_path / "one", reader="sae-lens"), SaeLensSAE)
    with pytest.raises(ConfigError, match="reader must be one of auto, own, sae-lens"):
        load_sae(tmp_path / "one", reader="other")


def test_weights_of_half_precision_are_opened_in_float32(tmp_path: Path) -> None:
    folder = save_sae(tmp_path / "sae", "gated", dtype="bfloat16")
    dictionary = load_sae(folder)
    x = residuals(0).to(torch.bfloat16)
    assert load_file(folder / WEIGHTS)["W_dec"].dtype == torch.bfloat16
    assert dictionary.decoder.dtype == dictionary.encode(x).codes.dtype == torch.float32
    assert relative_gap(decode(dictionary, dictionary.encode(x)), dictionary.reconstruct(x)) < 1e-5


def test_a_centred_sae_opens_without_the_advice_to_process_the_model(tmp_path: Path) -> None:
    metadata = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    for kind in ("standard", "gated"):
        folder = save_sae(tmp_path / kind, kind, metadata=metadata)
        assert load_sae(folder, reader="sae-lens").card.basis == "centred"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("transcoder", r"it is a transcoder \(transcoder\), which predicts one activation from"),
        ("skip_transcoder", r"it is a transcoder \(skip_transcoder\)"),
        ("jumprelu_transcoder", r"it is a transcoder \(jumprelu_transcoder\)"),
        ("jumprelu_skip_transcoder", r"it is a transcoder \(jumprelu_skip_transcoder\)"),
        ("temporal", "it is a temporal SAE, whose codes depend on the whole sequence"),
    ],
)
def test_what_sae_lens_saves_beside_dictionaries_is_refused_with_the_reason(
    kind: str, message: str, tmp_path: Path
) -> None:
    options = {"n_heads": 2, "bottleneck_factor": 4} if kind == "temporal" else {}
    folder = save_sae(tmp_path / "it", kind, **options)
    for reader in ("auto", "own", "sae-lens"):
        with pytest.raises(DictionaryError, match=message):
            load_sae(folder, reader=reader)


def test_an_sae_of_heads_is_refused(tmp_path: Path) -> None:
    metadata = {"hook_name": "blocks.1.attn.hook_z"}
    options = {"reshape_activations": "hook_z", "metadata": metadata}
    folder = save_sae(tmp_path / "it", "gated", **options)
    with pytest.raises(DictionaryError, match=r"it reads attention heads at blocks\.1\.attn\.hook"):
        load_sae(folder)


def test_a_scale_that_was_never_folded_is_refused(tmp_path: Path) -> None:
    folder = save_sae(tmp_path / "sae", "gated", "expected_average_only_in")
    with pytest.raises(DictionaryError, match="the average scale is not in the file; fold it"):
        load_sae(folder)


def test_a_training_checkpoint_is_refused_with_what_to_do(tmp_path: Path) -> None:
    folder = edit_config(save_sae(tmp_path / "sae", "batchtopk"), architecture="batchtopk")
    with pytest.raises(DictionaryError, match="save it with save_inference_model"):
        load_sae(folder)


def test_a_config_of_an_older_sae_lens_is_read_by_the_newer(tmp_path: Path) -> None:
    folder = save_sae(tmp_path / "sae")
    old = {"d_in": 12, "d_sae": D_SAE, "dtype": "float32", "hook_point": HOOK}
    (folder / "cfg.json").write_text(json.dumps(old), "utf-8")
    dictionary = load_sae(folder)
    assert isinstance(dictionary, SaeLensSAE)
    assert (dictionary.card.layers, dictionary.card.prepend_bos) == ((1,), True)


def test_damage_is_one_error_also_through_sae_lens(tmp_path: Path) -> None:
    folder = save_sae(tmp_path / "sae", "gated")
    tensors = load_file(folder / WEIGHTS)
    for changed, message in (
        ({**tensors, "b_gate": tensors["b_gate"] / 0}, "b_gate must be finite"),
        (
            {**tensors, "b_mag": torch.zeros(3)},
            "open, but: RuntimeError .* size mismatch for b_mag",
        ),
        ({k: v for k, v in tensors.items() if k != "r_mag"}, 'Missing key.* "r_mag"'),
    ):
        save_file(changed, folder / WEIGHTS)
        with pytest.raises(InputFileError, match=message) as caught:
            load_sae(folder)
        assert "\n" not in str(caught.value)
    (folder / "cfg.json").write_text("{", "utf-8")
    with pytest.raises(InputFileError, match=r"cfg\.json: it must be JSON, but: "):
        load_sae(folder)


def test_without_sae_lens_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_sae(tmp_path / "sae", "gated")
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    for source in (folder, "gpt2-small-res-jb/blocks.8.hook_resid_pre"):
        with pytest.raises(MissingExtraError, match=r"pip install 'fusion-lens\[sae\]'"):
            load_sae(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nowhere", r"\./nowhere must be a folder with an SAE, but there is none"),
        ("gpt2-small-res-jd/blocks.8.hook_resid_pre", "Did you mean gpt2-small-res-jb"),
        ("gpt2-small-res-jb/blocks.8.hook_resid_post", r"Did you mean blocks\.\d+\.hook_resid_p"),
        ("gpt2-small-res-jb", "OWNER/REPOSITORY/FOLDER of the hub, but none of these fits"),
    ],
)
def test_a_name_that_nothing_has_is_refused_with_what_is_near(source: str, message: str) -> None:
    with pytest.raises(DictionaryError, match=message):
        load_sae(source)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands in for the hub: OWNER/REPOSITORY/FILE."""
    from huggingface_hub.errors import EntryNotFoundError
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def download(repo_id: str, filename: str, **_: object) -> str:
        path = tmp_path / "hub" / repo_id / filename
        if not path.parent.is_dir():
            raise ConnectionError("the hub is out of reach\nretry")
        if not path.is_file():
            raise EntryNotFoundError(f"no {filename}")
        return str(path)

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    return tmp_path / "hub"


def test_a_published_sae_comes_from_the_hub_with_its_basis_and_page(hub: Path) -> None:
    metadata = {"hook_name": "blocks.8.hook_resid_pre"}
    # the directory of sae-lens says what the config on the hub does not
    save_sae(hub / "jbloom/GPT2-Small-SAEs-Reformatted/blocks.8.hook_resid_pre", metadata=metadata)
    path = hub / "jbloom/GPT2-Small-SAEs-Reformatted/blocks.8.hook_resid_pre/cfg.json"
    old = {"d_in": 12, "d_sae": D_SAE, "dtype": "float32", "model_name": "gpt2-small", **metadata}
    path.write_text(json.dumps(old), "utf-8")
    dictionary = load_sae("gpt2-small-res-jb/blocks.8.hook_resid_pre")
    card = dictionary.card
    assert (card.layers, card.basis, card.trained_on_bos) == ((7,), "centred", True)
    assert card.neuronpedia_id == "gpt2-small/8-res-jb"
    assert (
        relative_gap(
            decode(dictionary, dictionary.encode(residuals(0))),
            dictionary.reconstruct(residuals(0)),
        )
        < 1e-5
    )


def test_a_repository_beside_the_directory_opens_by_owner_name_and_folder(hub: Path) -> None:
    save_sae(hub / "someone/saes/layer_1/wide", "topk", "layer_norm")
    found, local = (
        load_sae("someone/saes/layer_1/wide"),
        load_sae(hub / "someone/saes/layer_1/wide"),
    )
    assert found.card.name == "someone/saes/layer_1/wide"
    torch.testing.assert_close(found.encode(residuals(0)).codes, local.encode(residuals(0)).codes)


def test_a_transcoder_of_the_hub_is_refused_before_its_weights_are_fetched(hub: Path) -> None:
    folder = save_sae(hub / "someone/saes/it", "transcoder")
    (folder / WEIGHTS).unlink()
    with pytest.raises(DictionaryError, match="it is a transcoder"):
        load_sae("someone/saes/it")
    shutil.rmtree(hub / "someone")
    with pytest.raises(DictionaryError, match="fetch, but: ConnectionError the hub is out of re"):
        load_sae("someone/saes/it")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"apply_b_dec_to_input": [[]]},
            r"apply_b_dec_to_input must be true or false, but got \[\[",
        ),
        ({"d_sae": 10**9}, r"W_dec must have the shape \(1000000000, 12\), but got \(32, 12\)"),
        ({"d_in": 10**400}, r"W_dec must have the shape \(32, 1000"),
    ],
)
def test_what_sae_lens_would_make_room_for_or_trip_over_is_refused_before_it_is_asked(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = edit_config(save_sae(tmp_path / "sae", "gated"), **change)
    with pytest.raises((DictionaryError, InputFileError), match=message):
        load_sae(folder)

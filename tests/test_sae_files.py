from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dictionaries import D_MODEL, D_SAE, NORMALISATIONS, OWN, edit_config, residuals, save_sae
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fusion_lens.dictionaries import Dictionary
from fusion_lens.errors import DictionaryError, InputFileError, OutputError
from fusion_lens.identity import identify
from fusion_lens.models import HookedModel
from fusion_lens.sae_files import load_sae_folder, seal_sae, statistics
from fusion_lens.saes import load_sae

WEIGHTS = "sae_weights.safetensors"


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("kind", OWN)
def test_read_without_sae_lens_an_sae_gives_what_sae_lens_gives(
    kind: str, normalisation: str, tmp_path: Path
) -> None:
    folder = save_sae(tmp_path / "sae", kind, normalisation)
    own, theirs = load_sae_folder(folder), load_sae(folder, reader="sae-lens")
    x = residuals(0)
    mine, given_ = own.encode(x), theirs.encode(x)
    assert own.card == theirs.card
    assert 0 < int((mine.codes > 0).sum()) < mine.codes.numel()
    for name in ("codes", "scale", "offset"):
        torch.testing.assert_close(getattr(mine, name), getattr(given_, name))
    torch.testing.assert_close(own.decoder, theirs.decoder)
    torch.testing.assert_close(own.reconstruct(x), theirs.reconstruct(x))


@pytest.mark.parametrize("applied", [True, False])
def test_the_bias_is_taken_from_the_input_only_where_the_config_says_so(
    applied: bool, tmp_path: Path
) -> None:
    folder = save_sae(tmp_path / "sae", apply_b_dec_to_input=applied)
    own, theirs = load_sae_folder(folder), load_sae(folder, reader="sae-lens")
    x = residuals(0)
    torch.testing.assert_close(own.encode(x).codes, theirs.encode(x).codes)
    edit_config(folder, apply_b_dec_to_input=not applied)
    assert not torch.allclose(load_sae_folder(folder).encode(x).codes, own.encode(x).codes)


def test_a_topk_that_must_keep_what_is_negative_keeps_nothing_of_it(tmp_path: Path) -> None:
    folder = edit_config(save_sae(tmp_path / "sae", "topk"), k=D_SAE)
    own, theirs = load_sae_folder(folder), load_sae(folder, reader="sae-lens")
    codes = own.encode(residuals(0)).codes
    assert float(codes.min()) == 0.0
    torch.testing.assert_close(codes, theirs.encode(residuals(0)).codes)


def test_the_threshold_of_a_jumprelu_changes_the_codes(tmp_path: Path) -> None:
    folder = save_sae(tmp_path / "sae", "jumprelu")
    x = residuals(0)
    codes = load_sae_folder(folder).encode(x).codes
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, "threshold": torch.zeros(D_SAE)}, folder / WEIGHTS)
    without = load_sae_folder(folder).encode(x).codes
    assert int((without > 0).sum()) > int((codes > 0).sum())
    kept = codes > 0
    assert torch.equal(codes[kept], without[kept])
    threshold = tensors["threshold"].expand_as(codes)
    assert bool((without[~kept] <= threshold[~kept]).all())


def test_no_sae_lens_is_needed_for_a_folder_it_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_sae(tmp_path / "sae", "batchtopk", "layer_norm")
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    x = residuals(0)
    assert torch.equal(load_sae(folder).encode(x).codes, load_sae_folder(folder).encode(x).codes)


def test_a_code_does_not_depend_on_the_other_rows(tmp_path: Path) -> None:
    for kind in ("topk", "batchtopk"):
        dictionary = load_sae_folder(save_sae(tmp_path / kind, kind, "layer_norm"))
        x = residuals(0)
        alone = torch.cat([dictionary.encode(row[None]).codes for row in x])
        torch.testing.assert_close(dictionary.encode(x).codes, alone)


def test_the_card_says_what_the_config_says(tmp_path: Path) -> None:
    metadata = {"neuronpedia_id": "tiny/1-res", "hook_name": "blocks.2.hook_resid_pre"}
    card = load_sae_folder(save_sae(tmp_path / "an-sae", metadata=metadata)).card
    assert (card.name, card.d_model, card.d_sae) == ("an-sae", D_MODEL, D_SAE)
    assert card.layers == (1,)
    assert card.hook_names == ("blocks.2.hook_resid_pre",)
    assert card.notes == ("blocks.2.hook_resid_pre is read as blocks.1.hook_resid_post",)
    assert (card.basis, card.model_name) == ("unprocessed", "tiny")
    assert (card.prepend_bos, card.trained_on_bos) == (True, True)
    assert card.neuronpedia_id == "tiny/1-res"
    assert card.weights is card.embedding is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gated"}, "topk, jumprelu to be read without sae-lens, but got gated"),
        ({"metadata": {"sae_lens_version": "5.1.0"}}, "by sae-lens 6 or later .* version 5.1.0"),
        ({"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input must be true or false"),
        ({"k": 33}, "k must be an integer of 1 to d_sae = 32, but got 33"),
    ],
)
def test_a_config_that_cannot_be_read_without_sae_lens_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = edit_config(save_sae(tmp_path / "sae", "topk"), **changes)
    with pytest.raises(DictionaryError, match=message):
        load_sae_folder(folder)


def test_files_that_are_missing_or_hold_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match=r"cfg\.json: it must be readable, but: No such file"):
        load_sae_folder(tmp_path)
    folder = save_sae(tmp_path / "sae", "jumprelu")
    tensors = load_file(folder / WEIGHTS)
    for changed, message in (
        ({**tensors, "W_enc": torch.zeros(3, 4)}, r"W_enc must have the shape \(12, 32\), but got"),
        ({k: v for k, v in tensors.items() if k != "threshold"}, "misses threshold and has noth"),
        ({**tensors, "b_out": torch.zeros(3)}, "misses none and has b_out beside"),
        ({**tensors, "b_dec": tensors["b_dec"] * float("nan")}, "b_dec must be finite, but it"),
        ({**tensors, "b_dec": tensors["b_dec"].int()}, "b_dec must be floating, but got"),
    ):
        save_file(changed, folder / WEIGHTS)
        with pytest.raises(InputFileError, match=message):
            load_sae_folder(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputFileError, match="must be a whole safetensors file, but: No such file"):
        load_sae_folder(folder)


def test_a_decoder_row_without_length_is_refused_where_codes_are_divided_by_it(
    tmp_path: Path,
) -> None:
    for kind in ("topk", "topk rescaled", "abstopk rescaled"):
        folder = save_sae(tmp_path / kind, kind)
        tensors = load_file(folder / WEIGHTS)
        tensors["W_dec"][3] = 0.0
        save_file(tensors, folder / WEIGHTS)
        if kind == "topk":
            assert bool(torch.isfinite(load_sae(folder).reconstruct(residuals(0))).all())
        else:
            with pytest.raises(DictionaryError, match="must have no decoder row of length zero"):
                load_sae(folder)


def test_an_input_of_another_shape_or_without_values_is_refused(tmp_path: Path) -> None:
    dictionary = load_sae_folder(save_sae(tmp_path / "sae", "standard", "constant_norm_rescale"))
    with pytest.raises(DictionaryError, match=r"1 layer\(s\) of width 12, but got \(1, 16\)"):
        dictionary.encode(residuals(0, d_model=16))
    with pytest.raises(DictionaryError, match=r"of width 12, but got \(2, 12\)"):
        dictionary.encode(residuals(0, 2))
    with pytest.raises(DictionaryError, match="must be given finite residuals"):
        dictionary.encode(residuals(0) / 0)
    with pytest.raises(DictionaryError, match="a residual must not be zero"):
        dictionary.encode(residuals(0) * 0)


def test_layer_norm_goes_out_by_the_deviation_it_came_in_by_without_epsilon() -> None:
    x = residuals(0)[:, 0]
    used = statistics("layer_norm", x)
    torch.testing.assert_close(used.scale_out[:, 0], x.std(dim=-1))
    torch.testing.assert_close(used.scale_in, 1 / (used.scale_out + 1e-5))
    torch.testing.assert_close(used.mean[:, 0], x.mean(dim=-1))


@pytest.fixture
def sealed(tiny: HookedModel, tmp_path: Path) -> Path:
    folder = save_sae(tmp_path / "sae", "jumprelu")
    seal_sae(folder, identify(tiny))
    return folder


def test_a_sealed_sae_names_its_checkpoint_and_stays_one_of_sae_lens(
    sealed: Path, tiny: HookedModel
) -> None:
    model = identify(tiny)
    own, theirs = load_sae_folder(sealed), load_sae(sealed, reader="sae-lens")
    assert own.card == theirs.card
    assert (own.card.weights, own.card.embedding) == (model.weights, model.embedding)
    assert isinstance(own, Dictionary)
    before = (sealed / "cfg.json").read_bytes()
    seal_sae(sealed, model)
    assert (sealed / "cfg.json").read_bytes() == before


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_flipped_bit_of_a_sealed_weight_is_found(sealed: Path, data: st.DataObject) -> None:
    path = sealed / WEIGHTS
    content = path.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(changed)
    try:
        with pytest.raises(InputFileError):
            load_sae_folder(sealed)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("reader", ["own", "sae-lens"])
def test_a_changed_config_or_a_cut_file_of_a_sealed_sae_is_found(sealed: Path, reader: str) -> None:
    edit_config(sealed, apply_b_dec_to_input=False)
    with pytest.raises(InputFileError, match=r"cfg\.json do not match their checksum"):
        load_sae(sealed, reader=reader)
    content = (sealed / WEIGHTS).read_bytes()
    (sealed / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputFileError, match="must be a whole safetensors file, but: "):
        load_sae(sealed, reader=reader)


def test_a_place_that_cannot_be_written_is_one_error(
    sealed: Path, tiny: HookedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OutputError, match="No space left on device"):
        seal_sae(sealed, identify(tiny))
    assert json.loads((sealed / "cfg.json").read_text("utf-8"))["architecture"] == "jumprelu"

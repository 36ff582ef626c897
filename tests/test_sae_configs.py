from __future__ import annotations

from typing import Any

import pytest
from dictionaries import D_MODEL, D_SAE, HOOK

from fusion_lens.errors import DictionaryError
from fusion_lens.sae_configs import is_current, read_card


def config_of(**metadata: Any) -> dict[str, Any]:
    return {
        "architecture": "standard",
        "d_in": D_MODEL,
        "d_sae": D_SAE,
        "metadata": {"hook_name": HOOK, **metadata},
    }


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"prepend_bos": True}, True),
        ({"prepend_bos": False}, False),
        ({}, None),
        ({"prepend_bos": True, "exclude_special_tokens": True}, False),
        ({"prepend_bos": True, "exclude_special_tokens": [0, 1]}, None),
        ({"prepend_bos": True, "seqpos_slice": [1]}, False),
        ({"prepend_bos": True, "seqpos_slice": [None]}, True),
    ],
)
def test_whether_bos_was_in_training_is_told_from_three_settings(
    metadata: dict[str, Any], expected: bool | None
) -> None:
    assert read_card(config_of(**metadata), name="sae").trained_on_bos is expected


def test_only_centred_writing_weights_change_the_basis() -> None:
    neutral = {"fold_ln": True, "center_unembed": True, "fold_value_biases": True, "dtype": "bf16"}
    card = read_card(config_of(model_from_pretrained_kwargs=neutral), name="sae")
    assert (card.basis, card.notes) == ("unprocessed", ())
    options = {"center_writing_weights": True, "revision": "step1000"}
    card = read_card(config_of(model_from_pretrained_kwargs=options), name="sae")
    assert card.basis == "centred"
    assert card.notes == ("trained on the model's revision step1000",)
    with pytest.raises(DictionaryError, match="it was opened with rescale, and whether that"):
        read_card(config_of(model_from_pretrained_kwargs={"rescale": 2}), name="sae")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "jumprelu_transcoder"}, r"it is a transcoder \(jumprelu_transcoder\)"),
        ({"metadata": {"hook_name": HOOK, "hook_name_out": "x"}}, "it is a transcoder"),
        ({"architecture": "temporal"}, "it is a temporal SAE, whose codes depend on the whole"),
        ({"architecture": "batchtopk"}, "save it with save_inference_model"),
        ({"architecture": "vanilla"}, "its architecture is 'vanilla', and standard, topk"),
        ({"architecture": None}, "its config names no architecture"),
        ({"metadata": {}}, "its config names no hook"),
        ({"metadata": {"hook_name": HOOK, "hook_head_index": 3}}, "it reads attention heads"),
        ({"reshape_activations": "hook_z"}, "it reads attention heads"),
        ({"metadata": {"hook_name": "blocks.1.attn.hook_z"}}, "hook_resid_post or hook_resid_pre"),
        ({"metadata": {"hook_name": "blocks.1.hook_mlp_out"}}, "but got 'blocks.1.hook_mlp_out'"),
        ({"metadata": {"hook_name": "blocks.0.hook_resid_pre"}}, "nothing is steered there"),
        ({"metadata": 3}, "metadata must be a JSON object, but got 3"),
        ({"metadata": {"hook_name": HOOK, "prepend_bos": "yes"}}, "prepend_bos must be a bool"),
        ({"normalize_activations": "expected_average_only_in"}, "the average scale is not in the"),
        ({"normalize_activations": "covariance_whitening"}, "the whitening is not in the file"),
        ({"normalize_activations": ["none"]}, r"but got \['none'\]: that is not known"),
        ({"metadata": {"hook_name": HOOK, "model_from_pretrained_kwargs": [1]}}, "must be a dict"),
        ({"normalize_activations": "other"}, "but got 'other': that is not known"),
        ({"d_in": 0}, "d_in of sae must be a positive integer, but got 0"),
        ({"d_sae": True}, "d_sae of sae must be a positive integer, but got True"),
    ],
)
def test_what_is_no_dictionary_of_one_residual_is_refused_with_the_reason(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DictionaryError, match=message):
        read_card({**config_of(), **changes}, name="sae")


@pytest.mark.parametrize(
    ("version", "current"),
    [
        *(("6.0.0", True), ("6.54.12", True), ("10.1", True), ("5.11.0", False), (None, False)),
        # what Python calls a digit and does not read as a number, and what it will not read at all
        *(("²", False), ("٦.1", False), ("9" * 5000, False), ("", False)),
    ],
)
def test_a_config_is_of_today_from_version_6_on(version: str | None, current: bool) -> None:
    assert is_current(config_of(sae_lens_version=version)) is current
    assert not is_current({})

from __future__ import annotations

import dataclasses

import jaxtyping
import pytest
import torch

from fusion_lens.errors import ModelError
from fusion_lens.identity import identify
from fusion_lens.models import load_model


def test_identity_tells_models_apart_and_not_precisions(tiny, tiny_folder, other_folder) -> None:
    identity = identify(tiny)
    assert (identity.n_layers, identity.d_model, identity.dtype) == (4, 32, "float32")
    assert (identity.wrapper, identity.processing) == ("TransformerBridge", "unprocessed")
    half = identify(load_model(tiny_folder, dtype="bfloat16"))
    assert half.dtype == "bfloat16"
    assert identity.mismatch(half) is None
    other = identify(load_model(other_folder))
    assert "it was made on tiny" in str(identity.mismatch(other))


def test_identity_changes_with_a_single_weight(tiny, tiny_folder) -> None:
    changed = load_model(tiny_folder)
    with torch.no_grad():
        next(iter(changed.parameters()))[0, 0] += 1.0
    assert identify(changed).weights != identify(tiny).weights


def test_a_hooked_transformer_of_the_same_weights_is_the_same_model(
    tiny, hooked_transformer
) -> None:
    bridge, hooked = identify(tiny), identify(hooked_transformer)
    assert hooked.wrapper == "HookedTransformer"
    assert bridge.mismatch(hooked) is None
    assert hooked.mismatch(bridge) is None


def test_processed_weights_are_another_basis(tiny, tiny_folder) -> None:
    processed = load_model(tiny_folder)
    processed.enable_compatibility_mode(disable_warnings=True)
    assert identify(processed).processing == "processed"
    assert identify(tiny).mismatch(identify(processed)) == (
        "processing must be unprocessed, but the model has processed"
    )
    width = dataclasses.replace(identify(tiny), d_model=64)
    assert identify(tiny).mismatch(width) == "d_model must be 32, but the model has 64"


def test_something_without_hook_points_is_no_model(monkeypatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ModelError, match="must offer TransformerLens hook points, but got Linear"):
        identify(torch.nn.Linear(2, 2))  # type: ignore[arg-type]

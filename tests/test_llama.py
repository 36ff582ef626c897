from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import family, family_module, save_family
from transformers import DynamicCache

from fusion_lens.executors import lean_of
from fusion_lens.lean import Lean, attention_masks
from fusion_lens.llama import MODEL_TYPES, LlamaPass
from fusion_lens.models import HookedModel, load_model

TOKENS = (torch.arange(24).view(2, 12) * 17 + 5) % 320


def config_of(lean: Lean) -> Any:
    return lean.module.config


@contextmanager
def by_the_module(lean: Lean) -> Iterator[None]:
    """Inside, the module's own forward runs."""
    written_out, lean.written_out = lean.written_out, None
    try:
        yield
    finally:
        lean.written_out = written_out


def passes(lean: Lean, *, last: int = 0) -> torch.Tensor:
    """A filling pass over all tokens but the last two, and two cached steps, side by side."""
    cache = DynamicCache()
    seen = []
    columns = torch.arange(TOKENS.shape[1]).expand(TOKENS.shape)
    for start, stop in ((0, 10), (10, 11), (11, 12)):
        positions = columns[:, start:stop]
        mask = attention_masks(lean, positions, columns[:, :stop])
        with torch.no_grad():
            seen.append(
                lean.forward(TOKENS[:, start:stop], positions, mask, cache=cache, last=last)
            )
    return torch.cat(seen, dim=1)


@pytest.fixture(params=["llama", "mistral", "qwen2"])
def lean(request: pytest.FixtureRequest) -> Lean:
    return lean_of(family(request.param))


def test_the_pass_is_the_modules_own_forward(lean: Lean, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lean.written_out is not None
    assert lean.written_out.module is lean.module
    real, calls = LlamaPass.__call__, []

    def counted(self: LlamaPass, *args: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        return real(self, *args, **options)

    monkeypatch.setattr(LlamaPass, "__call__", counted)
    ours = passes(lean)
    assert len(calls) == 3
    with by_the_module(lean):
        theirs = passes(lean)
    assert len(calls) == 3
    assert ours.shape == (2, 12, 320)
    assert (ours - theirs).abs().max() < 1e-5
    with torch.no_grad():
        published = family_module(config_of(lean).model_type)(TOKENS).logits
    assert (ours - published).abs().max() < 1e-4
    assert published.abs().max() > 1.0


@pytest.mark.parametrize("last", [1, 2])
def test_only_the_last_logits_are_given(lean: Lean, last: int) -> None:
    ours = passes(lean, last=last)
    whole = passes(lean)
    assert ours.shape == (2, last + 2, 320)
    assert (ours - whole[:, -last - 2 :]).abs().max() < 1e-5


def test_the_residual_stream_is_seen_and_changed_behind_every_block(lean: Lean) -> None:
    shift = torch.linspace(-1.0, 1.0, 48)
    streams: list[torch.Tensor] = []
    at: Any = {0: lambda resid: resid + shift, 2: streams.append, 3: lambda resid: 2.0 * resid}
    with lean.at_blocks(at):
        ours = passes(lean)
        with by_the_module(lean):
            theirs = passes(lean)
    assert (ours - theirs).abs().max() < 1e-4
    assert (ours - passes(lean)).abs().max() > 0.1
    for one, other in zip(streams[:3], streams[3:], strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_a_hook_that_changes_the_stream_in_place_changes_it(lean: Lean) -> None:
    with lean.at_blocks({1: lambda resid: resid.mul_(2.0), 2: lambda resid: None}):
        ours = passes(lean)
    with lean.at_blocks({1: lambda resid: 2.0 * resid}):
        assert torch.equal(ours, passes(lean))
    assert (ours - passes(lean)).abs().max() > 0.1


@pytest.mark.parametrize("site", ["attn_z", "mlp_out"])
def test_what_stands_inside_a_block_is_seen_and_changed_there(lean: Lean, site: str) -> None:
    streams: list[torch.Tensor] = []
    at: Any = {(site, 0): lambda x: x + 0.5, (site, 2): streams.append, (site, 3): lambda x: -x}
    with lean.at_sites(at):
        ours = passes(lean)
        with by_the_module(lean):
            theirs = passes(lean)
    assert (ours - theirs).abs().max() < 1e-4
    assert (ours - passes(lean)).abs().max() > 0.1
    for one, other in zip(streams[:3], streams[3:], strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    with lean.at_sites({(site, layer): lambda x: None for layer in range(4)}):
        assert (passes(lean) - passes(lean)).abs().max() == 0


@pytest.mark.parametrize(("name", "number"), [("llama", 29), ("qwen2", 13)])
def test_every_bias_counts(name: str, number: int, tmp_path: Path) -> None:
    lean = lean_of(load_model(save_family(name, tmp_path)))
    before = passes(lean)
    # of every layer's linear maps, and of the bridge's unembedding
    biases = {
        name: parameter
        for name, parameter in lean.module.named_parameters()
        if name.endswith("bias")
    }
    assert len(biases) == number
    for bias in biases.values():
        with torch.no_grad():
            bias.add_(torch.linspace(-1.0, 1.0, len(bias)))
        changed = passes(lean)
        assert (changed - before).abs().max() > 1e-6
        before = changed
    with by_the_module(lean):
        assert (before - passes(lean)).abs().max() < 1e-4


def test_weights_in_bfloat16_agree_as_far_as_bfloat16_goes(lean: Lean) -> None:
    half = lean_of(family(config_of(lean).model_type, "bfloat16"))
    assert half.written_out is not None
    ours = passes(half)
    with by_the_module(half):
        theirs = passes(half)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    in_float32 = passes(lean)
    errors = [float((logits - in_float32).abs().mean()) for logits in (ours, theirs)]
    assert errors[0] < 1.3 * errors[1]
    assert errors[0] < 0.02 * in_float32.abs().max()


def test_a_window_of_the_module_is_kept() -> None:
    lean = lean_of(family("mistral"))
    before = passes(lean)
    other = TOKENS.clone()
    # four layers of windows of four reach back twelve tokens from the next one, not thirteen
    other[:, 0] += 1
    wide = torch.arange(12).expand(2, 12)
    with torch.no_grad():
        changed = lean.forward(other, wide, attention_masks(lean, wide, wide))
    assert (changed - before)[:, 11].abs().max() > 0
    narrow = Lean(lean.module, {"full_attention": 3}, written_out=lean.written_out)
    with torch.no_grad():
        first, second = (
            narrow.forward(tokens, wide, attention_masks(narrow, wide, wide))
            for tokens in (TOKENS, other)
        )
    assert (first - second)[:, 8].abs().max() > 0
    assert torch.equal(first[:, 9:], second[:, 9:])


def test_a_llama_a_mistral_and_a_qwen2_are_written_out_and_no_other_family(
    tiny: HookedModel, atlas: HookedModel
) -> None:
    assert MODEL_TYPES == ("llama", "mistral", "qwen2")
    for model in (tiny, atlas):
        lean = lean_of(model)
        assert lean.written_out is not None
        assert lean.written_out.module is lean.module
    assert lean_of(family("qwen3")).written_out is None

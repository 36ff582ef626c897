"""What the plan of every method has to keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import prompts_of
from engine import logits_of, same_bits, written
from kinds import by_hand
from test_plan_files import same_tensors

from fusion_lens.decoding import Row
from fusion_lens.models import HookedModel
from fusion_lens.plan_files import load_plan, save_plan
from fusion_lens.plans import Plan
from fusion_lens.prompts import NO_PROMPT

SHAPE: dict[str, Any] = {"slots": 4, "cache_length": 64}


def check_plan(model: HookedModel, plan: Plan, tmp_path: Path) -> None:
    """Of no prompt, strength 1, the same once saved, nothing at strength 0; rows in a crowd write
    what they write alone, what token by token arithmetic gives, and not what they write
    unsteered."""
    assert plan.layout == NO_PROMPT
    assert set(plan.coeffs.values()) == {1.0}
    save_plan(plan, tmp_path / "plan.safetensors")
    loaded = load_plan(tmp_path / "plan.safetensors")
    assert len(loaded.steps) == len(plan.steps)
    assert all(map(same_tensors, loaded.steps, plan.steps))
    prompts = prompts_of(model)
    for executor in ("lean", "hooks"):
        bare = written(model, [Row(prompt) for prompt in prompts], executor=executor, **SHAPE)
        off = [Row(prompt, plan * 0.0) for prompt in prompts]
        assert all(map(same_bits, written(model, off, executor=executor, **SHAPE), bare))
        rows = [Row(prompt, plan) for prompt in prompts]
        crowd = [row for steered, other in zip(rows, off, strict=True) for row in (steered, other)]
        together = written(model, crowd, executor=executor, **SHAPE)[::2]
        for row, one, unsteered in zip(rows, together, bare, strict=True):
            (alone,) = written(model, [row], executor=executor, **SHAPE)
            assert same_bits(one, alone)
            assert float((logits_of(one) - by_hand(model, row, one)).abs().max()) < 1e-4
            assert float((logits_of(one) - logits_of(unsteered)).abs().max()) > 0.01

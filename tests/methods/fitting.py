"""What the tests of the methods share: activations to fit on, and how a fitted plan must run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import prompts_of
from engine import hand_prompt, logits_of, same_bits, written
from kinds import by_hand, same_tensors
from torch import Tensor

from fusion_lens.contrast_texts import pair_texts
from fusion_lens.contrasts import Pair
from fusion_lens.decoding import Row
from fusion_lens.identity import ModelIdentity
from fusion_lens.models import HookedModel
from fusion_lens.plan_files import load_plan, save_plan
from fusion_lens.plans import Plan
from fusion_lens.prompts import NO_PROMPT
from fusion_lens.site_activations import SiteActivations, record_at

WHO = ("Tom", "Ada", "the cat", "the fox", "the brown dog")
WHERE = ("in the harbour", "in winter", "over the red book", "at the house")


def sides_of(
    model: HookedModel, site: str = "resid_post", n_pairs: int = 20
) -> tuple[SiteActivations, SiteActivations]:
    """Up to twenty pairs that go on with a name or with a date, of one model."""
    prompts = [f"Question: When was {who} {where}?\nAnswer:" for who in WHO for where in WHERE]
    pairs = [
        Pair(f"p{n}", prompt, f" {3 + n % 7} May 1901", f" Ada Lovelace, No. {n % 3}")
        for n, prompt in enumerate(prompts[:n_pairs])
    ]
    right, wrong = pair_texts(model, pairs)
    return record_at(model, right, site), record_at(model, wrong, site)


def toy(values: Any, site: str = "resid_post") -> SiteActivations:
    """These numbers, "text layer width", as those of a model that is not there."""
    given = values.float() if isinstance(values, Tensor) else torch.tensor(values)
    n_layers, width = given.shape[1:]
    model = ModelIdentity(
        "toy", "TransformerBridge", "unprocessed", n_layers, width, "float32", "w", "e"
    )
    return SiteActivations(given, site, model)


def assert_a_plan_like_any(model: HookedModel, plan: Plan, strength: float, folder: Path) -> None:
    """The plan does what its steps say token by token, alone as in a batch and on both executors;
    nothing at strength 0; and is the same from its file."""
    assert set(plan.coeffs.values()) == {1.0}
    assert plan.layout == NO_PROMPT
    prompts = [*prompts_of(model), hand_prompt((1, 60, 61))]
    rows = [Row(prompt, plan * strength) for prompt in prompts]
    rows += [Row(prompts[0], plan * -strength)]
    bare = [Row(row.prompt) for row in rows]
    still = [Row(row.prompt, plan * 0.0) for row in rows]
    for executor in ("lean", "hooks"):
        shape: dict[str, Any] = {"executor": executor, "slots": 4, "cache_length": 64}
        together = written(model, [*rows, *bare, *still], **shape)
        steered, plain, nothing = (together[n : n + len(rows)] for n in (0, 5, 10))
        for row, one, other in zip(rows, steered, plain, strict=True):
            assert (logits_of(one) - by_hand(model, row, one)).abs().max() < 1e-4
            assert (logits_of(one) - logits_of(other)).abs().max() > 0.01
            assert same_bits(one, written(model, [row], **shape)[0])
        assert all(map(same_bits, nothing, plain))
    path = folder / "plan.safetensors"
    save_plan(plan, path)
    loaded = load_plan(path)
    assert len(loaded.steps) == len(plan.steps)
    assert all(map(same_tensors, loaded.steps, plan.steps))

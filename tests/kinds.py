"""A plan of every kind of step at every site, and what it does, written out token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from conftest import deltas_of
from torch import Tensor

from fusion_lens.decoding import Completion, Row
from fusion_lens.identity import ModelIdentity, identify
from fusion_lens.models import HookedModel
from fusion_lens.plans import Affine, Gate, Plan, Segment, Step, make_plan, thirds
from fusion_lens.prompts import Layout, Prompt, question_prompt

SITES = ("resid_post", "attn_z", "mlp_out")


def width_of(model: HookedModel, site: str) -> int:
    cfg = model.cfg
    return int(cfg.n_heads * cfg.d_head if site == "attn_z" else cfg.d_model)


def numbers(seed: int, *shape: int, size: float = 1.0) -> Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gate_of(model: HookedModel, site: str, kind: str = "sigmoid", **changed: Any) -> Gate:
    """A gate that differs from token to token, closed on the second layer."""
    n_layers, width = int(model.cfg.n_layers), width_of(model, site)
    is_open = torch.arange(n_layers) != 1
    made: dict[str, Any] = {
        "theta": numbers(1, n_layers, width, size=3.0 / width**0.5),
        "bias": numbers(2, n_layers),
        "open": is_open,
        "kind": kind,
    }
    return Gate(**(made | changed))


def affine_of(model: HookedModel, site: str, **changed: Any) -> Affine:
    """A third of the units scaled and shifted, on all layers, with three coefficients."""
    n_layers, width = int(model.cfg.n_layers), width_of(model, site)
    made: dict[str, Any] = {
        "scale": numbers(3, n_layers, width) * (torch.arange(width) % 3 == 0),
        "shift": numbers(4, n_layers, width, size=0.5) * (torch.arange(width) % 3 == 1),
        "segments": thirds(n_layers),
        "coeffs": (0.8, -0.5, 0.6),
        "model": identify(model),
        "layout": question_prompt(model, "Who wrote the red book?").layout,
    }
    return Affine(site, **(made | changed))


def step_of(model: HookedModel, **changed: Any) -> Step:
    """A question's deltas, large enough to be seen."""
    (step,) = make_plan(deltas_of(model), (4.0, -8.0, 6.0), **changed).steps
    assert isinstance(step, Step)
    return step


def _like(model: HookedModel, site: str, value: float) -> Tensor:
    return torch.full((int(model.cfg.n_layers), width_of(model, site)), value)


AT_A_SITE: dict[str, Callable[[HookedModel, str], Affine]] = {
    "affine": affine_of,
    "scale": lambda model, site: affine_of(model, site, shift=_like(model, site, 0.0)),
    "shift": lambda model, site: affine_of(model, site, scale=_like(model, site, 0.0)),
    "bounded": lambda model, site: affine_of(
        model, site, low=_like(model, site, -0.2), high=_like(model, site, 0.6)
    ),
    "sigmoid": lambda model, site: affine_of(model, site, gate=gate_of(model, site)),
    "relu": lambda model, site: affine_of(model, site, gate=gate_of(model, site, "relu")),
    "prompt": lambda model, site: affine_of(model, site, positions="prompt"),
    "completion": lambda model, site: affine_of(model, site, positions="completion"),
    "token": lambda model, site: affine_of(model, site, positions=3),
    "special": lambda model, site: affine_of(model, site, steer_special=True),
    "one_layer": lambda model, site: affine_of(
        model, site, segments=(Segment("one", 1, 2),), coeffs=(1.0,)
    ),
}


def _units(model: HookedModel) -> Tensor:
    return numbers(5, int(model.cfg.n_layers), width_of(model, "resid_post")) > 0


OTHERS: dict[str, Callable[[HookedModel], Plan]] = {
    "units": lambda model: Plan((step_of(model, units=_units(model)),)),
    "gated": lambda model: Plan((step_of(model, gate=gate_of(model, "resid_post")),)),
    "gated_relu": lambda model: Plan((step_of(model, gate=gate_of(model, "resid_post", "relu")),)),
    "gated_units": lambda model: Plan(
        (step_of(model, units=_units(model), gate=gate_of(model, "resid_post")),)
    ),
    "tokens": lambda model: Plan(
        (step_of(model, positions=2), step_of(model, positions=0, steer_special=True))
    ),
    "add_then_scale": lambda model: Plan((step_of(model), affine_of(model, "resid_post"))),
    "scale_then_add": lambda model: Plan((affine_of(model, "resid_post"), step_of(model))),
    "all_sites": lambda model: Plan(
        (
            affine_of(model, "mlp_out", gate=gate_of(model, "mlp_out")),
            step_of(model, positions="prompt"),
            affine_of(model, "attn_z", positions="completion"),
            step_of(model, gate=gate_of(model, "resid_post"), steer_special=True),
        )
    ),
}


def every_plan(model: HookedModel) -> dict[str, Plan]:
    """All of them by name."""
    at_sites = {
        f"{name}_{site}": Plan((make(model, site),))
        for site in SITES
        for name, make in AT_A_SITE.items()
    }
    return at_sites | {name: make(model) for name, make in OTHERS.items()}


def same_tensors(one: Any, other: Any) -> bool:
    """Whether two steps hold the same, tensors bit for bit."""
    assert type(one) is type(other)
    for field in fields(one):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(mine, torch.Tensor):
            same = mine.dtype == theirs.dtype and torch.equal(mine, theirs)
        elif is_dataclass(mine) and not isinstance(mine, (Layout, ModelIdentity)):
            same = same_tensors(mine, theirs)
        else:
            same = mine == theirs
        if not same:
            return False
    return True


def by_hand(model: Any, row: Row, completion: Completion) -> Tensor:
    """The logits of a completion from one pass of TransformerLens, whose hooks move one token after
    the other."""
    tokens = torch.tensor([row.prompt.tokens + completion.tokens[:-1]])
    names = {"resid_post": "hook_resid_post", "attn_z": "attn.hook_z", "mlp_out": "mlp.hook_out"}
    if type(model).__name__ == "HookedTransformer":
        names["mlp_out"] = "hook_mlp_out"
    hooks = []
    assert row.plan is not None
    for layer in range(model.cfg.n_layers):
        for site, name in names.items():
            steps = [step for step in row.plan.steps if step.site == site]
            act = partial(_moved, steps, layer, row.prompt)
            hooks.append((f"blocks.{layer}.{name}", act))
    with torch.no_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks)[0]
    return logits[len(row.prompt.tokens) - 1 :]


def _moved(
    steps: list[Step | Affine], layer: int, prompt: Prompt, x: Tensor, hook: object
) -> Tensor:
    rows = x.flatten(2)[0].clone()
    last = len(prompt.tokens) - 1
    for step in steps:
        coeff = sum(
            c for s, c in zip(step.segments, step.coeffs, strict=True) if s.start <= layer < s.stop
        )
        for t in range(len(rows)):
            kind = "prompt" if t < last else "completion"
            named = t if t <= last else None
            meant = step.positions in ("all", kind) or step.positions == named
            if meant and (step.steer_special or t not in prompt.special):
                rows[t] = _moved_token(step, layer, coeff, rows[t].float()).to(rows.dtype)
    return rows.view(x.shape)


def _moved_token(step: Step | Affine, layer: int, coeff: float, x: Tensor) -> Tensor:
    gate = 1.0
    if step.gate is not None:
        z = step.gate.theta[layer] @ x + step.gate.bias[layer]
        gate = float(z.sigmoid() if step.gate.kind == "sigmoid" else z.clamp(min=0.0))
        gate *= bool(step.gate.open[layer])
    if isinstance(step, Step):
        vector = step.deltas.reference[layer] - step.deltas.base[layer]
        units = torch.ones_like(x) if step.units is None else step.units[layer].float()
        return x + coeff * gate * units * vector
    moved = x + coeff * gate * (step.scale[layer] * x + step.shift[layer])
    inside = torch.ones_like(x, dtype=torch.bool)
    if step.low is not None:
        inside &= x >= step.low[layer]
    if step.high is not None:
        inside &= x <= step.high[layer]
    return torch.where(inside, moved, x)

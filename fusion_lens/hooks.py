"""Plans become hooks on a model; nothing is left behind.

Positions are absolute: position t of a row is counted from its first token, never from the start of
the current pass ("skip when the length is 1" and "last position only" break under a KV cache,
docs/method.md). A hook therefore has to know the offset of the pass it sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fusion_lens.errors import PlanError
from fusion_lens.executors import hooked
from fusion_lens.lean import AtBlock
from fusion_lens.models import HookedModel, identify, resid_post
from fusion_lens.operators import add, mean_shift
from fusion_lens.plans import Plan, Step
from fusion_lens.prompts import Layout, Prompt

HookFn = Callable[..., Any]
"""TransformerLens' `(activation, hook) -> activation`."""


@dataclass(slots=True)
class Cursor:
    """Where the current pass starts, in padded positions; None: not told, so a pass is a whole
    sequence. `width` is the padded length of the prompts; None: that of the longest."""

    offset: int | None = None
    width: int | None = None


def fwd_hooks(
    plan: Plan,
    *,
    model: HookedModel | None = None,
    prompt: Prompt | Layout | None = None,
    offset: int | None = None,
) -> list[tuple[str, HookFn]]:
    """TransformerLens' list of (hook_name, function) for one plan, beside hooks of the user's own.

    For `run_with_hooks`, `run_with_cache` and `hooks()`, on unpadded rows that all get the same
    plan. With `model` the plan is checked against it: a bridge ignores hooks it does not have and
    would run unsteered. `prompt` is the prompt that is run if it is not the one the plan was made
    for: its length and special tokens decide which positions are meant.

    In a loop with a KV cache, give the `offset` of every pass, the number of positions already
    cached. Without it a pass is a whole sequence. The one exception: where every position is
    steered, a pass too short to be a prompt (a single token, behind one BOS) is a continuation.

    Raises:
        PlanError: if the plan belongs to another model; from the hook, if a pass is shorter than
            the prompt and no offset tells where it stands, or if the residual has another width.
    """
    if model is not None:
        plan.check(identify(model))
    if isinstance(prompt, Prompt):
        prompt = prompt.layout
    layouts = [prompt] if prompt is not None else [plan.steps[0].deltas.layout]
    at = _at_blocks([plan], layouts, Cursor(offset))
    return [(resid_post(layer), act) for layer, act in at.items()]


def batch_steering(
    plans: Sequence[Plan | None], layouts: Sequence[Layout], cursor: Cursor
) -> dict[int, AtBlock]:
    """What a left-padded batch does after each block if every row has its own plan, or none."""
    return _at_blocks(plans, layouts, cursor) if any(plan is not None for plan in plans) else {}


@contextmanager
def steering(
    model: HookedModel, plan: Plan, *, prompt: Prompt | Layout | None = None
) -> Iterator[HookedModel]:
    """Run the body with `plan` on `model`, checked against it first; the hooks go when it ends,
    however it ends.

    Raises:
        PlanError: if the plan belongs to another model.
    """
    with hooked(model, fwd_hooks(plan, model=model, prompt=prompt)):
        yield model


@dataclass(slots=True)
class _Group:
    """All first (second, ...) steps of a batch that act alike: one tensor for all rows and layers.

    `active[row, layer]` tells whether the row has such a step on that layer. `tensor` is the shift,
    or with `mean="sequence"` the reference.
    """

    mean: str
    positions: str
    steer_special: bool
    tensor: Float[Tensor, "batch layer d_model"]
    coeffs: Float[Tensor, "batch layer"]
    active: Bool[Tensor, "batch layer"]


@dataclass(slots=True)
class _Batch:
    layouts: Sequence[Layout]
    cursor: Cursor
    groups: list[_Group]
    masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def mask(self, group: _Group, resid: Tensor, *, present: bool) -> Bool[Tensor, "rows pos"]:
        """Which positions of this pass are steered, or with `present` enter a sequence mean."""
        offset = self._offset(group, resid.shape[1])
        key = (group.positions, group.steer_special, present, offset, resid.shape[1])
        if key not in self.masks:
            self.masks = {k: v for k, v in self.masks.items() if k[3:] == key[3:]}
            self.masks[key] = self._make_mask(group, offset, resid.shape[1], present).to(
                resid.device
            )
        return self.masks[key]

    def _offset(self, group: _Group, length: int) -> int:
        if self.cursor.offset is not None:
            if group.mean == "sequence" and self.cursor.offset > 0:
                raise PlanError(
                    'a plan with mean="sequence" needs the whole sequence in every pass, '
                    f"but got an offset of {self.cursor.offset}; run it without a KV cache."
                )
            return self.cursor.offset
        layout = max(self.layouts, key=lambda layout: layout.length)
        everywhere = group.positions == "all" and group.mean == "question"
        leading = next((t for t in range(layout.length) if t not in layout.special), 0)
        if everywhere and (length <= leading or group.steer_special or not layout.special):
            return layout.length
        if length < layout.length and group.mean == "sequence":
            raise PlanError(
                'a plan with mean="sequence" needs the whole sequence in every pass, but got '
                f"{length} tokens of a prompt of {layout.length}; run it without a KV cache."
            )
        if length < layout.length:
            raise PlanError(
                f"a position-limited plan needs the offset of a pass of {length} tokens, shorter "
                f"than its prompt of {layout.length}; give fwd_hooks its offset= (the number of "
                "cached positions) or the prompt= that is run, or run without a KV cache."
            )
        return 0

    def _make_mask(
        self, group: _Group, offset: int, length: int, present: bool
    ) -> Bool[Tensor, "rows pos"]:
        width = self.cursor.width or max(layout.length for layout in self.layouts)
        columns = torch.arange(offset, offset + length)
        rows = []
        for layout in self.layouts:
            position = columns - (width - layout.length)
            row = position >= 0
            if not group.steer_special:
                row &= ~torch.isin(position, torch.tensor(layout.special, dtype=torch.long))
            if not present and group.positions == "prompt":
                row &= position < layout.length - 1
            if not present and group.positions == "completion":
                row &= position >= layout.length - 1
            rows.append(row)
        return torch.stack(rows)


def _at_blocks(
    plans: Sequence[Plan | None], layouts: Sequence[Layout], cursor: Cursor
) -> dict[int, AtBlock]:
    batch = _Batch(layouts=layouts, cursor=cursor, groups=_groups(plans))
    covered = torch.stack([group.active.any(dim=0) for group in batch.groups]).any(dim=0)
    return {
        layer: partial(_steer, batch, layer) for layer in range(covered.shape[0]) if covered[layer]
    }


def _steer(
    batch: _Batch, layer: int, resid: Float[Tensor, "batch pos d_model"], hook: Any = None
) -> Float[Tensor, "batch pos d_model"]:
    for group in batch.groups:
        if group.tensor.shape[-1] != resid.shape[-1]:
            raise PlanError(
                f"a plan must have the width of the model, but got {group.tensor.shape[-1]} "
                f"for a residual of {resid.shape[-1]}."
            )
        if group.tensor.device != resid.device:
            group.tensor = group.tensor.to(resid.device)
            group.coeffs = group.coeffs.to(resid.device)
            group.active = group.active.to(resid.device)
        mask = batch.mask(group, resid, present=False) & group.active[:, layer, None]
        if group.mean == "question":
            resid = add(resid, group.tensor[:, layer], mask)
        else:
            present = batch.mask(group, resid, present=True)
            resid = mean_shift(resid, group.tensor[:, layer], group.coeffs[:, layer], present, mask)
    return resid


def _groups(plans: Sequence[Plan | None]) -> list[_Group]:
    example = next(plan for plan in plans if plan is not None)
    n_layers, d_model = example.model.n_layers, example.model.d_model
    groups: list[_Group] = []
    for n in range(max(len(plan.steps) for plan in plans if plan is not None)):
        kinds: dict[tuple[str, str, bool], dict[int, Step]] = {}
        for row, plan in enumerate(plans):
            if plan is not None and n < len(plan.steps):
                step = plan.steps[n]
                kinds.setdefault((step.mean, step.positions, step.steer_special), {})[row] = step
        for (mean, positions, steer_special), steps in kinds.items():
            dtype = next(iter(steps.values())).deltas.base.dtype
            tensor = torch.zeros((len(plans), n_layers, d_model), dtype=dtype)
            coeffs = torch.zeros((len(plans), n_layers), dtype=dtype)
            active = torch.zeros((len(plans), n_layers), dtype=torch.bool)
            for row, step in steps.items():
                tensor[row] = step.shift if mean == "question" else step.deltas.reference
                coeffs[row] = step.layer_coeffs
                active[row] = step.layers
            groups.append(_Group(mean, positions, steer_special, tensor, coeffs, active))
    return groups

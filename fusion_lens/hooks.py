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
from fusion_lens.executors import as_hook, hooked
from fusion_lens.identity import identify
from fusion_lens.lean import AtSite
from fusion_lens.models import (
    HookedModel,
    Place,
    attn_z,
    check_hook_names,
    resid_post,
    site_hook,
)
from fusion_lens.moves import Group, Kind, Moves
from fusion_lens.plans import Plan
from fusion_lens.prompts import NO_PROMPT, Layout, Prompt
from fusion_lens.steps import steered_mask

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
        PlanError: if the plan belongs to another model, was fitted on many texts and no prompt is
            given, or acts at "mlp_out" and no model is given;
            from the hook, if a pass is shorter than the prompt and no offset tells where it stands,
            or if the activation has another width.
        HookNameError: if the model given lacks a hook.
    """
    if model is not None:
        plan.check(identify(model))
    if isinstance(prompt, Prompt):
        prompt = prompt.layout
    layouts = [plan.layout if prompt is None else prompt]
    if NO_PROMPT in layouts:
        raise PlanError(
            "a plan that was fitted on many texts must be told what it runs on, but got no prompt; "
            "give fwd_hooks or steering its prompt=."
        )
    at = _at_sites([plan], layouts, Cursor(offset))
    hooks = [(_hook_name(place, model), as_hook(act)) for place, act in at.items()]
    if model is not None:
        check_hook_names(model, [name for name, _ in hooks])
    return hooks


def batch_steering(
    plans: Sequence[Plan | None], layouts: Sequence[Layout], cursor: Cursor
) -> dict[Place, AtSite]:
    """What a left-padded batch does at each site and layer if every row has its own plan, or
    none."""
    return _at_sites(plans, layouts, cursor) if any(plan is not None for plan in plans) else {}


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
class _Batch:
    layouts: Sequence[Layout]
    cursor: Cursor
    groups: list[Group]
    masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def mask(self, kind: Kind, resid: Tensor, *, present: bool) -> Bool[Tensor, "rows pos"]:
        """Which positions of this pass are steered, or with `present` enter a sequence mean."""
        offset = self._offset(kind, resid.shape[1])
        device, shape = resid.device, (offset, resid.shape[1])
        key = (kind.positions, kind.steer_special, present, device, shape)
        if key not in self.masks:
            self.masks = {k: v for k, v in self.masks.items() if k[-1] == shape}
            self.masks[key] = self._make_mask(kind, *shape, present).to(device)
        return self.masks[key]

    def _offset(self, kind: Kind, length: int) -> int:
        if self.cursor.offset is not None:
            if kind.needs_sequence and self.cursor.offset > 0:
                raise PlanError(
                    'a plan with mean="sequence" needs the whole sequence in every pass, '
                    f"but got an offset of {self.cursor.offset}; run it without a KV cache."
                )
            return self.cursor.offset
        layout = max(self.layouts, key=lambda layout: layout.length)
        everywhere = kind.positions == "all" and not kind.needs_sequence
        leading = next((t for t in range(layout.length) if t not in layout.special), 0)
        if everywhere and (length <= leading or kind.steer_special or not layout.special):
            return layout.length
        if length < layout.length and kind.needs_sequence:
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
        self, kind: Kind, offset: int, length: int, present: bool
    ) -> Bool[Tensor, "rows pos"]:
        width = self.cursor.width or max(layout.length for layout in self.layouts)
        columns = torch.arange(offset, offset + length)
        positions = "all" if present else kind.positions
        rows = []
        for layout in self.layouts:
            at = columns - (width - layout.length)
            rows.append(steered_mask(positions, kind.steer_special, layout, at))
        return torch.stack(rows)


def _at_sites(
    plans: Sequence[Plan | None], layouts: Sequence[Layout], cursor: Cursor
) -> dict[Place, AtSite]:
    n_layers = next(plan.model.n_layers for plan in plans if plan is not None)
    moves = Moves(len(plans), n_layers, torch.device("cpu"))
    for row, plan in enumerate(plans):
        moves.seat(row, plan)
    batch = _Batch(layouts=layouts, cursor=cursor, groups=moves.groups)
    return {place: partial(_steer, batch, place) for place in moves.places}


def _steer(
    batch: _Batch, place: Place, x: Float[Tensor, "batch pos width"]
) -> Float[Tensor, "batch pos width"]:
    site, layer = place
    for group in batch.groups:
        if group.kind.site == site:
            mask = batch.mask(group.kind, x, present=False)
            present = batch.mask(group.kind, x, present=True) if group.kind.needs_sequence else None
            x = group.steer(layer, x, mask, present)
    return x


def _hook_name(place: Place, model: HookedModel | None) -> str:
    site, layer = place
    if model is not None:
        return site_hook(model, site, layer)
    if site == "mlp_out":
        raise PlanError(
            "a plan that acts at mlp_out must be given the model to know the hook's name, which "
            "TransformerBridge and HookedTransformer spell differently; give fwd_hooks its model=."
        )
    return resid_post(layer) if site == "resid_post" else attn_z(layer)

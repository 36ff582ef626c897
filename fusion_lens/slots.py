"""Rows through a fixed number of slots of the lean module: a finished row's slot takes the next.

A row's prompt is read in a pass of its own, which gives its first new token (`fill`); every later
pass feeds one token to all slots (`step`). Both have fixed shapes, so a row's numbers do not depend
on its neighbours, its slot, or when it began. Transformers' `StaticCache` keeps one length for all
rows; the cache here keeps one for each, from position 0 of its slot.

The last position of a filling pass and all of the others' are of a plan's kind "completion", the
rest "prompt". Plans of steps that add a constant shift therefore become one tensor
"slot layer d_model" for each kind. All other plans keep their steps (`moves`): a row without such a
plan passes them unchanged, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from fusion_lens.activations import left_padded, padded_length
from fusion_lens.decoding import Completion, GenerationConfig, Row, Tape
from fusion_lens.engine_log import out_of_memory
from fusion_lens.executors import LeanModule, close, probe_steering, probe_tokens
from fusion_lens.hooks import Cursor, batch_steering
from fusion_lens.lean import AtSite, Lean, all_attend, attention_masks
from fusion_lens.models import HookedModel, KeyValues, Place, decode, stop_tokens
from fusion_lens.moves import Moves
from fusion_lens.plans import Plan
from fusion_lens.steps import AFTER_PROMPT

_STEPS = 8
_LEAST_FILLED = 4


def write_in_slots(
    model: HookedModel, lean: Lean, rows: Sequence[Row], config: GenerationConfig
) -> Iterator[tuple[int, Completion]]:
    """Write all rows; gives (place in `rows`, completion) as they finish.

    `config.slots` and `config.cache_length` must be numbers. No row may need the whole sequence.
    """
    slots = Slots(model, lean, config)
    # long prompts last: a refill is rarer where it costs more
    waiting = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt.tokens), reverse=True)
    seats: dict[int, int] = {}
    steps = 1 if lean.device.type == "cpu" else _STEPS  # to ask a device whether rows ended stalls
    while waiting or seats:
        free = [slot for slot in range(slots.n_slots) if slot not in seats]
        while taken := _next_filling(waiting, rows, len(free), slots.n_filled, bool(seats)):
            slots.fill(free[: len(taken)], [rows[i] for i in taken])
            seats |= dict(zip(free, taken, strict=False))
            del waiting[-len(taken) :], free[: len(taken)]
        for _ in range(steps):
            slots.step()
        going = slots.tape.going.tolist()
        for slot in [slot for slot in seats if not going[slot]]:
            yield seats.pop(slot), slots.tape.completion(slot, partial(decode, model))


def slots_fit(model: HookedModel, lean: Lean) -> bool:
    """Whether the module computes with slots what it computes on a padded batch; tried once.

    A module with an attention of its own may take the end of the cache for the position.
    """
    if lean.slots_fit is None:
        try:
            lean.slots_fit = _try_slots(model, lean) and all_attend(lean, int(model.cfg.n_layers))
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            if out_of_memory(error):
                raise
            lean.slots_fit = False
    return lean.slots_fit


class Slots:
    """The slots' tensors, changed in place by `fill` and `step`."""

    def __init__(self, model: HookedModel, lean: Lean, config: GenerationConfig) -> None:
        assert config.slots is not None
        assert config.cache_length is not None
        self.n_slots = config.slots
        self.n_filled = min(config.slots, max(_LEAST_FILLED, config.slots // 4))
        """Rows of one filling pass: many make it cheap, few keep slots from waiting for others."""
        n_layers, d_model = int(model.cfg.n_layers), int(model.cfg.d_model)
        device = lean.device
        place = _Place(config.slots, config.cache_length, device)
        self._lean = lean
        self._passes = _Passes(lean, _cache(n_layers, place))
        self.tape = Tape.blank(config.slots, config, stop_tokens(model), device)
        self._token = torch.zeros(config.slots, dtype=torch.long, device=device)
        self._position = torch.zeros(config.slots, dtype=torch.long, device=device)
        wide = torch.promote_types(lean.dtype, torch.float32)
        self._none = torch.zeros((n_layers, d_model), dtype=wide)
        self._shift = torch.zeros((config.slots, n_layers, d_model), dtype=wide, device=device)
        self._steered = False
        self._everywhere = torch.ones((config.slots, 1), dtype=torch.bool, device=device)
        self._moves = Moves(config.slots, n_layers, device)
        self.at: dict[Place, AtSite] = {}
        """What is done in every pass but a filling one."""

    def fill(self, slots: Sequence[int], rows: Sequence[Row]) -> None:
        """Seat these rows: read their prompts and choose their first tokens."""
        # an earlier row's NaN would spread: 0 * NaN is NaN, behind a mask too
        finite = self.tape.finite.tolist()
        self._passes.clear([slot for slot in slots if not finite[slot]])
        prompts = [row.prompt.tokens for row in rows]
        index = torch.tensor(slots, device=self._token.device)
        tokens, mask = left_padded(
            [*prompts, *[prompts[0][-1:]] * (self.n_filled - len(rows))],
            0,
            index.device,
            width=padded_length(max(map(len, prompts))),
        )
        with self._lean.at_sites(self._steer_prompts(rows, mask)):
            first = self._passes.fill(slots, tokens, mask)
        for slot, row in zip(slots, rows, strict=True):
            self._shift[slot] = self._shift_of(row.plan, "completion")
            self._steered |= row.plan is not None and row.plan.is_constant
            self._moves.seat(slot, None if _is_constant(row.plan) else row.plan)
        self.at = self._steer_steps()
        self._position[index] = mask[: len(rows)].sum(dim=-1)
        self.tape.start(slots, rows)
        logits = first.new_zeros((self.n_slots, first.shape[-1]))
        begun = torch.zeros_like(self.tape.going)
        begun[index] = True
        self._choose(logits.index_copy_(0, index, first[: len(rows)]), begun)

    def step(self) -> None:
        """Feed every slot its token and choose the next; finished slots stand still."""
        with self._lean.at_sites(self.at):
            logits = self._passes.step(self._token, self._position)
        self._choose(logits)
        self._position += self.tape.going

    def _choose(
        self, logits: Float[Tensor, "slot d_vocab"], of: Bool[Tensor, " slot"] | None = None
    ) -> None:
        chosen = self.tape.step(logits, of)
        going = self.tape.going if of is None else self.tape.going & of
        self._token.copy_(torch.where(going, chosen, self._token))

    def _add(self, layer: int, resid: Tensor) -> None:
        # rounded once: the sum of a half and a float32 is taken in float32
        resid.add_(self._shift[:, layer, None])

    def _move(self, place: Place, x: Tensor) -> Tensor:
        site, layer = place
        for group in self._moves.groups:
            if group.kind.site == site and group.kind.positions in AFTER_PROMPT:
                x = group.steer(layer, x, self._everywhere)
        return x

    def _steer_steps(self) -> dict[Place, AtSite]:
        """All positions are "completion", and none is a token of the prompt."""
        at: dict[Place, AtSite] = {}
        if self._steered:
            layers = range(self._shift.shape[1])
            at = {("resid_post", layer): partial(self._add, layer) for layer in layers}
        return _then(at, {place: partial(self._move, place) for place in self._moves.places})

    def _steer_prompts(
        self, rows: Sequence[Row], mask: Int[Tensor, "row pos"]
    ) -> dict[Place, AtSite]:
        """All positions of left-padded prompts as "prompt", but the last as "completion"."""
        idle = [Row(rows[0].prompt)] * (self.n_filled - len(rows))
        full = [*rows, *idle]
        others = [None if _is_constant(row.plan) else row.plan for row in full]
        layouts = [row.prompt.layout for row in full]
        moved = batch_steering(others, layouts, Cursor(0, mask.shape[1]))
        return _then(self._add_to_prompts(rows, mask), moved)

    def _add_to_prompts(
        self, rows: Sequence[Row], mask: Int[Tensor, "row pos"]
    ) -> dict[Place, AtSite]:
        if not any(row.plan is not None and row.plan.is_constant for row in rows):
            return {}
        width = mask.shape[1]
        special = torch.zeros(mask.shape, dtype=torch.bool)
        for n, row in enumerate(rows):
            special[n, [width - len(row.prompt.tokens) + t for t in row.prompt.special]] = True
        plans = [*(row.plan for row in rows), *[None] * (self.n_filled - len(rows))]
        ordinary, other = (
            torch.stack([self._shift_of(plan, "prompt", special=kind) for plan in plans])
            for kind in (False, True)
        )
        last = torch.stack(
            [
                self._shift_of(plan, "completion", special=bool(ends))
                for plan, ends in zip(plans, special[:, -1], strict=True)
            ]
        )
        device = self._shift.device
        ordinary, other, last = (shift.to(device) for shift in (ordinary, other, last))
        is_special, is_padding = special[:, :-1, None].to(device), mask[:, :-1, None] == 0

        def add(layer: int, resid: Tensor) -> None:
            shift = torch.where(is_special, other[:, layer, None], ordinary[:, layer, None])
            # padding that overflows would spread to its row: 0 * NaN is NaN, behind a mask too
            resid[:, :-1].add_(shift.masked_fill_(is_padding, 0))
            resid[:, -1].add_(last[:, layer])

        return {("resid_post", layer): partial(add, layer) for layer in range(self._shift.shape[1])}

    def _shift_of(self, plan: Plan | None, position: str, *, special: bool = False) -> Tensor:
        if plan is None or not plan.is_constant:
            return self._none
        return plan.shift_at(position, special=special)


def _is_constant(plan: Plan | None) -> bool:
    return plan is None or plan.is_constant


def _then(first: Mapping[Place, AtSite], second: Mapping[Place, AtSite]) -> dict[Place, AtSite]:
    """Both, where both do something; the first changes its argument in place."""

    def both(place: Place, x: Tensor) -> Tensor | None:
        first[place](x)
        return second[place](x)

    shared = {place: partial(both, place) for place in first.keys() & second.keys()}
    return {**first, **second, **shared}


@dataclass(slots=True, eq=False)
class _Place:
    """Where a pass writes its keys and values: all slots at their own position, or, in a filling
    pass, the first columns of some slots: `moved` says from which columns, padding behind them."""

    n_slots: int
    length: int
    device: torch.device
    position: Int[Tensor, " slot"] | None = None
    filled: Int[Tensor, " filled"] | None = None
    moved: Int[Tensor, "filled pos"] | None = None
    dropped: Bool[Tensor, "filled 1 pos 1"] | None = None
    _index: dict[int, Tensor] = field(default_factory=dict)

    def at(self, position: Int[Tensor, " slot"]) -> None:
        self.filled = None
        self.position, self._index = position, {}

    def fill(self, slots: Sequence[int], mask: Int[Tensor, "row pos"]) -> None:
        self.filled = torch.tensor(slots, device=self.device)
        lengths = mask[: len(slots)].sum(dim=-1, keepdim=True)
        width = mask.shape[1]
        columns = torch.arange(width, device=self.device)
        self.moved = (columns + width - lengths) % width
        self.dropped = (columns >= lengths)[:, None, :, None]

    def index(self, groups: int) -> Int[Tensor, " entry"]:
        """Every slot's position in a flat "slot group pos", for each group."""
        if groups not in self._index:
            assert self.position is not None
            first = torch.arange(self.n_slots * groups, device=self.device) * self.length
            self._index[groups] = (first.view(-1, groups) + self.position[:, None]).flatten()
        return self._index[groups]


class _SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values, "slot group pos d_head"."""

    def __init__(self, place: _Place) -> None:
        super().__init__()
        self._place = place

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = (self._place.n_slots, key_states.shape[1], self._place.length)
        self.keys = key_states.new_zeros((*shape, key_states.shape[-1]))
        self.values = value_states.new_zeros((*shape, value_states.shape[-1]))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        for store, new in ((self.keys, key_states), (self.values, value_states)):
            if self._place.filled is None:
                flat = new.reshape(-1, new.shape[-1])
                store.view(-1, new.shape[-1]).index_copy_(0, self._place.index(new.shape[1]), flat)
            else:
                self._fill(store, new)
        if self._place.filled is not None:
            return key_states, value_states
        return self.keys, self.values

    def _fill(self, store: Tensor, new: Tensor) -> None:
        slots, moved, dropped = self._place.filled, self._place.moved, self._place.dropped
        assert slots is not None
        assert moved is not None
        assert dropped is not None
        new = new[: len(slots)]
        own = new.gather(2, moved[:, None, :, None].expand(new.shape)).masked_fill_(dropped, 0)
        own = own[:, :, : self._place.length]
        store[slots, :, : own.shape[2]] = own

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._place.length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self._place.length

    def get_max_cache_shape(self) -> int:
        # its name in earlier transformers, 5.9 among them
        return self._place.length


@dataclass(frozen=True, slots=True, eq=False)
class _Passes:
    """The two kinds of pass over a slot cache."""

    lean: Lean
    cache: Cache

    def fill(
        self,
        slots: Sequence[int],
        tokens: Int[Tensor, "row pos"],
        mask: Int[Tensor, "row pos"],
    ) -> Float[Tensor, "row d_vocab"]:
        """Read left-padded `tokens` into the first columns of `slots`; rows beyond them are idle.
        Logits of the last position."""
        self._place.fill(slots, mask)
        columns = (mask.cumsum(dim=-1) - 1).masked_fill(mask == 0, -1)
        masks = attention_masks(self.lean, columns, columns)
        return self.lean.forward(tokens, columns.clamp(min=0), masks, cache=self.cache, last=1)[
            :, 0
        ]

    def clear(self, slots: Sequence[int]) -> None:
        """Zero what earlier rows left in these slots."""
        for layer in self.cache.layers if slots else ():
            layer.keys[slots] = 0
            layer.values[slots] = 0

    def step(
        self, token: Int[Tensor, " slot"], position: Int[Tensor, " slot"]
    ) -> Float[Tensor, "slot d_vocab"]:
        """Logits after one more token in every slot."""
        self._place.at(position)
        columns = torch.arange(self._place.length, device=token.device)[None]
        mask = attention_masks(self.lean, position[:, None], columns)
        return self.lean.forward(token[:, None], position[:, None], mask, cache=self.cache, last=1)[
            :, 0
        ]

    @property
    def _place(self) -> _Place:
        layer = self.cache.layers[0]
        assert isinstance(layer, _SlotLayer)
        return layer._place


def _cache(n_layers: int, place: _Place) -> Cache:
    return Cache(layers=[_SlotLayer(place) for _ in range(n_layers)])


def _try_slots(model: HookedModel, lean: Lean) -> bool:
    tokens = probe_tokens(model, lean.device)
    n_layers = int(model.cfg.n_layers)
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    passes = LeanModule(lean)
    with passes.at_blocks(probe_steering(n_layers)):
        expected = passes.forward(tokens, mask, cache=KeyValues(), last=2)
        cache = _cache(n_layers, _Place(2, 8, lean.device))
        fills = _Passes(lean, cache)
        first = [fills.fill([slot], tokens[[slot], :-1], mask[[slot], :-1]) for slot in (0, 1)]
        second = fills.step(tokens[:, -1], mask.sum(dim=-1) - 1)
    return close(torch.stack([torch.cat(first), second], dim=1), expected)


def _next_filling(
    waiting: Sequence[int], rows: Sequence[Row], n_free: int, n_filled: int, busy: bool
) -> list[int]:
    """The next rows to seat, of one padded length; none while a fuller pass can be waited for."""
    if not waiting or not n_free:
        return []
    width = padded_length(len(rows[waiting[-1]].prompt.tokens))
    alike = []
    for i in reversed(waiting[-n_filled:]):
        if padded_length(len(rows[i].prompt.tokens)) != width:
            break
        alike.append(i)
    if busy and n_free < len(alike):
        return []
    return alike[:n_free][::-1]

"""Rows through a fixed number of slots of the lean module: a finished row's slot takes the next.

Every row runs from position 0 of its slot, without padding: its prompt but for the last token is
read in a pass of its own (`fill`), and every later pass feeds one token to all slots (`step`). Both
have fixed shapes, so a row's numbers do not depend on its neighbours, its slot, or when it began.
Transformers' `StaticCache` keeps one length for all rows; the cache here keeps one for each.

The two passes are the two kinds of position of a plan: `fill` sees "prompt", `step` "completion".
Steps that add a constant shift therefore become one tensor "slot layer d_model" for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from fusion_lens.activations import padded_length
from fusion_lens.decoding import Completion, GenerationConfig, Row, Tape
from fusion_lens.engine_log import out_of_memory
from fusion_lens.executors import LeanModule, close, probe_steering, probe_tokens
from fusion_lens.lean import AtBlock, Lean, all_attend, attention_masks
from fusion_lens.models import HookedModel, KeyValues, decode, stop_tokens
from fusion_lens.plans import Plan

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
        self._passes = _Passes(lean, _cache(n_layers, place), int(model.cfg.n_ctx))
        self.tape = Tape.blank(config.slots, config, stop_tokens(model), device)
        self._token = torch.zeros(config.slots, dtype=torch.long, device=device)
        self._position = torch.zeros(config.slots, dtype=torch.long, device=device)
        wide = torch.promote_types(lean.dtype, torch.float32)
        self._none = torch.zeros((n_layers, d_model), dtype=wide)
        self._shift = torch.zeros((config.slots, n_layers, d_model), dtype=wide, device=device)
        self._later: dict[int, Tensor] = {}
        self._steered = False

    def fill(self, slots: Sequence[int], rows: Sequence[Row]) -> None:
        """Seat these rows: read their prompts but for the last token."""
        prompts = [row.prompt for row in rows]
        index = torch.tensor(slots, device=self._token.device)
        read = torch.tensor([len(prompt.tokens) - 1 for prompt in prompts])
        # an earlier row's NaN would spread: 0 * NaN is NaN, behind a mask too
        finite = self.tape.finite.tolist()
        unclean = [slot for slot in slots if not finite[slot]]
        if unclean:
            self._passes.clear(unclean)
        width = padded_length(max(1, int(read.max())))
        tokens = torch.zeros((self.n_filled, width), dtype=torch.long)
        special = torch.zeros((self.n_filled, width), dtype=torch.bool)
        for n, prompt in enumerate(prompts):
            tokens[n, : read[n]] = torch.tensor(prompt.tokens[:-1])
            special[n, [t for t in prompt.special if t < read[n]]] = True
        padding = (
            torch.arange(width)
            >= torch.nn.functional.pad(read, (0, self.n_filled - len(rows)), value=width)[:, None]
        )
        with self._lean.at_blocks(self._steer_prompts(rows, special, padding)):
            self._passes.fill(slots, tokens.to(index.device), read)
        self._token[index] = torch.tensor([p.tokens[-1] for p in prompts], device=index.device)
        self._position[index] = read.to(index.device)
        self._seat_shifts(slots, rows)
        self.tape.start(slots, rows)

    def step(self) -> None:
        """Feed every slot its token and choose the next; finished slots stand still."""
        at: dict[int, AtBlock] = {}
        if self._steered:
            at = {layer: partial(self._add, layer) for layer in range(self._shift.shape[1])}
        with self._lean.at_blocks(at):
            logits = self._passes.step(self._token, self._position)
        chosen = self.tape.step(logits)
        self._token.copy_(torch.where(self.tape.going, chosen, self._token))
        self._position += self.tape.going
        for slot, shift in self._later.items():
            self._shift[slot] = shift
        self._later = {}

    def _add(self, layer: int, resid: Tensor) -> None:
        # rounded once: the sum of a half and a float32 is taken in float32
        resid.add_(self._shift[:, layer, None])

    def _seat_shifts(self, slots: Sequence[int], rows: Sequence[Row]) -> None:
        for slot, row in zip(slots, rows, strict=True):
            ordinary = self._shift_of(row.plan, "completion", special=False)
            self._shift[slot] = ordinary
            if row.plan is not None:
                self._steered = True
                if len(row.prompt.tokens) - 1 in row.prompt.special:
                    self._shift[slot] = self._shift_of(row.plan, "completion", special=True)
                    self._later[slot] = ordinary.to(self._shift.device)

    def _steer_prompts(
        self,
        rows: Sequence[Row],
        special: Bool[Tensor, "row pos"],
        padding: Bool[Tensor, "row pos"],
    ) -> dict[int, AtBlock]:
        if all(row.plan is None for row in rows):
            return {}
        plans = [*(row.plan for row in rows), *[None] * (self.n_filled - len(rows))]
        device = self._shift.device
        by_kind = {
            kind: torch.stack([self._shift_of(plan, "prompt", special=kind) for plan in plans]).to(
                device
            )
            for kind in (False, True)
        }
        is_special, is_padding = special[..., None].to(device), padding[..., None].to(device)

        def add(layer: int, resid: Tensor) -> None:
            ordinary, other = by_kind[False][:, layer, None], by_kind[True][:, layer, None]
            # padding that overflows would spread to its row: 0 * NaN is NaN, behind a mask too
            resid.add_(torch.where(is_special, other, ordinary).masked_fill_(is_padding, 0))

        return {layer: partial(add, layer) for layer in range(self._shift.shape[1])}

    def _shift_of(self, plan: Plan | None, position: str, *, special: bool) -> Tensor:
        return self._none if plan is None else plan.shift_at(position, special=special)


@dataclass(slots=True, eq=False)
class _Place:
    """Where a pass writes its keys and values: all slots at their own position, or, in a filling
    pass, the first columns of some slots; `dropped` is the padding there."""

    n_slots: int
    length: int
    device: torch.device
    position: Int[Tensor, " slot"] | None = None
    filled: Int[Tensor, " filled"] | None = None
    dropped: Bool[Tensor, "filled 1 pos 1"] | None = None
    _index: dict[int, Tensor] = field(default_factory=dict)

    def at(self, position: Int[Tensor, " slot"]) -> None:
        self.filled, self.dropped = None, None
        self.position, self._index = position, {}

    def fill(self, slots: Sequence[int], read: Int[Tensor, " filled"], width: int) -> None:
        self.filled = torch.tensor(slots, device=self.device)
        dropped = torch.arange(min(width, self.length)) >= read[:, None]
        self.dropped = dropped[:, None, :, None].to(self.device)

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
            filled, dropped = self._place.filled, self._place.dropped
            if filled is None or dropped is None:
                flat = new.reshape(-1, new.shape[-1])
                store.view(-1, new.shape[-1]).index_copy_(0, self._place.index(new.shape[1]), flat)
            else:
                own = new[: len(filled), :, : self._place.length]
                store[filled, :, : own.shape[2]] = own.masked_fill(dropped, 0)
        if self._place.filled is not None:
            return key_states, value_states
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._place.length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self._place.length


@dataclass(frozen=True, slots=True, eq=False)
class _Passes:
    """The two kinds of pass over a slot cache."""

    lean: Lean
    cache: Cache
    n_ctx: int = 2**31

    def fill(self, slots: Sequence[int], tokens: Int[Tensor, "row pos"], read: Tensor) -> None:
        """Read `tokens` from position 0 into `slots`; rows beyond them are idle."""
        width = tokens.shape[1]
        self._place.fill(slots, read, width)
        positions = torch.arange(width, device=tokens.device)[None]
        mask = attention_masks(self.lean, positions, positions)
        # a padded position may lie beyond those a model has learnt
        within = positions.clamp(max=self.n_ctx - 1).expand(len(tokens), -1)
        self.lean.forward(tokens, within, mask, cache=self.cache, last=1)

    def clear(self, slots: Sequence[int]) -> None:
        """Zero what earlier rows left in these slots."""
        for layer in self.cache.layers:
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
        fills, steps = _Passes(lean, cache), []
        for slot, start in ((0, 2), (1, 0)):
            own = tokens[slot : slot + 1, start:-2]
            fills.fill([slot], own, torch.tensor([own.shape[1]]))
        position = mask.sum(dim=-1) - 2
        for step in (-2, -1):
            steps.append(fills.step(tokens[:, step], position))
            position += 1
    return close(torch.stack(steps, dim=1), expected)


def _next_filling(
    waiting: Sequence[int], rows: Sequence[Row], n_free: int, n_filled: int, busy: bool
) -> list[int]:
    """The next rows to seat, of one padded length; none while a fuller pass can be waited for."""
    if not waiting or not n_free:
        return []
    width = padded_length(len(rows[waiting[-1]].prompt.tokens) - 1)
    alike = []
    for i in reversed(waiting[-n_filled:]):
        if padded_length(len(rows[i].prompt.tokens) - 1) != width:
            break
        alike.append(i)
    if busy and n_free < len(alike):
        return []
    return alike[:n_free][::-1]

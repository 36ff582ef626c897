"""How likely a model finds completions, given their prompts: teacher-forced, in fixed shapes.

All trials of a question continue the same prompt. The lean module reads every distinct prompt once
and goes on from its keys and values for each of the completions; hook points read whole texts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusion_lens.activations import at_least_float32, left_padded, padded_length, same_shape
from fusion_lens.decoding import Completion
from fusion_lens.engine_log import EngineLog
from fusion_lens.executors import Executor, LeanModule, executor_of
from fusion_lens.models import HookedModel, KeyValues, evaluating
from fusion_lens.prompts import Prompt

_LOGITS_AT_ONCE = 2**27
_MULTIPLE_KEPT = 16
_ROWS = 16
_BATCHES_OF_PREFIXES = 4


def completion_nll(
    model: HookedModel,
    texts: Sequence[tuple[Prompt, Completion]],
    *,
    batch_size: int | None = None,
    executor: str = "auto",
    log: EngineLog | None = None,
) -> list[float | None]:
    """Nats per completion token under the unsteered model; None for a value that is not finite, or
    of a completion without tokens.

    Every pass has `batch_size` rows (half of them where prompts are read), idle ones among
    them, and lengths that depend on the text alone: with a number given, a text's value does not
    depend on the others. None: as many as there are, 16 at most. Fewer where so many texts of one
    length had logits that fill the memory.
    """
    log = log or EngineLog()
    run, reason = executor_of(model, executor)
    log.fell_back(reason)
    values: dict[int, float | None] = {
        i: None for i, (_, completion) in enumerate(texts) if not completion.tokens
    }

    def score(n_rows: int) -> None:
        left = [i for i in range(len(texts)) if i not in values]
        halves = [_split(run, *texts[i]) for i in left]
        most = _LOGITS_AT_ONCE // int(model.cfg.d_vocab)
        for place, total in _losses(run, halves, n_rows, most):
            mean = total / halves[place].n_scored
            values[left[place]] = mean if math.isfinite(mean) else None

    with evaluating(model):
        log.halving(batch_size or max(1, min(len(texts), _ROWS)), score)
    return [values[i] for i in range(len(texts))]


@dataclass(frozen=True, slots=True)
class _Text:
    """A text in two: what is read once for all texts that begin with it, and the rest, of which
    the last `n_scored` tokens are scored. Both widths are padded, from the text alone."""

    prefix: tuple[int, ...]
    rest: tuple[int, ...]
    n_scored: int
    multiple: int

    @property
    def prefix_width(self) -> int:
        return padded_length(len(self.prefix), self.multiple)

    @property
    def width(self) -> int:
        """Of what goes in to score the rest: all but its last token."""
        return padded_length(len(self.rest) - 1, self.multiple)

    @property
    def kept(self) -> int:
        """Positions whose logits are needed."""
        return min(self.width, padded_length(self.n_scored, _MULTIPLE_KEPT))


def _split(run: Executor, prompt: Prompt, completion: Completion) -> _Text:
    cut = len(prompt.tokens) - 1 if isinstance(run, LeanModule) else 0
    text = prompt.tokens + completion.tokens
    return _Text(text[:cut], text[cut:], len(completion.tokens), run.multiple)


def _losses(
    run: Executor, texts: Sequence[_Text], n_rows: int, most_kept: int
) -> Iterator[tuple[int, float]]:
    """(place in `texts`, nats of its scored tokens); passes keep the logits of `most_kept`
    positions at most."""
    starts = list(dict.fromkeys(text.prefix for text in texts))
    owned: dict[tuple[int, ...], list[int]] = {start: [] for start in starts}
    for place, text in enumerate(texts):
        owned[text.prefix].append(place)
    widths = [padded_length(len(start), run.multiple) for start in starts]
    for group in same_shape(widths, lambda _: _BATCHES_OF_PREFIXES * n_rows):
        begun = _Begun.read(run, [starts[i] for i in group], max(1, n_rows // 2))
        members = [(row, place) for row, i in enumerate(group) for place in owned[starts[i]]]
        shapes = [(texts[place].width, texts[place].kept) for _, place in members]

        def affordable(shape: tuple[int, int]) -> int:
            return max(1, min(n_rows, most_kept // shape[1]))

        for batch in same_shape(shapes, affordable):
            some = [members[n] for n in batch]
            full = some + [some[0]] * (affordable(shapes[batch[0]]) - len(some))
            totals = _score(run, begun, [(row, texts[place]) for row, place in full])
            yield from zip((place for _, place in some), totals.tolist(), strict=False)


@dataclass(frozen=True, slots=True, eq=False)
class _Begun:
    """Prefixes of one padded length that have been read. `store`: a transformers cache; None: the
    prefixes are empty."""

    mask: Int[Tensor, "prefix pos"]
    store: Any = None

    @staticmethod
    def read(run: Executor, starts: Sequence[tuple[int, ...]], n_rows: int) -> _Begun:
        """Read them, `n_rows` at a time."""
        if not starts[0]:
            return _Begun(torch.zeros((len(starts), 0), dtype=torch.long, device=run.device))
        width = padded_length(len(starts[0]), run.multiple)
        masks, stores = [], []
        for first in range(0, len(starts), n_rows):
            some = list(starts[first : first + n_rows])
            full = some + [some[0]] * (n_rows - len(some))
            tokens, mask = left_padded(full, 0, run.device, width=width)
            cache = KeyValues()
            run.forward(tokens, mask, cache=cache, last=1)
            masks.append(mask)
            stores.append(cache.store)
        for layer, *others in zip(*(store.layers for store in stores), strict=True):
            layer.keys = torch.cat([layer.keys, *(other.keys for other in others)])
            layer.values = torch.cat([layer.values, *(other.values for other in others)])
        return _Begun(torch.cat(masks), stores[0])

    def rows(self, index: Int[Tensor, " row"]) -> KeyValues | None:
        """A cache to go on from, of these prefixes."""
        if self.store is None:
            return None
        store = copy.copy(self.store)
        store.layers = [copy.copy(layer) for layer in store.layers]
        store.batch_select_indices(index)
        return KeyValues(store)


def _score(
    run: Executor, begun: _Begun, rows: Sequence[tuple[int, _Text]]
) -> Float[Tensor, " row"]:
    width, kept = rows[0][1].width, rows[0][1].kept
    index = torch.tensor([row for row, _ in rows], device=run.device)
    tokens, mask = left_padded([text.rest for _, text in rows], 0, run.device, width=width + 1)
    scored = torch.tensor([text.n_scored for _, text in rows], device=run.device)
    seen = torch.cat([begun.mask[index], mask[:, :-1]], dim=1)
    logits = at_least_float32(run.forward(tokens[:, :-1], seen, cache=begun.rows(index), last=kept))
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, -kept:].flatten(), reduction="none"
    ).view(len(rows), -1)
    counted = torch.arange(kept, device=run.device) >= kept - scored[:, None]
    return torch.where(counted, losses, torch.zeros_like(losses)).sum(dim=-1)

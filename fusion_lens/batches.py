"""Rows in fixed, left-padded batches, for what slots cannot do.

A plan with a sequence mean needs the whole sequence in every pass; hook points and some modules
have no cache of ours. Every batch has the same number of rows (idle ones among them) and a padded
length that depends on the row's own prompt alone, and keeps its shape until all its rows have
ended: so a row's numbers do not depend on its neighbours here either. Without a cache every pass
has a row's whole text, and fewer rows fill it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from fusion_lens.activations import left_padded, padded_length, same_shape
from fusion_lens.decoding import Completion, GenerationConfig, Row, Tape
from fusion_lens.executors import Executor
from fusion_lens.hooks import Cursor, batch_steering
from fusion_lens.models import HookedModel, KeyValues, decode, stop_tokens

_ROWS_UNCACHED = 16


def write_in_batches(
    model: HookedModel, executor: Executor, rows: Sequence[Row], config: GenerationConfig
) -> Iterator[tuple[int, Completion]]:
    """Write all rows; gives (place in `rows`, completion) batch by batch.

    `config.slots` must be a number: the rows of a batch with a cache, and at most those of one
    without.
    """
    assert config.slots is not None
    cached_rows = config.slots
    room = int(model.cfg.n_ctx) - config.max_new_tokens

    def kind(row: Row) -> tuple[bool, int]:
        # a single sequence mean would take the cache from all its neighbours
        length = padded_length(len(row.prompt.tokens), executor.multiple)
        return row.needs_sequence, min(length, room)

    kinds = [kind(row) for row in rows]

    def is_cached(kind: tuple[bool, int]) -> bool:
        return config.use_cache and not kind[0]

    def n_rows(kind: tuple[bool, int]) -> int:
        return cached_rows if is_cached(kind) else min(cached_rows, _ROWS_UNCACHED)

    for batch in same_shape(kinds, n_rows):
        alike = kinds[batch[0]]
        own = replace(config, slots=n_rows(alike))
        cache = KeyValues() if is_cached(alike) else None
        written = _write(model, executor, [rows[i] for i in batch], own, cache, alike[1])
        yield from zip(batch, written, strict=True)


def _write(
    model: HookedModel,
    executor: Executor,
    rows: Sequence[Row],
    config: GenerationConfig,
    cache: KeyValues | None,
    width: int,
) -> list[Completion]:
    assert config.slots is not None
    full = [*rows, *[Row(rows[0].prompt)] * (config.slots - len(rows))]
    tokens, mask = left_padded([row.prompt.tokens for row in full], 0, executor.device, width=width)
    tape = Tape.blank(config.slots, config, stop_tokens(model), executor.device)
    tape.start(range(len(rows)), rows)
    cursor = Cursor(0, width)
    plans, layouts = [row.plan for row in full], [row.prompt.layout for row in full]
    with executor.at_sites(batch_steering(plans, layouts, cursor)):
        for step in range(config.max_new_tokens):
            cursor.offset = tokens.shape[1] - 1 if cache is not None and step else 0
            logits = executor.forward(tokens[:, cursor.offset :], mask, cache=cache, last=1)
            chosen = tape.step(logits[:, 0])
            if not bool(tape.going.any()):
                break
            tokens = torch.cat([tokens, chosen[:, None]], dim=1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return [tape.completion(i, partial(decode, model)) for i in range(len(rows))]

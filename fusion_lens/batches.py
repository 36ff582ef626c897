"""Rows in fixed, left-padded batches, for what slots cannot do.

A plan with a sequence mean needs the whole sequence in every pass; hook points and some modules
have no cache of ours. Every batch has the same number of rows (idle ones among them) and a padded
length that depends on the row's own prompt alone, and keeps its shape until all its rows have
ended: so a row's numbers do not depend on its neighbours here either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby

import torch

from fusion_lens.activations import left_padded, padded_length
from fusion_lens.decoding import Completion, GenerationConfig, Row, Tape
from fusion_lens.executors import Executor
from fusion_lens.hooks import Cursor, batch_steering
from fusion_lens.models import HookedModel, KeyValues, decode, stop_tokens


def write_in_batches(
    model: HookedModel, executor: Executor, rows: Sequence[Row], config: GenerationConfig
) -> Iterator[tuple[int, Completion]]:
    """Write all rows; gives (place in `rows`, completion) batch by batch.

    `config.slots` must be a number: the rows of a batch.
    """
    assert config.slots is not None

    room = int(model.cfg.n_ctx) - config.max_new_tokens

    def kind(i: int) -> tuple[bool, int]:
        # a single sequence mean would take the cache from all its neighbours
        return rows[i].needs_sequence, min(
            padded_length(len(rows[i].prompt.tokens), executor.multiple), room
        )

    for (uncached, width), alike in groupby(sorted(range(len(rows)), key=kind), key=kind):
        places = list(alike)
        for start in range(0, len(places), config.slots):
            batch = places[start : start + config.slots]
            cache = KeyValues() if config.use_cache and not uncached else None
            written = _write(model, executor, [rows[i] for i in batch], config, cache, width)
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
    device = next(iter(model.parameters())).device
    idle = [Row(rows[0].prompt)] * (config.slots - len(rows))
    layouts = [row.prompt.layout for row in (*rows, *idle)]
    tokens, mask = left_padded([r.prompt.tokens for r in (*rows, *idle)], 0, device, width=width)
    tape = Tape.blank(config.slots, config, stop_tokens(model), device)
    tape.start(range(len(rows)), rows)
    cursor = Cursor(0, width)
    plans = [*(row.plan for row in rows), *(row.plan for row in idle)]
    with executor.at_blocks(batch_steering(plans, layouts, cursor)):
        for step in range(config.max_new_tokens):
            cursor.offset = tokens.shape[1] - 1 if cache is not None and step else 0
            logits = executor.forward(tokens[:, cursor.offset :], mask, cache=cache, last=1)
            chosen = tape.step(logits[:, 0])
            if not bool(tape.going.any()):
                break
            tokens = torch.cat([tokens, chosen[:, None]], dim=1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return [tape.completion(i, partial(decode, model)) for i in range(len(rows))]

"""Rows of (prompt, plan) -> completions, thousands at once, each steered by its own plan.

Rows run through the slots of the lean module (`slots`) where model and plan allow it, in fixed
batches otherwise (`batches`), and through hook points where the model cannot be shared. What ran
where is counted in an `EngineLog`. `Completion.text` never holds the prompt.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from fusion_lens.activations import padded_length
from fusion_lens.batches import write_in_batches
from fusion_lens.decoding import Completion as Completion
from fusion_lens.decoding import GenerationConfig as GenerationConfig
from fusion_lens.decoding import Row as Row
from fusion_lens.engine_log import EngineLog
from fusion_lens.errors import ContextLengthError
from fusion_lens.executors import Executor, LeanModule, executor_of
from fusion_lens.identity import identify
from fusion_lens.models import HookedModel, evaluating
from fusion_lens.prompts import Prompt

MOST_SLOTS = {"cpu": 256, "cuda": 256}


def generate(
    model: HookedModel,
    rows: Sequence[Row],
    config: GenerationConfig | None = None,
    *,
    progress: Callable[[int], None] | None = None,
    log: EngineLog | None = None,
) -> list[Completion]:
    """Write a completion for every row, in the order of the rows.

    `progress` is called with the number of rows finished so far whenever some have. Out of memory
    halves the slots, which `log` remembers, and goes on.

    Raises:
        PlanError: if a plan belongs to another model.
        ContextLengthError: if prompt + completion exceed the context, or `cache_length`.
        UnfitModelError: if `config.executor` is "lean" and the model has no lean module.
    """
    config = config or GenerationConfig()
    log = log or EngineLog()
    if not rows:
        return []
    check_rows(model, rows, config)
    config = with_shape(model, [row.prompt for row in rows], config, n_rows=len(rows))
    done: dict[int, Completion] = {}

    def write(slots: int) -> None:
        left = [i for i in range(len(rows)) if i not in done]
        some = replace(config, slots=slots)
        for place, completion in _write(model, [rows[i] for i in left], some, log):
            done[left[place]] = completion
            if progress is not None:
                progress(len(done))

    with evaluating(model):
        log.halving(config.slots or len(rows), write)
    return [done[i] for i in range(len(rows))]


def with_shape(
    model: HookedModel,
    prompts: Sequence[Prompt],
    config: GenerationConfig,
    *,
    n_rows: int | None = None,
) -> GenerationConfig:
    """The config with numbers for `slots` and `cache_length`, from these prompts, the number of
    rows at most, and the size of the device: never from its free memory.

    Prompts that do not fit the context are left out of account.
    """
    n_ctx = int(model.cfg.n_ctx)
    lengths = [len(prompt.tokens) + config.max_new_tokens for prompt in prompts]
    longest = max((length for length in lengths if length <= n_ctx), default=n_ctx)
    cache_length = config.cache_length or padded_length(longest)
    slots = config.slots
    if slots is None:
        device = next(iter(model.parameters())).device
        slots = MOST_SLOTS.get(device.type, 64)
        while slots > 1 and slots * _bytes_of_slot(model, cache_length) > _memory(device) // 4:
            slots //= 2
        slots = min(slots, n_rows or slots)
    return replace(config, slots=slots, cache_length=cache_length)


def check_rows(model: HookedModel, rows: Sequence[Row], config: GenerationConfig) -> None:
    """Refuse plans of another model and prompts that leave no room, before anything runs.

    Raises:
        PlanError: if a plan belongs to another model.
        ContextLengthError: if prompt + completion exceed the context, or `cache_length`.
    """
    plans = {id(row.plan): row.plan for row in rows if row.plan is not None}
    if plans:
        identity = identify(model)
        for plan in plans.values():
            plan.check(identity)
    for row in rows:
        check_context(model, row.prompt, config.max_new_tokens, config.cache_length)


def check_context(
    model: HookedModel, prompt: Prompt, max_new_tokens: int, cache_length: int | None = None
) -> None:
    """Make sure a prompt leaves room for its completion.

    Raises:
        ContextLengthError: if it does not.
    """
    n_ctx = int(model.cfg.n_ctx)
    if len(prompt.tokens) + max_new_tokens > n_ctx:
        raise ContextLengthError(len(prompt.tokens), max_new_tokens, n_ctx)
    if cache_length is not None and len(prompt.tokens) + max_new_tokens > cache_length:
        raise ContextLengthError(
            len(prompt.tokens), max_new_tokens, cache_length, limit="cache_length"
        )


def _write(
    model: HookedModel, rows: Sequence[Row], config: GenerationConfig, log: EngineLog
) -> Iterator[tuple[int, Completion]]:
    sites = [frozenset[str]() if row.plan is None else row.plan.sites for row in rows]
    by_executor: dict[str, tuple[Executor, list[int]]] = {}
    for alike in dict.fromkeys(sites):
        # a row that needs hook points takes the lean module from no other
        executor, reason = executor_of(model, config.executor, alike)
        log.fell_back(reason)
        _, places = by_executor.setdefault(executor.name, (executor, []))
        places += [i for i, own in enumerate(sites) if own == alike]
    for executor, places in by_executor.values():
        places.sort()
        some = [rows[i] for i in places]
        for place, completion in _write_alike(model, executor, some, config):
            log.rows[executor.name] += 1
            yield places[place], completion


def _write_alike(
    model: HookedModel, executor: Executor, rows: Sequence[Row], config: GenerationConfig
) -> Iterator[tuple[int, Completion]]:
    seated = []
    if isinstance(executor, LeanModule) and config.use_cache:
        # transformers takes seconds to import, and a plain import of the package must not
        from fusion_lens.slots import slots_fit, write_in_slots

        if slots_fit(model, executor.lean):
            seated = [i for i, row in enumerate(rows) if not row.needs_sequence]
            some = [rows[i] for i in seated]
            for place, completion in write_in_slots(model, executor.lean, some, config):
                yield seated[place], completion
    others = sorted(set(range(len(rows))).difference(seated))
    for place, completion in write_in_batches(model, executor, [rows[i] for i in others], config):
        yield others[place], completion


def _bytes_of_slot(model: HookedModel, cache_length: int) -> int:
    """Keys, values and a few activations of one row: an estimate from above."""
    size = next(iter(model.parameters())).element_size()
    kept = 2 * int(model.cfg.n_layers) * cache_length * int(model.cfg.d_model)
    return size * (kept + 4 * int(model.cfg.d_vocab))


def _memory(device: torch.device) -> int:
    """The device's whole memory in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

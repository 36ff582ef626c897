"""Rows of (prompt, plan) -> completions, many rows at once, each steered by its own plan.

Rows are sorted by prompt length, left-padded, masked and KV cached; a batch keeps its shape to its
end, so that a row's numbers do not depend on which neighbour finished first. Rows with a sequence
mean are run without a cache. `Completion.text` never holds the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusion_lens.activations import left_padded
from fusion_lens.errors import ConfigError, ContextLengthError
from fusion_lens.hooks import Cursor, batch_hooks, hooked
from fusion_lens.models import (
    HookedModel,
    KeyValues,
    evaluating,
    forward,
    identify,
    stop_tokens,
)
from fusion_lens.plans import Plan
from fusion_lens.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Row:
    """One text to write: a prompt, the plan that steers it (None: unsteered), and the seed of its
    samples."""

    prompt: Prompt
    plan: Plan | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"0 <= seed < 2**63 must hold, but got {self.seed}.")


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """How to decode. Temperature 0 is greedy; above it, each row draws from a generator of its own
    seed."""

    max_new_tokens: int = 48
    temperature: float = 0.0
    batch_size: int = 128
    use_cache: bool = True

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise ConfigError(
                "max_new_tokens and batch_size must be at least 1, "
                f"but got ({self.max_new_tokens=}, {self.batch_size=})."
            )
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature must be 0 or above, but got {self.temperature}.")


@dataclass(frozen=True, slots=True)
class Completion:
    """What a row wrote: text without prompt, stop token and special tokens.

    `tokens` hold the stop token, if the row `ended`. Not `finite`: a step's logits held NaN or
    infinity, so the text means nothing.
    """

    text: str
    tokens: tuple[int, ...] = field(repr=False)
    ended: bool
    finite: bool = True


def generate(
    model: HookedModel,
    rows: Sequence[Row],
    config: GenerationConfig | None = None,
    *,
    progress: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Write a completion for every row, in the order of the rows.

    `progress` is called with the number of rows finished so far after each batch.

    Raises:
        PlanError: if a plan belongs to another model.
        ContextLengthError: if prompt + completion exceed the context.
    """
    config = config or GenerationConfig()
    check_rows(model, rows, config)
    # one kind of plan a batch: a single sequence mean would take the cache from all its neighbours
    order = sorted(range(len(rows)), key=lambda i: (_uncached(rows[i]), len(rows[i].prompt.tokens)))
    done: dict[int, Completion] = {}
    with evaluating(model):
        while len(done) < len(rows):
            kind = _uncached(rows[order[len(done)]])
            batch = [
                i
                for i in order[len(done) : len(done) + config.batch_size]
                if _uncached(rows[i]) == kind
            ]
            cached = config.use_cache and not kind
            written = _run_batch(model, [rows[i] for i in batch], config, cached)
            done.update(zip(batch, written, strict=True))
            if progress is not None:
                progress(len(done))
    return [done[i] for i in range(len(rows))]


def check_rows(model: HookedModel, rows: Sequence[Row], config: GenerationConfig) -> None:
    """Refuse plans of another model and prompts that leave no room, before anything runs.

    Raises:
        PlanError: if a plan belongs to another model.
        ContextLengthError: if prompt + completion exceed the context.
    """
    plans = {id(row.plan): row.plan for row in rows if row.plan is not None}
    if plans:
        identity = identify(model)
        for plan in plans.values():
            plan.check(identity)
    for row in rows:
        check_context(model, row.prompt, config.max_new_tokens)


def check_context(model: HookedModel, prompt: Prompt, max_new_tokens: int) -> None:
    """Make sure a prompt leaves room for its completion.

    Raises:
        ContextLengthError: if it does not.
    """
    if len(prompt.tokens) + max_new_tokens > model.cfg.n_ctx:
        raise ContextLengthError(len(prompt.tokens), max_new_tokens, int(model.cfg.n_ctx))


def _uncached(row: Row) -> bool:
    return row.plan is not None and row.plan.needs_sequence


def _run_batch(
    model: HookedModel, rows: Sequence[Row], config: GenerationConfig, cached: bool
) -> list[Completion]:
    device = next(iter(model.parameters())).device
    stops = torch.tensor(sorted(stop_tokens(model)), device=device)
    tokens, mask = left_padded([row.prompt.tokens for row in rows], 0, device)
    width = tokens.shape[1]
    draw = _sampler(rows, config, device)
    cursor = Cursor(0)
    cache = KeyValues() if cached else None
    hooks = batch_hooks([row.plan for row in rows], [row.prompt.layout for row in rows], cursor)
    finished = torch.zeros(len(rows), dtype=torch.bool, device=device)
    finite = ~finished
    with hooked(model, hooks):
        for step in range(config.max_new_tokens):
            cursor.offset = tokens.shape[1] - 1 if cached and step else 0
            logits = forward(model, tokens[:, cursor.offset :], mask, cache=cache, last=1)
            # a masked vocabulary may hold -inf; its maximum is finite all the same
            finite &= finished | torch.isfinite(logits[:, 0].amax(dim=-1))
            new = draw(logits[:, 0], step)
            tokens = torch.cat([tokens, new[:, None]], dim=1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            finished |= torch.isin(new, stops)
            if bool(finished.all()):
                break
    return [
        _completion(model, written, ok)
        for written, ok in zip(tokens[:, width:].tolist(), finite.tolist(), strict=True)
    ]


def _completion(model: HookedModel, written: list[int], finite: bool) -> Completion:
    stops = stop_tokens(model)
    end = next((i for i, token in enumerate(written) if token in stops), None)
    said = written[:end]
    return Completion(
        text=model.tokenizer.decode(said, skip_special_tokens=True),
        tokens=tuple(said if end is None else written[: end + 1]),
        ended=end is not None,
        finite=finite,
    )


def _sampler(
    rows: Sequence[Row], config: GenerationConfig, device: torch.device
) -> Callable[[Float[Tensor, "batch d_vocab"], int], Int[Tensor, " batch"]]:
    if config.temperature == 0.0:
        return lambda logits, step: logits.argmax(dim=-1)
    uniforms = torch.stack(
        [
            torch.rand(
                config.max_new_tokens,
                generator=torch.Generator().manual_seed(row.seed),
                dtype=torch.float64,
            )
            for row in rows
        ]
    ).to(device)

    def sample(logits: Tensor, step: int) -> Tensor:
        scaled = torch.nan_to_num(logits.double() / config.temperature)
        cumulative = scaled.softmax(dim=-1).cumsum(dim=-1)
        point = uniforms[:, step, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, point, right=True)[:, 0].clamp(
            max=logits.shape[-1] - 1
        )

    return sample

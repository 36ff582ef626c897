"""Rows of (prompt, written tokens, plan) -> residual streams and log-probabilities, without writing
anything.

The tokens are given, so that an unsteered and a steered pass over one text differ by the steering
alone. Prompts are padded on the left and what follows on the right, each to a length that depends
on the row alone, and every pass has the same number of rows: a row's numbers do not depend on the
others. Plans that recompute their mean are refused: in one pass over a whole text it would hold
tokens that generation had not written yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusion_lens.activations import at_least_float32, left_padded, padded_length, same_shape
from fusion_lens.engine_log import EngineLog
from fusion_lens.errors import PlanError, SpanError
from fusion_lens.executors import Executor, executor_of
from fusion_lens.hooks import Cursor, batch_steering
from fusion_lens.identity import identify
from fusion_lens.lean import AtSite
from fusion_lens.models import HookedModel, Place, evaluating
from fusion_lens.plans import Plan
from fusion_lens.preparation import Prepared
from fusion_lens.prompts import Prompt, continuation

T = TypeVar("T")

_ROWS_OF_STREAMS = 8
_ROWS = 32


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt, the tokens that follow it, and the plan that steers both (None: unsteered)."""

    prompt: Prompt
    written: tuple[int, ...] = ()
    plan: Plan | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """All tokens, in order."""
        return self.prompt.tokens + self.written

    @property
    def writing(self) -> range:
        """The positions whose logits write what follows the prompt."""
        start = len(self.prompt.tokens) - 1
        return range(start, start + len(self.written))


def gold_text(model: HookedModel, prepared: Prepared, plan: Plan | None = None) -> Text:
    """The gold answer behind the question's prompt, as the reference text has it."""
    answer = prepared.question.answer
    tail = prepared.reference.text[len(prepared.prompt.text) :]
    told = tail[: tail.index(answer) + len(answer)]
    return Text(prepared.prompt, continuation(model, prepared.prompt, told), plan)


@dataclass(frozen=True, slots=True, eq=False)
class Streams:
    """The residual stream of one text at every block, on the CPU, in float32 or the model's wider
    dtype.

    `entering[l, t]` is the residual that the steering after block `l` is given, in a run that is
    steered below; `leaving[l, t]` what it makes of it.
    """

    entering: Float[Tensor, "layer pos d_model"]
    leaving: Float[Tensor, "layer pos d_model"]


def record_streams(
    model: HookedModel,
    texts: Sequence[Text],
    *,
    executor: str = "auto",
    log: EngineLog | None = None,
) -> list[Streams]:
    """Run every text once and keep all its residuals.

    Raises:
        PlanError: if a plan belongs to another model, or recomputes its mean.
    """
    n_layers = int(model.cfg.n_layers)

    def read(run: Executor, batch: Batch) -> list[Streams]:
        both = passed(run, batch, "resid_post", n_layers)
        entering, leaving = ([at_least_float32(own).cpu() for own in side] for side in both)

        def of_row(seen: list[Tensor], row: int) -> Float[Tensor, "layer pos d_model"]:
            return torch.stack([own[row, batch.places[row]] for own in seen])

        rows = range(len(batch.places))
        return [Streams(of_row(entering, row), of_row(leaving, row)) for row in rows]

    return in_batches(model, texts, read, _ROWS_OF_STREAMS, executor, log)


def log_probs(
    model: HookedModel,
    texts: Sequence[Text],
    *,
    executor: str = "auto",
    log: EngineLog | None = None,
) -> list[float]:
    """log p(written | prompt) of every text under its plan, in nats, summed over its tokens; raises
    as `token_log_probs` does."""
    return [math.fsum(own) for own in token_log_probs(model, texts, executor=executor, log=log)]


def token_log_probs(
    model: HookedModel,
    texts: Sequence[Text],
    *,
    executor: str = "auto",
    log: EngineLog | None = None,
) -> list[tuple[float, ...]]:
    """log p of every written token given all before it, under the text's plan, in nats.

    Raises:
        PlanError: if a plan belongs to another model, or recomputes its mean.
        SpanError: if a text has nothing written.
    """
    require_written(texts)

    def read(run: Executor, batch: Batch) -> list[tuple[float, ...]]:
        with run.at_sites(batch.steering):
            logits = run.forward(batch.tokens, batch.mask, last=batch.n_written + 1)[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            at_least_float32(logits).flatten(0, 1),
            batch.tokens[:, -batch.n_written :].flatten(),
            reduction="none",
        ).view(len(batch.tokens), -1)
        lengths = batch.mask[:, -batch.n_written :].sum(dim=-1).tolist()
        return [
            tuple(-loss for loss in row[:length])
            for row, length in zip(losses.tolist(), lengths, strict=True)
        ]

    return in_batches(model, texts, read, _ROWS, executor, log)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """`rows` in one shape: `n_written` columns after the prompts, `places` where each row's own
    tokens are."""

    rows: tuple[Text, ...]
    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    n_written: int
    places: tuple[slice, ...]
    steering: dict[Place, AtSite]

    @staticmethod
    def of(rows: Sequence[Text], width: int, n_written: int, device: torch.device) -> Batch:
        """Prompts padded on the left to `width`, what follows on the right."""
        prompts, mask = left_padded([row.prompt.tokens for row in rows], 0, device, width=width)
        written = torch.zeros((len(rows), n_written), dtype=torch.long)
        for n, row in enumerate(rows):
            written[n, : len(row.written)] = torch.tensor(row.written, dtype=torch.long)
        lengths = torch.tensor([len(row.written) for row in rows])
        present = (torch.arange(n_written) < lengths[:, None]).long()
        places = (slice(width - len(row.prompt.tokens), width + len(row.written)) for row in rows)
        plans, layouts = [row.plan for row in rows], [row.prompt.layout for row in rows]
        return Batch(
            rows=tuple(rows),
            tokens=torch.cat([prompts, written.to(device)], dim=1),
            mask=torch.cat([mask, present.to(device)], dim=1),
            n_written=n_written,
            places=tuple(places),
            steering=batch_steering(plans, layouts, Cursor(0, width)),
        )


def require_written(texts: Sequence[Text]) -> None:
    """Make sure that there is something to read behind every prompt.

    Raises:
        SpanError: if a text has nothing written.
    """
    for text in texts:
        if not text.written:
            raise SpanError(
                f"there must be tokens after the prompt, but {text.prompt.text!r} has none."
            )


def passed(
    run: Executor, batch: Batch, site: str, n_layers: int
) -> tuple[list[Float[Tensor, "batch pos width"]], list[Float[Tensor, "batch pos width"]]]:
    """One pass: the activation at a site of every block as the steering is given it, and as it
    leaves it."""
    entering: dict[int, Tensor] = {}
    leaving: dict[int, Tensor] = {}

    def at(layer: int, x: Float[Tensor, "batch pos width"]) -> Tensor | None:
        steer = batch.steering.get((site, layer))
        changed = None if steer is None else steer(x)
        entering[layer] = x
        leaving[layer] = x if changed is None else changed
        return changed

    recording = {(site, layer): partial(at, layer) for layer in range(n_layers)}
    with run.at_sites({**batch.steering, **recording}):
        run.forward(batch.tokens, batch.mask, last=1)
    return [entering[layer] for layer in range(n_layers)], [leaving[n] for n in range(n_layers)]


def in_batches(
    model: HookedModel,
    texts: Sequence[Text],
    read: Callable[[Executor, Batch], list[T]],
    n_rows: int,
    executor: str,
    log: EngineLog | None,
    sites: Iterable[str] = (),
) -> list[T]:
    """What `read` makes of every text, in batches of `n_rows` rows of one shape. `sites` are those
    that are read besides the plans' own.

    Raises:
        PlanError: if a plan belongs to another model, or recomputes its mean.
        HookNameError: if the model has no hook point at a site.
    """
    log = log or EngineLog()
    identity = identify(model)
    for text in texts:
        if text.plan is not None:
            text.plan.check(identity)
            if text.plan.needs_sequence:
                raise PlanError(
                    "a plan must need one token at a time to be read teacher-forced, but has "
                    'mean="sequence"; tune with mean="question".'
                )
    steered = {site for text in texts if text.plan is not None for site in text.plan.sites}
    run, reason = executor_of(model, executor, steered.union(sites))
    log.fell_back(reason)
    done: dict[int, T] = {}

    def shape(text: Text) -> tuple[int, int]:
        lengths = (len(text.prompt.tokens), len(text.written))
        width, n_written = (padded_length(length, run.multiple) for length in lengths)
        return width, n_written

    def work(most: int) -> None:
        left = [i for i in range(len(texts)) if i not in done]
        shapes = [shape(texts[i]) for i in left]
        for places in same_shape(shapes, lambda _: most):
            some = [left[n] for n in places]
            idle = [some[0]] * (most - len(some))
            batch = Batch.of([texts[i] for i in some + idle], *shapes[places[0]], run.device)
            done.update(zip(some, read(run, batch), strict=False))

    with evaluating(model):
        log.halving(n_rows, work)
    return [done[i] for i in range(len(texts))]

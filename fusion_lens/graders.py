"""Scores that need a model: how fluent a completion is, and everything measured on one trial.

Fluency is the mean negative log-likelihood per completion token given the prompt, end-of-text
included where it was generated, under the *unsteered* model; perplexity is its exponential,
unclipped (docs/method.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fusion_lens.activations import at_least_float32, left_padded, padded_length, same_shape
from fusion_lens.decoding import Completion
from fusion_lens.engine_log import EngineLog
from fusion_lens.executors import Executor, executor_of
from fusion_lens.models import HookedModel, evaluating
from fusion_lens.prompts import Prompt
from fusion_lens.questions import Question
from fusion_lens.scores import (
    distinct_2,
    exact_match,
    extract_answer,
    objective,
    perplexity_of,
    token_overlap,
)

_LOGITS_AT_ONCE = 2**27
_KEPT = 16


@dataclass(frozen=True, slots=True)
class Graded:
    """A completion with its scores; None is unscored. `nll` is in nats per token."""

    completion: Completion
    answer: str
    overlap: float | None
    exact_match: float
    nll: float | None
    distinct_2: float | None
    objective: float

    @property
    def perplexity(self) -> float | None:
        """exp(nll); None where that is unscored or overflows."""
        return perplexity_of(self.nll)


def grade(
    question: Question, completion: Completion, nll: float | None, *, weight: float = 0.7
) -> Graded:
    """Score one completion against its gold answer.

    An unscored overlap counts 0 in the objective alone. Logits that were not finite make the whole
    completion meaningless: overlap and perplexity are unscored, so its objective is the worst.
    """
    overlap = token_overlap(completion.text, question.answer) if completion.finite else None
    nll = nll if completion.finite else None
    return Graded(
        completion=completion,
        answer=extract_answer(completion.text),
        overlap=overlap,
        exact_match=float(
            completion.finite and exact_match(completion.text, question.answer, question.aliases)
        ),
        nll=nll,
        distinct_2=distinct_2(completion.text),
        objective=objective(overlap or 0.0, perplexity_of(nll), weight),
    )


def completion_nll(
    model: HookedModel,
    texts: Sequence[tuple[Prompt, Completion]],
    *,
    batch_size: int | None = None,
    executor: str = "auto",
    log: EngineLog | None = None,
) -> list[float | None]:
    """Nats per completion token, teacher-forced in batches; None for a value that is not finite,
    or of a completion without tokens.

    Every pass has `batch_size` rows, idle ones among them, and lengths that depend on the text
    alone: with a number given, a text's value does not depend on the others. None: as many as there
    are, 16 at most. Fewer where so many texts of one length had logits that fill the memory.
    """
    log = log or EngineLog()
    run, reason = executor_of(model, executor)
    log.fell_back(reason)
    values: dict[int, float | None] = {
        i: None for i, (_, completion) in enumerate(texts) if not completion.tokens
    }

    def score(n_rows: int) -> None:
        left = [i for i in range(len(texts)) if i not in values]
        shapes = [_shape(run, *texts[i]) for i in left]

        def affordable(shape: tuple[int, int]) -> int:
            return max(1, min(n_rows, _LOGITS_AT_ONCE // (shape[1] * int(model.cfg.d_vocab))))

        for batch in same_shape(shapes, affordable):
            rows = [left[n] for n in batch]
            idle = [rows[0]] * (affordable(shapes[batch[0]]) - len(rows))
            sums = _batch_nll(run, [texts[i] for i in rows + idle])
            for i, total in zip(rows, sums.tolist(), strict=False):
                mean = total / len(texts[i][1].tokens)
                values[i] = mean if math.isfinite(mean) else None

    with evaluating(model):
        log.halving(batch_size or max(1, min(len(texts), 16)), score)
    return [values[i] for i in range(len(texts))]


def _shape(run: Executor, prompt: Prompt, completion: Completion) -> tuple[int, int]:
    """The padded length of a text, and of its end that logits are needed of."""
    width = padded_length(len(prompt.tokens) + len(completion.tokens), run.multiple)
    return width, min(width - 1, padded_length(len(completion.tokens), _KEPT))


def _batch_nll(
    run: Executor, texts: Sequence[tuple[Prompt, Completion]]
) -> Float[Tensor, " batch"]:
    width, kept = _shape(run, *texts[0])
    tokens, mask = left_padded(
        [prompt.tokens + completion.tokens for prompt, completion in texts],
        0,
        run.device,
        width=width,
    )
    lengths = torch.tensor([len(completion.tokens) for _, completion in texts], device=run.device)
    logits = at_least_float32(run.forward(tokens[:, :-1], mask[:, :-1], last=kept))
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, -kept:].flatten(), reduction="none"
    ).view(len(texts), -1)
    counted = torch.arange(kept, device=run.device) >= kept - lengths[:, None]
    return torch.where(counted, losses, torch.zeros_like(losses)).sum(dim=-1)

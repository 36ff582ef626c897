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
from jaxtyping import Int
from torch import Tensor

from fusion_lens.activations import at_least_float32, left_padded
from fusion_lens.generation import Completion
from fusion_lens.models import HookedModel, evaluating, forward
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
    batch_size: int = 128,
) -> list[float | None]:
    """Nats per completion token, teacher-forced in batches; None for a value that is not finite.

    Batches are smaller than `batch_size` where the vocabulary is so large that their logits would
    fill the memory.
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i][0].tokens + texts[i][1].tokens))
    values: dict[int, float | None] = {}
    longest = max((len(completion.tokens) for _, completion in texts), default=1)
    batch_size = max(1, min(batch_size, _LOGITS_AT_ONCE // (longest * int(model.cfg.d_vocab))))
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            sums = _batch_nll(model, [texts[i] for i in batch])
            for i, total in zip(batch, sums.tolist(), strict=True):
                mean = total / len(texts[i][1].tokens)
                values[i] = mean if math.isfinite(mean) else None
    return [values[i] for i in range(len(texts))]


def _batch_nll(model: HookedModel, texts: Sequence[tuple[Prompt, Completion]]) -> Tensor:
    device = next(iter(model.parameters())).device
    tokens, mask = left_padded(
        [prompt.tokens + completion.tokens for prompt, completion in texts], 0, device
    )
    lengths = torch.tensor([len(completion.tokens) for _, completion in texts], device=device)
    longest = int(lengths.max())
    logits = at_least_float32(forward(model, tokens[:, :-1], mask[:, :-1], last=longest))
    targets: Int[Tensor, "batch last"] = tokens[:, -longest:]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none"
    ).view(targets.shape)
    position = torch.arange(longest, device=device)
    counted = position >= longest - lengths[:, None]
    return torch.where(counted, losses, torch.zeros_like(losses)).sum(dim=-1)

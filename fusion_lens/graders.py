"""Everything that is measured on one completion, and the objective made of it.

Fluency is the mean negative log-likelihood per completion token given the prompt, end-of-text
included where it was generated, under the *unsteered* model or one that is named; perplexity is its
exponential, unclipped (docs/method.md). The paper's own scores read prompt and completion as one
text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fusion_lens.decoding import Completion
from fusion_lens.differences import marked_words
from fusion_lens.published import published_overlap
from fusion_lens.questions import Question
from fusion_lens.scores import objective, perplexity_of, text_scores
from fusion_lens.tables import Cell, Section


def _number(value: float | None) -> str:
    return "unscored" if value is None else f"{value:.2f}"


_SHOWN: dict[str, Callable[[Any], str]] = {
    "exact_match": lambda value: "yes" if value else "no",
    "overlap": _number,
    "perplexity": _number,
    "objective": "{:+.3f}".format,
}


@dataclass(frozen=True, slots=True)
class Graded:
    """A completion with its scores; None is unscored. `nll` is in nats per token."""

    completion: Completion
    answer: str
    overlap: float | None
    exact_match: float
    contained_match: float
    token_f1: float | None
    nll: float | None
    distinct_2: float | None
    repetition: float | None
    objective: float

    @property
    def perplexity(self) -> float | None:
        """exp(nll); None where that is unscored or overflows."""
        return perplexity_of(self.nll)

    def beside(self, unsteered: Graded | None, title: str, notes: tuple[str, ...] = ()) -> Section:
        """A table of both completions and their scores; each marks the words the other lacks."""
        sides = [self.completion] if unsteered is None else [unsteered.completion, self.completion]
        texts = [side.text.strip() for side in sides]
        rows: list[tuple[Cell, ...]] = [
            ("text", *map(marked_words, texts[::-1], texts))
            if unsteered is not None
            else ("text", "", *texts)
        ]
        shown = [
            ["" if each is None else form(getattr(each, name)) for each in (unsteered, self)]
            for name, form in _SHOWN.items()
        ]
        rows += [
            (name.replace("_", " "), *values) for name, values in zip(_SHOWN, shown, strict=True)
        ]
        return Section(title, ("", "unsteered", "steered"), tuple(rows), notes)


def grade(
    question: Question,
    completion: Completion,
    nll: float | None,
    *,
    weight: float = 0.7,
    whole: str | None = None,
) -> Graded:
    """Score one completion against its gold answer; `nll` is as the caller has measured it. With
    `whole`, prompt and completion as one text, the overlap is the published one on that text.

    An unscored overlap counts 0 in the objective alone. Logits that were not finite make the whole
    completion meaningless: overlap and perplexity are unscored, so its objective is the worst.
    """
    scores = text_scores(completion.text, question.answer, question.aliases)
    finite = completion.finite
    overlap = scores["overlap"].value
    if whole is not None:
        overlap = published_overlap(whole, question.answer)
    if not finite:
        overlap = nll = None
    return Graded(
        completion=completion,
        answer=scores["overlap"].answer,
        overlap=overlap,
        exact_match=float(finite and bool(scores["exact_match"].value)),
        contained_match=float(finite and bool(scores["contained_match"].value)),
        token_f1=scores["token_f1"].value if finite else None,
        nll=nll,
        distinct_2=scores["distinct_2"].value,
        repetition=scores["repetition"].value,
        objective=objective(overlap or 0.0, perplexity_of(nll), weight),
    )

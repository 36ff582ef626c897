"""Lenders of questions that are prepared in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

from fusion_lens.engine_log import EngineLog
from fusion_lens.lenders import Lenders, Ready, gathered
from fusion_lens.models import HookedModel
from fusion_lens.preparation import TuningConfig, prepare
from fusion_lens.questions import Question


def lent(
    model: HookedModel,
    config: TuningConfig,
    questions: Sequence[Question],
    lending: str | None = None,
    *,
    size: int = 3,
    centre: bool = False,
) -> AbstractContextManager[Lenders]:
    """Of blocks of `size` questions; `lending` names those that lend by a letter each (None:
    all)."""
    names = {question.id for question in questions} if lending is None else set(lending)
    return gathered(
        blocks(model, config, questions, size),
        names,
        seed=config.search.seed,
        centre=centre,
    )


def blocks(
    model: HookedModel, config: TuningConfig, questions: Sequence[Question], size: int
) -> Iterator[Ready]:
    ordered = sorted(questions, key=lambda question: question.id)
    for start in range(0, len(ordered), size):
        yield Ready(*prepare(model, ordered[start : start + size], config), EngineLog())

"""A finished run of other questions -> where each question's search starts: at the plans that were
best for the questions most like it.

Alike are questions that share words: |A and B| / |A or B| over the sets of their words (Jaccard).
Of equally similar ones the plan of the larger objective comes first, then the smaller id. What a
question starts from depends on that run and on nothing else, so that neither the order of questions
nor the number of workers changes it; a run never starts from questions of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fusion_lens.errors import ConfigError, SearchError
from fusion_lens.identity import ModelIdentity
from fusion_lens.plan_files import load_plan
from fusion_lens.presets import require_apart, text_digest
from fusion_lens.questions import Question
from fusion_lens.results import Result, load_results, plan_path
from fusion_lens.scores import words
from fusion_lens.starts import LayerCoeffs, by_layer

ARM = "segmented"
N_SIMILAR = 3


def similar_starts(
    folder: str | Path,
    model: ModelIdentity,
    questions: Sequence[Question],
    *,
    k: int = N_SIMILAR,
    arm: str = ARM,
) -> tuple[tuple[str, tuple[LayerCoeffs, ...]], ...]:
    """For every question, by its id, the coefficients that an arm of the run in `folder` chose for
    the `k` most similar questions for which something beat the zero plan.

    Raises:
        InputFileError: if there is no run that ended, or a file of it is damaged.
        ConfigError: if `k` is below 1, or the run has not the arm.
        SearchError: if the run was interrupted, or has one of the questions.
        PlanError: if it is of another model, or a plan is missing or damaged.
    """
    if k < 1:
        raise ConfigError(f"k must be at least 1, but got {k}.")
    folder = Path(folder)
    results = load_results(folder)
    if results.summary.get("interrupted"):
        raise SearchError(f"a run to start from must be finished, but {folder} was interrupted.")
    require_apart({text_digest(own.question) for own in results.records}, questions, "a run")
    tuned = [own for own in results.records if own.arm == arm and own.coeffs]
    if not tuned:
        arms = sorted({own.arm for own in results.records if own.coeffs})
        raise ConfigError(
            f"a run to start from must have the arm {arm!r}, but {folder} has "
            f"{', '.join(arms) or 'no arm that was tuned'}."
        )
    steering = sorted(
        (own for own in tuned if own.injected_norm),
        key=lambda own: (-own.objective, own.question_id),
    )
    texts = [(own, {*words(own.question)}) for own in steering]
    known: dict[str, LayerCoeffs] = {}

    def start(own: Result) -> LayerCoeffs:
        if own.question_id not in known:
            plan = load_plan(plan_path(folder, own.question_id, own.arm))
            plan.check(model)
            step = plan.steps[0]
            known[own.question_id] = by_layer(step.segments, step.coeffs, model.n_layers)
        return known[own.question_id]

    made = []
    for question in questions:
        asked = {*words(question.question)}
        # stable: of equally similar ones the order stays
        alike = sorted(texts, key=lambda each: -_jaccard(asked, each[1]))
        made.append((question.id, tuple(start(own) for own, _ in alike[:k])))
    return tuple(made)


def _jaccard(some: set[str], others: set[str]) -> float:
    return len(some & others) / max(1, len(some | others))

"""What an arm chose and what the judge says of it -> the result that is kept."""

from __future__ import annotations

from dataclasses import asdict

from fusion_lens.arms import TUNED
from fusion_lens.experiment_config import ExperimentConfig
from fusion_lens.judges import Verdict
from fusion_lens.lenders import Lenders
from fusion_lens.results import Result
from fusion_lens.scores import composite
from fusion_lens.workers import Outcome


def judged_result(
    outcome: Outcome,
    verdict: Verdict,
    lenders: Lenders,
    config: ExperimentConfig,
    *,
    graded: bool,
) -> Result:
    """One line of a run; `graded` tells whether the judge gives grades too."""
    chosen = outcome.chosen
    question, scores = chosen.prepared.question, chosen.graded
    search = None if chosen.tuned is None else chosen.tuned.tuned
    mismatched = chosen.arm in TUNED and TUNED[chosen.arm].vectors == "mismatched"
    return Result(
        question_id=question.id,
        arm=chosen.arm,
        subject=question.subject or question.id,
        topic=question.topic,
        answer_type=question.answer_type,
        question=question.question,
        answer=question.answer,
        explanation=chosen.prepared.explanation,
        completion=scores.completion.text,
        extracted=scores.answer,
        ended=scores.completion.ended,
        finite=scores.completion.finite,
        margin=scores.completion.margin,
        coeffs={} if search is None else dict(search.best.coeffs),
        extra={} if search is None else dict(search.best.extra),
        injected_norm=0.0 if search is None else search.best.injected_norm,
        objective=scores.objective,
        overlap=scores.overlap,
        exact_match=scores.exact_match,
        contained_match=scores.contained_match,
        token_f1=scores.token_f1,
        nll=scores.nll,
        perplexity=scores.perplexity,
        distinct_2=scores.distinct_2,
        repetition=scores.repetition,
        **asdict(outcome.reach),
        label=verdict.label,
        grade=verdict.grade,
        composite=_composite(config, scores.overlap, verdict.grade) if graded else None,
        judged=verdict.explanation,
        n_trials=chosen.n_samples if search is None else len(search.trials),
        best_trial=1 if search is None else search.best.number,
        zero_won=None if search is None else search.zero_won,
        tied=None if search is None else search.tied,
        donor=lenders.donors[question.id].id if mismatched else None,
        n_not_finite=(
            int(not scores.completion.finite)
            if search is None
            else sum(not trial.outcome.completion.finite for trial in search.trials)
        ),
        seconds=round(chosen.seconds, 4),
    )


def _composite(
    config: ExperimentConfig, overlap: float | None, grade: float | None
) -> float | None:
    """As published, what is missing counts 0; else the composite is unscored."""
    if config.tuning.metrics == "published":
        return composite(overlap or 0.0, grade)
    return None if overlap is None or grade is None else composite(overlap, grade)

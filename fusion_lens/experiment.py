"""The loop over questions and arms; composes the stages and their configs.

Arms so far: `baseline` (one greedy run of the steered prompt, unsteered), `full` (one coefficient
for all layers) and `segmented` (one per segment). Questions are taken in blocks, so that memory
does not grow with their number; all rounds of a block share one batch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fusion_lens.engine_log import EngineLog
from fusion_lens.errors import ActivationError, ConfigError, one_of
from fusion_lens.generation import generate
from fusion_lens.graders import Graded
from fusion_lens.models import HookedModel, ModelIdentity, identify
from fusion_lens.plan_files import save_plan
from fusion_lens.plans import Segment
from fusion_lens.questions import Question, questions_digest
from fusion_lens.results import (
    SCHEMA_VERSION,
    Provenance,
    Result,
    Results,
    append_results,
    open_run_folder,
    plan_path,
    save_summary,
)
from fusion_lens.scores import perplexity_of
from fusion_lens.search import check_storage
from fusion_lens.statistics import Interval, cluster_bootstrap
from fusion_lens.tuning import (
    Failure,
    Job,
    Prepared,
    Progress,
    Scorer,
    TunedPlan,
    TuningConfig,
    export_tuned,
    make_segments,
    prepare,
    tune_jobs,
    with_engine_shape,
)

ARMS = ("baseline", "full", "segmented")
METRICS = ("exact_match", "overlap", "objective", "nll", "perplexity", "distinct_2")

_NOT_FINITE = (
    "the model's logits must be finite, but a step of the completion gave NaN or infinity; "
    "lower the coefficients, or run in a wider dtype."
)


@dataclass(frozen=True, slots=True)
class ExperimentConfig:
    """What to run on every question.

    `segments` divides the layers of the segmented arm; `storage` is an Optuna storage URL that gets
    every finished study, named `<question id>/<arm>`.
    """

    arms: tuple[str, ...] = ARMS
    segments: str | int = "thirds"
    tuning: TuningConfig = field(default_factory=TuningConfig)
    block_size: int = 64
    storage: str | None = None

    def __post_init__(self) -> None:
        if not self.arms or len(set(self.arms)) != len(self.arms):
            raise ConfigError(f"arms must be different and at least one, but got {self.arms}.")
        for arm in self.arms:
            one_of("arms", arm, ARMS)
        if self.block_size < 1:
            raise ConfigError(f"block_size must be at least 1, but got {self.block_size}.")


def run(
    model: HookedModel,
    questions: Sequence[Question],
    config: ExperimentConfig | None = None,
    *,
    out: str | Path | None = None,
    pool: Sequence[Question] | None = None,
    source: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Results:
    """Tune and score every question under every arm; with `out`, write the run there.

    `pool` is every question of the file, those included that are not run: slots and cache length
    come from it, so that another selection gives the same numbers. `source` tells where the
    questions are from, for the provenance.

    A question that cannot be steered is listed under `failures` in the summary with its reason, and
    the run goes on. An interrupt keeps what was finished; the summary then says
    `interrupted`.

    Raises:
        ConfigError: if two questions share an id.
        PlanError: if the model has fewer layers than segments.
        OutputError: if `out` cannot be written.
    """
    config = config or ExperimentConfig()
    ids = [question.id for question in questions]
    if len(set(ids)) != len(ids):
        raise ConfigError("question ids must be unique, but two questions share one.")
    identity = identify(model)
    segments = {
        "full": make_segments("full", identity.n_layers),
        "segmented": make_segments(config.segments, identity.n_layers),
    }
    if config.storage is not None:
        tuned_arms = [arm for arm in config.arms if arm in segments]
        check_storage(config.storage, [f"{name}/{arm}" for name in ids for arm in tuned_arms])
    pool = pool or questions
    per_question = config.tuning.search.round_size * sum(arm in segments for arm in config.arms)
    n_rows = max(1, per_question) * len(pool)
    shaped = with_engine_shape(model, pool, config.tuning, n_rows=n_rows)
    config = replace(config, tuning=shaped)
    log = EngineLog()
    folder = None if out is None else open_run_folder(out)
    began = time.perf_counter()
    records: list[Result] = []
    failures: list[Failure] = []
    delta_norms: dict[str, list[float]] = {}
    interrupted = False
    try:
        for start in range(0, len(questions), config.block_size):
            shown = _within(progress, done=start, of=len(questions), config=config)
            of_block = questions[start : start + config.block_size]
            block = _run_block(model, of_block, config, segments, shown, log)
            _write_block(block, folder, config.storage)
            # a block's studies and deltas go with it: memory does not grow with the questions
            records += block.records
            failures += block.failures
            delta_norms |= {p.question.id: p.deltas.norms.tolist() for p in block.prepared}
            interrupted = block.interrupted
            if interrupted:
                break
    except KeyboardInterrupt:
        interrupted = True
    summary = {
        "schema_version": SCHEMA_VERSION,
        "provenance": asdict(_provenance(identity, config, questions)),
        "questions": {"n": len(questions), **(source or {})},
        "arms": {
            arm: _arm([record for record in records if record.arm == arm], config)
            for arm in config.arms
        },
        "failures": [_failure(failure) for failure in failures],
        "delta_norms": delta_norms,
        "engine": log.to_dict(),
        "interrupted": interrupted,
        "seconds": round(time.perf_counter() - began, 2),
    }
    if folder is not None:
        save_summary(folder, summary)
    return Results(tuple(records), summary)


@dataclass(frozen=True, slots=True)
class _Block:
    """Some questions under every arm."""

    prepared: Sequence[Prepared]
    failures: Sequence[Failure]
    tuned: Sequence[TunedPlan]
    records: Sequence[Result]
    interrupted: bool


def _run_block(
    model: HookedModel,
    questions: Sequence[Question],
    config: ExperimentConfig,
    segments: Mapping[str, tuple[Segment, ...]],
    progress: Progress | None,
    log: EngineLog,
) -> _Block:
    prepared, failures = prepare(model, questions, config.tuning, log=log)
    score = Scorer(model, config.tuning, log=log)
    baseline = _baseline(model, prepared, config, score, log)
    jobs = [
        Job(item, segments[arm], arm) for item in prepared for arm in config.arms if arm in segments
    ]
    tuned, interrupted = tune_jobs(
        model, jobs, config.tuning, score=score, progress=progress, log=log
    )
    order = [question.id for question in questions]
    records = sorted(
        [*baseline, *map(_tuned_result, tuned)],
        key=lambda record: (order.index(record.question_id), config.arms.index(record.arm)),
    )
    not_finite = [
        Failure(record.question_id, ActivationError(_NOT_FINITE), record.arm)
        for record in records
        if not record.finite
    ]
    return _Block(prepared, [*failures, *not_finite], tuned, records, interrupted)


def _write_block(block: _Block, folder: Path | None, storage: str | None) -> None:
    if folder is not None:
        append_results(folder, block.records)
    for tuned in block.tuned:
        question_id, arm = tuned.job.prepared.question.id, tuned.job.arm
        if folder is not None:
            save_plan(tuned.plan, plan_path(folder, question_id, arm))
        if storage is not None:
            export_tuned(tuned, storage, f"{question_id}/{arm}")


def _baseline(
    model: HookedModel,
    prepared: Sequence[Prepared],
    config: ExperimentConfig,
    score: Scorer,
    log: EngineLog,
) -> list[Result]:
    if "baseline" not in config.arms or not prepared:
        return []
    began = time.perf_counter()
    rows = [item.row(config.tuning) for item in prepared]
    graded = score(prepared, generate(model, rows, config.tuning.generation, log=log))
    seconds = (time.perf_counter() - began) / len(rows)
    return [
        _result(item, "baseline", grade, seconds)
        for item, grade in zip(prepared, graded, strict=True)
    ]


def _tuned_result(tuned: TunedPlan) -> Result:
    search = tuned.tuned
    return replace(
        _result(tuned.job.prepared, tuned.job.arm, tuned.best, tuned.seconds),
        coeffs=dict(search.best.coeffs),
        injected_norm=search.best.injected_norm,
        n_trials=len(search.trials),
        best_trial=search.best.number,
        zero_won=search.zero_won,
        tied=search.tied,
        n_not_finite=sum(not trial.outcome.completion.finite for trial in search.trials),
    )


def _result(prepared: Prepared, arm: str, graded: Graded, seconds: float) -> Result:
    question = prepared.question
    return Result(
        question_id=question.id,
        arm=arm,
        subject=question.subject or question.id,
        question=question.question,
        answer=question.answer,
        explanation=prepared.explanation,
        completion=graded.completion.text,
        extracted=graded.answer,
        ended=graded.completion.ended,
        finite=graded.completion.finite,
        margin=graded.completion.margin,
        coeffs={},
        injected_norm=0.0,
        objective=graded.objective,
        overlap=graded.overlap,
        exact_match=graded.exact_match,
        nll=graded.nll,
        perplexity=graded.perplexity,
        distinct_2=graded.distinct_2,
        n_trials=1,
        best_trial=1,
        zero_won=None,
        tied=None,
        n_not_finite=int(not graded.completion.finite),
        seconds=round(seconds, 4),
    )


def _provenance(
    identity: ModelIdentity, config: ExperimentConfig, questions: Sequence[Question]
) -> Provenance:
    return Provenance.of(
        identity,
        seed=config.tuning.search.seed,
        questions_sha256=questions_digest(questions),
        settings=_settings(config),
        threads=torch.get_num_threads(),
    )


def _failure(failure: Failure) -> dict[str, str | None]:
    return {
        "question_id": failure.question_id,
        "arm": failure.arm,
        "error": type(failure.cause).__name__,
        "message": str(failure.cause),
    }


def _arm(records: Sequence[Result], config: ExperimentConfig) -> dict[str, Any]:
    clusters = [record.subject for record in records]
    seed = config.tuning.search.seed
    metrics = {name: asdict(_interval(name, records, seed)) for name in METRICS}
    arm: dict[str, Any] = {"n": len(records), "clusters": len(set(clusters)), "metrics": metrics}
    tuned = [record for record in records if record.coeffs]
    if tuned:
        # a zero plan's coefficients say nothing about how strongly to steer
        steered = [record for record in tuned if not record.zero_won]
        arm |= {
            "n_trials": [min(r.n_trials for r in tuned), max(r.n_trials for r in tuned)],
            "steered": len(steered),
            "coeffs_median": {
                name: median(record.coeffs[name] for record in steered)
                for name in tuned[0].coeffs
                if steered
            },
            "zero_won": 1 - len(steered) / len(tuned),
            "tied": sum(bool(record.tied) for record in tuned) / len(tuned),
            "not_finite": sum(record.n_not_finite for record in tuned),
        }
    return arm


def _interval(name: str, records: Sequence[Result], seed: int) -> Interval:
    clusters = [record.subject for record in records]
    if name != "perplexity":
        values = [getattr(record, name) for record in records]
        return cluster_bootstrap(values, clusters, seed=seed, share=name == "exact_match")
    # a mean of perplexities is the mean of its outliers: exponentiate the mean nll instead
    nll = cluster_bootstrap([record.nll for record in records], clusters, seed=seed)
    return replace(
        nll,
        mean=perplexity_of(nll.mean),
        low=perplexity_of(nll.low),
        high=perplexity_of(nll.high),
    )


def _settings(config: ExperimentConfig) -> dict[str, Any]:
    settings = asdict(config)
    sampler = config.tuning.search.sampler
    settings["tuning"]["search"]["sampler"] = getattr(sampler, "__qualname__", "TPE")
    # a storage URL may hold a password
    settings["storage"] = config.storage is not None
    return settings


def _within(
    progress: Progress | None, *, done: int, of: int, config: ExperimentConfig
) -> Progress | None:
    """A block's progress as progress of the whole run."""
    if progress is None:
        return None
    per_question = config.tuning.search.trials * sum(arm != "baseline" for arm in config.arms)
    outer = progress
    return lambda stage, n, _: outer(stage, done * per_question + n, of * per_question)

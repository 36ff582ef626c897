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

from fusion_lens.errors import ConfigError, one_of
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
)

ARMS = ("baseline", "full", "segmented")
METRICS = ("exact_match", "overlap", "objective", "nll", "perplexity", "distinct_2")


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
    source: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Results:
    """Tune and score every question under every arm; with `out`, write the run there.

    `source` tells where the questions are from, for the provenance.

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
    folder = None if out is None else open_run_folder(out)
    began = time.perf_counter()
    blocks: list[_Block] = []
    interrupted = False
    try:
        for start in range(0, len(questions), config.block_size):
            shown = _within(progress, done=start, of=len(questions), config=config)
            questions_of_block = questions[start : start + config.block_size]
            blocks.append(_run_block(model, questions_of_block, config, segments, shown))
            _write_block(blocks[-1], folder, config.storage)
            if blocks[-1].interrupted:
                break
    except KeyboardInterrupt:
        interrupted = True
    records = [record for block in blocks for record in block.records]
    summary = {
        "schema_version": SCHEMA_VERSION,
        "provenance": asdict(_provenance(identity, config, questions)),
        "questions": {"n": len(questions), **(source or {})},
        "arms": {
            arm: _arm([record for record in records if record.arm == arm], config)
            for arm in config.arms
        },
        "failures": [_failure(failure) for block in blocks for failure in block.failures],
        "delta_norms": {
            item.question.id: item.deltas.norms.tolist()
            for block in blocks
            for item in block.prepared
        },
        "interrupted": interrupted or any(block.interrupted for block in blocks),
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
) -> _Block:
    prepared, failures = prepare(model, questions, config.tuning)
    score = Scorer(model, config.tuning)
    baseline = _baseline(model, prepared, config, score)
    jobs = [
        Job(item, segments[arm], arm) for item in prepared for arm in config.arms if arm in segments
    ]
    tuned, interrupted = tune_jobs(model, jobs, config.tuning, score=score, progress=progress)
    order = [question.id for question in questions]
    records = sorted(
        [*baseline, *map(_tuned_result, tuned)],
        key=lambda record: (order.index(record.question_id), config.arms.index(record.arm)),
    )
    return _Block(prepared, failures, tuned, records, interrupted)


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
    model: HookedModel, prepared: Sequence[Prepared], config: ExperimentConfig, score: Scorer
) -> list[Result]:
    if "baseline" not in config.arms or not prepared:
        return []
    began = time.perf_counter()
    rows = [item.row(config.tuning) for item in prepared]
    graded = score(prepared, generate(model, rows, config.tuning.generation))
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


def _failure(failure: Failure) -> dict[str, str]:
    return {
        "question_id": failure.question_id,
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

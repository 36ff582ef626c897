"""The loop over questions and arms; composes the stages and their configs.

The protocol is the controlled one (docs/method.md): every arm of `arms`, then what each chose on
paraphrases, neighbours and unrelated text. Questions are taken in blocks, so that memory does not
grow with their number; all rounds of a block share one batch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from fusion_lens.activations import padded_length
from fusion_lens.arms import (
    ARMS,
    DEFAULT_ARMS,
    TUNED,
    Bench,
    Chosen,
    choose,
    most_rows,
    prefix_of_question,
)
from fusion_lens.details import Detail, append_details
from fusion_lens.divergence import n_counted, unrelated_texts
from fusion_lens.engine_log import EngineLog
from fusion_lens.errors import ActivationError, ConfigError, one_of
from fusion_lens.judges import Judge, JudgeItem, LexicalJudge, Verdict
from fusion_lens.lenders import Lenders
from fusion_lens.memory import release_freed
from fusion_lens.models import HookedModel, ModelIdentity, identify
from fusion_lens.perplexity import PerplexityModel
from fusion_lens.plan_files import save_plan
from fusion_lens.plans import Segment
from fusion_lens.preparation import Failure, TuningConfig, with_engine_shape
from fusion_lens.progress import Progress, shown
from fusion_lens.prompts import Prompt, tokenize
from fusion_lens.questions import Question, questions_digest
from fusion_lens.results import (
    SCHEMA_VERSION,
    Provenance,
    Result,
    Results,
    Summary,
    append_results,
    open_run_folder,
    plan_path,
    save_summary,
)
from fusion_lens.scores import composite
from fusion_lens.scoring import Scorer, judge_item
from fusion_lens.search import check_storage
from fusion_lens.summary import compare_arms, summarise_arms, summarise_groups
from fusion_lens.tracing import Explain, details_of
from fusion_lens.transfer import Reach, measure
from fusion_lens.tuning import export_tuned, make_segments

if TYPE_CHECKING:
    from fusion_lens.methods.dsas import FittedGate

_NOT_FINITE = (
    "the model's logits must be finite, but a step of the completion gave NaN or infinity; "
    "lower the coefficients, or run in a wider dtype."
)


@dataclass(frozen=True, slots=True)
class ExperimentConfig:
    """What to run on every question.

    `segments` divides the layers of the segmented arm; `centre` subtracts the other questions' mean
    delta from every delta; `reach` measures transfer and specificity; `unrelated` is a text file
    for the divergence on unrelated text (None: unscored); `storage` is an Optuna storage URL that
    gets every finished study, named `<question id>/<arm>`.
    """

    arms: tuple[str, ...] = DEFAULT_ARMS
    segments: str | int = "thirds"
    tuning: TuningConfig = field(default_factory=TuningConfig)
    centre: bool = False
    reach: bool = True
    unrelated: Path | None = None
    block_size: int = 64
    storage: str | None = None

    def __post_init__(self) -> None:
        if not self.arms or len(set(self.arms)) != len(self.arms):
            raise ConfigError(f"arms must be different and at least one, but got {self.arms}.")
        for arm in self.arms:
            one_of("arms", arm, ARMS)
        if self.block_size < 1:
            raise ConfigError(f"block_size must be at least 1, but got {self.block_size}.")
        constant = [arm for arm in self.tuned_arms if TUNED[arm].lends or TUNED[arm].gated]
        if self.tuning.mean != "question" and (constant or self.centre):
            raise ConfigError(
                f"{constant[0] if constant else 'centre'} needs a constant shift, mean='question', "
                f"but got mean={self.tuning.mean!r}; leave it out."
            )

        if self.tuning.metrics == "published" and "answer_in_prompt" in self.arms:
            raise ConfigError(
                "the published metrics read the prompt, and that of answer_in_prompt holds the "
                "answer; leave the arm out."
            )

    @property
    def lends(self) -> bool:
        """Whether questions other than those that are run have to lend their deltas."""
        return self.centre or any(TUNED[arm].lends for arm in self.tuned_arms)

    @property
    def tuned_arms(self) -> list[str]:
        """The arms with a search."""
        return [arm for arm in self.arms if arm in TUNED]


def run(
    model: HookedModel,
    questions: Sequence[Question],
    config: ExperimentConfig | None = None,
    *,
    out: str | Path | None = None,
    pool: Sequence[Question] | None = None,
    donors: Sequence[Question] | None = None,
    judge: Judge | None = None,
    fluency: PerplexityModel | None = None,
    explain: Explain | None = None,
    gate: FittedGate | None = None,
    source: Mapping[str, Any] | None = None,
    command: str | None = None,
    progress: Progress | bool = True,
) -> Results:
    """Every question under every arm; with `out`, write the run there.

    `pool` is every question of the file, those included that are not run: slots and cache length
    come from it, so that another selection gives the same numbers. `donors` lend their deltas to
    control arms: all questions of the split. Without them both are `questions`. `judge` labels
    what every arm chose (None: by spelling and value). `fluency` measures perplexity (None: the
    unsteered model itself). `explain` tells the features of a plan (`shelves.explainer`). `gate` is
    that of the gated arm, fitted on other questions (`question_gates`). `source`
    tells where the questions are from and `command` what was typed, for the provenance. `progress`
    as in `tune`.

    A question that cannot be steered is listed under `failures` in the summary with its reason, and
    the run goes on. An interrupt keeps what was finished; the summary then says `interrupted`.

    Raises:
        ConfigError: if there is no question, two share an id, the metrics are the published ones
            and there is no `fluency`, or the gated arm has no gate that fits.
        PlanError: if the model has fewer layers than segments.
        InputFileError: if the unrelated text cannot be read or is too short.
        OutputError: if `out` cannot be written.
    """
    config = config or ExperimentConfig()
    judge = judge or LexicalJudge()
    if not questions:
        raise ConfigError("there must be at least one question to run, but got none.")
    ids = [question.id for question in questions]
    if len(set(ids)) != len(ids):
        raise ConfigError("question ids must be unique, but two questions share one.")
    identity = identify(model)
    _check_gate(gate, identity, config)
    segments = _segments(config, identity.n_layers)
    if config.storage is not None:
        check_storage(
            config.storage, [f"{name}/{arm}" for name in ids for arm in config.tuned_arms]
        )
    pool = pool or questions
    n_rows = most_rows(config.tuning, pool)
    shaped = with_engine_shape(model, pool, config.tuning, n_rows=n_rows)
    config = replace(config, tuning=shaped)
    unrelated = [] if config.unrelated is None else unrelated_texts(model, config.unrelated)
    log = EngineLog()
    score = Scorer(model, config.tuning, fluency=fluency, log=log)
    folder = None if out is None else open_run_folder(out)
    began = time.perf_counter()
    kept = _Kept()
    lending = Lenders(model, config.tuning, centre=config.centre)
    with lending as lenders, shown(progress) as show:
        try:
            lenders.gather(
                questions,
                (donors or questions) if config.lends else questions,
                block_size=config.block_size,
                log=log,
                progress=show,
            )
            prefixed = "answer_in_prompt" in config.arms
            room = _prefix_room(model, pool, config) if prefixed else 0
            for start in range(0, len(questions), config.block_size):
                bench = Bench(
                    model,
                    config.tuning,
                    lenders,
                    score,
                    log,
                    prefix_room=room,
                    gate=None if gate is None else gate.gate,
                )
                block = [q.id for q in questions[start : start + config.block_size]]
                told = _within(show, done=start, of=len(questions), config=config)
                _run_block(
                    bench, block, config, segments, unrelated, judge, explain, kept, folder, told
                )
                release_freed()
                if kept.interrupted:
                    break
        except KeyboardInterrupt:
            kept.interrupted = True
        failed = [lenders.failures[name] for name in ids if name in lenders.failures]
        lent = lenders.donors if "mismatched" in config.arms else {}
        donated = [lent[name].shared for name in ids if name in lent]
    seed = config.tuning.search.seed
    summary = {
        "schema_version": SCHEMA_VERSION,
        "provenance": asdict(_provenance(identity, config, questions, fluency, gate, command)),
        "questions": {"n": len(questions), **(source or {})},
        "arms": summarise_arms(kept.records, config.arms, kept.n_prepared, seed),
        "comparisons": [asdict(each) for each in compare_arms(kept.records, config.arms, seed)],
        "groups": summarise_groups(kept.records, config.arms, seed),
        "failures": [_failure(failure) for failure in (*failed, *kept.failures)],
        "generic_share": _generic_share(kept.details),
        "donors": {
            "n": len(lenders.generic.of),
            "mismatched": len(donated),
            "sharing_a_word": sum(shared > 0 for shared in donated),
        },
        "judge": {"name": judge.name, "grade": judge.grade, **_costs(judge)},
        "unrelated_tokens": sum(map(n_counted, unrelated)) if config.reach else 0,
        "engine": log.to_dict(),
        "interrupted": kept.interrupted,
        "seconds": round(time.perf_counter() - began, 2),
    }
    if folder is not None:
        save_summary(folder, summary)
    return Results(tuple(kept.records), Summary(summary), tuple(kept.details))


@dataclass(slots=True)
class _Kept:
    """What is kept of the blocks; their studies and deltas go with them. `n_prepared` counts the
    questions whose arms have run."""

    n_prepared: int = 0
    records: list[Result] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    details: list[Detail] = field(default_factory=list)
    interrupted: bool = False


def _run_block(
    bench: Bench,
    names: Sequence[str],
    config: ExperimentConfig,
    segments: Mapping[str, tuple[Segment, ...]],
    unrelated: Sequence[Prompt],
    judge: Judge,
    explain: Explain | None,
    kept: _Kept,
    folder: Path | None,
    progress: Progress | None,
) -> None:
    prepared = [bench.lenders.prepared[name] for name in names if name in bench.lenders.prepared]
    chosen, kept.interrupted = choose(bench, prepared, config.arms, segments, progress=progress)
    nothing = Reach(None, 0, None, 0, None)
    reached = [nothing] * len(chosen)
    if config.reach and not kept.interrupted:
        try:
            reached = measure(bench, chosen, unrelated)
        except KeyboardInterrupt:  # what was searched is kept
            kept.interrupted = True
    verdicts = judge.judge([_judged(bench, each) for each in chosen])
    records = [
        _result(bench, *each, graded=judge.grade)
        for each in zip(chosen, reached, verdicts, strict=True)
    ]
    kept.n_prepared += len(prepared)
    kept.records += records
    kept.failures += [
        Failure(record.question_id, ActivationError(_NOT_FINITE), record.arm)
        for record in records
        if not record.finite
    ]
    _write_block(chosen, records, folder, config.storage)
    try:
        details = details_of(bench, prepared, chosen, explain)
    except KeyboardInterrupt:  # what was scored is kept
        kept.interrupted = True
        return
    if folder is not None:
        append_details(folder, details)
    kept.details += details


def _generic_share(details: Sequence[Detail]) -> dict[str, Any]:
    """The median over questions of the mean over layers."""
    shares = [each.generic_share for each in details if each.generic_share is not None]
    means = [sum(share) / len(share) for share in shares]
    return {"median": median(means) if means else None, "n": len(means)}


def _write_block(
    chosen: Sequence[Chosen],
    records: Sequence[Result],
    folder: Path | None,
    storage: str | None,
) -> None:
    if folder is not None:
        append_results(folder, records)
    for each in chosen:
        if each.tuned is None:
            continue
        question_id = each.prepared.question.id
        if folder is not None:
            save_plan(each.tuned.plan, plan_path(folder, question_id, each.arm))
        if storage is not None:
            export_tuned(each.tuned, storage, f"{question_id}/{each.arm}")


def _segments(config: ExperimentConfig, n_layers: int) -> dict[str, tuple[Segment, ...]]:
    segmented = make_segments(config.segments, n_layers)
    return {
        "full": make_segments("full", n_layers),
        "segmented": segmented,
        "last": segmented[-1:],
    }


def _prefix_room(model: HookedModel, pool: Sequence[Question], config: ExperimentConfig) -> int:
    """Tokens that the longest answer and explanation before a question can take."""
    lengths = []
    for question in pool:
        told = tokenize(model, prefix_of_question(question), prepend_bos=False)
        own = config.tuning.explanation_tokens if question.explanation is None else 0
        lengths.append(len(told.tokens) + own)
    return padded_length(max(lengths))


def _judged(bench: Bench, chosen: Chosen) -> JudgeItem:
    item = chosen.prepared
    written = chosen.graded.completion
    return judge_item(bench.model, item.question, item.prompt, written, bench.config)


def _composite(bench: Bench, overlap: float | None, grade: float | None) -> float | None:
    """As published, what is missing counts 0; else the composite is unscored."""
    if bench.config.metrics == "published":
        return composite(overlap or 0.0, grade)
    return None if overlap is None or grade is None else composite(overlap, grade)


def _result(
    bench: Bench, chosen: Chosen, reach: Reach, verdict: Verdict, *, graded: bool
) -> Result:
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
        **asdict(reach),
        label=verdict.label,
        grade=verdict.grade,
        composite=_composite(bench, scores.overlap, verdict.grade) if graded else None,
        judged=verdict.explanation,
        n_trials=chosen.n_samples if search is None else len(search.trials),
        best_trial=1 if search is None else search.best.number,
        zero_won=None if search is None else search.zero_won,
        tied=None if search is None else search.tied,
        donor=bench.lenders.donors[question.id].id if mismatched else None,
        n_not_finite=(
            int(not scores.completion.finite)
            if search is None
            else sum(not trial.outcome.completion.finite for trial in search.trials)
        ),
        seconds=round(chosen.seconds, 4),
    )


def _costs(judge: Judge) -> dict[str, Any]:
    counts = getattr(judge, "counts", None)
    return {} if counts is None else counts.to_dict()


def _provenance(
    identity: ModelIdentity,
    config: ExperimentConfig,
    questions: Sequence[Question],
    fluency: PerplexityModel | None,
    gate: FittedGate | None,
    command: str | None,
) -> Provenance:
    return Provenance.of(
        identity,
        command=command,
        seed=config.tuning.search.seed,
        questions_sha256=questions_digest(questions),
        settings=_settings(config)
        | {
            "perplexity_model": None if fluency is None else fluency.name,
            "gate": None if gate is None else gate.to_dict(),
        },
        threads=torch.get_num_threads(),
    )


def _check_gate(gate: FittedGate | None, model: ModelIdentity, config: ExperimentConfig) -> None:
    if gate is None:
        needing = [arm for arm in config.tuned_arms if TUNED[arm].gated]
        if needing:
            raise ConfigError(
                f"the arm {needing[0]!r} must be given a gate that was fitted on other questions, "
                "but got none; see question_gates.fit_question_gate."
            )
        return
    reason = gate.model.mismatch(model)
    if reason is not None:
        raise ConfigError(f"a gate must be of the model that is run, but {reason}.")
    if gate.site != "resid_post":
        raise ConfigError(f"the gated arm needs a gate at resid_post, but got {gate.site}.")


def _failure(failure: Failure) -> dict[str, str | None]:
    return {
        "question_id": failure.question_id,
        "arm": failure.arm,
        "error": type(failure.cause).__name__,
        "message": str(failure.cause),
    }


def _settings(config: ExperimentConfig) -> dict[str, Any]:
    settings = asdict(config)
    sampler = config.tuning.search.sampler
    settings["tuning"]["search"]["sampler"] = getattr(sampler, "__qualname__", "TPE")
    # a storage URL may hold a password
    settings["storage"] = config.storage is not None
    settings["unrelated"] = None if config.unrelated is None else config.unrelated.name
    return settings


def _within(
    progress: Progress | None, *, done: int, of: int, config: ExperimentConfig
) -> Progress | None:
    """A block's progress as progress of the whole run."""
    if progress is None:
        return None
    per_question = config.tuning.search.trials * len(config.tuned_arms)
    outer = progress
    return lambda stage, n, _: outer(stage, done * per_question + n, of * per_question)

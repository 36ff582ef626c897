"""The loop over questions and arms: who is still to be run, and what becomes of what was made.

The protocol is the controlled one (docs/method.md): every arm of `arms`, then what each chose on
paraphrases, neighbours and unrelated text. Questions are taken in blocks, so that memory does not
grow with their number; all rounds of a block share one batch. The work is done by an engine
(`workers`): this process, or a cluster. What is done is written by nobody but this loop.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from fusion_lens.arms import TUNED
from fusion_lens.details import Detail
from fusion_lens.divergence import read_text
from fusion_lens.engine_log import EngineLog
from fusion_lens.errors import ActivationError, ConfigError
from fusion_lens.experiment_config import ExperimentConfig
from fusion_lens.identity import ModelIdentity
from fusion_lens.judged_results import judged_result
from fusion_lens.judges import Judge, LexicalJudge
from fusion_lens.lenders import Lenders, Ready, gathered
from fusion_lens.models import HookedModel
from fusion_lens.perplexity import PerplexityModel
from fusion_lens.preparation import Failure
from fusion_lens.progress import Progress, shown
from fusion_lens.questions import Question, questions_digest
from fusion_lens.results import SCHEMA_VERSION, Provenance, Result, Results, Summary
from fusion_lens.run_folder import Made, RunFolder
from fusion_lens.run_identity import identity_of, settings_of
from fusion_lens.run_memory import RunMemory
from fusion_lens.search import check_storage
from fusion_lens.stopping import Stop, stopping
from fusion_lens.summary import compare_arms, summarise_arms, summarise_groups
from fusion_lens.tracing import Explain
from fusion_lens.tuning import export_tuned
from fusion_lens.workers import Engine, InWork, LocalEngine, Setup, Solved, Task, Worker

if TYPE_CHECKING:
    from fusion_lens.methods.dsas import FittedGate

_NOT_FINITE = (
    "the model's logits must be finite, but a step of the completion gave NaN or infinity; "
    "lower the coefficients, or run in a wider dtype."
)
_STOPPING = "stopping when this batch is written; interrupt again to stop at once"


def run(
    model: HookedModel | Engine,
    questions: Sequence[Question],
    config: ExperimentConfig | None = None,
    *,
    out: str | Path | None = None,
    existing: str = "refuse",
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

    `model` may be an engine, which then has `fluency` and `explain` itself. `existing` says what
    becomes of a run that is in `out` already: "refuse", "overwrite", or "resume", which goes on
    where it ended, with the same results as if it never had.

    `pool` is every question of the file, those included that are not run: slots and cache length
    come from it, so that another selection gives the same numbers. `donors` lend their deltas to
    control arms: all questions of the split. Without them both are `questions`. `judge` labels
    what every arm chose (None: by spelling and value). `fluency` measures perplexity (None: the
    unsteered model itself). `explain` tells the features of a plan (`shelves.Explainer`). `gate` is
    that of the gated arm, fitted on other questions (`question_gates`). `source`
    tells where the questions are from and `command` what was typed, for the provenance. `progress`
    as in `tune`.

    A question that fails is listed under `failures` in the summary with its reason, and the run
    goes on. An interrupt (Ctrl-C, SIGTERM) ends the run after the block in work; the summary then
    says `interrupted`. A second one ends it at once, without that block and without a summary.

    Raises:
        ConfigError: if there is no question, two share an id, the metrics are the published ones
            and there is no `fluency`, or the gated arm has no gate that fits.
        PlanError: if the model has fewer layers than segments.
        SearchError: if a search would start outside the range it searches.
        InputFileError: if the unrelated text cannot be read or is too short.
        OutputError: if `out` cannot be written, or holds what must not be replaced.
        ResumeError: if the run in `out` is another one.
        KeyboardInterrupt: if interrupted twice.
    """
    config = config or ExperimentConfig()
    judge = judge or LexicalJudge()
    began = time.perf_counter()
    if not questions:
        raise ConfigError("there must be at least one question to run, but got none.")
    ids = [question.id for question in questions]
    if len(set(ids)) != len(ids):
        raise ConfigError("question ids must be unique, but two questions share one.")
    engine = _engine(model, fluency, explain)
    has = engine.describe()
    _check_gate(gate, has.model, config)
    pool, donors = pool or questions, donors or questions
    text = None if config.unrelated is None else read_text(config.unrelated)
    setup = Setup(
        config,
        gate=None if gate is None else gate.gate,
        unrelated=None if text is None else (text, str(config.unrelated)),
    )
    studies = [f"{name}/{arm}" for name in ids for arm in config.tuned_arms]
    if config.storage is not None and existing != "resume":
        check_storage(config.storage, studies)
    setup = engine.set_up(setup, pool)
    config = setup.config
    settings = settings_of(config, text) | {
        "perplexity_model": has.fluency,
        "gate": None if gate is None else gate.to_dict(),
    }
    with ExitStack() as stack:
        kept: _Kept = RunMemory()
        if out is not None:
            lending = donors if config.lends else None
            identity = identity_of(has, questions, pool, lending, judge=judge, settings=settings)
            kept = stack.enter_context(RunFolder(out, identity, existing=existing))
            if config.storage is not None and existing == "resume" and not kept.resumed:
                check_storage(config.storage, studies)
        stop = stack.enter_context(stopping(_STOPPING))
        loop = _Loop(engine, setup, kept, judge, stop, questions)
        loop.run(donors, stack.enter_context(shown(progress)))
        provenance = Provenance.of(
            has.model,
            command=command,
            seed=config.tuning.search.seed,
            questions_sha256=questions_digest(questions),
            settings=settings,
            threads=has.threads,
        )
        summary = {
            "schema_version": SCHEMA_VERSION,
            "provenance": asdict(provenance),
            "questions": {"n": len(questions), **(source or {})},
            **loop.summary(),
            "seconds": round(time.perf_counter() - began, 2),
        }
        kept.finish(summary, loop.order)
        return Results(tuple(loop.records()), Summary(summary), kept.details())


def _engine(
    model: HookedModel | Engine, fluency: PerplexityModel | None, explain: Explain | None
) -> Engine:
    if not isinstance(model, Engine):
        return LocalEngine(Worker(model, fluency=fluency, explain=explain))
    if fluency is not None or explain is not None:
        raise ConfigError("an engine has fluency and explain itself, but they were given too.")
    return model


@runtime_checkable
class _Kept(Protocol):
    """Where what was made goes."""

    done: set[tuple[str, str]]
    detailed: set[str]
    lent: dict[str, int]
    resumed: bool
    run: str

    def add(self, made: Made) -> None: ...

    def keep_lent(self, lent: Mapping[str, int]) -> None: ...

    def records(self) -> list[Result]: ...

    def details(self) -> tuple[Detail, ...]: ...

    def failures(self) -> list[Failure]: ...

    def finish(self, summary: Mapping[str, Any], order: Mapping[tuple[str, str], int]) -> None: ...


class _Loop:
    """One run: what is still to be done, block by block, and what it came to. `order` is that of
    the results, by question and arm."""

    def __init__(
        self,
        engine: Engine,
        setup: Setup,
        kept: _Kept,
        judge: Judge,
        stop: Stop,
        questions: Sequence[Question],
    ) -> None:
        self._engine = engine
        self._setup = setup
        self._config = setup.config
        self._kept = kept
        self._judge = judge
        self._stop = stop
        self._questions = questions
        self._unprepared: dict[str, Failure] = {}
        self._wanted: set[str] = set()
        self._log = EngineLog()
        self._lent = kept.lent or {"n": 0, "mismatched": 0, "sharing_a_word": 0}
        self._found = len(kept.done)
        # the questions whose arms have run
        self._prepared = {name for name, _ in kept.done}
        pairs = ((question.id, arm) for question in questions for arm in self._config.arms)
        self.order = {pair: n for n, pair in enumerate(pairs)}

    def run(self, donors: Sequence[Question], show: Progress | None) -> None:
        """Everything that is not there yet."""
        config, questions = self._config, self._questions
        wanted: dict[str, tuple[str, ...]] = {}
        for question in questions:
            missing = [arm for arm in config.arms if (question.id, arm) not in self._kept.done]
            if missing:
                wanted[question.id] = tuple(missing)
        if not wanted:
            return
        self._wanted = {*wanted}
        asked = [question for question in questions if question.id in wanted]
        lending = {question.id for question in (donors if config.lends else questions)}
        others: Sequence[Question] = donors if config.lends else ()
        if not config.lends and not wanted.keys() <= self._kept.detailed:
            # a question's details hold it against all others, those that are done among them
            others = questions
        everyone = {q.id: q for q in (*others, *asked)}
        ordered = [everyone[name] for name in sorted(everyone)]
        size = self._engine.block_size(config.block_size, len(ordered))
        blocks = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        seed = config.tuning.search.seed
        lent = gathered(self._ready(blocks, show), lending, seed=seed, centre=config.centre)
        with lent as lenders:
            self._unprepared = {name: lenders.failures[name] for name in lenders.failures}
            # of a run that goes on, only a part may have been prepared
            if not self._kept.lent:
                self._lent = _lent(lenders, [question.id for question in questions], config)
            if self._stop.asked:
                return
            self._kept.keep_lent(self._lent)
            self._solve(wanted, lenders, len(questions), show)

    def records(self) -> list[Result]:
        """All results, in their order."""
        return sorted(self._kept.records(), key=lambda own: self.order[own.question_id, own.arm])

    def summary(self) -> dict[str, Any]:
        """What it came to."""
        records, arms, seed = self.records(), self._config.arms, self._config.tuning.search.seed
        left = self._wanted - self._prepared - self._unprepared.keys()
        return {
            "arms": summarise_arms(records, arms, len(self._prepared), seed),
            "comparisons": [asdict(each) for each in compare_arms(records, arms, seed)],
            "groups": summarise_groups(records, arms, seed),
            "failures": [asdict(each) for each in self._failures(records)],
            "generic_share": _generic_share(self._kept.details()),
            "donors": self._lent,
            "judge": {
                "name": self._judge.name,
                "grade": self._judge.grade,
                **_costs(self._judge),
            },
            "unrelated_tokens": self._setup.unrelated_tokens,
            "engine": self._log.to_dict(),
            "interrupted": self._stop.asked and bool(left),
            "resumed": self._found,
        }

    def _failures(self, records: Sequence[Result]) -> list[Failure]:
        """What could not be prepared, run, or scored: in that order."""
        place = {question.id: n for n, question in enumerate(self._questions)}
        unprepared = [own for name, own in self._unprepared.items() if name in place]
        not_finite = [
            Failure.of(own.question_id, ActivationError(_NOT_FINITE), own.arm)
            for own in records
            if not own.finite
        ]
        return [
            own
            for part in (unprepared, self._kept.failures(), not_finite)
            for own in sorted(part, key=lambda own: place[own.question_id])
        ]

    def _ready(
        self, blocks: Sequence[Sequence[Question]], show: Progress | None
    ) -> Iterator[Ready]:
        done, total = 0, sum(map(len, blocks))
        if show is not None:
            show("preparing", 0, total)
        for block, ready in zip(blocks, self._engine.prepare(blocks), strict=False):
            self._log.add(ready.log)
            done += len(block)
            if show is not None:
                show("preparing", done, total)
            yield ready
            if self._stop.asked:
                return

    def _solve(
        self,
        wanted: Mapping[str, tuple[str, ...]],
        lenders: Lenders,
        n_questions: int,
        show: Progress | None,
    ) -> None:
        able = [name for name in wanted if name in lenders.prepared]
        config = self._config
        searching = len(config.tuned_arms) + ("best_of_n" in config.arms)
        each = {"trials": config.tuning.search.trials * searching}
        if config.reach:
            each["reach"] = len(config.arms)
        done = n_questions - len(wanted)
        in_work: InWork = Counter()
        told: dict[str, int] = {}

        def tell(own: InWork) -> None:
            nonlocal in_work
            in_work = own
            for stage, per_question in each.items():
                # less than was told, where a task is begun again
                now = done * per_question + own[stage]
                if show is not None and told.get(stage) != now:
                    told[stage] = now
                    show(stage, now, n_questions * per_question)

        def tasks() -> Iterator[Task]:
            size = self._engine.block_size(config.block_size, len(able))
            for start in range(0, len(able), size):
                names = able[start : start + size]
                yield Task(
                    tuple((name, arm) for name in names for arm in wanted[name]),
                    tuple(name for name in names if name not in self._kept.detailed),
                    lenders.only(names),
                )

        done += len(wanted) - len(able)
        solving = self._engine.solve(tasks(), stopping=self._stop, progress=tell)
        for solved in solving:
            self._keep(solved, lenders)
            n_done = len({name for name, _ in solved.pairs})
            done += n_done
            tell(in_work - Counter({stage: n_done * own for stage, own in each.items()}))

    def _keep(self, solved: Solved, lenders: Lenders) -> None:
        self._log.add(solved.log)
        verdicts = self._judge.judge([each.item for each in solved.outcomes])
        graded = self._judge.grade
        records = [
            judged_result(each, verdict, lenders, self._config, graded=graded)
            for each, verdict in zip(solved.outcomes, verdicts, strict=True)
        ]
        tuned = {(o.chosen.question_id, o.chosen.arm): o.chosen.tuned for o in solved.outcomes}
        found = {pair: own for pair, own in tuned.items() if own is not None}
        if self._config.storage is not None:
            for (name, arm), own in found.items():
                # who was killed may have handed it over without having kept its result
                export_tuned(own, self._config.storage, f"{name}/{arm}", run=self._kept.run)
        plans = {pair: own.plan for pair, own in found.items()}
        self._kept.add(Made(plans, solved.details, solved.failures, records))
        self._prepared |= {name for name, _ in solved.pairs}


def _lent(lenders: Lenders, names: Sequence[str], config: ExperimentConfig) -> dict[str, int]:
    """How many lend, and how many of these questions have a donor."""
    mismatched = "mismatched" in config.arms
    lent = [lenders.donors[name] for name in names if mismatched and name in lenders.donors]
    return {
        "n": len(lenders.generic.of),
        "mismatched": len(lent),
        "sharing_a_word": sum(donor.shared > 0 for donor in lent),
    }


def _generic_share(details: Sequence[Detail]) -> dict[str, Any]:
    """The median over questions of the mean over layers."""
    shares = [each.generic_share for each in details if each.generic_share is not None]
    means = [sum(share) / len(share) for share in shares]
    return {"median": median(means) if means else None, "n": len(means)}


def _costs(judge: Judge) -> dict[str, Any]:
    counts = getattr(judge, "counts", None)
    return {} if counts is None else counts.to_dict()


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

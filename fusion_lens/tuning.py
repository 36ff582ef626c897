"""Prepared questions -> tuned plans: the one path that `tune` and `run` share.

The trials that every open search asks for in a round are rows of one generation call, whatever
question and arm they belong to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest

from jaxtyping import Int
from torch import Tensor

from fusion_lens.deltas import Deltas
from fusion_lens.engine_log import EngineLog
from fusion_lens.errors import one_of
from fusion_lens.generation import generate
from fusion_lens.graders import Graded
from fusion_lens.gradient_starts import along_gradient, answer_gradient
from fusion_lens.models import HookedModel
from fusion_lens.perplexity import PerplexityModel
from fusion_lens.plans import Gate, Plan, Segment, even_segments, full, make_plan, per_layer, thirds
from fusion_lens.preparation import Prepared, TuningConfig, prepare_one, seed_of, with_engine_shape
from fusion_lens.progress import Progress, shown
from fusion_lens.questions import Question
from fusion_lens.scoring import Scorer
from fusion_lens.search import (
    Coeffs,
    Parameter,
    Search,
    SearchConfig,
    Tuned,
    checked_starts,
    export_study,
)
from fusion_lens.starts import in_segments
from fusion_lens.tables import Section, Shows
from fusion_lens.teacher_forcing import gold_text
from fusion_lens.units import unit_mask


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One search: a prepared question, the segments whose coefficients are sought, the search's
    name, and the vectors (None: the question's own deltas).

    With a `ranking` of units, the first of them alone are injected, and how many is sought too, as
    "k"; a `gate` weighs the injection token by token.
    """

    prepared: Prepared
    segments: tuple[Segment, ...]
    arm: str
    deltas: Deltas | None = None
    ranking: Int[Tensor, "unit 2"] | None = None
    gate: Gate | None = None

    @property
    def extra(self) -> tuple[Parameter, ...]:
        """What is sought beside the coefficients."""
        if self.ranking is None:
            return ()
        return (Parameter("k", 1, len(self.ranking), log=True, whole=True),)

    def search(self, config: TuningConfig) -> SearchConfig:
        """How it is sought: as the config says."""
        return config.search

    def starts(self, model: HookedModel, config: TuningConfig) -> list[Coeffs]:
        """What is tried first: what the config has for the question, and along the gradient."""
        given = config.starts
        named = [
            [in_segments(start, self.segments) for start in starts]
            for starts in (given.of(self.prepared.question.id), given.shared)
        ]
        if given.lengths:
            plan = self.plan({segment.name: 1.0 for segment in self.segments}, config)
            gradient = answer_gradient(model, gold_text(model, self.prepared, plan))
            bounds = self.search(config).bounds
            named.append(along_gradient(gradient, self.segments, given.lengths, bounds))
        return [start for ranked in zip_longest(*named) for start in ranked if start is not None]

    def plan(self, values: Mapping[str, float | int], config: TuningConfig) -> Plan:
        """The plan of one trial; without a "k", of all units that are ranked."""
        deltas = self.deltas or self.prepared.deltas
        coeffs = {segment.name: values[segment.name] for segment in self.segments}
        units = None
        if self.ranking is not None:
            k = int(values.get("k", len(self.ranking)))
            shape = (deltas.model.n_layers, deltas.model.d_model)
            units = unit_mask(self.ranking, k, shape)
        return make_plan(
            deltas,
            coeffs,
            self.segments,
            mean=config.mean,
            positions=config.positions,
            steer_special=config.steer_special,
            units=units,
            gate=self.gate,
        )


@dataclass(frozen=True, slots=True)
class MethodJob:
    """One search for how strongly a fitted method should steer one question.

    `make` gives the plan of "strength", which is drawn from [low, high], and of what is in `extra`.
    A strength of 0 must do nothing.
    """

    prepared: Prepared
    arm: str
    make: Callable[[Mapping[str, float | int]], Plan]
    low: float | int
    high: float | int
    extra: tuple[Parameter, ...] = ()

    @property
    def segments(self) -> tuple[Segment, ...]:
        """One over all layers, by the name of what is sought."""
        return (Segment("strength", 0, self.prepared.deltas.model.n_layers),)

    def search(self, config: TuningConfig) -> SearchConfig:
        """How it is sought: as the config says, in the method's own range."""
        return replace(config.search, low=self.low, high=self.high, parametrisation="coeff")

    def starts(self, model: HookedModel, config: TuningConfig) -> list[Coeffs]:
        """None: those of a config are for coefficients of deltas."""
        return []

    def plan(self, values: Mapping[str, float | int], config: TuningConfig) -> Plan:
        """The plan of one trial; what `values` lack beside the strength is at its highest."""
        return self.make({each.name: each.high for each in self.extra} | dict(values))


AnyJob = Job | MethodJob


@dataclass(frozen=True, slots=True)
class TunedPlan(Shows):
    """A finished search with the plan it chose, and the settings it ran with, the engine's shape
    among them. `seconds` is its share of the wall time, by rows."""

    job: AnyJob
    config: TuningConfig
    tuned: Tuned[Graded]
    plan: Plan
    seconds: float

    @property
    def best(self) -> Graded:
        """What the chosen plan wrote, scored."""
        return self.tuned.best.outcome

    @property
    def unsteered(self) -> Graded | None:
        """What the zero plan wrote, scored; None where it was no trial."""
        first = self.tuned.unsteered
        return None if first is None else first.outcome

    def table(self) -> Section:
        """The steered completion beside the unsteered one, their scores, and what was chosen."""
        question = self.job.prepared.question
        best, n = self.tuned.best, len(self.tuned.trials)
        sought = [f"{name} {value:.3f}" for name, value in best.coeffs.items()]
        sought += [f"{name} {value:g}" for name, value in best.extra.items()]
        told = f"trial {best.number} of {n}; coefficients: {', '.join(sought)}"
        notes = [f"gold: {question.answer}", told]
        if self.tuned.zero_won:
            notes.append("no trial beat the zero plan: this plan does not steer")
        return self.best.beside(self.unsteered, question.question, tuple(notes))


def tune_jobs(
    model: HookedModel,
    jobs: Sequence[AnyJob],
    config: TuningConfig,
    *,
    score: Scorer | None = None,
    progress: Progress | None = None,
    log: EngineLog | None = None,
) -> tuple[list[TunedPlan], bool]:
    """Run many searches side by side; the second value tells whether an interrupt ended them early.

    A search that was interrupted before its first round has no result and is left out.
    """
    searches: list[Search[Graded]] = [_search(model, job, config) for job in jobs]
    seconds = [0.0] * len(jobs)
    score = score or Scorer(model, config, log=log)
    total = len(jobs) * config.search.trials
    told = 0
    interrupted = False
    if progress is not None and jobs:
        progress("trials", 0, total)
    try:
        while not all(search.done for search in searches):
            began = time.perf_counter()
            asked = [search.ask() for search in searches]
            rows = [
                job.prepared.row(config, job.plan(values, config))
                for job, batch in zip(jobs, asked, strict=True)
                for values in batch
            ]
            show = None if progress is None else partial(_show, progress, told, total)
            completions = generate(model, rows, config.generation, progress=show, log=log)
            owners = [job.prepared for job, batch in zip(jobs, asked, strict=True) for _ in batch]
            outcomes = iter(score(owners, completions))
            share = (time.perf_counter() - began) / max(len(rows), 1)
            for i, (search, batch) in enumerate(zip(searches, asked, strict=True)):
                search.tell([next(outcomes) for _ in batch])
                seconds[i] += share * len(batch)
            told += len(rows)
    except KeyboardInterrupt:
        interrupted = True
    return [
        _chosen(job, search.result(interrupted=interrupted), spent, config)
        for job, search, spent in zip(jobs, searches, seconds, strict=True)
        if search.started
    ], interrupted


def tune(
    model: HookedModel,
    question: Question | str,
    answer: str | None = None,
    *,
    segments: str | int | Sequence[Segment] = "thirds",
    config: TuningConfig | None = None,
    fluency: PerplexityModel | None = None,
    progress: Progress | bool = True,
    log: EngineLog | None = None,
) -> TunedPlan:
    """Tune one question's plan: coefficients per segment that make the model say the answer,
    fluently, by `fluency` or the unsteered model itself.

    `progress`: True draws a bar in a notebook or a terminal, False none; a function is called as
    (stage, done, total). An interrupt gives the trials so far (`.tuned.interrupted`) and leaves the
    model without hooks. `log` counts what the engine did for the trials.

    Raises:
        QuestionError: if question or answer is empty.
        SpanError: if the answer is not found in the reference's tokens.
        ContextLengthError: if a text exceeds the context.
        SearchError: if it would start outside the range that is searched.
        KeyboardInterrupt: if interrupted before the first round ended.
    """
    config = config or TuningConfig()
    if isinstance(question, str):
        question = Question(id="question", question=question, answer=answer or "")
    elif answer is not None:
        question = replace(question, answer=answer)
    parts = make_segments(segments, int(model.cfg.n_layers))
    config = with_engine_shape(model, [question], config, n_rows=config.search.round_size)
    job = Job(prepare_one(model, question, config), parts, "tuned")
    score = Scorer(model, config, fluency=fluency, log=log)
    with shown(progress) as show:
        tuned, interrupted = tune_jobs(model, [job], config, score=score, progress=show, log=log)
    if not tuned and interrupted:
        raise KeyboardInterrupt
    return tuned[0]


def export_tuned(tuned: TunedPlan, storage: str, name: str, *, run: str = "") -> None:
    """Hand a finished search to an Optuna storage URL: every trial with its prompt, text and
    scores. It takes the place of a study of that name that is of the same `run`.

    Raises:
        SearchError: if the storage cannot be opened or holds a study of that name.
    """
    prompt = tuned.job.prepared.prompt.text
    answer = tuned.job.prepared.question.answer
    export_study(
        tuned.tuned,
        storage,
        name,
        lambda graded: {
            "prompt": prompt,
            "answer": answer,
            "completion": graded.completion.text,
            "overlap": graded.overlap,
            "exact_match": graded.exact_match,
            "perplexity": graded.perplexity,
            "objective": graded.objective,
        },
        run=run,
    )


def check_starts(config: TuningConfig, segments: Sequence[Segment]) -> None:
    """Make sure that searches over these segments can start where the config says.

    Raises:
        ConfigError: if the starts are of fewer layers than the segments.
        SearchError: if one lies outside the range that is searched.
    """
    given = [*config.starts.shared, *(start for _, own in config.starts.own for start in own)]
    starts = [in_segments(start, segments) for start in given]
    checked_starts(starts, [segment.name for segment in segments], config.search)


def make_segments(segments: str | int | Sequence[Segment], n_layers: int) -> tuple[Segment, ...]:
    """`"full"`, `"thirds"`, `"layers"`, a number of even segments, or segments as they are.

    Raises:
        ConfigError: if the name is unknown.
        PlanError: if there are fewer layers than segments.
    """
    if isinstance(segments, int):
        return even_segments(n_layers, segments)
    if isinstance(segments, str):
        named = {"full": full, "thirds": thirds, "layers": per_layer}
        return named[one_of("segments", segments, tuple(named))](n_layers)
    return tuple(segments)


def _show(progress: Progress, before: int, total: int, done: int) -> None:
    progress("trials", before + done, total)


def _search(model: HookedModel, job: AnyJob, config: TuningConfig) -> Search[Graded]:
    return Search(
        [segment.name for segment in job.segments],
        replace(
            job.search(config),
            # the same for every arm: they differ in vectors and segments only
            seed=seed_of(config.search.seed, job.prepared.question.id, "sampler"),
        ),
        lambda values: job.plan(values, config).injected_norm,
        job.extra,
        job.starts(model, config),
    )


def _chosen(job: AnyJob, tuned: Tuned[Graded], seconds: float, config: TuningConfig) -> TunedPlan:
    return TunedPlan(job, config, tuned, job.plan(tuned.best.values, config), seconds)

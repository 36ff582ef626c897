"""One model -> the arms of any questions: what a run hands out, in this process or in others.

A worker knows nothing of files, of the judge or of other workers. Whatever it is given at once,
every question gets the same numbers: rows of a batch do not see each other, and the engine's shape
is that of the whole file. A question that fails is found by halving what was given, down to one arm
of one question; the rest goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch

from fusion_lens.activations import padded_length
from fusion_lens.arms import TUNED, Bench, Chosen, choose, most_rows, prefix_of_question
from fusion_lens.details import Detail
from fusion_lens.divergence import n_counted, pieces_of
from fusion_lens.engine_log import EngineLog
from fusion_lens.experiment_config import ExperimentConfig
from fusion_lens.identity import ModelIdentity, configuration, identify
from fusion_lens.isolation import Tried, isolated
from fusion_lens.judges import JudgeItem
from fusion_lens.lenders import Lenders, Ready
from fusion_lens.memory import release_freed
from fusion_lens.models import HookedModel
from fusion_lens.perplexity import PerplexityModel
from fusion_lens.plans import Gate, Segment
from fusion_lens.preparation import Failure, Prepared, prepare, with_engine_shape
from fusion_lens.prompts import Prompt, tokenize
from fusion_lens.questions import Question
from fusion_lens.results import running_versions
from fusion_lens.scoring import Scorer, judge_item
from fusion_lens.tracing import Explain, details_of
from fusion_lens.transfer import Reach, measure
from fusion_lens.tuning import check_starts, make_segments

Pair = tuple[str, str]
"""The id of a question, and an arm."""

InWork = Counter[str]
"""What is done of tasks that are in work: "trials", samples among them, and "reach", the choices
whose reach is measured."""

_UNMEASURED = Reach(None, 0, None, 0, None)


@dataclass(frozen=True, slots=True)
class Description:
    """What a worker has: its model, what measures perplexity (None: the model itself), how many
    threads it computes with, what else its results depend on, by content, and what it runs on."""

    model: ModelIdentity
    fluency: str | None
    threads: int
    content: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Setup:
    """What every worker of a run is told once. `config` has numbers for the engine's shape;
    `prefix_room` is the cache that prompts with an answer before them need beyond it; `unrelated`
    is the text that divergence is measured on, and where it is from, `unrelated_tokens` how much of
    it is counted."""

    config: ExperimentConfig
    gate: Gate | None
    unrelated: tuple[str, str] | None
    prefix_room: int = 0
    unrelated_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Task:
    """Questions and their arms to be run together, in order, with what is lent to them;
    `undetailed` are the questions whose details are not known yet."""

    pairs: tuple[Pair, ...]
    undetailed: tuple[str, ...]
    lenders: Lenders

    def only(self, names: Sequence[str]) -> Task:
        """The part of some of its questions."""
        return Task(
            tuple(pair for pair in self.pairs if pair[0] in names),
            tuple(name for name in self.undetailed if name in names),
            self.lenders.only(names),
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one arm chose for one question, how far that reaches, and what a judge is to read."""

    chosen: Chosen
    reach: Reach
    item: JudgeItem


@dataclass(frozen=True, slots=True)
class Solved:
    """A task that is done, or a part of one, and what the engine did for it."""

    pairs: tuple[Pair, ...]
    outcomes: tuple[Outcome, ...]
    details: tuple[Detail, ...]
    failures: tuple[Failure, ...]
    log: EngineLog


@runtime_checkable
class Engine(Protocol):
    """Whoever runs tasks: this process, or a cluster."""

    def describe(self) -> Description:
        """What every worker has."""
        ...

    def set_up(self, setup: Setup, pool: Sequence[Question]) -> Setup:
        """Tell the workers what is run, with the engine's shape for all questions of a file."""
        ...

    def block_size(self, asked: int, n_questions: int) -> int:
        """How many questions make a task where `asked` are asked for."""
        ...

    def prepare(self, blocks: Iterable[Sequence[Question]]) -> Iterator[Ready]:
        """What `preparation.prepare` makes of each block, in their order."""
        ...

    def solve(
        self,
        tasks: Iterable[Task],
        *,
        stopping: Callable[[], bool],
        progress: Callable[[InWork], None],
    ) -> Iterator[Solved]:
        """Tasks as they are done, no more of them begun once `stopping`. `progress` is told what is
        done of those in work."""
        ...


class Worker:
    """A model with what is needed to run any arm of any question on it."""

    def __init__(
        self,
        model: HookedModel,
        *,
        fluency: PerplexityModel | None = None,
        explain: Explain | None = None,
    ) -> None:
        self.model = model
        self._fluency = fluency
        self._explain = explain
        self._halvings = 0

    def describe(self) -> Description:
        """What it has."""
        fluency, explain = self._fluency, self._explain
        content = {
            **configuration(self.model),
            "perplexity_weights": None if fluency is None else fluency.weights,
            # of a function nobody knows more than that it is there
            "explained": getattr(explain, "content", explain is not None),
        }
        name = None if fluency is None else fluency.name
        threads = torch.get_num_threads()
        return Description(identify(self.model), name, threads, content, running_versions())

    def shaped(self, setup: Setup, pool: Sequence[Question]) -> Setup:
        """The same with numbers for slots, cache length and room that serve all these questions.

        Raises:
            ConfigError: if the metrics are the published ones and nothing measures perplexity.
            PlanError: if the model has fewer layers than segments.
            SearchError: if a search would start outside the range it searches.
            InputFileError: if the unrelated text is too short.
        """
        config = setup.config
        n_rows = most_rows(config.tuning, pool)
        tuning = with_engine_shape(self.model, pool, config.tuning, n_rows=n_rows)
        room = 0
        if "answer_in_prompt" in config.arms:
            room = _prefix_room(self.model, pool, config)
        shaped = replace(setup, config=replace(config, tuning=tuning), prefix_room=room)
        self.begin(shaped)
        return replace(shaped, unrelated_tokens=sum(map(n_counted, self._unrelated)))

    def begin(self, setup: Setup) -> None:
        """Take in what is run."""
        config = setup.config
        self._setup = setup
        self._segments = _segments(config, int(self.model.cfg.n_layers))
        self._unrelated: list[Prompt] = []
        if config.reach and setup.unrelated is not None:
            self._unrelated = pieces_of(self.model, *setup.unrelated)
        for arm in config.tuned_arms:
            check_starts(config.tuning, self._segments[TUNED[arm].segments])
        # refuses published metrics that nothing measures
        Scorer(self.model, config.tuning, fluency=self._fluency)

    def prepare(self, questions: Sequence[Question]) -> Ready:
        """`preparation.prepare`, and what failed otherwise by itself."""
        log = EngineLog(halvings=self._halvings)

        def attempt(some: Sequence[Question]) -> Tried[Prepared]:
            return prepare(self.model, some, self._setup.config.tuning, log=log)

        prepared, failed = isolated(
            attempt, questions, lambda question, error: Failure.of(question.id, error), log
        )
        self._halvings = log.halvings
        return Ready(prepared, failed, log)

    def solve(self, task: Task, progress: Callable[[InWork], None] | None = None) -> Solved:
        """All arms of a task, and the details of its questions. `progress` is told what is done."""
        log = EngineLog(halvings=self._halvings)
        setup, prepared = self._setup, task.lenders.prepared
        bench = Bench(
            self.model,
            setup.config.tuning,
            task.lenders,
            Scorer(self.model, setup.config.tuning, fluency=self._fluency, log=log),
            log,
            prefix_room=setup.prefix_room,
            gate=setup.gate,
        )

        def run(pairs: Sequence[Pair]) -> Tried[Outcome]:
            made: list[Outcome] = []
            before: InWork = Counter()
            for arms, names in _alike(pairs):
                tally = _Tally(before, progress)
                made += self._outcomes(bench, [prepared[name] for name in names], arms, tally)
                before = tally.done
            return made, []

        outcomes, failed = isolated(
            run, task.pairs, lambda pair, error: Failure.of(pair[0], error, pair[1]), log
        )

        def tell(names: Sequence[str]) -> Tried[Detail]:
            chosen = [one.chosen for one in outcomes if one.chosen.question_id in names]
            items = [prepared[name] for name in names]
            return details_of(bench, items, chosen, self._explain), []

        details, untold = isolated(tell, task.undetailed, Failure.of, log)
        self._halvings = log.halvings
        release_freed()
        return Solved(task.pairs, tuple(outcomes), tuple(details), (*failed, *untold), log)

    def _outcomes(
        self,
        bench: Bench,
        items: Sequence[Prepared],
        arms: Sequence[str],
        tally: _Tally,
    ) -> list[Outcome]:
        chosen = choose(bench, items, arms, self._segments, progress=partial(tally.tell, "trials"))
        reached = [_UNMEASURED] * len(chosen)
        if self._setup.config.reach:
            told = partial(tally.tell, "reach")
            reached = measure(bench, chosen, self._unrelated, progress=told)
        return [
            Outcome(each, reach, self._item(each))
            for each, reach in zip(chosen, reached, strict=True)
        ]

    def _item(self, chosen: Chosen) -> JudgeItem:
        item, written = chosen.prepared, chosen.graded.completion
        config = self._setup.config.tuning
        return judge_item(self.model, item.question, item.prompt, written, config)


class _Tally:
    """Some arms of some questions, after what was done `before`."""

    def __init__(self, before: InWork, progress: Callable[[InWork], None] | None) -> None:
        self.done = before
        self._before = before
        self._progress = progress

    def tell(self, stage: str, done: int) -> None:
        """So many of one kind."""
        self.done = Counter({**self.done, stage: self._before[stage] + done})
        if self._progress is not None:
            self._progress(self.done)


class LocalEngine:
    """One worker in this process, a task after the other."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def describe(self) -> Description:
        """See `Engine`."""
        return self._worker.describe()

    def set_up(self, setup: Setup, pool: Sequence[Question]) -> Setup:
        """See `Engine`."""
        return self._worker.shaped(setup, pool)

    def block_size(self, asked: int, n_questions: int) -> int:
        """As asked: all rounds of a block share one batch."""
        return asked

    def prepare(self, blocks: Iterable[Sequence[Question]]) -> Iterator[Ready]:
        """See `Engine`."""
        return map(self._worker.prepare, blocks)

    def solve(
        self,
        tasks: Iterable[Task],
        *,
        stopping: Callable[[], bool],
        progress: Callable[[InWork], None],
    ) -> Iterator[Solved]:
        """See `Engine`."""
        for task in tasks:
            yield self._worker.solve(task, progress)
            if stopping():
                return


def _alike(pairs: Sequence[Pair]) -> list[tuple[tuple[str, ...], list[str]]]:
    """The questions of each selection of arms."""
    wanted: dict[str, tuple[str, ...]] = {}
    for name, arm in pairs:
        wanted[name] = (*wanted.get(name, ()), arm)
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, arms in wanted.items():
        groups.setdefault(arms, []).append(name)
    return list(groups.items())


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

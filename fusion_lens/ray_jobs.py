"""What an actor is given to do, and what becomes of it when the actor dies.

A job that has lost actors is done again, then halved, down to one question; one that still costs
its actor then is a failure. All it knows of Ray is that an actor's methods are called by `remote`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fusion_lens.engine_log import EngineLog
from fusion_lens.lenders import Ready
from fusion_lens.preparation import Failure
from fusion_lens.questions import Question
from fusion_lens.workers import Solved, Task

_TOGETHER, _ALONE = 2, 5
"""How often a task may lose its actor before it is halved, and when it is of one question."""


@dataclass(frozen=True, slots=True)
class Preparing:
    """A block of questions to be prepared, of a number, that has lost so many actors."""

    number: int
    deaths: int
    block: tuple[Question, ...]

    def on(self, actor: Any) -> Any:
        """Given to an actor: the reference of what comes of it."""
        return actor.prepare.remote(self.block)

    def after_death(self) -> list[Job]:
        """What is done again."""
        parts = [self.block[part] for part in _cut(len(self.block), self.deaths + 1)]
        return [Preparing(self.number, _deaths_of(self, len(p), len(parts)), p) for p in parts]

    def failed(self) -> Ready:
        """Where nothing is done again."""
        failures = [Failure.of(question.id, _killed(self.deaths + 1)) for question in self.block]
        return Ready((), failures, EngineLog())


@dataclass(frozen=True, slots=True)
class Solving:
    """A task of a number that has lost so many actors."""

    number: int
    deaths: int
    task: Task

    def on(self, actor: Any) -> Any:
        """Given to an actor: the reference of what comes of it."""
        return actor.solve.remote(self.task)

    def after_death(self) -> list[Job]:
        """What is done again."""
        names = list(dict.fromkeys(name for name, _ in self.task.pairs))
        parts = [names[part] for part in _cut(len(names), self.deaths + 1)]
        return [
            Solving(self.number, _deaths_of(self, len(p), len(parts)), self.task.only(p))
            for p in parts
        ]

    def failed(self) -> Solved:
        """Where nothing is done again."""
        cause = _killed(self.deaths + 1)
        failures = [Failure.of(name, cause, arm) for name, arm in self.task.pairs]
        return Solved(self.task.pairs, (), (), tuple(failures), EngineLog())


Job = Preparing | Solving


def _cut(size: int, deaths: int) -> list[slice]:
    """What of a job that has lost so many actors is done again, and how it is divided."""
    if size == 1:
        return [] if deaths >= _ALONE else [slice(0, 1)]
    if deaths < _TOGETHER:
        return [slice(0, size)]
    return [slice(0, size // 2), slice(size // 2, size)]


def _deaths_of(job: Job, size: int, n_parts: int) -> int:
    """How many a part of a job is held to have cost: those of its own question when it is alone,
    and so many that it is halved again otherwise."""
    if n_parts == 1:
        return job.deaths + 1
    return 0 if size == 1 else _TOGETHER - 1


def _killed(deaths: int) -> RuntimeError:
    return RuntimeError(
        f"a question must leave its worker alive, but {deaths} died over this one; "
        "the machine's or Ray's log says of what, most often of too little memory."
    )


def joined(parts: Sequence[Ready]) -> Ready:
    """A block that was prepared in parts."""
    if len(parts) == 1:
        return parts[0]
    prepared = [own for part in parts for own in part.prepared]
    prepared.sort(key=lambda own: own.question.id)
    log = EngineLog()
    for part in parts:
        log.add(part.log)
    return Ready(prepared, [own for part in parts for own in part.failed], log)

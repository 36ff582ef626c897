"""A run's tasks on the machines of a Ray cluster, or in several processes of this one.

An actor has one worker: its model is opened once. Tasks are pulled by whoever is free. An actor
that dies, of a kill, a lost machine or too little memory, is replaced and its task done again; what
kills one after the other is halved, and a question that does so alone is a failure. Results do not
depend on who made them: every actor computes with the same number of threads at the same shape.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from fusion_lens.engine_log import EngineLog
from fusion_lens.errors import ConfigError, MissingExtraError
from fusion_lens.lenders import Ready
from fusion_lens.preparation import Failure
from fusion_lens.questions import Question
from fusion_lens.workers import Description, InWork, Setup, Solved, Task, Worker

_LOG = logging.getLogger(__name__)
_BLOCKS_EACH = 4
"""Tasks for each actor, so that none waits long for the last, where they are many."""
_FILLS = 8
_TOGETHER, _ALONE = 2, 5
"""How often a task may lose its actor before it is halved, and when it is of one question."""
_PAUSE = 1.0


def start_ray(n_cpus: int, address: str | None = None) -> None:
    """Connect to a cluster, or start Ray on this machine with room for that many cores at least.

    Raises:
        MissingExtraError: if Ray is not installed.
    """
    ray = _ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is not None:
        ray.init(address=address, logging_level="error", log_to_driver=False)
        return
    # workers compute like a run in this process: Ray's give way to everything else
    os.environ.setdefault("RAY_worker_niceness", "0")
    # "local": not one that happens to run here, which may be somebody else's
    quiet = {"include_dashboard": False, "logging_level": "error", "log_to_driver": False}
    ray.init("local", num_cpus=max(n_cpus, os.cpu_count() or 1), **quiet)


class RayEngine:
    """Workers as Ray actors; use as a context manager.

    `make` opens a worker and is called in every actor: a `Recipe`, or any function that can be
    pickled. `address` is that of a cluster ("auto": the one that was started here; None: processes
    of this machine, which end with the engine). An actor has `threads` CPU cores and
    `gpus_per_worker` GPUs, of which a part is allowed.

    Raises:
        ConfigError: if there is no worker or no thread, or a cluster has no room for one.
        MissingExtraError: if Ray is not installed.
    """

    def __init__(
        self,
        make: Callable[[], Worker],
        *,
        workers: int = 2,
        address: str | None = None,
        gpus_per_worker: float | int = 0.0,
        threads: int = 1,
    ) -> None:
        for name, value in (("workers", workers), ("threads", threads)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, but got {value}.")
        if gpus_per_worker < 0:
            raise ConfigError(f"gpus_per_worker must be 0 or above, but got {gpus_per_worker}.")
        self._ray = _ray()
        self._actors: list[Any] = []
        self._make = make
        self._threads = threads
        self._setup: Setup | None = None
        self._gpus = gpus_per_worker
        self._started = not self._ray.is_initialized()
        if self._started:
            start_ray(workers * threads, address)
        self._actors = [self._actor() for _ in range(self._fitting(workers))]

    @property
    def workers(self) -> int:
        """How many actors there are."""
        return len(self._actors)

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the actors, and Ray where it was started for them."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []
        if self._started:
            self._ray.shutdown()

    def describe(self) -> Description:
        """See `Engine`."""
        found: Description = self._ask("describe")
        return found

    def set_up(self, setup: Setup, pool: Sequence[Question]) -> Setup:
        """See `Engine`."""
        shaped: Setup = self._ask("shaped", setup, pool)
        # who is made from now on knows it
        self._setup = shaped
        told = [actor.begin.remote(shaped) for actor in self._actors]
        for place, each in enumerate(told):
            try:
                self._got(each)
            except self._ray.exceptions.RayActorError as error:
                self._replace(self._actors[place], error)
        return shaped

    def block_size(self, asked: int, n_questions: int) -> int:
        """As asked, or fewer where some would have none; few enough to end at one time, but no
        fewer than keep the slots of a worker full; and all workers have as many blocks."""
        n = len(self._actors)
        wanted = max(-(-n_questions // (_BLOCKS_EACH * n)), self._filling())
        size = max(1, min(asked, -(-n_questions // n), wanted))
        each = max(-(-n_questions // (asked * n)), round(n_questions / (size * n)), 1)
        return -(-n_questions // (each * n))

    def prepare(self, blocks: Iterable[Sequence[Question]]) -> Iterator[Ready]:
        """See `Engine`."""
        parts: dict[int, list[Ready]] = {}
        sizes: dict[int, int] = {}
        awaited = 0

        def jobs() -> Iterator[_Job]:
            for number, block in enumerate(blocks):
                sizes[number] = len(block)
                yield _Preparing(number, 0, tuple(block))

        for job, ready in self._each(jobs(), stopping=lambda: False, progress=lambda n: None):
            parts.setdefault(job.number, []).append(ready)
            while awaited in parts:
                own = parts[awaited]
                if sum(len(each.prepared) + len(each.failed) for each in own) < sizes[awaited]:
                    break
                yield _joined(parts.pop(awaited))
                awaited += 1

    def solve(
        self,
        tasks: Iterable[Task],
        *,
        stopping: Callable[[], bool],
        progress: Callable[[InWork], None],
    ) -> Iterator[Solved]:
        """See `Engine`; in the order in which they are done."""
        jobs = (_Solving(number, 0, task) for number, task in enumerate(tasks))
        for _, solved in self._each(jobs, stopping=stopping, progress=progress):
            yield solved

    def _each(
        self,
        jobs: Iterator[_Job],
        *,
        stopping: Callable[[], bool],
        progress: Callable[[InWork], None],
    ) -> Iterator[tuple[_Job, Any]]:
        """Jobs with what they came to, as they are done; each actor has one at a time."""
        again: deque[_Job] = deque()
        flying: dict[Any, tuple[Any, _Job]] = {}
        idle = list(self._actors)
        told = _Told(self._ray, progress)
        while True:
            while idle and not stopping():
                job = again.popleft() if again else next(jobs, None)
                if job is None:
                    break
                actor = idle.pop()
                flying[job.on(actor)] = actor, job
            if not flying:
                return
            done, _ = self._ray.wait(list(flying), num_returns=1, timeout=_PAUSE)
            told.ask([actor for actor, _ in flying.values()])
            for each in done:
                actor, job = flying.pop(each)
                told.forget(actor)
                try:
                    made = self._got(each)
                except self._ray.exceptions.RayActorError as error:
                    idle.append(self._replace(actor, error))
                    parts = job.after_death()
                    again.extend(parts)
                    if not parts:
                        yield job, job.failed()
                    continue
                idle.append(actor)
                yield job, made

    def _filling(self) -> int:
        """Questions whose rows fill all slots some times over: idle slots cost as much as busy
        ones, and there are some at the end of every round."""
        if self._setup is None:
            return 1
        config = self._setup.config
        rows = config.tuning.search.round_size * max(1, len(config.tuned_arms))
        return -(-_FILLS * (config.tuning.generation.slots or 1) // rows)

    def _fitting(self, workers: int) -> int:
        """As many as asked for, or as there is room for."""
        there = self._ray.cluster_resources()
        needed = {"CPU": float(self._threads), "GPU": self._gpus}
        room = min(int(there.get(kind, 0.0) / n) for kind, n in needed.items() if n)
        if room < 1:
            self.close()
            raise ConfigError(
                f"the cluster must have {self._threads} CPU cores and {self._gpus:g} GPUs for a "
                f"worker, but has {there.get('CPU', 0):g} and {there.get('GPU', 0):g} in all."
            )
        if room < workers:
            _LOG.warning("there is room for %d of %d workers; the run has those", room, workers)
        return min(workers, room)

    def _ask(self, method: str, *args: Any) -> Any:
        for _ in range(_ALONE):
            try:
                return self._got(getattr(self._actors[0], method).remote(*args))
            except self._ray.exceptions.RayActorError as error:
                self._replace(self._actors[0], error)
        raise ConfigError(
            f"a worker must be able to open its model, but {_ALONE} died of it in a row; "
            "see Ray's logs, and give each more memory."
        )

    def _got(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            # what the worker raised, without Ray's frames around it
            raise error.cause from None

    def _replace(self, actor: Any, error: Exception) -> Any:
        """A new actor in the place of one that died."""
        place = self._actors.index(actor)
        reason = str(error).strip().split("\n")[0]
        _LOG.warning("worker %d of %d died and is replaced: %s", place + 1, self.workers, reason)
        self._actors[place] = self._actor()
        return self._actors[place]

    def _actor(self) -> Any:
        options = {
            "num_cpus": self._threads,
            "num_gpus": self._gpus,
            "max_restarts": 0,
            # one of them tells how far the other has come
            "max_concurrency": 2,
            # read when a process starts: products of more threads than cores are slow beyond use
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(self._threads)}},
        }
        made = self._ray.remote(_Actor).options(**options)
        return made.remote(self._make, self._threads, self._setup)


class _Actor:
    """A worker in a process of its own."""

    def __init__(self, make: Callable[[], Worker], threads: int, setup: Setup | None) -> None:
        self._fault: Exception | None = None
        self._done: InWork = Counter()
        torch.set_num_threads(threads)
        try:
            self._worker = make()
            if setup is not None:
                self._worker.begin(setup)
        except Exception as error:
            # told by whatever is asked first: an actor that does not start is started again
            self._fault = error

    def describe(self) -> Description:
        return self._opened().describe()

    def shaped(self, setup: Setup, pool: Sequence[Question]) -> Setup:
        return self._opened().shaped(setup, pool)

    def begin(self, setup: Setup) -> None:
        self._opened().begin(setup)

    def prepare(self, questions: Sequence[Question]) -> Ready:
        return self._opened().prepare(questions)

    def solve(self, task: Task) -> Solved:
        self._done = Counter()
        return self._opened().solve(task, self._tell)

    def home(self) -> tuple[str, int]:
        """The machine of the cluster that it is on, and its process there."""
        return _ray().get_runtime_context().get_node_id(), os.getpid()

    def done(self) -> InWork:
        """What is done of the task in work."""
        return self._done

    def _tell(self, done: InWork) -> None:
        self._done = done

    def _opened(self) -> Worker:
        if self._fault is not None:
            raise self._fault
        return self._worker


class _Told:
    """What is done of all tasks in work, as far as actors have answered."""

    def __init__(self, ray: Any, progress: Callable[[InWork], None]) -> None:
        self._ray = ray
        self._progress = progress
        self._asked: dict[Any, Any] = {}
        self._done: dict[Any, InWork] = {}

    def ask(self, actors: Sequence[Any]) -> None:
        """Take in what was answered, and ask those that have."""
        for actor in actors:
            asked = self._asked.get(actor)
            if asked is not None:
                ready, _ = self._ray.wait([asked], timeout=0)
                if not ready:
                    continue
                try:
                    self._done[actor] = self._ray.get(asked)
                except self._ray.exceptions.RayError:
                    continue
            self._asked[actor] = actor.done.remote()
        self._progress(sum(self._done.values(), Counter()))

    def forget(self, actor: Any) -> None:
        """Its task is done."""
        self._done.pop(actor, None)
        self._asked.pop(actor, None)


@dataclass(frozen=True, slots=True)
class _Preparing:
    number: int
    deaths: int
    block: tuple[Question, ...]

    def on(self, actor: Any) -> Any:
        return actor.prepare.remote(self.block)

    def after_death(self) -> list[_Job]:
        """What is done again."""
        cut = _cut(len(self.block), self.deaths + 1)
        parts = [self.block[part] for part in cut]
        return [_Preparing(self.number, self.deaths + 1, part) for part in parts]

    def failed(self) -> Ready:
        """Where nothing is done again."""
        failures = [Failure.of(question.id, _killed(self.deaths + 1)) for question in self.block]
        return Ready((), failures, EngineLog())


@dataclass(frozen=True, slots=True)
class _Solving:
    number: int
    deaths: int
    task: Task

    def on(self, actor: Any) -> Any:
        return actor.solve.remote(self.task)

    def after_death(self) -> list[_Job]:
        """What is done again."""
        names = list(dict.fromkeys(name for name, _ in self.task.pairs))
        parts = [names[part] for part in _cut(len(names), self.deaths + 1)]
        return [_Solving(self.number, self.deaths + 1, self.task.only(part)) for part in parts]

    def failed(self) -> Solved:
        """Where nothing is done again."""
        cause = _killed(self.deaths + 1)
        failures = [Failure.of(name, cause, arm) for name, arm in self.task.pairs]
        return Solved(self.task.pairs, (), (), tuple(failures), EngineLog())


_Job = _Preparing | _Solving


def _cut(size: int, deaths: int) -> list[slice]:
    """What of a job that has lost so many actors is done again, and how it is divided."""
    if size == 1:
        return [] if deaths >= _ALONE else [slice(0, 1)]
    if deaths < _TOGETHER:
        return [slice(0, size)]
    return [slice(0, size // 2), slice(size // 2, size)]


def _killed(deaths: int) -> RuntimeError:
    return RuntimeError(
        f"a question must leave its worker alive, but {deaths} died over this one; "
        "the machine's or Ray's log says of what, most often of too little memory."
    )


def _joined(parts: Sequence[Ready]) -> Ready:
    if len(parts) == 1:
        return parts[0]
    prepared = [own for part in parts for own in part.prepared]
    prepared.sort(key=lambda own: own.question.id)
    log = EngineLog()
    for part in parts:
        log.add(part.log)
    return Ready(prepared, [own for part in parts for own in part.failed], log)


def _ray() -> Any:
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise MissingExtraError("ray", "ray") from error
    return ray

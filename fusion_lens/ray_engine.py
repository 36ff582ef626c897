"""A run's tasks on the machines of a Ray cluster, or in several processes of this one.

An actor has one worker: its model is opened once. Tasks are pulled by whoever is free. An actor
that dies, of a kill, a lost machine or too little memory, is replaced and its task done again; what
kills one after the other is halved, and a question that does so alone is a failure. Results do not
depend on who made them: every actor computes with the same number of threads at the same shape.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from types import TracebackType
from typing import Any

import torch

from fusion_lens.errors import ConfigError, DeviceError, MissingExtraError
from fusion_lens.lenders import Ready
from fusion_lens.questions import Question
from fusion_lens.ray_jobs import Job, Preparing, Solving, joined
from fusion_lens.workers import Description, InWork, Setup, Solved, Task, Worker

_LOG = logging.getLogger(__name__)
_BLOCKS_EACH = 4
"""Tasks for each actor, so that none waits long for the last, where they are many."""
_FILLS = 8
_STILLBORN = 5
"""How many may die in a row for each worker, before they were of use."""
_PAUSE = 1.0
_SILENCE = 60.0
"""Seconds after which it is said that nothing comes."""


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
        ConfigError: if there is no worker or no thread, GPUs are neither whole nor a part of one,
            or a cluster has no room for a worker.
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
        if gpus_per_worker < 0 or (gpus_per_worker > 1 and gpus_per_worker % 1):
            raise ConfigError(
                "gpus_per_worker must be a whole number or a part of one GPU, but got "
                f"{gpus_per_worker}."
            )
        self._ray = _ray()
        self._actors: list[Any] = []
        self._make = make
        self._threads = threads
        self._setup: Setup | None = None
        self._described: Description | None = None
        self._stillborn = 0
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
        """See `Engine`; all workers have the same.

        Raises:
            ConfigError: if they have not, or cannot be opened.
        """
        for place in range(self.workers):
            self._know(self._asked(place, "describe"))
        assert self._described is not None
        return self._described

    def set_up(self, setup: Setup, pool: Sequence[Question]) -> Setup:
        """See `Engine`."""
        shaped: Setup = self._asked(0, "shaped", setup, pool)
        # who is made from now on knows it
        self._setup = shaped
        for place in range(self.workers):
            self._asked(place, "begin", shaped)
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

        def jobs() -> Iterator[Job]:
            for number, block in enumerate(blocks):
                sizes[number] = len(block)
                yield Preparing(number, 0, tuple(block))

        for job, ready in self._each(jobs(), stopping=lambda: False, progress=lambda n: None):
            parts.setdefault(job.number, []).append(ready)
            while awaited in parts:
                own = parts[awaited]
                if sum(len(each.prepared) + len(each.failed) for each in own) < sizes[awaited]:
                    break
                yield joined(parts.pop(awaited))
                awaited += 1

    def solve(
        self,
        tasks: Iterable[Task],
        *,
        stopping: Callable[[], bool],
        progress: Callable[[InWork], None],
    ) -> Iterator[Solved]:
        """See `Engine`; in the order in which they are done."""
        jobs = (Solving(number, 0, task) for number, task in enumerate(tasks))
        for _, solved in self._each(jobs, stopping=stopping, progress=progress):
            yield solved

    def _each(
        self,
        jobs: Iterator[Job],
        *,
        stopping: Callable[[], bool],
        progress: Callable[[InWork], None],
    ) -> Iterator[tuple[Job, Any]]:
        """Jobs with what they came to, as they are done; each actor has one at a time, and a new
        actor none before it is up."""
        again: deque[Job] = deque()
        flying: dict[Any, tuple[Any, Job]] = {}
        opening: dict[Any, Any] = {}
        idle = list(self._actors)
        told = _Told(self._ray, progress)
        more = True

        def replaced(actor: Any, error: Exception) -> None:
            new = self._replace(actor, error)
            opening[new.describe.remote()] = new

        try:
            while True:
                while idle and not stopping():
                    job = again.popleft() if again else next(jobs, None)
                    if job is None:
                        more = False
                        break
                    actor = idle.pop()
                    flying[job.on(actor)] = actor, job
                if not flying and (stopping() or not (more or again)):
                    return
                done, _ = self._ray.wait([*flying, *opening], num_returns=1, timeout=_PAUSE)
                told.ask([actor for actor, _ in flying.values()], something=bool(done))
                for each in done:
                    if each in opening:
                        actor = opening.pop(each)
                        try:
                            self._know(self._got(each))
                        except self._deaths as error:
                            replaced(actor, error)
                        else:
                            idle.append(actor)
                        continue
                    actor, job = flying.pop(each)
                    told.forget(actor)
                    try:
                        made = self._got(each)
                    except self._deaths as error:
                        replaced(actor, error)
                        parts = job.after_death()
                        again.extend(parts)
                        if not parts:
                            yield job, job.failed()
                        continue
                    idle.append(actor)
                    yield job, made
        finally:
            # whoever ends this early, an interrupt say, must not leave them at work
            for actor, _ in flying.values():
                self._renew(actor)

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
        there = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        room = sum(_room(node, self._threads, self._gpus) for node in there)
        if room < 1:
            self.close()
            cpus, gpus = (max(node.get(kind, 0.0) for node in there) for kind in ("CPU", "GPU"))
            raise ConfigError(
                f"a machine of the cluster must have {self._threads} CPU cores and {self._gpus:g} "
                f"GPUs for a worker, but the largest has {cpus:g} and {gpus:g}."
            )
        if room < workers:
            _LOG.warning("there is room for %d of %d workers; the run has those", room, workers)
        return min(workers, room)

    @property
    def _deaths(self) -> tuple[type[Exception], ...]:
        """How it is told that an actor is gone, or of no more use."""
        raised = self._ray.exceptions
        return (
            *(raised.RayActorError, raised.OutOfMemoryError, raised.NodeDiedError),
            *(raised.WorkerCrashedError, raised.ObjectLostError, DeviceError),
        )

    def _asked(self, place: int, method: str, *args: Any) -> Any:
        """What an actor answers, or who takes its place."""
        while True:
            actor = self._actors[place]
            try:
                reference = getattr(actor, method).remote(*args)
                self._wait_for(reference)
                answer = self._got(reference)
            except self._deaths as error:
                self._replace(actor, error)
            else:
                self._stillborn = 0
                return answer

    def _wait_for(self, reference: Any) -> None:
        waited = 0.0
        while not self._ray.wait([reference], timeout=_SILENCE)[0]:
            waited += _SILENCE
            _LOG.warning(
                "no worker has been up for %.0f s: it opens its model, or waits for cores and "
                "GPUs that others have",
                waited,
            )

    def _got(self, reference: Any) -> Any:
        raised = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except raised.RayTaskError as error:
            # what the worker raised, without Ray's frames around it
            raise error.cause from None
        except self._deaths:
            raise
        except raised.RayError as error:
            raise ConfigError(
                f"Ray must be able to run a worker, but: {_first_line(error)}"
            ) from error

    def _know(self, described: Description) -> None:
        """Take in what an actor has.

        Raises:
            ConfigError: if it is not what the others have.
        """
        self._stillborn = 0
        known = self._described = self._described or described
        for each in fields(described):
            mine, theirs = getattr(known, each.name), getattr(described, each.name)
            if mine != theirs:
                raise ConfigError(
                    f"all workers must have the same {each.name}, but one has {mine!r:.300} and "
                    f"another {theirs!r:.300}."
                )

    def _replace(self, actor: Any, error: Exception) -> Any:
        """A new actor in the place of one that died.

        Raises:
            ConfigError: if too many died in a row before they were of use.
        """
        self._stillborn += 1
        if self._stillborn > _STILLBORN * self.workers:
            raise ConfigError(
                f"a worker must be able to open its model, but {self._stillborn} died in a row; "
                f"see Ray's logs, and give each more memory: {_first_line(error)}"
            )
        place = self._actors.index(actor) + 1
        _LOG.warning(
            "worker %d of %d died and is replaced: %s", place, self.workers, _first_line(error)
        )
        return self._renew(actor)

    def _renew(self, actor: Any) -> Any:
        """Another in its place; it may be alive."""
        self._ray.kill(actor)
        place = self._actors.index(actor)
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
        self._heard = time.monotonic()

    def ask(self, actors: Sequence[Any], *, something: bool) -> None:
        """Take in what was answered, and ask those that have; with `something` a task is done."""
        before = dict(self._done)
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
        now = time.monotonic()
        if something or self._done != before:
            self._heard = now
        elif now - self._heard > _SILENCE:
            self._heard = now
            _LOG.warning("no worker has come further for %.0f s", _SILENCE)
        self._progress(sum(self._done.values(), Counter()))

    def forget(self, actor: Any) -> None:
        """Its task is done."""
        self._done.pop(actor, None)
        self._asked.pop(actor, None)


def _room(node: Mapping[str, float], threads: int, gpus: float | int) -> int:
    """How many workers a machine has room for; no part of a worker's GPU is on another one."""
    cores = int(node.get("CPU", 0.0) / threads)
    own = node.get("GPU", 0.0)
    if not gpus:
        return cores
    fitting = int(own) * int(1 / gpus + 1e-9) if gpus < 1 else int(own / gpus)
    return min(cores, fitting)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _ray() -> Any:
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise MissingExtraError("ray", "ray") from error
    return ray

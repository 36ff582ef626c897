"""With real Ray, on processes of this machine."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from ray_runs import CONFIG, QUESTIONS, comparable

from fusion_lens import ray_engine, ray_jobs, workers
from fusion_lens.errors import ConfigError, ModelError
from fusion_lens.experiment import run
from fusion_lens.models import HookedModel
from fusion_lens.ray_engine import RayEngine, start_ray
from fusion_lens.recipes import Recipe
from fusion_lens.workers import Setup, Solved, Task, Worker

ray: Any = pytest.importorskip("ray", reason="Ray is an extra of its own")


@dataclass(frozen=True)
class Cursed:
    """A worker of the tiny model under what lies in a folder when it is given a task: every file
    "life..." costs a life, once; "fatal" holds a question's id; "rest" how long it rests over a
    question, in seconds; with "broken" nothing goes on from there."""

    recipe: Recipe
    folder: str

    def __call__(self) -> Worker:
        return _Cursed(self.recipe.opened(), Path(self.folder))


def _breaks(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


class _Cursed(Worker):
    def __init__(self, model: HookedModel, folder: Path) -> None:
        super().__init__(model)
        self._folder = folder

    def solve(self, task: Task, progress: Any = None) -> Solved:
        names = {name for name, _ in task.pairs}
        if self._told("fatal") in names:
            os.kill(os.getpid(), signal.SIGKILL)
        for life in self._folder.glob("life*"):
            life.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if self._told("broken") is not None:
            (self._folder / "broken").unlink()
            workers.choose = _breaks
        time.sleep(float(self._told("rest") or 0) * len(names))
        return super().solve(task, progress)

    def _told(self, name: str) -> str | None:
        path = self._folder / name
        return path.read_text("utf-8") if path.is_file() else None


@pytest.fixture(scope="module")
def started() -> Iterator[None]:
    """One Ray for all tests: engines use what runs. Actors cannot import this file."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    start_ray(8)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def recipe(tiny_folder: Path) -> Recipe:
    return Recipe(str(tiny_folder), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def curses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("curses")


@pytest.fixture(scope="module")
def pair(started: None, recipe: Recipe, curses: Path) -> Iterator[RayEngine]:
    """Two workers whose models are open: to open them takes longer than any test."""
    with RayEngine(Cursed(recipe, str(curses)), workers=2) as engine:
        ray.get([actor.describe.remote() for actor in engine._actors])
        yield engine


@pytest.fixture
def single(pair: RayEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[RayEngine]:
    """The first of the two alone."""
    both = pair._actors
    pair._actors = both[:1]
    yield pair
    # it may have been replaced
    pair._actors = [*pair._actors, *both[1:]]


@pytest.fixture(scope="module")
def alone(tiny: HookedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in this process."""
    folder = tmp_path_factory.mktemp("alone")
    run(tiny, QUESTIONS, CONFIG, out=folder, progress=False)
    return folder


def test_two_workers_give_what_one_process_gives_byte_for_byte(
    pair: RayEngine, alone: Path, tmp_path: Path
) -> None:
    told: list[tuple[str, int, int]] = []
    assert pair.describe().threads == 1
    run(pair, QUESTIONS, CONFIG, out=tmp_path, progress=lambda *own: told.append(own))
    found, expected = comparable(tmp_path), comparable(alone)
    threads = [each["summary"]["provenance"].pop("threads") for each in (found, expected)]
    assert threads[0] == 1
    assert found == expected
    for stage, total in (("trials", 72), ("reach", 16)):
        done = [done for own, done, _ in told if own == stage]
        assert done == sorted(done)
        assert (done[-1], {total for own, _, total in told if own == stage}) == (total, {total})
    assert [done for stage, done, _ in told if stage == "preparing"] == [0, 2, 4]


def seconds(engine: RayEngine, out: Path) -> float:
    """What a run takes."""
    began = time.perf_counter()
    config = replace(CONFIG, arms=("baseline",), reach=False)
    run(engine, QUESTIONS, config, out=out, progress=False)
    return time.perf_counter() - began


def test_two_workers_do_more_than_one_and_a_half_times_as_much_as_one(
    pair: RayEngine, request: pytest.FixtureRequest, curses: Path, tmp_path: Path
) -> None:
    """Their work is waiting, so that it does not depend on the cores that there are; `make
    bench-ray` has them compute."""
    (curses / "rest").write_text("2.0", "utf-8")
    both = seconds(pair, tmp_path / "both")
    one = seconds(request.getfixturevalue("single"), tmp_path / "one")
    (curses / "rest").unlink()
    assert one > 8.0
    assert one > 1.6 * both


def test_blocks_keep_the_slots_full(pair: RayEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    shaped = replace(CONFIG.tuning.generation, slots=96)
    config = replace(CONFIG, tuning=replace(CONFIG.tuning, generation=shaped))
    monkeypatch.setattr(pair, "_setup", Setup(config, None, None))
    # 3 rows under each of 3 arms: 86 questions fill 96 slots 8 times
    sizes = [pair.block_size(100, n) for n in (1, 8, 80, 400, 500, 2000)]
    assert sizes == [1, 4, 40, 100, 84, 100]
    assert pair.block_size(16, 400) == 16
    monkeypatch.setattr(pair, "_setup", None)
    # a task for each, and some to spare
    assert [pair.block_size(64, n) for n in (1, 8, 9, 80, 10_000)] == [1, 1, 3, 10, 64]


def test_a_killed_worker_is_replaced_and_nothing_is_lost_or_twice(
    single: RayEngine, curses: Path, alone: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The only one there is, while it works."""
    (curses / "life").touch()
    run(single, QUESTIONS, CONFIG, out=tmp_path, progress=False)
    assert comparable(tmp_path)["lines"] == comparable(alone)["lines"]
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "worker 1 of 1 died and is replaced"
    ]


@pytest.mark.slow
def test_a_question_that_kills_whoever_takes_it_is_a_failure_and_the_rest_goes_on(
    single: RayEngine, curses: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_jobs, "_ALONE", 1)
    (curses / "fatal").write_text("b", "utf-8")
    config = replace(CONFIG, block_size=1)
    results = run(single, QUESTIONS, config, out=tmp_path, progress=False)
    (curses / "fatal").unlink()
    expected = [line for line in comparable(alone)["lines"] if line["question_id"] != "b"]
    assert comparable(tmp_path)["lines"] == expected
    failures = results.summary["failures"]
    assert [(own["question_id"], own["arm"]) for own in failures] == [
        ("b", arm) for arm in CONFIG.arms
    ]
    assert failures[0]["message"].startswith("a question must leave its worker alive, but 1 died")


def test_what_a_worker_cannot_open_is_told_as_it_is_without_ray(started: None) -> None:
    with (
        RayEngine(Recipe("/no/such/folder"), workers=1) as engine,
        pytest.raises(ModelError, match="/no/such/folder must be an existing checkpoint folder"),
    ):
        engine.describe()


def test_settings_that_cannot_be_had_are_refused(started: None, recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match="workers must be at least 1, but got 0"):
        RayEngine(recipe, workers=0)
    with pytest.raises(ConfigError, match="threads must be at least 1, but got -1"):
        RayEngine(recipe, threads=-1)
    for gpus in (-0.5, 1.5):
        with pytest.raises(ConfigError, match=f"a part of one GPU, but got {gpus}"):
            RayEngine(recipe, gpus_per_worker=gpus)
    with pytest.raises(
        ConfigError, match="1 CPU cores and 999 GPUs for a worker, but the largest has 8 and"
    ):
        RayEngine(recipe, gpus_per_worker=999)


def test_there_are_no_more_workers_than_there_is_room_for(
    started: None, recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    with RayEngine(recipe, workers=5, threads=2) as engine:
        assert engine.workers == 4
    assert caplog.messages == ["there is room for 4 of 5 workers; the run has those"]


def test_there_is_room_where_a_machine_has_all_that_a_worker_needs() -> None:
    room = ray_engine._room
    assert [room({"CPU": 3.0}, threads, 0.0) for threads in (1, 2, 4)] == [3, 1, 0]
    # two of 0.4 to a GPU, and no more
    assert room({"CPU": 16.0, "GPU": 2.0}, 1, 0.4) == 4
    assert [room({"CPU": 16.0, "GPU": 3.0}, 1, gpus) for gpus in (0.1, 1.0, 2.0)] == [16, 3, 1]
    assert room({"CPU": 2.0}, 1, 1.0) == 0


def test_workers_that_have_something_else_than_the_others_are_refused(pair: RayEngine) -> None:
    own = pair.describe()
    with pytest.raises(ConfigError, match="the same threads, but one has 1 and another 2"):
        pair._know(replace(own, threads=2))
    with pytest.raises(ConfigError, match=r"the same content, but one has .* and another \{\}"):
        pair._know(replace(own, content={}))


@pytest.mark.slow
def test_a_worker_whose_device_is_broken_is_replaced(
    single: RayEngine, curses: Path, alone: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (curses / "broken").touch()
    results = run(single, QUESTIONS, CONFIG, out=tmp_path, progress=False)
    assert results.summary["failures"] == []
    assert comparable(tmp_path)["lines"] == comparable(alone)["lines"]
    assert "the device must be able to go on, but says: CUDA error" in caplog.text


@pytest.mark.slow
def test_who_stops_listening_leaves_no_task_behind(
    single: RayEngine, curses: Path, alone: Path, tmp_path: Path
) -> None:
    (curses / "rest").write_text("30", "utf-8")
    busy = single._actors[0]

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "trials":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(single, QUESTIONS, CONFIG, out=tmp_path, progress=stop)
    (curses / "rest").unlink()
    assert single._actors[0] is not busy
    run(single, QUESTIONS, CONFIG, out=tmp_path, existing="resume", progress=False)
    assert comparable(tmp_path)["lines"] == comparable(alone)["lines"]

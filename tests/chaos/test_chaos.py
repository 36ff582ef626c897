"""A run that is ended in any way at any moment goes on to the results it would have had.

`make test` takes a few points of everything, `make chaos` (the marker) all of them.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from crashes import KILLED, Nursery, Point, broken_promise, late, mounted, outcome, why_no_strace
from nursery import ANOTHER_RUN, ENDED, UNWRITABLE

SEED = 20261
PAGE = 4096
long = pytest.mark.chaos


class Scene(NamedTuple):
    """A run, what is in its folder before, and what is to become of that."""

    scenario: str
    before: str | None
    existing: str


SCENES = {
    "in a new folder": Scene("canned", None, "refuse"),
    "finished in another order": Scene("backwards", None, "refuse"),
    "taken up": Scene("canned", "half", "resume"),
    "in the place of another": Scene("canned", "other", "overwrite"),
}
ERRORS = {
    **dict.fromkeys(("write", "mkdir", "mkdirat"), "ENOSPC"),
    **dict.fromkeys(("fsync", "ftruncate", "rename", "renameat", "renameat2"), "EIO"),
    **dict.fromkeys(("unlink", "unlinkat"), "EROFS"),
}


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with Nursery(tmp_path_factory.mktemp("nursery")) as nursery:
        yield nursery


@pytest.fixture(scope="module")
def expected(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an undisturbed run leaves."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    nursery.run("canned", folder)
    return outcome(folder)


@pytest.fixture(scope="module")
def befores(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that a run may find."""
    folder = tmp_path_factory.mktemp("befores")
    nursery.run("other", folder / "other")
    child = nursery.child("pausing", folder / "half")
    child.paused()
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait().code == KILLED
    results = folder / "half" / "results.jsonl"
    results.write_bytes(results.read_bytes()[:-40])
    (folder / "half" / "plans" / "b.segmented.safetensors.part").write_bytes(b"half")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def strace() -> None:
    why = why_no_strace()
    if why is None:
        return
    if os.environ.get("FUSION_LENS_STRACE") == "1":
        pytest.fail(why)
    pytest.skip(why)


def begun(scene: Scene, befores: dict[str, Path], folder: Path) -> Path:
    """The folder as a run of the scene finds it."""
    shutil.rmtree(folder, ignore_errors=True)
    if scene.before is not None:
        shutil.copytree(befores[scene.before], folder)
    return folder


def taken_up(nursery: Nursery, scenario: str, folder: Path) -> None:
    """To the end, or replaced where another run's is still what the folder holds."""
    told = nursery.child(scenario, folder, "resume").ended()
    if told.code == ANOTHER_RUN:
        assert b'"seed": 1' in (folder / "run.json").read_bytes()
        told = nursery.child(scenario, folder, "overwrite").ended()
    assert told == (ENDED, "")


def some(points: Sequence[Point], most: int | None, chance: random.Random) -> list[int]:
    """The places of all points, or of as many."""
    places = range(len(points))
    return list(places) if most is None else sorted(chance.sample(places, most))


def tear(path: Path, unsynced: int, chance: random.Random) -> None:
    """What a power cut may leave of the last bytes of a file: fewer of them, or zeros."""
    content = path.read_bytes()
    lost = chance.randint(1, unsynced)
    kept = content[: len(content) - lost]
    path.write_bytes(kept + (b"" if chance.random() < 0.5 else b"\0" * lost))


@pytest.mark.parametrize(
    "most", [pytest.param(4, marks=pytest.mark.slow), pytest.param(None, marks=long)]
)
@pytest.mark.parametrize("name", SCENES)
def test_a_run_killed_at_a_call_goes_on(
    nursery: Nursery,
    expected: dict[str, Any],
    befores: dict[str, Path],
    strace: None,
    tmp_path: Path,
    name: str,
    most: int | None,
) -> None:
    scene, chance, folder = SCENES[name], random.Random(SEED), tmp_path / "run"
    points = nursery.traced(scene.scenario, begun(scene, befores, folder), scene.existing)
    assert outcome(folder) == expected
    assert {"write", "fsync"} < {point.call for point in points}
    done: Counter[str] = Counter()
    for n in some(points, most, chance):
        point = points[n]
        begun(scene, befores, folder)
        child = nursery.child(scene.scenario, folder, scene.existing)
        assert nursery.struck(child, point, "signal=KILL").code == KILLED, point
        done["killed"] += 1
        written = points[n - 1]
        appended = point.file.endswith(".jsonl") and written[::2] == ("write", point.file)
        if point.call == "fsync" and appended and chance.random() < 0.7:
            tear(folder / point.file, written.returned, chance)
            done["with a torn end"] += 1
        assert broken_promise(folder) is None, point
        if chance.random() < 0.3:
            again = chance.choice(points[: len(points) - n + 8])
            child = nursery.child(scene.scenario, folder, "resume")
            done["killed again"] += nursery.struck(child, again, "signal=KILL").code == KILLED
            assert broken_promise(folder) is None, (point, again)
        taken_up(nursery, scene.scenario, folder)
        assert outcome(folder) == expected, point
    print(f"\na run {name}: {len(points)} calls, {dict(done)}")


def test_a_call_that_a_run_is_killed_at_does_nothing(
    nursery: Nursery, strace: None, tmp_path: Path
) -> None:
    points = nursery.traced("canned", tmp_path / "whole")
    place = next(point for point in points if point.call.startswith("rename"))
    assert place.file == "run.json.part"
    child = nursery.child("canned", tmp_path / "run")
    assert nursery.struck(child, place, "signal=KILL").code == KILLED
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {".lock", "run.json.part"}


def test_what_is_not_on_the_disk_yet_is_found() -> None:
    calls = [
        *(Point("openat", 1, "a.part", 3), Point("write", 1, "a.part", 9)),
        *(Point("fsync", 1, "a.part", 0), Point("rename", 1, "a.part", 0)),
        *(Point("fsync", 2, ".", 0), Point("write", 2, "b", 9), Point("fsync", 3, "b", 0)),
    ]
    assert late(calls, {"b"}) == []
    assert late(calls, set()) == []
    for left_out, file in ((2, "a.part"), (4, "a")):
        ((_, waiting), *_) = late([*calls[:left_out], *calls[left_out + 1 :]], {"b"})
        assert file in waiting


@pytest.mark.parametrize("name", SCENES)
def test_nothing_is_written_before_what_was_written_earlier_is_on_the_disk(
    nursery: Nursery, befores: dict[str, Path], strace: None, tmp_path: Path, name: str
) -> None:
    scene = SCENES[name]
    folder = begun(scene, befores, tmp_path / "run")
    there = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    points = nursery.traced(scene.scenario, folder, scene.existing, "openat")
    # a plan of another run that comes back is no result's
    made = [point for point in points if not (point.call == "unlink" and "plans/" in point.file)]
    assert late(made, there) == []


@pytest.mark.parametrize("most", [2, pytest.param(25, marks=long)])
@pytest.mark.parametrize("name", SCENES)
def test_a_call_that_fails_ends_a_run_with_an_error_and_it_goes_on(
    nursery: Nursery,
    expected: dict[str, Any],
    befores: dict[str, Path],
    strace: None,
    tmp_path: Path,
    name: str,
    most: int | None,
) -> None:
    scene, chance, folder = SCENES[name], random.Random(SEED), tmp_path / "run"
    points = nursery.traced(scene.scenario, begun(scene, befores, folder), scene.existing)
    done: Counter[str] = Counter()
    for point in (points[n] for n in some(points, most, chance)):
        begun(scene, befores, folder)
        error = ERRORS[point.call]
        lasting = point.call == "write" and chance.random() < 0.5
        child = nursery.child(scene.scenario, folder, scene.existing)
        ended = nursery.struck(child, point, f"error={error}", onwards=lasting)
        assert ended.code == UNWRITABLE, (point, ended)
        if not lasting:
            assert "must be writable, but got: " in ended.says
        done[f"{point.call} {error}" + " from then on" * lasting] += 1
        assert broken_promise(folder) is None, point
        taken_up(nursery, scene.scenario, folder)
        assert outcome(folder) == expected, point
    print(f"\na run {name}: {dict(done)}")


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=long)])
def test_a_run_killed_at_any_moment_goes_on(nursery: Nursery, tmp_path: Path, kills: int) -> None:
    kill_at_moments(nursery, "canned", kills, tmp_path / "run")


@long
def test_a_run_of_a_model_killed_at_any_moment_goes_on(tmp_path: Path) -> None:
    with Nursery(tmp_path / "nursery", "atlas") as nursery:
        kill_at_moments(nursery, "atlas", 50, tmp_path / "run")


def kill_at_moments(nursery: Nursery, scenario: str, kills: int, folder: Path) -> None:
    """As many kills of a run, some of them followed by another while it is taken up."""
    chance = random.Random(SEED)
    nursery.run(scenario, folder)
    expected = outcome(folder)
    shutil.rmtree(folder)
    began = time.monotonic()
    nursery.run(scenario, folder)
    lasts = time.monotonic() - began
    assert outcome(folder) == expected
    done: Counter[str] = Counter()
    while done["killed"] < kills:
        shutil.rmtree(folder, ignore_errors=True)
        child = nursery.child(scenario, folder)
        if child.killed_after(chance.uniform(0, lasts)).code != KILLED:
            done["too late"] += 1
            assert done["too late"] < 10 * kills
            continue
        done["killed"] += 1
        assert broken_promise(folder) is None, done
        if chance.random() < 0.3:
            child = nursery.child(scenario, folder, "resume")
            told = child.killed_after(chance.uniform(0, lasts / 2))
            done["killed again"] += told.code == KILLED
            assert broken_promise(folder) is None, done
        taken_up(nursery, scenario, folder)
        assert outcome(folder) == expected, done
    print(f"\n{scenario}: {lasts:.1f} s undisturbed, {dict(done)}")


@pytest.mark.parametrize("rooms", [(1, 6, 11), pytest.param(range(16), marks=long)])
def test_a_full_disk_ends_a_run_with_an_error_and_it_goes_on_when_there_is_room(
    nursery: Nursery, expected: dict[str, Any], tmp_path: Path, rooms: range | tuple[int, ...]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted(f"mount -t tmpfs -o size=1m none '{disk}'") as root:
        if isinstance(root, str):
            pytest.skip(root)
        there = root / disk.relative_to("/")
        for room in rooms:
            folder, ballast = there / f"run{room}", there / "ballast"
            free = os.statvfs(there)
            assert free.f_bsize == PAGE
            ballast.write_bytes(bytes((free.f_bavail - room) * PAGE))
            told = nursery.child("canned", folder).ended()
            assert told.code == UNWRITABLE, room
            assert told.says.endswith("No space left on device; choose another place.")
            assert broken_promise(folder) is None, room
            # no better the second time
            assert nursery.child("canned", folder, "resume").ended().code == UNWRITABLE
            ballast.unlink()
            nursery.run("canned", folder, "resume")
            assert outcome(folder) == expected, room
            shutil.rmtree(folder)


def test_a_disk_that_cannot_be_written_is_an_error_and_a_run_in_it_stays_as_it_is(
    nursery: Nursery, expected: dict[str, Any], befores: dict[str, Path], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    folder = begun(SCENES["taken up"], befores, disk / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    # for root, a mode forbids nothing
    script = f"mount --bind '{disk}' '{disk}'\nmount -o remount,ro,bind '{disk}'"
    with mounted(script) as root:
        if isinstance(root, str):
            pytest.skip(root)
        there = root / disk.relative_to("/")
        for name, existing in (("run", "resume"), ("run", "overwrite"), ("new", "refuse")):
            told = nursery.child("canned", there / name, existing).ended()
            assert told.code == UNWRITABLE
            assert told.says.endswith("Read-only file system; choose another place.")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    nursery.run("canned", folder, "resume")
    assert outcome(folder) == expected


def test_a_second_writer_is_refused_and_the_first_is_not_harmed(
    nursery: Nursery, expected: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    first = nursery.child("pausing", folder)
    first.paused()
    for existing in ("refuse", "resume", "overwrite"):
        told = nursery.child("canned", folder, existing).ended()
        assert told.code == UNWRITABLE
        assert "another process is writing a run there" in told.says
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait().code == ENDED
    assert outcome(folder) == expected


@pytest.mark.parametrize("rounds", [2, pytest.param(20, marks=long)])
def test_of_two_that_begin_at_once_one_runs(
    nursery: Nursery, expected: dict[str, Any], tmp_path: Path, rounds: int
) -> None:
    for n in range(rounds):
        folder = tmp_path / str(n)
        both = [nursery.child("canned", folder) for _ in range(2)]
        for child in both:
            child.go()
        assert sorted(child.wait().code for child in both) == [ENDED, UNWRITABLE]
        assert outcome(folder) == expected

"""Runs that are ended from outside, and what must hold afterwards.

strace ends a run at the N-th call of one kind, before the call does anything, or makes that call
fail. The calls are counted in an undisturbed run first: children of one nursery make the same ones.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fusion_lens.details import read_detail
from fusion_lens.durable import PART
from fusion_lens.json_lines import read_whole_lines
from fusion_lens.plan_files import load_plan
from fusion_lens.results import load_results, plan_path, read_result

HERE = Path(__file__).parent
KILLED = -signal.SIGKILL
CALLS = (
    *("write", "pwrite64", "writev", "fsync", "fdatasync", "ftruncate", "truncate"),
    *("rename", "renameat", "renameat2", "unlink", "unlinkat", "mkdir", "mkdirat"),
)
# what of a summary is of the process that wrote it, and not of the run
_OF_THE_PROCESS = ("seconds", "resumed", "engine")
_PATIENCE = 120.0


class Point(NamedTuple):
    """The `n`-th call of one kind that a run makes, the name of the file it is on, and what it
    returned."""

    call: str
    n: int
    file: str
    returned: int


class Ended(NamedTuple):
    """What a run exited with, below 0 the signal that ended it, and the error it told."""

    code: int
    says: str


class Nursery:
    """The program `nursery`, which has imported everything already; use as a context manager.
    What it and its children leave behind is in `folder`."""

    def __init__(self, folder: Path, *models: str) -> None:
        self._folder = folder
        self._n_children = 0
        (folder / "tmp").mkdir(parents=True)
        paths = (HERE.parents[1], HERE.parent, HERE)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "TMPDIR": str(folder / "tmp"),
            "TOKENIZERS_PARALLELISM": "false",
            # an allocator that comes with transformer_lens' packages
            "JE_ARROW_MALLOC_CONF": "background_thread:false",
            **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
        }
        self._process = subprocess.Popen(
            [sys.executable, HERE / "nursery.py", *models],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._answer()

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=_PATIENCE)

    def child(self, scenario: str, folder: Path, existing: str = "refuse") -> Child:
        """A run that has not begun yet."""
        self._n_children += 1
        told = self._folder / f"told.{self._n_children}"
        asked = {"folder": str(folder), "existing": existing, "told": str(told)}
        return Child(self, self.ask(run=scenario, **asked)["pid"], told)

    def run(self, scenario: str, folder: Path, existing: str = "refuse") -> Ended:
        """A run that nothing disturbs."""
        return self.child(scenario, folder, existing).ended()

    def traced(
        self, scenario: str, folder: Path, existing: str = "refuse", *more: str
    ) -> list[Point]:
        """Every call of `CALLS` and `more` that an undisturbed run makes on files of its folder, in
        order."""
        log = self._folder / "trace"
        child = self.child(scenario, folder, existing)
        # not every machine has all of these calls
        traced = ",".join(f"?{call}" for call in (*CALLS, *more))
        with _attached(child.pid, "-y", "-s0", f"-o{log}", "-e", f"trace={traced}"):
            assert child.ended() == (0, "")
        return _points(log.read_text("utf-8"), folder)

    def struck(self, child: Child, point: Point, fault: str, *, onwards: bool = False) -> Ended:
        """The child, whose call at that point (and every one of its kind from there `onwards`) gets
        a `fault`, as strace names it."""
        at = f"inject={point.call}:{fault}:when={point.n}" + "+" * onwards
        with _attached(child.pid, "-o/dev/null", "-e", f"trace={point.call}", "-e", at):
            return child.ended()

    def ask(self, **asked: Any) -> dict[str, Any]:
        """See the program."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


class Child:
    """A run in a process of its own, which waits to be let go."""

    def __init__(self, nursery: Nursery, pid: int, told: Path) -> None:
        self._nursery = nursery
        self.pid = pid
        self._told = told

    def go(self) -> None:
        self._nursery.ask(go=self.pid)

    def wait(self) -> Ended:
        code = self._nursery.ask(wait=self.pid)["code"]
        return Ended(code, self._told.read_text("utf-8") if self._told.exists() else "")

    def ended(self) -> Ended:
        """Let go, and waited for."""
        self.go()
        return self.wait()

    def paused(self) -> None:
        """Let go, and waited for until it stops itself."""
        self.go()
        end = time.monotonic() + _PATIENCE
        while Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < end, self._told
            time.sleep(0.01)

    def killed_after(self, seconds: float) -> Ended:
        """Let go, and killed then, if it has not ended."""
        self.go()
        time.sleep(seconds)
        # until it is waited for its number is not given away
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()


def why_no_strace() -> str | None:
    """Why no call of another process can be made to fail; None where it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    command = ["strace", "-o/dev/null", "-e", "inject=getcwd:error=EIO", "true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"strace may not trace: {done.stderr.strip()}"


@contextmanager
def mounted(script: str) -> Iterator[Path | str]:
    """The root of file systems as they are after the commands of `script`, which mount something,
    while the rest of the machine does not see it; or why that is not allowed."""
    if shutil.which("unshare") is None:
        yield "unshare is not installed"
        return
    # who is not root is root of a user namespace, where there are any
    own = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    holder = subprocess.Popen(
        ["unshare", *own, "--mount", "sh", "-ec", f"{script}\necho mounted\nexec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert holder.stdout is not None
    said = holder.stdout.readline()
    try:
        if said == "mounted\n":
            yield Path(f"/proc/{holder.pid}/root")
        else:
            yield f"mounting is not allowed: {said.strip()}"
    finally:
        holder.communicate(timeout=_PATIENCE)


def late(points: Iterable[Point], there: set[str]) -> list[tuple[Point, set[str]]]:
    """Calls that change files while earlier changes of others, or of names, may not be on the disk
    yet; with those. `there` are the names in the folder before."""
    found = []
    contents: set[str] = set()
    names: set[str] = set()
    for call, n, file, returned in points:
        own = file.removesuffix(PART)
        if call == "fsync":
            contents.discard(file)
            names -= {name for name in names if str(Path(name).parent) == file}
            continue
        waiting = {name for name in contents | names if name.removesuffix(PART) != own}
        if call == "rename":
            waiting |= contents & {file}
            there -= {file}
        if call in ("write", "ftruncate", "rename") and waiting:
            found.append((Point(call, n, file, returned), waiting))
        if call in ("write", "ftruncate"):
            contents.add(file)
        elif call in ("rename", "unlink"):
            names.add(own)
        elif file not in there and file != ".":
            there.add(file)
            names.add(file)
    return found


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves in its folder, but for times and what is of its process alone."""
    files: dict[str, Any] = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
    lines = files["results.jsonl"].decode().split("\n")
    files["results.jsonl"] = [
        json.dumps(json.loads(line) | {"seconds": 0, "crc32": ""}) if line else "" for line in lines
    ]
    summary = json.loads(files["summary.json"])
    files["summary.json"] = {k: v for k, v in summary.items() if k not in _OF_THE_PROCESS}
    return files


def broken_promise(folder: Path) -> str | None:
    """What does not hold of a folder that must hold at every moment of a run; None where all
    does."""
    details, failures = _lines(folder, "details", read_detail), _lines(folder, "failures", dict)
    told = {own.question_id for own in details} | {own["question_id"] for own in failures}
    records = _lines(folder, "results", read_result)
    for record in records:
        if record.coeffs:
            plan = load_plan(plan_path(folder, record.question_id, record.arm))
            if plan.coeffs != record.coeffs:
                return f"{record.question_id} has another plan"
        if record.question_id not in told:
            return f"{record.question_id} has a result without details"
    if (folder / "summary.json").exists():
        arms = load_results(folder).summary["arms"]
        if sum(arm["n"] for arm in arms.values()) != len(records):
            return "there is a summary of other results"
    return None


def _lines(folder: Path, name: str, make: Callable[[Any], Any]) -> tuple[Any, ...]:
    path = folder / f"{name}.jsonl"
    return read_whole_lines(path, make, noun="a line of a run").values if path.exists() else ()


@contextmanager
def _attached(pid: int, *options: str) -> Iterator[None]:
    strace = subprocess.Popen(
        ["strace", *options, f"-p{pid}"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert strace.stderr is not None
    said = strace.stderr.readline()
    assert "attached" in said, said
    yield
    strace.communicate(timeout=_PATIENCE)


def _points(log: str, folder: Path) -> list[Point]:
    counted: Counter[str] = Counter()
    points = []
    for line in log.splitlines():
        found = re.match(r"(\w+)\(.*= (-?\d+)", line)
        if found is None:
            # the last is how the process ended
            continue
        call = found[1]
        # one that fails counts, and changes nothing
        counted[call] += 1
        if found[2].startswith("-"):
            continue
        names = re.findall(rf"{re.escape(str(folder))}(?:/([^>\"]*))?[>\"]", line)
        if names:
            points.append(Point(call, counted[call], names[0] or ".", int(found[2])))
    return points

"""The folder of a run: one writer, nothing lost and nothing invented, whatever ends it and when.

| file | is |
|---|---|
| `run.json` | what is run, by content: a run goes on only as what it was |
| `results.jsonl`, `details.jsonl`, `failures.jsonl` | lines: (question, arm), question, failure |
| `plans/*.safetensors` | the plan of every tuned arm |
| `donors.json` | how many questions lend, which is known when all are prepared |
| `summary.json` | written last: a folder without it holds a run that did not end |

Lines are only added, and are on the disk before the next are made: a result is there only after
its plan and the details of its question. When all are there they are put in the order of the
questions, whoever finished first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from fusion_lens.details import DETAILS, Detail, load_details, read_detail
from fusion_lens.durable import PART, cut, make_folder, replace_file, sync_file, sync_folder
from fusion_lens.errors import InputFileError, OutputError, ResumeError, one_of
from fusion_lens.json_lines import (
    Whole,
    append_lines,
    read_whole_lines,
    replace_lines,
)
from fusion_lens.plan_files import save_plan
from fusion_lens.plans import Plan
from fusion_lens.preparation import Failure
from fusion_lens.results import (
    RESULTS,
    SCHEMA_VERSION,
    SUMMARY,
    Result,
    load_records,
    plan_path,
    read_result,
    save_summary,
)
from fusion_lens.typed_json import parsed, typed

RUN = "run.json"
FAILURES = "failures.jsonl"
DONORS = "donors.json"
LOCK = ".lock"
EXISTING = ("refuse", "resume", "overwrite")
_MOST_LISTED = 8
_MOST_TOLD = 6


@dataclass(frozen=True, slots=True)
class Made:
    """What is kept of some questions: plans by (question, arm), and lines."""

    plans: Mapping[tuple[str, str], Plan]
    details: Sequence[Detail]
    failures: Sequence[Failure]
    records: Sequence[Result]


class RunFolder:
    """A run's folder, locked until it is closed; use as a context manager.

    `identity` is what is run. `existing` says what becomes of an earlier run there: "refuse",
    "resume" (what is done stays) or "overwrite". `done` are the (question, arm) with a result,
    `detailed` the questions whose details are settled: there, or a failure that lasts; `lent` what
    `keep_lent` kept, if it did; `resumed` tells whether this run was begun there before, and `run`
    is a digest of what is run.

    Raises:
        OutputError: if it cannot be made or written, holds files but no run, holds one that is to
            be refused, or another process is writing there.
        ResumeError: if the run in it is another one.
        InputFileError: if a line that was written before others is damaged, naming it, or a file
            that is replaced whole.
    """

    def __init__(
        self, path: str | Path, identity: Mapping[str, Any], *, existing: str = "refuse"
    ) -> None:
        one_of("existing", existing, EXISTING)
        self.path = Path(path)
        self.done: set[tuple[str, str]] = set()
        self.detailed: set[str] = set()
        self.lent: dict[str, int] = {}
        self.resumed = False
        identity = _as_json(identity)
        self.run = hashlib.sha256(_json(identity)).hexdigest()
        self._lock = self._locked()
        try:
            self._open(identity, existing)
        except OSError as error:
            self.close()
            if isinstance(error, OutputError):
                raise
            raise OutputError(self.path, error.strerror or str(error)) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let others write."""
        self._lock.release()

    def add(self, made: Made) -> None:
        """Keep what was made, results last.

        Raises:
            OutputError: if it cannot be written.
        """
        for (question_id, arm), plan in made.plans.items():
            save_plan(plan, plan_path(self.path, question_id, arm))
        append_lines(self.path / DETAILS, made.details)
        append_lines(self.path / FAILURES, made.failures)
        append_lines(self.path / RESULTS, made.records)
        self._know(made.records, made.details)

    def keep_lent(self, lent: Mapping[str, int]) -> None:
        """Keep what is lent, unless it is known already.

        Raises:
            OutputError: if it cannot be written.
        """
        if not self.lent:
            self.lent = dict(lent)
            replace_file(self.path / DONORS, _json(lent))

    def records(self) -> list[Result]:
        """All results so far."""
        return list(load_records(self.path / RESULTS))

    def details(self) -> tuple[Detail, ...]:
        """All details so far."""
        return load_details(self.path)

    def failures(self) -> list[Failure]:
        """All failures so far."""
        return list(_read(self.path / FAILURES, _failure).values)

    def finish(self, summary: Mapping[str, Any], order: Mapping[tuple[str, str], int]) -> None:
        """Put the lines in order and write the summary.

        Raises:
            OutputError: if it cannot be written.
        """
        records, details = self.records(), self.details()
        first: dict[str, int] = {}
        for (name, _), place in order.items():
            first[name] = min(place, first.get(name, place))
        sorted_records = sorted(records, key=lambda own: order[own.question_id, own.arm])
        if sorted_records != records:
            replace_lines(self.path / RESULTS, sorted_records)
        sorted_details = sorted(details, key=lambda own: first[own.question_id])
        if sorted_details != list(details):
            replace_lines(self.path / DETAILS, sorted_details)
        save_summary(self.path, dict(summary))

    def _locked(self) -> FileLock:
        try:
            make_folder(self.path)
            lock = FileLock(self.path / LOCK, timeout=0)
            lock.acquire()
        except Timeout:
            raise OutputError(self.path, "another process is writing a run there") from None
        except OSError as error:
            raise OutputError(self.path, error.strerror or str(error)) from error
        return lock

    def _open(self, identity: dict[str, Any], existing: str) -> None:
        occupied = require_free(self.path, existing)
        if occupied and existing == "resume":
            _require_same(self.path / RUN, identity)
            self.resumed = True
        elif existing == "overwrite":
            self._clear()
        (self.path / SUMMARY).unlink(missing_ok=True)
        sync_folder(self.path)
        replace_file(self.path / RUN, _json(identity))
        make_folder(self.path / "plans")
        for part in (*self.path.glob(f"*{PART}"), *(self.path / "plans").glob(f"*{PART}")):
            part.unlink()
        self._recover()

    def _recover(self) -> None:
        """Take away what was cut off, and know the rest."""
        details = self._whole(self.path / DETAILS, read_detail)
        failures: Sequence[Failure] = self._whole(self.path / FAILURES, _failure)
        records = self._whole(self.path / RESULTS, read_result)
        # who takes plans away wants them made again
        kept = [
            own
            for own in records
            if not own.coeffs or plan_path(self.path, own.question_id, own.arm).is_file()
        ]
        if len(kept) < len(records):
            replace_lines(self.path / RESULTS, kept)
        self._know(kept, details)
        finished = {own.question_id for own in kept}
        # the others are tried again
        lasting = [own for own in failures if own.arm is None and own.question_id in finished]
        if len(lasting) < len(failures):
            replace_lines(self.path / FAILURES, lasting)
        self.detailed |= {own.question_id for own in lasting}
        if (self.path / DONORS).exists():
            self.lent = _read_json(self.path / DONORS)
        # who was killed may have left in a cache what is built on from here
        for name in (DETAILS, FAILURES, RESULTS):
            sync_file(self.path / name)
        sync_folder(self.path)

    def _know(self, records: Iterable[Result], details: Iterable[Detail]) -> None:
        self.done |= {(own.question_id, own.arm) for own in records}
        self.detailed |= {own.question_id for own in details}

    def _whole(self, path: Path, make: Any) -> tuple[Any, ...]:
        if not path.exists():
            path.touch()
        read: Whole = _read(path, make)
        if read.size < path.stat().st_size:
            cut(path, read.size)
        return read.values

    def _clear(self) -> None:
        """Take an earlier run away, what says that it is done first; what it was is replaced when
        nothing of it is left."""
        figures = self.path / "figures"
        for stale in (
            *(self.path / name for name in (SUMMARY, RESULTS, DETAILS, FAILURES, DONORS)),
            *(self.path / name for name in ("report.md", "report.html")),
            *(self.path / "plans").glob("*.safetensors"),
            *figures.glob("*.html"),
            *figures.glob("*.png"),
        ):
            stale.unlink(missing_ok=True)


def require_free(folder: Path, existing: str) -> bool:
    """Whether a folder holds a run, once that is as `existing` allows.

    Raises:
        OutputError: if it holds files but no run, or one that is to be refused.
    """
    if not folder.is_dir():
        return False
    # what a kill leaves of a folder that was just made is nothing
    others = {each.name for each in folder.iterdir()} - {LOCK, RUN + PART}
    if others and not _holds_run(folder):
        raise OutputError(folder, "it has files that are not a run's")
    if others and existing == "refuse":
        raise OutputError(
            folder,
            "it holds a run, which can be continued (resume, --resume) or replaced (overwrite, "
            "--overwrite)",
        )
    return bool(others)


def _holds_run(folder: Path) -> bool:
    if (folder / RUN).exists():
        return True
    results, summary = folder / RESULTS, folder / SUMMARY
    if results.exists():
        content = results.read_bytes()
        return not content or b'"question_id"' in content.split(b"\n", 1)[0]
    return summary.exists() and b'"schema_version"' in summary.read_bytes()


def _read(path: Path, make: Any) -> Whole:
    return read_whole_lines(path, make, noun="a line of a run")


def _failure(content: Any) -> Failure:
    return typed(Failure, content)


def _as_json(identity: Mapping[str, Any]) -> dict[str, Any]:
    """As it is read again: tuples are lists there."""
    made: dict[str, Any] = json.loads(
        json.dumps({"schema_version": SCHEMA_VERSION, **identity}, allow_nan=False)
    )
    return made


def _require_same(path: Path, identity: Mapping[str, Any]) -> None:
    if not path.exists():
        raise ResumeError(
            f"a run must have {RUN} to be continued, but {path.parent} has none: it was written by "
            "an older version; replace it (overwrite, --overwrite)."
        )
    before, now = dict(_leaves(_read_json(path))), dict(_leaves(identity))
    names = [name for name in (before | now) if before.get(name) != now.get(name)]
    if names:
        told = [f"{name} {_difference(before.get(name), now.get(name))}" for name in names]
        raise ResumeError(
            f"a run can be continued only as what it was, but in {path.parent} "
            f"{'; '.join(told[:_MOST_TOLD])}"
            + (f"; and {len(told) - _MOST_TOLD} more" if len(told) > _MOST_TOLD else "")
            + ". Run as before, replace it (overwrite, --overwrite), or choose another folder."
        )


def _difference(before: Any, now: Any) -> str:
    """Of long lists how many there are, and the first that differs."""
    if (
        isinstance(before, list)
        and isinstance(now, list)
        and max(len(before), len(now)) > _MOST_LISTED
    ):
        pairs = enumerate(zip_longest(before, now))
        place, (old, new) = next(each for each in pairs if each[1][0] != each[1][1])
        return (
            f"were {len(before)} and are {len(now)}, of which number {place + 1} was {old!r:.60} "
            f"and is {new!r:.60}"
        )
    return f"was {before!r:.200} and is {now!r:.200}"


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = parsed(path.read_bytes())
    except ValueError as error:
        raise InputFileError(path, f"must be JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputFileError(path, f"must be a JSON object, but got {type(content).__name__}")
    return content


def _leaves(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, dict) or not value:
        return [(name, value)]
    return [
        leaf
        for key, own in value.items()
        for leaf in _leaves(own, f"{name}.{key}" if name else str(key))
    ]

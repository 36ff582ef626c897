from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import strong_plan
from records import LOVELACE, detail, tuned

from fusion_lens.errors import InputFileError, OutputError, ResumeError
from fusion_lens.models import HookedModel
from fusion_lens.plan_files import load_plan
from fusion_lens.preparation import Failure
from fusion_lens.results import Result, plan_path
from fusion_lens.run_folder import EXISTING, Made, RunFolder

IDENTITY = {"seed": 0, "arms": ("baseline", "segmented"), "model": {"weights": "abc"}}
LINES = ("results.jsonl", "details.jsonl", "failures.jsonl")
BOTH = (LOVELACE, tuned("lovelace", 0.1, 0.2))
OTHER = (replace(LOVELACE, question_id="harris"), tuned("harris", 0.3, 0.4))
ORDER = {
    pair: n
    for n, pair in enumerate((q, a) for q in ("lovelace", "harris") for a in IDENTITY["arms"])
}


def opened(folder: Path, existing: str = "refuse", **changed: Any) -> RunFolder:
    return RunFolder(folder, IDENTITY | changed, existing=existing)


def made(records: Sequence[Result], **more: Any) -> Made:
    named = {record.question_id for record in records}
    return Made(
        more.get("plans", {}),
        more.get("details", [detail(name, (1.0,)) for name in sorted(named)]),
        more.get("failures", []),
        records,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture
def plan(tiny: HookedModel) -> Any:
    return strong_plan(tiny)


def test_what_is_added_is_there_after_a_kill_and_is_known_again(tmp_path: Path, plan: Any) -> None:
    with opened(tmp_path) as run:
        assert (run.done, run.detailed) == (set(), set())
        run.add(made(BOTH, plans={("lovelace", "segmented"): plan}))
        assert run.done == {("lovelace", "baseline"), ("lovelace", "segmented")}
        before = contents(tmp_path)
    assert not (tmp_path / "summary.json").exists()
    with opened(tmp_path, "resume") as run:
        assert run.done == {("lovelace", "baseline"), ("lovelace", "segmented")}
        assert run.detailed == {"lovelace"}
        assert run.records() == list(BOTH)
        assert run.details() == (detail("lovelace", (1.0,)),)
        assert contents(tmp_path) == before
    assert load_plan(plan_path(tmp_path, "lovelace", "segmented")).coeffs == plan.coeffs


def test_a_run_cut_at_any_byte_of_its_last_lines_goes_on(tmp_path: Path, plan: Any) -> None:
    with opened(tmp_path) as run:
        plans = {("lovelace", "segmented"): plan, ("harris", "segmented"): plan}
        run.add(made([*BOTH, *OTHER], plans=plans))
    path = tmp_path / "results.jsonl"
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    pairs = [(record.question_id, record.arm) for record in (*BOTH, *OTHER)]
    for size in range(ends[0], len(whole) + 1, 7):
        path.write_bytes(whole[:size])
        n = sum(end <= size for end in ends)
        with opened(tmp_path, "resume") as run:
            assert run.done == set(pairs[:n])
            assert path.read_bytes() == whole[: ends[n - 1]]
            run.add(made((*BOTH, *OTHER)[n:], details=[]))
        assert path.read_bytes() == whole


def test_lines_are_put_in_order_when_all_are_there(tmp_path: Path, plan: Any) -> None:
    plans = {(name, "segmented"): plan for name in ("lovelace", "harris")}
    with opened(tmp_path / "one") as run:
        run.add(made([*BOTH, *OTHER], plans=plans))
        run.finish({"seconds": 1}, ORDER)
    with opened(tmp_path / "other") as run:
        run.add(made(OTHER, plans=plans))
        run.add(made(BOTH))
        assert [own.question_id for own in run.records()] == ["harris"] * 2 + ["lovelace"] * 2
        run.finish({"seconds": 1}, ORDER)
    one, other = (contents(tmp_path / name) for name in ("one", "other"))
    assert one["results.jsonl"] == other["results.jsonl"]
    assert sorted(one["details.jsonl"].splitlines()) == sorted(other["details.jsonl"].splitlines())
    assert json.loads(one["summary.json"]) == {"seconds": 1}


def test_a_run_is_refused_continued_or_replaced_as_it_is_asked_for(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        run.add(made([LOVELACE]))
        run.finish({}, ORDER)
    (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(OutputError, match=r"it holds a run, which can be continued \(resume, --r"):
        opened(tmp_path)
    assert contents(tmp_path) == before
    with opened(tmp_path, "resume") as run:
        assert run.done == {("lovelace", "baseline")}
    # it goes on, and has not ended
    assert not (tmp_path / "summary.json").exists()
    with opened(tmp_path, "overwrite", seed=1) as run:
        assert run.done == set()
        assert (tmp_path / "results.jsonl").read_bytes() == b""
    assert json.loads((tmp_path / "run.json").read_bytes())["seed"] == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_is_made_whatever_is_to_become_of_an_earlier_run(tmp_path: Path) -> None:
    for existing in EXISTING:
        with opened(tmp_path / "a" / existing, existing) as run:
            assert run.done == set()
        assert sorted(contents(tmp_path / "a" / existing)) == sorted((*LINES, "run.json"))


def test_what_a_kill_leaves_of_a_new_folder_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "run.json.part").write_bytes(b'{"se')
    (tmp_path / ".lock").touch()
    with opened(tmp_path):
        pass
    assert sorted(contents(tmp_path)) == sorted((*LINES, "run.json"))


def test_a_file_that_was_being_written_is_taken_away(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        run.add(made([LOVELACE]))
    stale = [tmp_path / "plans" / "x.full.safetensors.part", tmp_path / "summary.json.part"]
    for path in stale:
        path.write_bytes(b"half")
    with opened(tmp_path, "resume"):
        assert not any(path.exists() for path in stale)


def test_the_difference_is_told_where_another_run_is_there(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        run.add(made([LOVELACE]))
    before = contents(tmp_path)
    with pytest.raises(ResumeError) as caught:
        opened(tmp_path, "resume", seed=3, model={"weights": "abd"}, judge="lexical")
    assert str(caught.value) == (
        f"a run can be continued only as what it was, but in {tmp_path} seed was 0 and is 3; "
        "model.weights was 'abc' and is 'abd'; judge was None and is 'lexical'. Run as before, "
        "replace it (overwrite, --overwrite), or choose another folder."
    )
    assert contents(tmp_path) == before
    many = {f"s{n}": n for n in range(9)}
    with pytest.raises(ResumeError, match=r"s5 was None and is 5; and 3 more\. Run as before"):
        opened(tmp_path, "resume", **many)


def test_a_run_that_does_not_say_what_it_is_cannot_be_continued(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        run.add(made([LOVELACE]))
    for content, kind, says in (
        (None, ResumeError, "has none: it was written by an older version"),
        (b"{", InputFileError, "must be JSON"),
        (b"[]", InputFileError, "must be a JSON object, but got list"),
    ):
        path = tmp_path / "run.json"
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(kind, match=says):
            opened(tmp_path, "resume")


def test_two_never_write_at_once(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from fusion_lens.errors import OutputError\n"
        "from fusion_lens.run_folder import RunFolder\n"
        "for existing in ('refuse', 'resume', 'overwrite'):\n"
        "    try:\n"
        "        RunFolder(sys.argv[1], {}, existing=existing)\n"
        "    except OutputError as error:\n"
        "        print(error)\n"
    )
    with opened(tmp_path):
        before = contents(tmp_path)
        told = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
        ).stdout
        assert told.count("another process is writing a run there") == 3
        assert contents(tmp_path) == before
    with opened(tmp_path, "resume"):
        pass


def test_failures_are_tried_again_but_for_details_of_what_is_done(tmp_path: Path) -> None:
    untold = Failure("lovelace", None, "RuntimeError", "no features")
    failed = Failure("lovelace", "segmented", "RuntimeError", "no memory")
    unrun = Failure("harris", "baseline", "RuntimeError", "no memory")
    with opened(tmp_path) as run:
        run.add(made([LOVELACE], details=[], failures=[untold, failed, unrun]))
        assert run.failures() == [untold, failed, unrun]
    with opened(tmp_path, "resume") as run:
        assert run.failures() == [untold]


def test_details_that_failed_for_good_are_settled(tmp_path: Path) -> None:
    untold = Failure("lovelace", None, "RuntimeError", "no features")
    with opened(tmp_path) as run:
        run.add(made([LOVELACE], details=[], failures=[untold]))
    with opened(tmp_path, "resume") as run:
        assert run.detailed == {"lovelace"}


def test_what_is_lent_is_kept_once(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        assert run.lent == {}
        run.keep_lent({"n": 6})
        run.keep_lent({"n": 2})
    with opened(tmp_path, "resume") as run:
        assert run.lent == {"n": 6}
    (tmp_path / "donors.json").write_bytes(b"[6]")
    with pytest.raises(InputFileError, match="must be a JSON object, but got list"):
        opened(tmp_path, "resume")
    with opened(tmp_path, "overwrite") as run:
        assert run.lent == {}


def test_what_a_killed_run_left_in_a_cache_is_put_on_the_disk_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path) as run:
        run.add(made([LOVELACE]))
    synced = []
    real = os.fsync

    def watched(number: int) -> None:
        synced.append(Path(f"/proc/self/fd/{number}").resolve())
        real(number)

    monkeypatch.setattr(os, "fsync", watched)
    with opened(tmp_path, "resume"):
        lines = [tmp_path / name for name in ("details.jsonl", "failures.jsonl", "results.jsonl")]
        assert synced[-4:] == [*lines, tmp_path]


def test_a_damaged_line_before_a_good_one_is_named(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        run.add(made([LOVELACE, OTHER[0]]))
    path = tmp_path / "results.jsonl"
    path.write_bytes(path.read_bytes().replace(b"Tom", b"Tim", 1))
    with pytest.raises(InputFileError, match=r"results\.jsonl, line 1: .* match its checksum"):
        opened(tmp_path, "resume")
    # the lock is not kept
    with opened(tmp_path, "overwrite"):
        pass


def test_files_of_somebody_else_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for existing in EXISTING:
        with pytest.raises(OutputError, match="it has files that are not a run's"):
            opened(tmp_path, existing)
    assert contents(tmp_path) == {"thesis.txt": b"mine"}


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="must be writable, but got: Not a directory; choose"):
        opened(tmp_path / "file" / "run")
    with pytest.raises(OutputError, match="must be writable, but got: "):
        opened(tmp_path / "file")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[" * 60 + "]" * 60, "must be JSON: brackets must be nested at most 50 deep"),
        (r'{"\ud800": 1}', "must be JSON: 'utf-8' codec can't encode"),
        ("NaN", "must be JSON: numbers must be finite, but got nan"),
    ],
)
def test_a_run_file_that_could_not_even_be_told_about_is_refused(
    tmp_path: Path, content: str, reason: str
) -> None:
    opened(tmp_path).close()
    (tmp_path / "run.json").write_text(content, "utf-8")
    with pytest.raises(InputFileError) as caught:
        opened(tmp_path, "resume")
    assert str(caught.value).startswith(f"{tmp_path / 'run.json'}: {reason}")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("failures.jsonl", {"question_id": {"a": 1}}),
        ("failures.jsonl", {"message": None}),
        ("results.jsonl", {"arm": ["full"]}),
        ("results.jsonl", {"coeffs": "\ud800"}),
    ],
)
def test_a_line_of_other_types_is_named_when_a_run_is_continued(
    tmp_path: Path, name: str, change: dict[str, object]
) -> None:
    failure = Failure("lovelace", None, "SpanError", "none")
    with opened(tmp_path) as run:
        run.add(made(BOTH, failures=[failure]))
    path = tmp_path / name
    line = path.read_bytes().splitlines(keepends=True)[0]
    content = json.loads(line)
    del content["crc32"]
    text = json.dumps(content | change).encode()
    path.write_bytes(text[:-1] + b', "crc32": "%08x"}\n' % zlib.crc32(text) + line)
    with pytest.raises(InputFileError, match="line 1: must be a line of a run: "):
        opened(tmp_path, "resume")

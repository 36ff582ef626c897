from __future__ import annotations

import io
import json
import math
import sys
import zlib
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import LOVELACE, interval, make_results, saved
from rich.console import Console

from fusion_lens.errors import InputFileError, MissingExtraError, OutputError
from fusion_lens.identity import ModelIdentity
from fusion_lens.json_lines import append_lines
from fusion_lens.results import (
    Provenance,
    Results,
    Summary,
    load_results,
    plan_path,
    save_summary,
)

SUMMARY = make_results().summary


def test_a_run_is_loaded_as_it_was_written(tmp_path: Path) -> None:
    results = make_results()
    assert load_results(saved(tmp_path / "a" / "run", results)) == results


@settings(max_examples=50, deadline=None)
@given(text=st.text() | st.text(alphabet='a\n\r\t\x85\u2028\u2029\x0b\x0c\x1c"\\'))
def test_a_completion_of_any_letters_and_line_breaks_comes_back(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    folder = saved(tmp_path_factory.getbasetemp() / "letters", Results((), Summary(SUMMARY)))
    record = replace(LOVELACE, completion=text)
    append_lines(folder / "results.jsonl", [record, LOVELACE])
    assert load_results(folder).records == (record, LOVELACE)


def test_a_run_without_records_is_a_run(tmp_path: Path) -> None:
    assert load_results(saved(tmp_path, Results((), Summary(SUMMARY)))) == Results(
        (), Summary(SUMMARY)
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_json_does_not_know_is_refused_and_leaves_the_file_whole(
    tmp_path: Path, value: float
) -> None:
    folder = saved(tmp_path)
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        save_summary(folder, {"schema_version": 7, "seconds": value})
    assert load_results(folder) == make_results()


def test_a_run_that_did_not_end_has_no_summary_and_is_refused(tmp_path: Path) -> None:
    (saved(tmp_path) / "summary.json").unlink()
    with pytest.raises(InputFileError) as caught:
        load_results(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: must hold the summary.json of a run that ended: No such file or directory"
    )


def test_a_summary_alone_is_refused_too(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / "results.jsonl").unlink()
    with pytest.raises(InputFileError, match="must be readable: No such file or directory"):
        load_results(folder)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    expected = "must be writable, but got: No such file or directory; choose another place."
    with pytest.raises(OutputError, match=expected):
        save_summary(tmp_path / "missing", SUMMARY)


@pytest.mark.parametrize(
    "question_id",
    ["../../etc/x", "a/b", "/etc/passwd", "..", ".", ".hidden", "a\\b", "a\nb", "a\0b", "x" * 400],
)
def test_a_plan_lies_in_its_folder_whatever_the_id(tmp_path: Path, question_id: str) -> None:
    (tmp_path / "plans").mkdir()
    path = plan_path(tmp_path, question_id, "segmented")
    path.touch()
    assert path.resolve().parent == (tmp_path / "plans").resolve()
    assert not path.name.startswith(".")
    assert path.name.endswith(".segmented.safetensors")


def test_plain_ids_name_their_plan_and_no_two_ids_share_one(tmp_path: Path) -> None:
    assert plan_path(tmp_path, "lovelace-1", "full") == (
        tmp_path / "plans" / "lovelace-1.full.safetensors"
    )
    ids = ["a/b", "a_b", "a b", "a:b", ".a_b", "a" * 60, "a" * 61, "", "."]
    assert len({plan_path(tmp_path, name, "full") for name in ids}) == len(ids)


@pytest.mark.parametrize("content", [b'{"question_id": "x"}', b'{"answers": 1}'])
def test_a_record_of_other_fields_is_named_by_its_line(tmp_path: Path, content: bytes) -> None:
    path = saved(tmp_path) / "results.jsonl"
    first, *rest = path.read_bytes().splitlines(keepends=True)
    line = content[:-1] + b', "crc32": "%08x"}\n' % zlib.crc32(content)
    path.write_bytes(b"".join([first, line, *rest]))
    with pytest.raises(InputFileError) as caught:
        load_results(tmp_path)
    assert str(caught.value).startswith(f"{path}, line 2: must be a result: ")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "must be JSON: Expecting property name"),
        (b"", "must be JSON: Expecting value"),
        (b"[" * 100_000, "must be JSON: maximum recursion depth exceeded"),
        (b"\xff{}", "must be UTF-8 text: invalid start byte"),
        (b"[]", "schema_version must be 7"),
        (b"{}", "schema_version must be 7"),
        (b'{"schema_version": 1}', "schema_version must be 7"),
    ],
)
def test_a_summary_that_cannot_be_used_is_named(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    path = saved(tmp_path) / "summary.json"
    path.write_bytes(content)
    with pytest.raises(InputFileError) as caught:
        load_results(tmp_path)
    assert str(caught.value).startswith(f"{path}: {reason}")


def test_records_that_are_not_text_are_told_apart_from_the_summary(tmp_path: Path) -> None:
    path = saved(tmp_path) / "results.jsonl"
    path.write_bytes(b"\xff")
    with pytest.raises(InputFileError) as caught:
        load_results(tmp_path)
    assert caught.value.path == path


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(["results.jsonl", "summary.json"]),
    place=st.floats(0, 1),
    change=st.none() | st.binary(max_size=3),
)
def test_a_damaged_file_raises_nothing_but_the_packages_errors(
    tmp_path_factory: pytest.TempPathFactory, name: str, place: float, change: bytes | None
) -> None:
    folder = saved(tmp_path_factory.mktemp("damaged"))
    path = folder / name
    whole = path.read_bytes()
    at = int(place * len(whole))
    path.write_bytes(whole[:at] if change is None else whole[:at] + change + whole[at + 1 :])
    # any other exception fails this test
    with suppress(InputFileError):
        assert len(load_results(folder).records) <= 4


def test_a_table_has_a_row_per_record_and_a_column_per_coefficient() -> None:
    table = make_results().to_pandas()
    assert table["question_id"].tolist() == ["lovelace", "lovelace", "harris", "harris"]
    assert table["arm"].tolist() == ["baseline", "segmented"] * 2
    assert table["coeff.early"].dropna().to_dict() == {1: 1.5, 3: 0.0}
    assert table["coeff.late"].dropna().to_dict() == {1: 0.5, 3: 0.0}
    assert table["perplexity"].tolist() == [20.0] * 4
    assert "coeffs" not in table.columns
    assert table.shape == (4, 41)  # 25 fields, coeffs taken apart into two


def test_a_summary_as_a_table_has_a_row_per_metric_arm_and_group() -> None:
    content = make_results().summary
    books = {"baseline": {"overlap": interval(0.25, 0.0, 0.5, unscored=2)}}
    table = Summary(content | {"groups": {"topic": {"Books": books}}}).to_pandas()
    n_metrics = len(content["arms"]["baseline"]["metrics"])
    assert len(table) == 2 * n_metrics + 1
    assert table.iloc[-1].to_dict() == {
        "by": "topic",
        "value": "Books",
        "arm": "baseline",
        "metric": "overlap",
        "mean": 0.25,
        "low": 0.0,
        "high": 0.5,
        "n": 10,
        "unscored": 2,
        "clusters": 6,
    }
    right = table[(table["by"] == "all") & (table["metric"] == "exact_match")]
    assert dict(zip(right["arm"], right["mean"], strict=True)) == {
        "baseline": 0.0,
        "segmented": 0.25,
    }


def test_a_table_without_pandas_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fusion-lens\[pandas\]'"):
        make_results().to_pandas()


def test_provenance_names_model_seed_and_the_versions_that_ran() -> None:
    model = ModelIdentity(
        name="tiny",
        wrapper="TransformerBridge",
        processing="unprocessed",
        n_layers=4,
        d_model=32,
        dtype="float32",
        weights="w" * 64,
        embedding="e" * 64,
    )
    made = Provenance.of(
        model,
        command="fusion-lens run",
        seed=3,
        questions_sha256="q",
        settings={"arms": ["full"]},
        threads=2,
    )
    assert made.command == "fusion-lens run"
    assert (made.model, made.weights_sha256, made.dtype) == ("tiny", "w" * 64, "float32")
    assert (made.processing_mode, made.seed, made.threads) == ("unprocessed", 3, 2)
    assert made.settings == {"arms": ["full"]}
    assert made.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    for name in ("torch", "transformer-lens", "optuna"):
        assert made.versions[name] == version(name)
    assert json.loads(json.dumps(made.versions)) == made.versions


def test_a_run_shows_its_tables_escaped() -> None:
    results = make_results()
    results.summary["provenance"]["model"] = "<b>tiny</b>"
    shown = results._repr_html_()
    assert shown == results.summary._repr_html_()
    assert shown.count("<table>") == 3
    assert "&lt;b&gt;tiny&lt;/b&gt;" in shown
    assert "25.0% [0.0%, 50.0%]" in shown
    console = Console(width=100, file=io.StringIO())
    console.print(results)
    assert "segmented" in console.file.getvalue()


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("coeffs", None, "coeffs must be an object, but got None"),
        ("coeffs", {"early": "1"}, "coeffs.early must be a valid number, but got '1'"),
        ("question_id", ["a"], "question_id must be a valid string, but got list"),
        ("completion", "\ud800", "surrogates not allowed"),
        ("nll", math.inf, "numbers must be finite, but got inf"),
        ("extra", {"a": [[]]}, "extra.a must be float or int, but got list"),
    ],
)
def test_a_record_with_values_of_other_types_is_named_by_its_line(
    tmp_path: Path, field: str, value: object, reason: str
) -> None:
    """With a checksum of its own: somebody wrote it so."""
    path = saved(tmp_path) / "results.jsonl"
    content = json.dumps(asdict(LOVELACE) | {field: value}).encode()
    path.write_bytes(content[:-1] + b', "crc32": "%08x"}\n' % zlib.crc32(content))
    with pytest.raises(InputFileError) as caught:
        load_results(tmp_path)
    assert str(caught.value).startswith(f"{path}, line 1: must be a result: ")
    assert reason in str(caught.value)


def test_a_summary_that_no_table_can_be_made_of_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path) / "summary.json"
    content = json.loads(path.read_text("utf-8"))
    content["arms"]["baseline"]["metrics"]["overlap"]["mean"] = "half"
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(InputFileError) as caught:
        load_results(tmp_path)
    assert str(caught.value) == (
        f"{path}: must be the summary of a run: "
        "arms.baseline.metrics.overlap.mean must be a valid number, but got 'half'"
    )


@pytest.mark.parametrize("arm", ["../../etc/x", "/etc/passwd", "..", "a/b", "a\0b", "x" * 400])
def test_a_plan_lies_in_its_folder_whatever_the_arm(tmp_path: Path, arm: str) -> None:
    """An arm's name can come from a line of results."""
    (tmp_path / "plans").mkdir()
    path = plan_path(tmp_path, "lovelace", arm)
    path.touch()
    assert path.resolve().parent == (tmp_path / "plans").resolve()
    assert path != plan_path(tmp_path, "lovelace", "full")

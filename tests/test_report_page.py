from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.offline
import pytest
from records import saved
from sample_runs import ARMS, HOSTILE, empty_run, hostile_run, large_run, run_summary, small_run

from fusion_lens import cli
from fusion_lens.durable import replace_text
from fusion_lens.errors import OutputError
from fusion_lens.pictures import Figure, plain, styled
from fusion_lens.report import closing_lines, sections
from fusion_lens.report_data import details_table, packed, records_table
from fusion_lens.report_page import _figure, html_report, main_arm, page_script
from fusion_lens.results import Results, Summary

PAGE = Path(__file__).parents[1] / "fusion_lens" / "page"


def unpacked(page: str, name: str) -> str:
    """What the page's script reads under a name."""
    (content,) = re.findall(
        rf'<script type="application/octet-stream" id="packed-{name}">([^<]*)</script>', page
    )
    return gzip.decompress(base64.b64decode(content)).decode()


def contents(page: str, name: str) -> Any:
    return json.loads(unpacked(page, name))


def without_packed(page: str) -> str:
    return re.sub(r'(id="packed-\w+">)[^<]*', r"\1", page)


@pytest.fixture(scope="module")
def small() -> str:
    return html_report(small_run())


@pytest.fixture(scope="module")
def hostile() -> str:
    return html_report(hostile_run())


def test_the_packed_records_are_those_of_the_run(small: str) -> None:
    table = contents(small, "records")
    assert table["arms"] == ["baseline", "full", "segmented"]
    assert table["main"] == "segmented"
    assert table["segments"] == {
        "full": [0, 4],
        "early": [0, 2],
        "middle": [2, 3],
        "late": [3, 4],
    }
    assert table["questions"]["id"] == ["lovelace", "harris", "quist"]
    assert table["questions"]["answer"] == ["Ada Lovelace", "José Harris", "Oslo"]
    columns = table["records"]
    assert columns["question"] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert columns["arm"] == [0, 1, 2, 0, 1, 2, 0, 2]
    assert columns["completion"][2] == "Ada wrote\nthe book."
    assert columns["coeffs"][2] == {"early": 0.25, "middle": 0.5, "late": 1.25}
    assert columns["perplexity"][5] is None
    assert columns["objective"] == [-0.06, 0.5, -0.06, -0.06, -0.06, -0.06, -0.06, -0.5]


def test_a_records_own_text_is_kept_only_where_it_is_not_its_questions() -> None:
    results = small_run()
    assert not [name for name in records_table(results)["records"] if name.startswith("own_")]
    first, second, *others = results.records
    changed = replace(second, explanation="Another one.")
    columns = records_table(Results((first, changed, *others), results.summary))["records"]
    assert columns["own_explanation"] == [None, "Another one.", *[None] * len(others)]


def test_the_packed_details_are_those_of_the_run_with_every_token_once(small: str) -> None:
    table = contents(small, "details")
    tokens = table["tokens"]
    assert tokens == ["<s>", "\n", " Ada", " Lovelace", "."]
    assert list(table["questions"]) == ["lovelace", "harris"]
    shown = table["questions"]["lovelace"]
    assert shown["delta_norms"] == [1.0, 2.0, 3.0, 4.5]
    assert shown["captured"] == {"tokens": [0, 1, 2, 3, 4], "marked": [1, 2, 3, 4]}
    assert [trace["arm"] for trace in shown["traces"]] == ["full", "segmented"]
    assert shown["traces"][0]["steered"] == [-0.0, -0.5, -1.0, -1.5, -2.0]
    assert shown["features"][0]["label"] == "before a name"
    assert table["questions"]["harris"]["generic_share"] is None


def test_a_run_without_details_packs_none_and_knows_no_layers() -> None:
    results = small_run()
    older = Results(results.records, results.summary)
    assert details_table(older) == {"tokens": [], "questions": {}}
    assert records_table(older)["segments"] == {}
    assert "packed-details" in html_report(older)


def test_a_run_without_questions_is_a_page_that_says_so() -> None:
    page = html_report(empty_run())
    assert "The run was interrupted" in page
    assert contents(page, "records")["questions"]["id"] == []


def test_report_writes_the_page_again_from_the_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = small_run()
    saved(tmp_path, results)
    monkeypatch.setattr(sys, "argv", ["fusion-lens", "report", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    assert (tmp_path / "report.html").read_text("utf-8") == html_report(results)
    assert not list(tmp_path.glob("*.part"))


def test_a_page_that_cannot_be_written_leaves_the_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("earlier")
    (tmp_path / "report.html.part").mkdir()
    with pytest.raises(OutputError):
        replace_text(path, "later")
    assert path.read_text() == "earlier"


def test_numbers_are_packed_to_six_digits_and_the_same_content_to_the_same_text() -> None:
    results = small_run()
    assert packed(records_table(results)) == packed(records_table(results))
    rounded = {float(f"{r.perplexity:.6g}") for r in results.records if r.perplexity is not None}
    assert set(records_table(results)["records"]["perplexity"]) == rounded | {None}


def test_the_tables_of_the_summary_read_without_script(small: str) -> None:
    summary = small_run().summary
    for section in sections(summary, between="\n"):
        assert f"<caption><span>{html.escape(section.title)}</span></caption>" in small
        for row in section.rows:
            for cell in row:
                for part in cell.split("\n"):
                    assert html.escape(part) in small
    for line in closing_lines(summary):
        assert f"<li>{line}</li>" in html.unescape(small)
    assert "<li>quist, full: SpanError: too long.</li>" in small


def test_the_page_names_command_versions_hashes_and_seed(small: str) -> None:
    for told in (
        "fusion-lens run --limit 2 --out &#39;runs/two words&#39;",
        "ab" * 32,
        "cd" * 32,
        "<dt>torch</dt><dd>2.13.0</dd>",
        "<dt>seed</dt><dd>7</dd>",
        "3 of 6 from file.jsonl, split test",
        "&#34;cache_length&#34;: 96",
    ):
        assert told in small


def test_a_run_from_python_has_no_command_to_copy() -> None:
    results = small_run()
    given = results.summary["provenance"] | {"command": None}
    page = html_report(Results(results.records, Summary(results.summary | {"provenance": given})))
    assert "No command: the run was started from Python." in page
    assert 'id="copy"' not in page


def test_the_page_loads_nothing(small: str) -> None:
    shell = without_packed(small).replace(page_script(), "")
    assert re.findall(r'(?:src|href)="(?!#)([^"]*)"', shell) == ["data:,"]
    assert "@import" not in shell
    assert "url(" not in shell


def policy(page: str) -> dict[str, list[str]]:
    (content,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    parts = (part.split() for part in html.unescape(content).split(";"))
    return {name: values for name, *values in parts}


def test_the_policy_allows_the_two_scripts_by_their_hashes_and_nothing_else(small: str) -> None:
    scripts = re.findall(r"<script>(.*?)</script>", small, re.DOTALL)
    assert scripts == [page_script()]
    assert unpacked(small, "plotly") == plotly.offline.get_plotlyjs()
    hashes = [
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in (*scripts, plotly.offline.get_plotlyjs())
    ]
    assert policy(small) == {
        "default-src": ["'none'"],
        "script-src": hashes,
        "style-src": ["'unsafe-inline'"],
        "img-src": ["data:", "blob:"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
    }


def test_the_script_makes_no_html_of_text() -> None:
    script = page_script()
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval("):
        assert forbidden not in script
    assert "</script" not in script.lower()
    assert "<!--" not in script


def test_hostile_text_is_in_the_page_as_text_only(hostile: str) -> None:
    shell = without_packed(hostile)
    for text in HOSTILE[:5]:
        assert text not in shell
    assert html.escape(HOSTILE[0]).replace("&#x27;", "&#39;") in shell  # the command
    tags = re.findall(r"<(\w+)", shell.replace(page_script(), ""))
    assert {"img", "svg"} & set(tags) == set()
    assert shell.count("<script") == 5
    table = contents(hostile, "records")
    assert table["questions"]["id"] == list(HOSTILE)
    assert table["questions"]["answer"] == list(HOSTILE)


def test_figures_hold_no_markup_of_the_data(hostile: str) -> None:
    names = {
        name
        for figure in contents(hostile, "figures")
        for trace in figure["spec"]["data"]
        for name in trace.get("text") or ()
    }
    assert names == set(map(plain, HOSTILE))


def test_every_file_of_the_page_is_used_and_ships() -> None:
    settings = tomllib.loads((PAGE.parents[1] / "pyproject.toml").read_text("utf-8"))
    assert "page/*" in settings["tool"]["setuptools"]["package-data"]["fusion_lens"]
    script = page_script()
    for path in PAGE.glob("*.js"):
        assert path.read_text("utf-8") in script
    assert {path.name for path in PAGE.iterdir() if path.suffix != ".js"} == {
        "report.css",
        "report.html",
    }


@pytest.mark.parametrize(
    ("arms", "expected"),
    [
        (ARMS, "segmented"),
        (("baseline", "random", "full"), "random"),
        (("baseline", "best_of_n"), "best_of_n"),
        (("baseline",), "baseline"),
        ((), "baseline"),
    ],
)
def test_the_arm_that_is_read_first(arms: tuple[str, ...], expected: str) -> None:
    assert main_arm(run_summary(arms, 3)) == expected


def test_a_figures_title_becomes_a_heading_and_a_line_below_it() -> None:
    figure = go.Figure({"data": [{"type": "box", "y": [1, 2]}]})
    styled(figure, "a &lt;b&gt;", told="n = 2 &amp; more", height=300)
    made = _figure(Figure("name", figure, (), ()))
    assert (made["title"], made["told"]) == ("a <b>", "n = 2 & more")
    assert made["height"] == 300 - 70
    layout = made["spec"]["layout"]
    assert {"title", "width", "height"}.isdisjoint(layout)
    assert layout["margin"]["t"] == 30


@pytest.mark.slow
def test_a_thousand_questions_under_nine_arms_stay_below_15_megabytes() -> None:
    assert len(html_report(large_run()).encode()) < 15e6

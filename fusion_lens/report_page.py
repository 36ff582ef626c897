"""A run -> `report.html`: one file that opens offline and shows everything the run kept.

Tables of the summary are HTML and read without script. Questions, details, figures and plotly
itself lie in the page compressed and are unpacked by its script, which inserts them as text only.
What a model wrote is hostile until shown otherwise: the template escapes, the script never makes
HTML of data, and the page's Content-Security-Policy runs two scripts, known by their hashes, and
loads nothing.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import plotly.offline

from fusion_lens.pictures import Figure
from fusion_lens.report import closing_lines, failure_lines, further_sections, sections
from fusion_lens.report_data import details_table, packed, records_table
from fusion_lens.results import Results
from fusion_lens.run_plots import ARM_COLOURS, run_figures

_PAGE = Path(__file__).parent / "page"
# concatenated in this order into one script
SCRIPTS = ("dom.js", "data.js", "marks.js", "detail.js", "questions.js", "figures.js", "main.js")
_OTHER = "#6e7781"
_TILES = {
    "exact_match": ("right", "{:.1%}", "{:+.1%}"),
    "overlap": ("overlap with gold", "{:.2f}", "{:+.2f}"),
    "objective": ("objective", "{:+.2f}", "{:+.2f}"),
    "perplexity": ("perplexity", "{:.1f}", "{:+.1f}"),
}
# plotly keeps room for a title, which the page writes above the figure
_TITLE_ROOM = 70


def html_report(results: Results) -> str:
    """The whole page; depends on nothing but the run."""
    summary = results.summary
    plotly_js = plotly.offline.get_plotlyjs()
    script = page_script()
    figures = [_figure(figure) for figure in run_figures(results)]
    table = records_table(results)
    colours = {arm: ARM_COLOURS.get(arm, _OTHER) for arm in table["arms"]}
    main = main_arm(summary)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PAGE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        policy=_policy(script, plotly_js),
        style=(_PAGE / "report.css").read_text("utf-8"),
        script=script,
        provenance=summary["provenance"],
        questions=summary["questions"],
        n_arms=len(table["arms"]),
        n_questions=len(table["questions"]["id"]),
        interrupted=summary["interrupted"],
        seconds=summary["seconds"],
        main=main,
        tiles=_tiles(summary, main),
        colours=colours,
        sections=sections(summary, between="\n"),
        further=further_sections(summary, between="\n"),
        lines=closing_lines(summary),
        failures=failure_lines(summary),
        settings=json.dumps(summary["provenance"]["settings"], indent=2, ensure_ascii=False),
        figures=figures,
        has_details=bool(results.details),
        packed={
            "records": packed(table | {"colours": colours, "main": main}),
            "details": packed(details_table(results)),
            "figures": packed([{key: f[key] for key in ("name", "spec")} for f in figures]),
            "plotly": packed(plotly_js),
        },
    )


def page_script() -> str:
    """The page's own script: its parts in order."""
    parts = "\n".join((_PAGE / name).read_text("utf-8") for name in SCRIPTS)
    return f'(() => {{\n"use strict";\n{parts}}})();\n'


def main_arm(summary: Mapping[str, Any]) -> str:
    """The arm that a reader looks at first: segmented, else the first tuned one, else the first."""
    arms = summary["arms"]
    tuned = [name for name, content in arms.items() if "coeffs_median" in content]
    ordered = ["segmented", *tuned, *(name for name in arms if name != "baseline"), *arms]
    return next((name for name in ordered if name in arms), "baseline")


def _policy(*scripts: str) -> str:
    """Nothing is loaded and only these scripts run; plotly writes styles."""
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")


def _tiles(summary: Mapping[str, Any], main: str) -> list[dict[str, Any]]:
    """The main arm's scores, large, each against the baseline's."""
    arms = summary["arms"]
    if main not in arms:
        return []
    made = []
    for metric, (title, form, signed) in _TILES.items():
        own = arms[main]["metrics"][metric]
        if own["mean"] is None:
            continue
        lines = [f"n = {own['n']}"]
        if "baseline" in arms and main != "baseline":
            before = arms["baseline"]["metrics"][metric]["mean"]
            lines += [] if before is None else [f"unsteered {form.format(before)}"]
            lines += _against_baseline(summary["comparisons"], metric, signed)
        made.append({"title": title, "value": form.format(own["mean"]), "lines": lines})
    return made


def _against_baseline(
    comparisons: Sequence[Mapping[str, Any]], metric: str, form: str
) -> list[str]:
    for each in comparisons:
        if (each["b"], each["metric"]) == ("baseline", metric) and each["low"] is not None:
            diff, low, high = (form.format(each[key]) for key in ("diff", "low", "high"))
            return [f"difference {diff} [{low}, {high}]"]
    return []


def _figure(figure: Figure) -> dict[str, Any]:
    """What the page draws; title and subtitle become a heading and a line above the figure."""
    spec = json.loads(figure.figure.to_json())
    layout = spec["layout"]
    title = layout.pop("title")
    layout["margin"]["t"] = max(30, layout["margin"]["t"] - _TITLE_ROOM)
    del layout["width"]
    return {
        "name": figure.name,
        "title": html.unescape(title["text"]),
        "told": html.unescape(title.get("subtitle", {}).get("text", "")),
        "height": layout.pop("height") - _TITLE_ROOM,
        "spec": spec,
    }

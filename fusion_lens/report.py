"""A run's summary -> tables, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

_COLUMNS = {
    "exact_match": ("right", "{:.1%}"),
    "overlap": ("overlap", "{:.2f}"),
    "objective": ("objective", "{:+.2f}"),
    "perplexity": ("perplexity", "{:.1f}"),
}


def summary_table(summary: Mapping[str, Any]) -> Table:
    """What `fusion-lens run` prints: per arm, mean and 95 % interval of each metric."""
    header, *rows = summary_rows(summary, between="\n")
    table = Table(
        title=caption(summary),
        title_justify="left",
        title_style="",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for name in header:
        # a cell that does not fit is folded: cut off, a perplexity of 1234.5 reads 123
        table.add_column(name, justify="left" if name == "arm" else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(summary: Mapping[str, Any]) -> str:
    """The same as Markdown."""
    header, *rows = summary_rows(summary)
    rule = ["---" if name == "arm" else "---:" for name in header]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def tuned_lines(summary: Mapping[str, Any]) -> list[str]:
    """Per tuned arm: trials, how often the zero plan won or trials tied, median coefficients."""
    lines = []
    for name, arm in summary["arms"].items():
        if "coeffs_median" not in arm:
            continue
        trials = " to ".join(map(str, sorted(set(arm["n_trials"]))))
        line = f"{name}: {trials} trials; zero plan won {arm['zero_won']:.0%}, trials tied "
        line += f"{arm['tied']:.0%}"
        if arm["steered"]:
            medians = (f"{segment} {c:.2f}" for segment, c in arm["coeffs_median"].items())
            line += f"; median coefficient of the other {arm['steered']}: {', '.join(medians)}"
        lines.append(line)
    return lines


def engine_line(summary: Mapping[str, Any]) -> str:
    """Which executor generated how many rows, at which shape, and why it was not the lean one."""
    engine = summary["engine"]
    shape = summary["provenance"]["settings"]["tuning"]["generation"]
    ran = ", ".join(f"{n:,} {name}" for name, n in engine["rows"].items() if n)
    line = f"engine: {ran or 'no'} rows; {shape['slots']} slots of {shape['cache_length']} tokens"
    if engine["halvings"]:
        line += f", halved {engine['halvings']} times for lack of memory"
    return line + "".join(f"; hook points because {reason}" for reason in engine["reasons"])


def caption(summary: Mapping[str, Any]) -> str:
    """Model, number of questions and subjects, and what the intervals are."""
    arms = summary["arms"].values()
    n = max((arm["n"] for arm in arms), default=0)
    available = summary["questions"].get("available", 0)
    of = f" of {available}" if available > n else ""
    clusters = max((arm["clusters"] for arm in arms), default=0)
    unit = "every question its own cluster" if clusters == n else f"{clusters} subjects"
    ended = ", interrupted" if summary["interrupted"] else ""
    failed = f", {len(summary['failures'])} failed" if summary["failures"] else ""
    return (
        f"{summary['provenance']['model']}: {n}{of} questions ({unit}){failed}{ended}; "
        "mean [95 % cluster bootstrap]"
    )


def summary_rows(summary: Mapping[str, Any], between: str = " ") -> list[list[str]]:
    """Header and cells as text, `between` a mean and its interval; unscored values are counted."""
    rows = [["arm", "n", *(title for title, _ in _COLUMNS.values())]]
    for name, arm in summary["arms"].items():
        cells = [
            _cell(arm["metrics"][metric], form, between) for metric, (_, form) in _COLUMNS.items()
        ]
        rows.append([name, str(arm["n"]), *cells])
    return rows


def failure_lines(summary: Mapping[str, Any]) -> Sequence[str]:
    """One line for every question, or question under one arm, that failed."""
    return [
        f"{f['question_id']}{', ' + f['arm'] if f['arm'] else ''}: {f['error']}: {f['message']}"
        for f in summary["failures"]
    ]


def _cell(metric: Mapping[str, Any], form: str, between: str) -> str:
    if metric["mean"] is None:
        return "unscored"
    text = form.format(metric["mean"])
    if metric["low"] is not None:
        text += f"{between}[{form.format(metric['low'])}, {form.format(metric['high'])}]"
    return text + (f"{between}({metric['unscored']} unscored)" if metric["unscored"] else "")

"""A run's summary -> tables, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fusion_lens.statistics import Comparison
from fusion_lens.tables import Section

_SCORES = {
    "exact_match": ("right", "{:.1%}"),
    "overlap": ("overlap", "{:.2f}"),
    "objective": ("objective", "{:+.2f}"),
    "perplexity": ("perplexity", "{:.1f}"),
}
_REACH = {
    "transfer_exact_match": ("paraphrases right", "{:.1%}"),
    "neighbours_kept": ("neighbours kept", "{:.1%}"),
    "kl_unrelated": ("KL, nats/token", "{:.3f}"),
}
_GRADED = {
    "grade": ("grade", "{:.2f}"),
    "composite": ("composite", "{:.2f}"),
    "accurate": ("accurate", "{:.1%}"),
}
_DIFFERENCES = {
    "objective": ("objective", "{:+.2f}"),
    "overlap": ("overlap", "{:+.2f}"),
    "exact_match": ("right", "{:+.1%}"),
    "transfer_exact_match": ("paraphrases right", "{:+.1%}"),
}
_FURTHER = {
    "correct": ("judged correct", "{:+.1%}"),
    "accurate": ("accurate", "{:+.1%}"),
    "token_f1": ("token F1", "{:+.3f}"),
    "nll": ("nats/token", "{:+.3f}"),
    "neighbours_kept": ("neighbours kept", "{:+.1%}"),
    "kl_unrelated": ("KL, nats/token", "{:+.3f}"),
}
_GROUP_NAMES = {"topic": "topic", "answer_type": "answer type"}


def sections(summary: Mapping[str, Any], between: str = " ") -> list[Section]:
    """What `fusion-lens run` prints: scores and reach of every arm, and segmented against the
    others. `between` a mean and its interval."""
    made = [
        Section(caption(summary), *_by_arm(summary["arms"], _SCORES, between)),
    ]
    measured = (arm["metrics"] for arm in summary["arms"].values())
    if any(metrics[name]["n"] for metrics in measured for name in _REACH):
        title = "what was chosen, unchanged, elsewhere"
        if "best_of_n" in summary["arms"]:
            title += " (best_of_n: fresh samples, chosen against gold)"
        tokens = summary["unrelated_tokens"]
        title += f"; KL from unsteered on {tokens:,} tokens of unrelated text" if tokens else ""
        made.append(Section(title, *_by_arm(summary["arms"], _REACH, between)))
    if any(arm["labels"]["n"] for arm in summary["arms"].values()):
        made.append(_labels(summary))
    if summary["judge"]["grade"]:
        title = "half overlap, half the judge's grade of 1 to 5; accurate from 0.6 on"
        made.append(Section(title, *_by_arm(summary["arms"], _GRADED, between)))
    if summary["comparisons"]:
        made.append(_differences(summary, _DIFFERENCES, between))
    return made


def further_sections(summary: Mapping[str, Any], between: str = " ") -> list[Section]:
    """What only the written reports show: other differences, and scores by topic and answer
    type."""
    made = []
    if summary["comparisons"]:
        made.append(_differences(summary, _FURTHER, between))
    for field, name in _GROUP_NAMES.items():
        for group, arms in summary["groups"].get(field, {}).items():
            columns = {key: value for key, value in _SCORES.items() if key != "perplexity"}
            content = {arm: {"n": _n(metrics), "metrics": metrics} for arm, metrics in arms.items()}
            made.append(Section(f"{name}: {group}", *_by_arm(content, columns, between)))
    return made


def markdown_report(summary: Mapping[str, Any]) -> str:
    """Everything the summary says, as Markdown."""
    shown = [*sections(summary), *further_sections(summary)]
    parts = [f"**{section.title}**\n\n{section.to_markdown()}" for section in shown]
    lines = list(closing_lines(summary))
    lines += [f"failed: {line}" for line in failure_lines(summary)]
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in lines)]) + "\n"


def closing_lines(summary: Mapping[str, Any]) -> list[str]:
    """What is told below the tables."""
    told = (*tuned_lines(summary), *lender_lines(summary), *judge_lines(summary))
    return [*told, engine_line(summary)]


def lender_lines(summary: Mapping[str, Any]) -> list[str]:
    """How much of the deltas is generic, and how many control arms had to share a word."""
    lines = []
    share = summary["generic_share"]
    if share["n"]:
        line = f"generic share: {share['median']:.0%} of a delta's squared norm (median over "
        line += f"{share['n']} questions, mean over layers) lies along the mean delta of the "
        lines.append(line + f"others, {summary['donors']['n']} in all")
    if "mismatched" in summary["arms"]:
        donors = summary["donors"]
        lines.append(
            f"mismatched: {donors['mismatched']} questions have a donor, "
            f"{donors['sharing_a_word']} of them one that shares a word with the answer"
        )
    return lines


def run_differences(comparisons: Sequence[Comparison], names: tuple[str, str]) -> Section:
    """What `fusion-lens compare` prints."""
    shown = _DIFFERENCES
    found = {(each.b, each.metric): asdict(each) for each in comparisons}
    rows = tuple(
        (arm, *(_difference(found[arm, metric], form, "\n") for metric, (_, form) in shown.items()))
        for arm in dict.fromkeys(each.b for each in comparisons)
    )
    title = f"{names[1]} minus {names[0]}, paired by question; p Holm-corrected over the arms"
    return Section(title, ("arm", *(title for title, _ in shown.values())), rows)


def tuned_lines(summary: Mapping[str, Any]) -> list[str]:
    """Per tuned arm: trials, how often the zero plan won or trials tied, median coefficients."""
    lines = []
    for name, arm in summary["arms"].items():
        if "coeffs_median" not in arm:
            continue
        trials = " to ".join(map(str, sorted(set(arm["n_trials"]))))
        zero = arm["zero_won"]
        won = "no zero plan" if zero is None else f"zero plan won {zero:.0%}"
        line = f"{name}: {trials} trials; {won}, trials tied {arm['tied']:.0%}"
        if arm["steered"]:
            medians = (f"{segment} {c:.2f}" for segment, c in arm["coeffs_median"].items())
            others = "" if zero is None else f" of the other {arm['steered']}"
            line += f"; median coefficient{others}: {', '.join(medians)}"
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
        f"mean [95 % cluster bootstrap]{_seen(summary)}"
    )


def _seen(summary: Mapping[str, Any]) -> str:
    """What the metrics were taken on, where it is not the completion under the model itself."""
    settings = summary["provenance"]["settings"]
    model = settings["perplexity_model"]
    if settings["tuning"]["metrics"] == "published":
        return f"; overlap and perplexity ({model}) as published, of prompt + completion"
    return f"; perplexity by {model}" if model else ""


def failure_lines(summary: Mapping[str, Any]) -> Sequence[str]:
    """One line for every question, or question under one arm, that failed."""
    return [
        f"{f['question_id']}{', ' + f['arm'] if f['arm'] else ''}: {f['error']}: {f['message']}"
        for f in summary["failures"]
    ]


def _by_arm(
    arms: Mapping[str, Any], columns: Mapping[str, tuple[str, str]], between: str
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Header and cells; unscored values are counted."""
    header = ("arm", "n", *(title for title, _ in columns.values()))
    rows = tuple(
        (
            name,
            str(arm["n"]) + (f" ({arm['unscored']} unscored)" if arm.get("unscored") else ""),
            *(
                _cell(arm["metrics"][metric], form, between)
                for metric, (_, form) in columns.items()
            ),
        )
        for name, arm in arms.items()
    )
    return header, rows


def _labels(summary: Mapping[str, Any]) -> Section:
    names = ("correct", "incorrect", "not_attempted", "attempted_accuracy", "f")
    header = ("arm", "n", "correct", "incorrect", "not attempted", "of attempted", "F", "unscored")
    rows = tuple(
        (
            arm,
            str(content["labels"]["n"]),
            *("-" if (x := content["labels"][name]) is None else f"{x:.1%}" for name in names),
            str(content["labels"]["unscored"]),
        )
        for arm, content in summary["arms"].items()
    )
    return Section(f"labelled by the judge {summary['judge']['name']}", header, rows)


def judge_lines(summary: Mapping[str, Any]) -> list[str]:
    """What the judge has cost, and how often it failed and why; nothing of one that costs
    nothing."""
    judge = summary["judge"]
    if "requests" not in judge:
        return []
    line = f"judge {judge['name']}: {judge['requests']:,} requests, {judge['cached']:,} replies "
    line += f"from the cache, {judge['tokens_in']:,} tokens in and {judge['tokens_out']:,} out"
    if judge["cost"] is not None:
        line += f", cost {judge['cost']:.2f}"
    reasons = ", ".join(f"{n} {reason}" for reason, n in judge["failures"].items())
    return [line + f"; unscored: {reasons or 'none'}"]


def _differences(
    summary: Mapping[str, Any], columns: Mapping[str, tuple[str, str]], between: str
) -> Section:
    found = {(each["b"], each["metric"]): each for each in summary["comparisons"]}
    scored = {metric for (_, metric), each in found.items() if each["diff"] is not None}
    columns = {metric: shown for metric, shown in columns.items() if metric in scored}
    first = summary["comparisons"][0]
    rows = tuple(
        (
            other,
            *(
                _difference(found[other, metric], form, between)
                for metric, (_, form) in columns.items()
            ),
        )
        for other in dict.fromkeys(each["b"] for each in summary["comparisons"])
    )
    title = f"{first['a']} minus another arm, paired by question; p Holm-corrected over the arms"
    return Section(title, ("minus", *(title for title, _ in columns.values())), rows)


def _difference(comparison: Mapping[str, Any], form: str, between: str) -> str:
    if comparison["diff"] is None:
        return "unscored"
    text = form.format(comparison["diff"])
    if comparison["low"] is not None:
        text += f"{between}[{form.format(comparison['low'])}, {form.format(comparison['high'])}]"
    if comparison["p_holm"] is not None:
        text += f"{between}p {comparison['p_holm']:.2g}"
    return text + (f"{between}(n {comparison['n']})" if comparison["unscored"] else "")


def _n(metrics: Mapping[str, Any]) -> int:
    one = next(iter(metrics.values()))
    return int(one["n"] + one["unscored"])


def _cell(metric: Mapping[str, Any], form: str, between: str) -> str:
    if metric["mean"] is None:
        return "unscored"
    text = form.format(metric["mean"])
    if metric["low"] is not None:
        text += f"{between}[{form.format(metric['low'])}, {form.format(metric['high'])}]"
    return text + (f"{between}({metric['unscored']} unscored)" if metric["unscored"] else "")

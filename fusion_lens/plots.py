"""Plotly figures of a run. Colours are one per arm, the same in every figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from fusion_lens.pictures import Figure, styled
from fusion_lens.results import Result, Results

ARM_COLOURS = {
    "baseline": "#8c8c8c",
    "best_of_n": "#56b4e9",
    "answer_in_prompt": "#000000",
    "full": "#0072b2",
    "segmented": "#d55e00",
    "generic": "#e69f00",
    "mismatched": "#cc79a7",
    "random": "#b8a700",
    "unembed": "#009e73",
}
_OTHER = "#555555"
_SCORES = {
    "exact_match": "right (exact match)",
    "overlap": "overlap with gold",
    "objective": "objective",
    "perplexity": "perplexity",
}
_REACH = {
    "transfer_exact_match": "paraphrases right",
    "neighbours_kept": "neighbours kept",
    "kl_unrelated": "KL on unrelated text, nats/token",
}
_TICKS = [1, 1.5, 2, 3, 5, *(10**power * step for power in range(1, 6) for step in (1, 3))]


def run_figures(results: Results) -> list[Figure]:
    """The figures of a run: delta norms, scores and reach per arm, chosen coefficients. Empty ones
    are left out."""
    figures = []
    if results.details:
        figures.append(
            plot_delta_norms({each.question_id: each.delta_norms for each in results.details})
        )
    arms = results.summary["arms"]
    figures.append(plot_scores(arms))
    if any(content["metrics"][name]["n"] for content in arms.values() for name in _REACH):
        figures.append(plot_reach(arms))
    tuned = [record for record in results.records if record.coeffs]
    if tuned:
        figures.append(plot_coeffs(tuned, arms))
    return figures


def plot_delta_norms(norms: Mapping[str, Sequence[float]]) -> Figure:
    """Delta norm per layer over questions: median, quartiles, and every question as a faint
    line."""
    layers = list(range(len(next(iter(norms.values())))))
    figure = go.Figure()
    for question_id, values in norms.items():
        figure.add_scatter(
            x=layers,
            y=list(values),
            mode="lines",
            line={"color": "rgba(0,114,178,0.15)", "width": 1},
            name=escape(question_id, quote=False),  # plotly reads markup in names
            showlegend=False,
        )
    for layer in layers:
        figure.add_box(
            x=[layer] * len(norms),
            y=[values[layer] for values in norms.values()],
            marker_color=ARM_COLOURS["full"],
            boxpoints=False,
            showlegend=False,
            width=0.35,
            name=f"layer {layer}",
        )
    styled(figure, f"Delta norm per layer, {len(norms)} questions")
    figure.update_xaxes(title="layer (blocks.l.hook_resid_post)", dtick=max(1, len(layers) // 12))
    figure.update_yaxes(title="‖reference − question‖", rangemode="tozero")
    rows = tuple((q, layer, v) for q, values in norms.items() for layer, v in enumerate(values))
    return Figure("delta_norms", figure, ("question_id", "layer", "norm"), rows)


def plot_scores(arms: Mapping[str, Any]) -> Figure:
    """Mean and 95 % interval of each score under each arm; perplexity on a logarithmic axis."""
    return _plot_arms("scores", "Scores per arm", arms, _SCORES)


def plot_reach(arms: Mapping[str, Any]) -> Figure:
    """The same of transfer to paraphrases, neighbours kept, and divergence on unrelated text."""
    return _plot_arms("reach", "The chosen plan elsewhere", arms, _REACH)


def _plot_arms(name: str, title: str, arms: Mapping[str, Any], shown: Mapping[str, str]) -> Figure:
    figure = make_subplots(
        cols=len(shown),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        subplot_titles=list(shown.values()),
    )
    rows = []
    for arm, content in arms.items():
        for column, metric in enumerate(shown, start=1):
            values = content["metrics"][metric]
            if values["mean"] is None:
                continue
            # a point: a bar on a logarithmic axis has no foot to start from
            figure.add_scatter(
                x=[values["mean"]],
                y=[arm],
                error_x=_error_bars([values]),
                mode="markers",
                marker={"color": ARM_COLOURS.get(arm, _OTHER), "size": 11},
                name=arm,
                showlegend=False,
                row=1,
                col=column,
            )
            rows.append((arm, metric, *(values[key] for key in ("mean", "low", "high", "n"))))
    n = max((content["n"] for content in arms.values()), default=0)
    styled(figure, f"{title}, n = {n} questions, 95 % cluster bootstrap")
    figure.update_yaxes(categoryorder="array", categoryarray=list(arms)[::-1])
    figure.update_annotations(font_size=14)
    if "perplexity" in shown:
        column = list(shown).index("perplexity") + 1
        figure.update_xaxes(type="log", tickvals=_TICKS, ticktext=_TICKS, col=column)
    figure.update_layout(margin_t=90)
    return Figure(name, figure, ("arm", "metric", "mean", "low", "high", "n"), tuple(rows))


def plot_coeffs(records: Sequence[Result], arms: Mapping[str, Any]) -> Figure:
    """The chosen coefficient of every question per segment; how often the zero plan won, how often
    trials tied."""
    figure = go.Figure()
    rows = []
    for arm in dict.fromkeys(record.arm for record in records):
        own = [record for record in records if record.arm == arm]
        content = arms[arm]
        for segment in own[0].coeffs:
            values = [record.coeffs[segment] for record in own]
            figure.add_box(
                x=values,
                y=[f"{arm}: {segment}" if segment != arm else arm] * len(own),
                orientation="h",
                boxpoints="all",
                jitter=0.5,
                pointpos=0,
                marker={"color": ARM_COLOURS.get(arm, _OTHER), "size": 4, "opacity": 0.6},
                name=f"{arm}<br>" + _won_and_tied(content),
                legendgroup=arm,
                showlegend=segment == next(iter(own[0].coeffs)),
            )
            rows += [
                (r.question_id, arm, segment, r.coeffs[segment], r.zero_won, r.tied) for r in own
            ]
    styled(figure, "Chosen coefficient per segment")
    figure.update_xaxes(title="coefficient")
    figure.update_yaxes(autorange="reversed")
    columns = ("question_id", "arm", "segment", "coeff", "zero_won", "tied")
    return Figure("coeffs", figure, columns, tuple(rows))


def _won_and_tied(content: Mapping[str, Any]) -> str:
    tied = f"tied {content['tied']:.0%}"
    won = content["zero_won"]
    return tied if won is None else f"zero plan won {won:.0%}, {tied}"


def _error_bars(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def reach(metric: Mapping[str, Any], end: str) -> float:
        return 0.0 if metric[end] is None else abs(metric[end] - metric["mean"])

    return {
        "type": "data",
        "array": [reach(metric, "high") for metric in metrics],
        "arrayminus": [reach(metric, "low") for metric in metrics],
    }

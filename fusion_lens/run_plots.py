"""Plotly figures of a run. Colours are one per arm, the same in every figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from fusion_lens.delta_plots import plot_delta_norms, plot_generic_share, plot_norm_map
from fusion_lens.errors import ConfigError
from fusion_lens.pictures import (
    Figure,
    error_bars,
    logarithmic,
    number_of,
    plain,
    styled,
    with_zero,
)
from fusion_lens.results import Result, Results

ARM_COLOURS = {
    "baseline": "#8c8c8c",
    "best_of_n": "#2f8fc4",
    "answer_in_prompt": "#8660a8",
    "full": "#0072b2",
    "segmented": "#d55e00",
    "generic": "#b87900",
    "mismatched": "#b8558a",
    "random": "#8a7d00",
    "unembed": "#009e73",
    "masked": "#5b7f95",
    "gated": "#a35d4a",
}
_OTHER = "#757575"
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
_COMPARED = {
    "objective": "objective",
    "overlap": "overlap with gold",
    "transfer_exact_match": "paraphrases right",
}
_ALPHA = 0.05
_MOST_POINTS = 200


def run_figures(results: Results) -> list[Figure]:
    """The figures of a run: scores, differences and reach per arm, chosen coefficients, and the
    deltas they are made of. Empty ones are left out."""
    arms = results.summary["arms"]
    figures = [plot_scores(arms)]
    if any(_scored(results.summary["comparisons"], metric) for metric in _COMPARED):
        figures.append(plot_differences(results.summary["comparisons"]))
    if any(content["metrics"][name]["n"] for content in arms.values() for name in _REACH):
        figures.append(plot_reach(arms))
    tuned = [record for record in results.records if record.coeffs]
    if tuned:
        figures.append(plot_coeffs(tuned, arms))
    if results.details:
        figures += [plot_delta_norms(results.details), plot_norm_map(results.details)]
    if any(each.generic_share is not None for each in results.details):
        figures.append(plot_generic_share(results.details))
    return figures


def plot_scores(arms: Mapping[str, Any]) -> Figure:
    """Mean and 95 % interval of each score under each arm; perplexity on a logarithmic axis."""
    return _plot_arms("scores", "Scores per arm", arms, _SCORES)


def plot_reach(arms: Mapping[str, Any]) -> Figure:
    """The same of transfer to paraphrases, neighbours kept, and divergence on unrelated text."""
    return _plot_arms("reach", "The chosen plan elsewhere", arms, _REACH)


def plot_differences(comparisons: Sequence[Mapping[str, Any]]) -> Figure:
    """The first arm of the comparisons minus each other one, paired by question, with intervals; a
    hollow mark where Holm's p is 0.05 or more, or nothing was tested.

    Raises:
        ConfigError: if no comparison has a difference to show.
    """
    shown = {name: _COMPARED[name] for name in _COMPARED if _scored(comparisons, name)}
    if not shown:
        raise ConfigError(
            f"there must be a difference in one of {', '.join(_COMPARED)} to show, but got none."
        )
    others = list(dict.fromkeys(plain(each["b"]) for each in comparisons))
    figure = make_subplots(
        cols=len(shown),
        shared_yaxes=True,
        horizontal_spacing=0.04,
        subplot_titles=list(shown.values()),
    )
    rows = []
    for column, metric in enumerate(shown, start=1):
        for each in comparisons:
            if each["metric"] != metric or each["diff"] is None:
                continue
            sure = each["p_holm"] is not None and each["p_holm"] < _ALPHA
            look = {
                "symbol": "circle" if sure else "circle-open",
                "line": {"width": 2, "color": _colour(each["b"])},
            }
            _add_point(figure, column, each["b"], {**each, "mean": each["diff"]}, look)
            keys = ("b", "metric", "diff", "low", "high", "p_holm", "n")
            rows.append(tuple(each[key] for key in keys))
        figure.add_vline(x=0, line={"color": _OTHER, "width": 1, "dash": "dot"}, col=column)
    first = plain(comparisons[0]["a"])
    n = number_of(max(each["n"] for each in comparisons), "pair")
    told = f"n = {n}, 95 % cluster bootstrap; filled where Holm's p is below {_ALPHA}"
    styled(
        figure, f"{first} minus another arm", told=told, height=180 + 34 * len(others), panels=True
    )
    _name_rows(figure, others)
    columns = ("minus", "metric", "diff", "low", "high", "p_holm", "n")
    return Figure("differences", figure, columns, tuple(rows))


def _scored(comparisons: Sequence[Mapping[str, Any]], metric: str) -> bool:
    return any(each["metric"] == metric and each["diff"] is not None for each in comparisons)


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
            _add_point(figure, column, arm, values, {})
            rows.append((arm, metric, *(values[key] for key in ("mean", "low", "high", "n"))))
    n = max((content["n"] for content in arms.values()), default=0)
    told = f"n = {number_of(n, 'question')}, mean and 95 % cluster bootstrap"
    styled(figure, title, told=told, height=180 + 34 * len(arms), panels=True)
    _name_rows(figure, list(map(plain, arms)))
    if "perplexity" in shown:
        column = list(shown).index("perplexity") + 1
        ends = (end for _, metric, *own, _ in rows if metric == "perplexity" for end in own)
        axis = logarithmic([end for end in ends if end is not None], most=4)
        figure.update_xaxes(**axis, col=column)
    return Figure(name, figure, ("arm", "metric", "mean", "low", "high", "n"), tuple(rows))


def plot_coeffs(records: Sequence[Result], arms: Mapping[str, Any]) -> Figure:
    """The chosen coefficient of every question per segment; how often the zero plan won, how often
    trials tied."""
    figure = go.Figure()
    rows = []
    names = []
    for arm in dict.fromkeys(record.arm for record in records):
        own = [record for record in records if record.arm == arm]
        for n, segment in enumerate(own[0].coeffs):
            names.append(plain(f"{arm}: {segment}" if segment != arm else arm))
            figure.add_box(
                x=[record.coeffs[segment] for record in own],
                y=names[-1:] * len(own),
                orientation="h",
                boxpoints="all" if len(own) <= _MOST_POINTS else False,
                jitter=0.5,
                pointpos=0,
                marker={"color": _colour(arm), "size": 4},
                name=names[-1],
                showlegend=False,
            )
            if n == 0:
                figure.add_annotation(
                    x=1.01,
                    xref="paper",
                    y=names[-1],
                    text=_won_and_tied(arms[arm]),
                    showarrow=False,
                    xanchor="left",
                )
            rows += [
                (r.question_id, arm, segment, r.coeffs[segment], r.zero_won, r.tied) for r in own
            ]
    n_questions = len({record.question_id for record in records})
    told = f"n = {number_of(n_questions, 'question')}; box: quartiles and median; right: how often "
    told += "the zero plan won, trials tied"
    styled(figure, "Chosen coefficient per segment", told=told, height=190 + 26 * len(names))
    _name_rows(figure, names)
    figure.update_layout(margin={"l": 160, "r": 150})
    drawn = [coeff for *_, coeff, _, _ in rows]
    figure.update_xaxes(title="coefficient", range=with_zero(drawn, room=0.02))
    figure.update_yaxes(tickmode="array", tickvals=names)
    columns = ("question_id", "arm", "segment", "coeff", "zero_won", "tied")
    return Figure("coeffs", figure, columns, tuple(rows))


def _add_point(
    figure: go.Figure,
    column: int,
    arm: str,
    values: Mapping[str, Any],
    look: Mapping[str, Any],
) -> None:
    """The mean of `values` in the arm's row, with an error bar to `low` and `high`; `look` is of
    the marker."""
    figure.add_scatter(
        x=[values["mean"]],
        y=[plain(arm)],
        error_x=error_bars([values]),
        mode="markers",
        marker={"color": _colour(arm), "size": 11, **look},
        name=plain(arm),
        showlegend=False,
        row=1,
        col=column,
    )


def _colour(arm: str) -> str:
    return ARM_COLOURS.get(arm, _OTHER)


def _name_rows(figure: go.Figure, names: Sequence[str]) -> None:
    """A row for every name from the top, with room for it. A name may be a number."""
    figure.update_yaxes(
        type="category",
        categoryorder="array",
        categoryarray=names[::-1],
        range=[-0.6, len(names) - 0.4],
        automargin=True,
        ticklabelstandoff=6,
    )
    figure.update_layout(margin_l=130)


def _won_and_tied(content: Mapping[str, Any]) -> str:
    tied = f"tied {content['tied']:.0%}"
    won = content["zero_won"]
    return tied if won is None else f"zero {won:.0%}, {tied}"

"""Plotly figures of one search: what each coefficient was worth, which mattered, and what overlap
costs in perplexity."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from fusion_lens.errors import SearchError
from fusion_lens.pictures import (
    BELOW,
    LESS,
    MORE,
    REST,
    Figure,
    logarithmic,
    number_of,
    plain,
    shortened,
    styled,
    with_zero,
)
from fusion_lens.search import Trial, Tuned

_STAR = {"color": LESS, "size": 15, "symbol": "star", "line": {"color": "#ffffff", "width": 1}}
# opaque: see-through, they would not stand out from a dark page
_TRIAL = {"color": MORE, "size": 8, "line": {"color": "#ffffff", "width": 0.5}}
_MOST_PANELS = 6
_ZERO = {"color": REST, "size": 12, "symbol": "circle-open", "line": {"width": 2}}


def plot_search(tuned: Tuned[Any]) -> Figure:
    """Coefficient against objective, a panel for every segment: trials in blue, the unsteered model
    hollow, the chosen trial a star."""
    segments = list(tuned.best.coeffs)
    shown = segments[:_MOST_PANELS]
    figure = make_subplots(
        cols=len(shown),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        subplot_titles=[plain(shortened(name, 84 // len(shown))) for name in shown],
    )
    for column, segment in enumerate(shown, start=1):
        for name, trials, marker in _groups(tuned):
            figure.add_scatter(
                x=[trial.coeffs[segment] for trial in trials],
                y=[trial.outcome.objective for trial in trials],
                customdata=[trial.number for trial in trials],
                mode="markers",
                marker=marker,
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                hovertemplate="trial %{customdata}<br>coefficient %{x:.3f}<br>objective %{y:.3f}",
                row=1,
                col=column,
            )
    left = f"; the first {len(shown)} of {len(segments)} segments" if segments != shown else ""
    told = f"n = {number_of(len(tuned.trials), 'trial')}{left}"
    styled(figure, "Coefficient against objective", told=told, height=440, panels=True)
    drawn = [coeff for trial in tuned.trials for coeff in trial.coeffs.values()]
    room = 0.04 + 0.015 * len(shown)
    figure.update_xaxes(title="coefficient", range=with_zero(drawn, room=room))
    figure.update_yaxes(title="objective", col=1)
    figure.update_layout(margin_b=100, legend=BELOW)
    rows = tuple(
        (trial.number, segment, trial.coeffs[segment], trial.outcome.objective, trial is tuned.best)
        for trial in tuned.trials
        for segment in segments
    )
    return Figure("search", figure, ("trial", "segment", "coeff", "objective", "chosen"), rows)


def plot_front(tuned: Tuned[Any]) -> Figure:
    """Overlap against perplexity of every trial, both as measured; those of the Pareto front are
    joined: no trial has both more overlap and less perplexity than they."""
    scored = [each for each in tuned.trials if _pair(each) is not None]
    front = sorted(
        (each for each in tuned.front if _pair(each) is not None),
        key=lambda each: each.outcome.perplexity,
    )
    figure = go.Figure()
    figure.add_scatter(
        x=[each.outcome.perplexity for each in front],
        y=[each.outcome.overlap for each in front],
        mode="lines",
        line={"color": LESS, "width": 2, "shape": "hv"},
        name="Pareto front",
        hoverinfo="skip",
    )
    for name, trials, marker in _groups(tuned):
        own = [each for each in trials if _pair(each) is not None]
        figure.add_scatter(
            x=[each.outcome.perplexity for each in own],
            y=[each.outcome.overlap for each in own],
            customdata=[each.number for each in own],
            mode="markers",
            marker=marker,
            name=name,
            hovertemplate="trial %{customdata}<br>perplexity %{x:.2f}<br>overlap %{y:.2f}",
        )
    unscored = len(tuned.trials) - len(scored)
    told = f"n = {number_of(len(scored), 'trial')}"
    told += f"; {unscored} unscored" if unscored else ""
    styled(figure, "Overlap against perplexity", told=told)
    perplexities = [each.outcome.perplexity for each in scored]
    figure.update_xaxes(title="perplexity of the completion", **logarithmic(perplexities))
    figure.update_yaxes(title="overlap with gold", range=[-0.04, 1.04])
    figure.update_layout(margin_b=100, legend=BELOW)
    on_front = {each.number for each in front}
    rows = tuple(
        (each.number, each.outcome.overlap, each.outcome.perplexity, each.number in on_front)
        for each in scored
    )
    return Figure("front", figure, ("trial", "overlap", "perplexity", "front"), rows)


def plot_importance(tuned: Tuned[Any]) -> Figure:
    """How much every segment's parameter decides whether a trial is among the best
    (`Tuned.importances`).

    Raises:
        SearchError: if the trials tell nothing of it.
    """
    found = tuned.importances()
    if not found:
        raise SearchError(
            "importances need at least two trials of different objectives, but all objectives are "
            "equal; take more trials or wider coefficients."
        )
    figure = go.Figure()
    figure.add_bar(
        x=list(found.values()),
        y=[plain(name) for name in found],
        orientation="h",
        marker_color=MORE,
        text=[f"{value:.0%}" for value in found.values()],
        textposition="outside",
        cliponaxis=False,
    )
    n = sum(bool(trial.params) for trial in tuned.trials)
    styled(
        figure,
        "Importance of each coefficient for a good trial",
        told=f"PED-ANOVA on n = {n} trials; the shares sum to 1",
        height=170 + 28 * len(found),
    )
    figure.update_xaxes(
        title="share", range=[0, 1.15 * max(found.values()) or 1.0], tickformat=".0%"
    )
    figure.update_yaxes(type="category", autorange="reversed", automargin=True, ticklabelstandoff=6)
    return Figure("importance", figure, ("parameter", "share"), tuple(found.items()))


def _groups(tuned: Tuned[Any]) -> list[tuple[str, list[Trial[Any]], dict[str, Any]]]:
    zero = tuned.unsteered
    others = [each for each in tuned.trials if each is not tuned.best and each is not zero]
    groups: list[tuple[str, list[Trial[Any]], dict[str, Any]]] = [("trial", others, _TRIAL)]
    if zero is not None:
        groups.append(("unsteered", [zero], _ZERO))
    chosen = "chosen trial: unsteered" if tuned.zero_won else "chosen trial"
    return [*groups, (chosen, [tuned.best], _STAR)]


def _pair(trial: Trial[Any]) -> tuple[float, float] | None:
    overlap, perplexity = trial.outcome.overlap, trial.outcome.perplexity
    return None if overlap is None or perplexity is None else (overlap, perplexity)

"""Plotly figures of attributions: which features, at which layer, at which token, and whether they
do the work.

Blue is more of a feature, vermilion less, grey what is in no feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from html import unescape
from typing import Any, NamedTuple

import plotly.graph_objects as go

from fusion_lens.attribution import Attribution, FeatureEffect, shown_share
from fusion_lens.faithfulness import Faithfulness
from fusion_lens.pictures import (
    BELOW,
    LESS,
    MORE,
    REST,
    Figure,
    centred,
    error_bars,
    number_of,
    plain,
    shortened,
    styled,
)
from fusion_lens.pictures import visible as shown_token

Labels = Mapping[str, Mapping[int, str]]
"""Label by dictionary's name and feature."""

_LONGEST = 44
_LONGEST_TOKEN = 24
_LONGEST_ABOVE = 30
_RANK = ""


class _Cell(NamedTuple):
    """One feature's part in one layer; its `column` is a dictionary's feature, or a rank."""

    layer: int
    column: tuple[str, int]
    effect: float
    name: str


def plot_top_features(found: Attribution, k: int = 15, labels: Labels | None = None) -> Figure:
    """The `k` features of the largest effects as signed bars, in residual units, and below them the
    norm of the error, which no feature explains."""
    top = found.top(k, labels)
    names = [feature_name(each) for each in top]
    error = sum(float(each.error.norm()) ** 2 for each in found.effects) ** 0.5
    sizes = [each.effect for each in top]
    names.append("norm of the error, in no feature")
    figure = go.Figure()
    figure.add_bar(
        x=[*sizes, error],
        y=list(range(len(names))),
        hovertext=names,
        orientation="h",
        marker_color=[*(MORE if size > 0 else LESS for size in sizes), REST],
        customdata=[*(each.share for each in top), None],
        hovertemplate="%{hovertext}<br>effect %{x:.3f}<br>share %{customdata:.1%}<extra></extra>",
    )
    kind = found.effects[0].kind
    height = 160 + 26 * (len(top) + 1)
    _titled(figure, f"Features of the {kind} change, effect in residual units", found, height)
    figure.update_xaxes(title="signed effect, |w d|")
    # by place: two dictionaries may have a feature of one name
    _ticks(figure, "y", names)
    figure.update_yaxes(autorange="reversed")
    columns = ("dictionary", "layer", "feature", "label", "effect", "share")
    rows = tuple(tuple(getattr(each, name) for name in columns) for each in top)
    return Figure("top_features", figure, columns, rows)


def plot_layer_features(found: Attribution, k: int = 12, labels: Labels | None = None) -> Figure:
    """Layer against feature: of a crosscoder the `k` features of the largest effects, each with its
    part in every layer; of SAEs the `k` largest of each layer, by rank."""
    cells = (
        _crosscoder_cells(found, k, labels)
        if any(len(each.card.layers) > 1 for each in found.effects)
        else _ranked_cells(found, k, labels)
    )
    columns = list(dict.fromkeys(cell.column for cell in cells))
    layers = sorted({cell.layer for cell in cells})
    grid = {(cell.layer, cell.column): cell for cell in cells}
    values: list[list[float | None]] = []
    names: list[list[str]] = []
    for layer in layers:
        own = [grid.get((layer, column)) for column in columns]
        values.append([None if cell is None else cell.effect for cell in own])
        names.append(["" if cell is None else cell.name for cell in own])
    figure = go.Figure()
    figure.add_heatmap(
        x=list(range(len(columns))),
        y=[f"layer {layer}" for layer in layers],
        z=values,
        customdata=names,
        hovertemplate="%{y}<br>%{customdata}<br>effect %{z:.3f}<extra></extra>",
        **centred(values, "effect"),
    )
    ranked = bool(columns) and columns[0][0] == _RANK
    if ranked:
        figure.update_traces(
            text=[[name.split(" ")[1] if name else "" for name in row] for row in names],
            texttemplate="%{text}",
        )
    _titled(figure, "Features by layer, effect in residual units", found, 300 + 24 * len(layers))
    if ranked:
        _ticks(figure, "x", [f"rank {n}" for _, n in columns])
    else:
        tops = {(each.dictionary, each.feature): each for each in found.top(k, labels)}
        longest = _name_columns(figure, [tops[column] for column in columns])
        figure.update_layout(height=figure.layout.height + longest, margin_b=longest)
    rows = tuple((cell.layer, cell.name, cell.effect) for cell in cells)
    return Figure("layer_features", figure, ("layer", "feature", "effect"), rows)


def plot_token_features(found: Attribution, k: int = 12, labels: Labels | None = None) -> Figure:
    """Token against feature: the effects of the `k` largest features at every token, in residual
    units, a row per token from the top; tokens that no mean counts are in brackets."""
    top = found.top(k, labels)
    by_name = {effects.card.name: effects for effects in found.effects}
    values = []
    for each in top:
        effects = by_name[each.dictionary]
        place = effects.place(each.feature)
        assert place is not None
        values.append(effects.token_effects[:, place].tolist())
    tokens = [
        shown if counted else f"({shown})"
        for shown, counted in zip(map(visible, found.str_tokens), found.counted, strict=True)
    ]
    names = [feature_name(each) for each in top]
    figure = go.Figure()
    figure.add_heatmap(
        x=list(range(len(top))),
        y=list(range(len(tokens))),
        z=[list(own) for own in zip(*values, strict=True)],
        customdata=[names] * len(tokens),
        text=[[token] * len(top) for token in tokens],
        hovertemplate="%{customdata}<br>token %{y}: %{text}<br>effect %{z:.3f}<extra></extra>",
        **centred(values, "effect"),
    )
    _titled(figure, "Features by token, effect in residual units", found, 160 + 18 * len(tokens))
    longest = _name_columns(figure, top)
    figure.update_layout(
        height=figure.layout.height + longest, margin_t=figure.layout.margin.t + longest
    )
    _ticks(figure, "y", tokens)
    figure.update_xaxes(side="top")
    figure.update_yaxes(autorange="reversed")
    # above by as many pixels as before
    figure.update_layout(title_y=1 - 24 / figure.layout.height)
    rows = tuple(
        (each.dictionary, each.feature, t, found.str_tokens[t], value)
        for each, own in zip(top, values, strict=True)
        for t, value in enumerate(own)
    )
    columns = ("dictionary", "feature", "position", "token", "effect")
    return Figure("token_features", figure, columns, rows)


def plot_faithfulness(measured: Faithfulness, place: str = "question") -> Figure:
    """Nats of the gold answer's log-probability above the unsteered model's against k: the top
    features, random ones at the same norm, and the plan's other parts as lines; 95 % intervals."""
    ks = sorted({gain.k for gain in measured.gains} - {0})
    figure = go.Figure()
    rows: list[tuple[Any, ...]] = []
    curves = (("top", "the k largest features", MORE), ("random", "k random, same norm", LESS))
    for part, title, colour in curves:
        intervals = [measured.interval(part, k, place) for k in ks]
        figure.add_scatter(
            x=ks,
            y=[interval.mean for interval in intervals],
            mode="lines+markers",
            marker_color=colour,
            name=title,
            error_y=error_bars([asdict(interval) for interval in intervals]),
        )
        rows += [
            (part, k, own.mean, own.low, own.high, own.n)
            for k, own in zip(ks, intervals, strict=True)
        ]
    for part, dash in (("full", "solid"), ("without error", "dash"), ("error", "dot")):
        own = measured.interval(part, place=place)
        if own.mean is None:
            continue
        figure.add_scatter(
            x=[ks[0], ks[-1]],
            y=[own.mean] * 2,
            mode="lines",
            line={"color": REST, "dash": dash},
            name={"full": "the whole plan", "error": "its error alone"}.get(part, part),
        )
        rows.append((part, 0, own.mean, own.low, own.high, own.n))
    n = measured.interval("full", place=place).n
    styled(
        figure,
        f"Log-probability of the gold answer after the {plain(place)}",
        told=f"n = {number_of(n, 'question')}, 95 % cluster bootstrap",
    )
    figure.update_layout(margin_b=100, legend=BELOW)
    figure.update_xaxes(title="k, features per dictionary", type="log", tickvals=ks, ticktext=ks)
    figure.update_yaxes(title="nats above unsteered", rangemode="tozero")
    columns = ("part", "k", "mean", "low", "high", "n")
    return Figure(f"faithfulness_{place}", figure, columns, tuple(rows))


def feature_name(each: FeatureEffect) -> str:
    """As in figures, where plotly reads HTML: layer, number and label."""
    head = f"#{each.feature}" if each.layer is None else f"L{each.layer} #{each.feature}"
    label = each.label if len(each.label) <= _LONGEST else each.label[: _LONGEST - 1] + "…"
    return f"{head} {plain(label)}".rstrip()


def visible(token: str) -> str:
    """A token as a tick label: white space is shown, nothing is HTML, and a long one is cut."""
    return plain(shortened(shown_token(token), _LONGEST_TOKEN))


def _titled(figure: go.Figure, title: str, found: Attribution, height: int) -> None:
    """With how much of the change is explained, and what is not covered, below the title."""
    text = f"relative error {shown_share(found.relative_error)}, "
    text += f"cosine {shown_share(found.cosine)}; "
    text += f"means over n = {number_of(sum(found.counted), 'token')}"
    if found.not_covered:
        text += f"; layers without a dictionary: {', '.join(map(str, found.not_covered))}"
    styled(figure, title, told=text, height=height)


def _ticks(figure: go.Figure, axis: str, names: Sequence[str]) -> None:
    """Names at the places 0, 1, 2 ..., with room for them."""
    update = figure.update_xaxes if axis == "x" else figure.update_yaxes
    update(tickvals=list(range(len(names))), ticktext=names, automargin=True, ticklabelstandoff=4)


def _name_columns(figure: go.Figure, features: Sequence[FeatureEffect]) -> int:
    """Upright names of the columns; gives the pixels that the longest needs."""
    short = [replace(each, label=shortened(each.label, _LONGEST_ABOVE)) for each in features]
    names = [feature_name(each) for each in short]
    _ticks(figure, "x", names)
    # a margin that plotly finds by itself lets the names run into the title
    figure.update_xaxes(tickangle=-90, automargin=False)
    return 16 + 7 * max((len(unescape(name)) for name in names), default=0)


def _crosscoder_cells(found: Attribution, k: int, labels: Labels | None) -> list[_Cell]:
    return [
        _Cell(layer, (each.dictionary, each.feature), size, feature_name(each))
        for each in found.top(k, labels)
        for layer, size in each.per_layer or _one_layer(each)
    ]


def _one_layer(each: FeatureEffect) -> tuple[tuple[int, float], ...]:
    assert each.layer is not None
    return ((each.layer, each.effect),)


def _ranked_cells(found: Attribution, k: int, labels: Labels | None) -> list[_Cell]:
    return [
        _Cell(effects.card.layers[0], (_RANK, rank), each.effect, feature_name(each))
        for effects in found.effects
        for rank, each in enumerate(effects.top(k, (labels or {}).get(effects.card.name)), start=1)
    ]

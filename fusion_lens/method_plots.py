"""Plotly figures of steering methods: which units are kept, and how much of a step each token
gets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float
from plotly.subplots import make_subplots
from torch import Tensor

from fusion_lens.errors import ConfigError
from fusion_lens.pictures import (
    BELOW,
    LESS,
    MORE,
    REST,
    SEQUENTIAL,
    Figure,
    number_of,
    plain,
    shortened,
    styled,
    visible,
)
from fusion_lens.units import Momenta

_MOST_MARKS = 2000
_MOST_BINS = 96
_MOST_COUNTS = 40
_COLUMNS = 44
"""Tokens of a line: their labels stand upright, 12 px each."""
_FEWEST = 16
_LONGEST = 14
_GATE = [[0.0, "#6a6fd0"], [0.5, "#3fb8af"], [1.0, "#fde725"]]
"""As lightness goes, Viridis from where it stands out from the dark paper: 0 is no empty cell."""
_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


def plot_units(units: Bool[Tensor, "layer width"], momenta: Momenta | None = None) -> Figure:
    """Which units of each layer are kept, and how many; beyond 2,000 of them their share in ranges
    of dimensions. With the momenta they were chosen by also which way they differ, and the scores
    of all units, layer by layer, with the lowest that is kept.

    Raises:
        ConfigError: if no unit is kept, or the momenta have another shape.
    """
    if not bool(units.any()):
        raise ConfigError("there must be at least one unit to show, but none is kept.")
    if momenta is not None and momenta.shape != units.shape:
        raise ConfigError(
            f"units and momenta must have one shape, but got {tuple(units.shape)} "
            f"and {momenta.shape}."
        )
    n_layers, width = units.shape
    kinds = _kinds(units, momenta)
    titles = ["which dimensions", "how many", "scores of all units"]
    n_panels = 2 if momenta is None else 3
    figure = make_subplots(
        cols=n_panels,
        shared_yaxes=True,
        horizontal_spacing=0.04,
        column_widths=[0.52, 0.18, 0.3][:n_panels],
        subplot_titles=titles[:n_panels],
    )
    if int(units.sum()) > _MOST_MARKS:
        _add_shares(figure, units)
    else:
        for name, colour, own in kinds:
            _add_marks(figure, own, name, colour)
    counts = units.sum(dim=1).tolist()
    layers = list(range(n_layers))
    for name, colour, own in kinds:
        figure.add_bar(
            x=own.sum(dim=1).tolist(),
            y=layers,
            orientation="h",
            marker_color=colour,
            name=name,
            showlegend=len(kinds) > 1,
            hovertemplate=f"layer %{{y}}: %{{x}} {name}<extra></extra>",
            row=1,
            col=2,
        )
    if n_layers <= _MOST_COUNTS:
        figure.add_scatter(
            x=counts,
            y=layers,
            text=[f" {count:,}" for count in counts],
            mode="text",
            textposition="middle right",
            textfont_size=12,
            hoverinfo="skip",
            showlegend=False,
            row=1,
            col=2,
        )
    scores = [[None] * len(_QUANTILES)] * n_layers
    if momenta is not None:
        scores = momenta.score.quantile(torch.tensor(_QUANTILES).double(), dim=1).T.tolist()
        _add_scores(figure, scores, float(momenta.score[units].min()))
    n, share = int(units.sum()), float(units.double().mean())
    told = f"n = {n:,} of {n_layers} × {width:,} units ({share:.2%})"
    if momenta is not None:
        told += f" at {momenta.site}, from {number_of(momenta.n, 'pair')}; "
        told += "box: quartiles and range, line: the lowest score kept"
    height = min(780, 226 + (28 if n_layers <= 12 else 18) * n_layers)
    styled(figure, "The units that are kept", told=told, height=height, panels=True)
    legend = {**BELOW, "traceorder": "normal"}
    figure.update_layout(barmode="stack", bargap=0.25, legend=legend, margin_b=100)
    figure.update_xaxes(title="dimension", range=[-0.02 * width, 1.02 * width], col=1)
    figure.update_xaxes(title="units", range=[0, 1.5 * max(counts)], nticks=4, col=2)
    figure.update_yaxes(range=[-0.6, n_layers - 0.4], dtick=max(1, n_layers // 16))
    figure.update_yaxes(title="layer", col=1)
    columns = ("layer", "kept", "higher", "lower", "least", "q25", "median", "q75", "most")
    sides = [own.sum(dim=1).tolist() for _, _, own in kinds]
    if momenta is None:
        sides = [[None] * n_layers] * 2
    rows = tuple(
        (layer, counts[layer], *(side[layer] for side in sides), *scores[layer], _where(own))
        for layer, own in enumerate(units)
    )
    return Figure("units", figure, (*columns, "dimensions"), rows)


def plot_gate(
    g: Float[Tensor, "layer token"],
    str_tokens: Sequence[str],
    n_prompt: int,
    *,
    title: str = "How much of the step each token gets",
) -> Figure:
    """A gate's value over tokens and layers, in lines of 44 tokens; crosses where g is NaN: the
    layer is closed, or the token is not steered. The first `n_prompt` tokens are the prompt's.

    Raises:
        ConfigError: if there is no token or layer, tokens and values do not fit, or the prompt has
            more tokens than there are.
    """
    n_layers, n_tokens = g.shape
    if n_tokens != len(str_tokens) or not g.numel():
        raise ConfigError(
            "there must be a value of every layer for every token, at least one, "
            f"but got {n_layers} x {n_tokens} values for {len(str_tokens)} tokens."
        )
    if not 0 <= n_prompt <= n_tokens:
        raise ConfigError(
            f"0 <= n_prompt <= {n_tokens}, the number of tokens, must hold, but got {n_prompt}."
        )
    columns: list[int | None] = list(range(n_tokens))
    if 0 < n_prompt < n_tokens:
        columns.insert(n_prompt, None)
    n_lines = math.ceil(len(columns) / _COLUMNS)
    per_line = math.ceil(len(columns) / n_lines)
    lines = [columns[i : i + per_line] for i in range(0, len(columns), per_line)]
    labels = [shortened(visible(token), _LONGEST) for token in str_tokens]
    room = 16 + 7 * max(map(len, labels))
    cells = max(90, min(18 * n_layers, 260))
    height = 110 + n_lines * (cells + room) + 24
    figure = make_subplots(
        rows=n_lines, vertical_spacing=room / (height - 134) if n_lines > 1 else 0.0
    )
    values = g.double().numpy()
    steered = values[np.isfinite(values)]
    most = max(1.0, float(steered.max(initial=0.0)))
    for row, line in enumerate(lines, start=1):
        _add_line(figure, row, line, values, str_tokens)
        shown = [(x, t) for x, t in enumerate(line) if t is not None]
        figure.update_xaxes(
            tickvals=[x for x, _ in shown],
            ticktext=[plain(labels[t]) for _, t in shown],
            range=[-0.6, max(per_line, _FEWEST) - 0.4],
            row=row,
        )
    figure.update_traces(
        selector={"type": "heatmap"},
        zmin=0.0,
        zmax=most,
        colorscale=_GATE,
        colorbar={"title": "g", "lenmode": "pixels", "len": cells + 20, "y": 1, "yanchor": "top"},
    )
    mean = f"mean g {steered.mean():.2f} where steered" if len(steered) else "none is steered"
    told = f"n = {number_of(n_tokens, 'token')}, {mean}; × is not steered"
    if 0 < n_prompt < n_tokens:
        told += "; the bar parts prompt from completion"
    styled(figure, plain(title), told=told, height=height)
    figure.update_layout(margin_b=room + 24, margin_t=110)
    figure.update_xaxes(tickangle=-90, tickfont_size=12, showgrid=False, zeroline=False)
    figure.update_yaxes(
        title="layer",
        dtick=max(1, n_layers // 6),
        range=[-0.5, n_layers - 0.5],
        showgrid=False,
        zeroline=False,
    )
    rows = tuple(
        (t, token, "prompt" if t < n_prompt else "completion", layer, float(values[layer, t]))
        for t, token in enumerate(str_tokens)
        for layer in range(n_layers)
    )
    return Figure("gate", figure, ("position", "token", "part", "layer", "g"), rows)


def _kinds(
    units: Bool[Tensor, "layer width"], momenta: Momenta | None
) -> list[tuple[str, str, Bool[Tensor, "layer width"]]]:
    """The units to be told apart: name, colour, and which they are."""
    if momenta is None:
        return [("kept", MORE, units)]
    higher = momenta.r_positive >= momenta.r_negative
    return [
        ("mostly higher", MORE, units & higher),
        ("mostly lower", LESS, units & ~higher),
    ]


def _add_marks(
    figure: go.Figure, units: Bool[Tensor, "layer width"], name: str, colour: str
) -> None:
    layers, dimensions = (places.tolist() for places in units.nonzero().T)
    figure.add_scatter(
        x=dimensions,
        y=layers,
        mode="markers",
        marker={
            "symbol": "line-ns",
            "size": 11,
            "color": colour,
            "line": {"width": 2, "color": colour},
        },
        name=name,
        showlegend=False,
        hovertemplate=f"layer %{{y}}, dimension %{{x}}: {name}<extra></extra>",
        row=1,
        col=1,
    )


def _add_shares(figure: go.Figure, units: Bool[Tensor, "layer width"]) -> None:
    width = units.shape[1]
    edges = np.unique(np.linspace(0, width, min(width, _MOST_BINS) + 1).astype(int))
    shares = np.add.reduceat(units.numpy().astype(float), edges[:-1], axis=1) / np.diff(edges)
    figure.add_heatmap(
        x=((edges[:-1] + edges[1:]) / 2).tolist(),
        y=list(range(len(units))),
        z=shares.tolist(),
        zmin=0.0,
        zmax=1.0,
        colorscale=SEQUENTIAL,
        colorbar={
            "orientation": "h",
            "thickness": 10,
            "len": 0.4,
            "x": 0.95,
            "xanchor": "right",
            "yref": "container",
            "y": 0,
            "yanchor": "bottom",
            "tickformat": ".0%",
            "ticksuffix": " kept",
        },
        hovertemplate="layer %{y}, dimensions about %{x}: %{z:.0%} kept<extra></extra>",
        row=1,
        col=1,
    )


def _add_scores(figure: go.Figure, scores: Sequence[Sequence[Any]], lowest: float) -> None:
    """Boxes of the scores of every layer, and the lowest that is kept."""
    least, low, middle, high, most = (list(own) for own in zip(*scores, strict=True))
    figure.add_box(
        lowerfence=least,
        q1=low,
        median=middle,
        q3=high,
        upperfence=most,
        y=list(range(len(scores))),
        orientation="h",
        line={"color": REST, "width": 1.5},
        marker_color=REST,
        showlegend=False,
        name="scores",
        row=1,
        col=3,
    )
    figure.add_vline(x=lowest, line={"color": MORE, "width": 2, "dash": "dot"}, col=3)
    figure.update_xaxes(
        title="max(r+, r−)", range=[min(least) - 0.05, 1.05], tickformat=".0%", col=3
    )


def _add_line(
    figure: go.Figure,
    row: int,
    line: Sequence[int | None],
    values: np.ndarray,
    str_tokens: Sequence[str],
) -> None:
    """The cells of a line's tokens, crosses where there is none, and the border if it is here."""
    layers = range(len(values))
    grid = [[None if t is None else float(values[n, t]) for t in line] for n in layers]
    figure.add_heatmap(
        x=list(range(len(line))),
        y=list(layers),
        z=[[None if z is None or math.isnan(z) else z for z in own] for own in grid],
        customdata=[["" if t is None else plain(visible(str_tokens[t])) for t in line]] * len(grid),
        showscale=row == 1,
        xgap=1,
        ygap=1,
        hoverongaps=False,
        hovertemplate="%{customdata}<br>layer %{y}: %{z:.2f}<extra></extra>",
        row=row,
        col=1,
    )
    crosses = [
        (x, n) for n in layers for x, z in enumerate(grid[n]) if z is not None and math.isnan(z)
    ]
    figure.add_scatter(
        x=[x for x, _ in crosses],
        y=[n for _, n in crosses],
        mode="markers",
        marker={
            "symbol": "x-thin",
            "size": 5,
            "color": REST,
            "line": {"width": 1, "color": REST},
        },
        hovertemplate="layer %{y}: not steered<extra></extra>",
        showlegend=False,
        row=row,
        col=1,
    )
    if None in line:
        figure.add_vline(x=line.index(None), line={"color": REST, "width": 4}, row=row)


def _where(units: Bool[Tensor, " width"]) -> list[int]:
    places: list[int] = units.nonzero()[:, 0].tolist()
    return places

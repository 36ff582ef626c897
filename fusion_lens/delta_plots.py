"""Plotly figures of deltas: how large they are at every layer, how they lie to each other, and how
much of them every question shares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from fusion_lens.controls import generic_share
from fusion_lens.deltas import Deltas
from fusion_lens.details import Detail
from fusion_lens.errors import ConfigError
from fusion_lens.pictures import MORE, SEQUENTIAL, Figure, centred, plain, shortened, styled

Questions = Mapping[str, Deltas] | Sequence[Detail]
"""Deltas by question id, or what a run keeps of its questions."""

_FAINT = "rgba(128,128,128,{:.2f})"
_MOST_LINES = 200
_MOST_NAMES = 24
_LONGEST = 24


class _Norms(NamedTuple):
    absolute: list[float]
    relative: list[float]


def plot_delta_norms(questions: Questions) -> Figure:
    """Norm of every layer's delta, absolute (residual units) and relative to the norm of the mean
    residual it starts from: a faint line for each question (200 at most), median and quartiles.
    Where that mean is 0, there is no relative norm."""
    norms = _norms(questions)
    n_layers = _n_layers(norms)
    figure = make_subplots(
        cols=2,
        horizontal_spacing=0.12,
        subplot_titles=("‖h − μ‖, residual units", "‖h − μ‖ / ‖μ‖"),
    )
    layers = list(range(n_layers))
    for column, kind in enumerate(_Norms._fields, start=1):
        lines = [getattr(own, kind) for own in norms.values()]
        x, y = _one_trace(lines[:_MOST_LINES])
        # the more lines, the fainter: they would hide the quartiles
        faint = min(0.4, max(0.08, 10 / len(lines)))
        line = {"color": _FAINT.format(faint), "width": 1}
        hidden = {"showlegend": False, "row": 1, "col": column}
        figure.add_scatter(
            x=x,
            y=y,
            text=[plain(name) for name in list(norms)[:_MOST_LINES] for _ in range(n_layers + 1)],
            mode="lines",
            line=line,
            hovertemplate="%{text}<br>layer %{x}: %{y:.3g}<extra></extra>",
            **hidden,
        )
        low, middle, high = zip(*map(_quartiles, zip(*lines, strict=True)), strict=True)
        if len(norms) > 1:
            figure.add_scatter(
                x=[*layers, *layers[::-1]],
                y=[*high, *low[::-1]],
                mode="lines",
                fill="toself",
                fillcolor="rgba(0,114,178,0.25)",
                line={"width": 0},
                hoverinfo="skip",
                **hidden,
            )
        figure.add_scatter(
            x=layers,
            y=middle,
            mode="lines+markers",
            line={"color": MORE, "width": 3},
            hovertemplate="layer %{x}<br>median %{y:.3g}<extra></extra>",
            **hidden,
        )
    n = len(norms)
    drawn = f"each of {_MOST_LINES}" if n > _MOST_LINES else "each"
    told = f"n = {n} questions; median in blue, quartiles shaded, {drawn} in grey"
    if n == 1:
        told = _of_one(norms)
    styled(figure, "Delta norm per layer", told=told, panels=True)
    figure.update_xaxes(title="layer (after the block)", dtick=max(1, n_layers // 8))
    figure.update_yaxes(rangemode="tozero")
    rows = tuple(
        (name, layer, own.absolute[layer], own.relative[layer])
        for name, own in norms.items()
        for layer in layers
    )
    return Figure("delta_norms", figure, ("question_id", "layer", "norm", "relative"), rows)


def plot_norm_map(questions: Questions) -> Figure:
    """Question against layer: the norm of the delta relative to the residual it starts from, the
    question of the largest mean on top."""
    norms = _norms(questions)
    names = sorted(norms, key=lambda name: _mean(norms[name].relative))
    layers = list(range(_n_layers(norms)))
    figure = go.Figure()
    figure.add_heatmap(
        x=layers,
        y=list(range(len(names))),
        z=[_gaps(norms[name].relative) for name in names],
        customdata=[[plain(name)] * len(layers) for name in names],
        colorscale=SEQUENTIAL,
        colorbar={"title": "‖h − μ‖ / ‖μ‖"},
        hovertemplate="%{customdata}<br>layer %{x}: %{z:.2f}<extra></extra>",
    )
    few = len(names) <= _MOST_NAMES
    styled(
        figure,
        "Relative delta norm by question and layer",
        told=f"n = {len(names)} questions, the largest on top"
        if len(names) > 1
        else _of_one(norms),
        height=max(300, min(720, 150 + (22 if few else 6) * len(names))),
    )
    figure.update_xaxes(title="layer (after the block)", dtick=max(1, len(layers) // 12))
    _named_ticks(figure, names, "y")
    rows = tuple(
        (name, layer, norms[name].relative[layer]) for name in reversed(names) for layer in layers
    )
    return Figure("norm_map", figure, ("question_id", "layer", "relative"), rows)


def plot_layer_cosines(deltas: Mapping[str, Deltas]) -> Figure:
    """Cosine between the deltas of every two layers of one question: the median over questions."""
    _require(deltas)
    cosines = torch.stack([_cosines(own.vectors) for own in deltas.values()])
    values = cosines.quantile(0.5, dim=0).tolist()
    layers = list(range(len(values)))
    figure = go.Figure()
    figure.add_heatmap(
        x=layers,
        y=layers,
        z=values,
        hovertemplate="layers %{y} and %{x}: %{z:.2f}<extra></extra>",
        **_of_cosines(len(layers)),
        **_written(values),
    )
    n = len(deltas)
    told = f"median over n = {n} questions" if n > 1 else _of_one(deltas)
    styled(figure, "Cosine of a question's deltas between layers", told=told, height=560)
    ticks = {"dtick": max(1, len(layers) // 12)}
    figure.update_xaxes(title="layer", constrain="domain", **ticks)
    figure.update_yaxes(title="layer", autorange="reversed", scaleanchor="x", **ticks)
    rows = tuple((a, b, values[a][b]) for a in layers for b in layers)
    return Figure("layer_cosines", figure, ("layer", "other_layer", "cosine"), rows)


def plot_question_cosines(deltas: Mapping[str, Deltas], layer: int | None = None) -> Figure:
    """Cosine between the deltas of every two questions at one layer (None: the middle one).

    Raises:
        ConfigError: if there are fewer than two questions, or no such layer.
    """
    _require(deltas, least=2)
    n_layers = len(next(iter(deltas.values())).norms)
    at = n_layers // 2 if layer is None else layer
    if not 0 <= at < n_layers:
        raise ConfigError(f"layer must be in 0 to {n_layers - 1}, but got {layer}.")
    names = list(deltas)
    cosines = _cosines(torch.stack([own.vectors[at] for own in deltas.values()]))
    values = cosines.tolist()
    places = list(range(len(names)))
    figure = go.Figure()
    figure.add_heatmap(
        x=places,
        y=places,
        z=values if len(names) <= _MOST_LINES else cosines.round(decimals=3).tolist(),
        hovertemplate="questions %{y} and %{x}: %{z:.2f}<extra></extra>",
        **_of_cosines(len(names)),
    )
    if len(names) <= _MOST_LINES:  # a million pairs would be 60 MB of names
        figure.update_traces(
            customdata=[[f"{plain(a)}<br>{plain(b)}" for b in names] for a in names],
            hovertemplate="%{customdata}<br>%{z:.2f}<extra></extra>",
        )
    pairs = cosines[tuple(torch.triu_indices(len(names), len(names), 1))]
    median = round(float(np.median(pairs.numpy())), 2) + 0.0  # no "-0.00"
    told = f"n = {len(names)} questions; median over pairs {median:+.2f}"
    styled(figure, f"Cosine between questions' deltas, layer {at}", told=told, height=620)
    figure.update_xaxes(constrain="domain")
    figure.update_yaxes(autorange="reversed", scaleanchor="x")
    for axis in "xy":
        _named_ticks(figure, names, axis)
    rows = tuple((a, b, values[i][j]) for i, a in enumerate(names) for j, b in enumerate(names))
    return Figure("question_cosines", figure, ("question_id", "other_id", "cosine"), rows)


def plot_generic_share(questions: Questions) -> Figure:
    """Share of every layer's squared norm that lies along the other questions' mean delta: median
    and quartiles over questions.

    Raises:
        ConfigError: if no question has another beside it.
    """
    shares = _shares(questions)
    if not shares:
        raise ConfigError("a generic share needs at least two questions, but got fewer.")
    layers = list(range(len(next(iter(shares.values())))))
    figure = go.Figure()
    for layer in layers:
        figure.add_box(
            x=[layer] * len(shares),
            y=[own[layer] for own in shares.values()],
            marker={"color": MORE, "size": 4},
            line={"color": MORE},
            boxpoints="outliers",
            showlegend=False,
            width=0.5,
            name=f"layer {layer}",
        )
    told = f"n = {len(shares)} questions; box: quartiles and median, whiskers: 1.5 of its length"
    styled(figure, "Generic share of the delta per layer", told=told)
    figure.update_xaxes(
        title="layer (after the block)",
        range=[-0.7, len(layers) - 0.3],
        dtick=max(1, len(layers) // 12),
    )
    figure.update_yaxes(
        title="share of ‖h − μ‖² along the others", range=[-0.02, 1.02], tickformat=".0%"
    )
    rows = tuple((name, layer, own[layer]) for name, own in shares.items() for layer in layers)
    return Figure("generic_share", figure, ("question_id", "layer", "share"), rows)


def _norms(questions: Questions) -> dict[str, _Norms]:
    if isinstance(questions, Mapping):
        _require(questions)
        return {
            name: _Norms(own.norms.tolist(), own.relative_norms.tolist())
            for name, own in questions.items()
        }
    _require(questions)
    return {
        each.question_id: _Norms(list(each.delta_norms), list(each.relative_norms))
        for each in questions
    }


def _shares(questions: Questions) -> dict[str, Sequence[float]]:
    if not isinstance(questions, Mapping):
        return {
            each.question_id: each.generic_share
            for each in questions
            if each.generic_share is not None
        }
    if len(questions) < 2:
        return {}
    total = torch.stack([own.vectors for own in questions.values()]).sum(dim=0)
    n = len(questions) - 1
    return {
        name: generic_share(own, (total - own.vectors) / n).tolist()
        for name, own in questions.items()
    }


def _require(questions: Mapping[str, Any] | Sequence[Any], least: int = 1) -> None:
    if len(questions) < least:
        raise ConfigError(
            f"there must be at least {least} question(s) to show, but got {len(questions)}."
        )


def _n_layers(norms: Mapping[str, _Norms]) -> int:
    return len(next(iter(norms.values())).absolute)


def _one_trace(lines: Sequence[Sequence[float]]) -> tuple[list[int | None], list[float | None]]:
    """Many lines as one, with gaps: a thousand traces would take seconds to draw."""
    x: list[int | None] = []
    y: list[float | None] = []
    for line in lines:
        x += [*range(len(line)), None]
        y += [*_gaps(line), None]
    return x, y


def _quartiles(values: Sequence[float]) -> list[float | None]:
    """Of those that are finite: a base of 0 has no relative norm."""
    finite = _finite(values)
    return np.quantile(finite, (0.25, 0.5, 0.75)).tolist() if finite else [None] * 3


def _mean(values: Sequence[float]) -> float:
    finite = _finite(values)
    return sum(finite) / max(1, len(finite))


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _gaps(values: Sequence[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def _of_one(questions: Mapping[str, Any]) -> str:
    return f"n = 1 question: {plain(shortened(next(iter(questions)), 80))}"


def _cosines(vectors: Float[Tensor, "n d_model"]) -> Float[Tensor, "n n"]:
    unit = torch.nn.functional.normalize(vectors.double(), dim=-1)
    return (unit @ unit.T).clamp(-1, 1)


def _of_cosines(n: int) -> dict[str, Any]:
    gap = int(n <= _MOST_LINES // 4)  # gaps as wide as the cells would hide them
    return {**centred([[1.0]], "cosine"), "xgap": gap, "ygap": gap}


def _written(values: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The numbers in the cells, where they are few."""
    return {"texttemplate": "%{z:.2f}"} if len(values) <= 12 else {}


def _named_ticks(figure: go.Figure, names: Sequence[str], axis: str) -> None:
    """Names where they are few enough to be read, else their number."""
    update = figure.update_xaxes if axis == "x" else figure.update_yaxes
    if len(names) > _MOST_NAMES:
        update(title=f"{len(names)} questions", showticklabels=False)
        return
    shown = [plain(shortened(name, _LONGEST)) for name in names]
    places = list(range(len(names)))
    update(tickvals=places, ticktext=shown, automargin=True, tickfont_size=12)
    if axis == "x":
        update(tickangle=-60)

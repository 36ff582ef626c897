"""Plotly figures of texts, token by token: what was captured, where it is injected, which tokens
steering made likelier, and what each layer would say.

Tokens are tiles in the order of the text, in lines of a fixed width; white space is shown, and a
token longer than a line goes on in the next.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from fusion_lens.details import Marked, Trace
from fusion_lens.errors import ConfigError
from fusion_lens.logit_lens import Lens
from fusion_lens.pictures import (
    BELOW,
    LESS,
    MORE,
    REST,
    WIDTH,
    Figure,
    logarithmic,
    number_of,
    plain,
    shortened,
    styled,
    visible,
)

_LETTER = 8.0
_PADDING = 1.5
_LINE = 30
_COLUMNS = int((WIDTH - 40) / _LETTER)
_INK = "#16181d"
_DEEPEST = 0.75
"""How much of the full colour the strongest tile has: its token stays readable."""


@dataclass(frozen=True, slots=True)
class _Tile:
    text: str
    colour: str
    hover: str
    value: tuple[Any, ...]


def plot_tokens(captured: Marked, steered: Marked) -> Figure:
    """The reference text with the tokens its mean is taken over, and the prompt with the tokens a
    plan injects at: what is read and what is written to."""
    told = (
        ("the reference: captured tokens are blue", captured, "#9ecae9", "captured"),
        ("the prompt: steered tokens are orange", steered, "#fdbe85", "steered"),
    )
    blocks = []
    for heading, text, colour, name in told:
        marked = set(text.marked)
        tiles = [
            _Tile(
                token,
                colour if t in marked else "#f0f0f0",
                f"token {t}: {name if t in marked else 'left alone'}",
                (name, t, token, t in marked),
            )
            for t, token in enumerate(text.tokens)
        ]
        blocks.append((heading, tiles))
    n = f"{number_of(len(captured.marked), 'token')} captured, "
    n += f"{len(steered.marked)} of the prompt steered"
    figure, rows = _tiled(blocks, "What is captured and what is steered", n)
    return Figure("tokens", figure, ("text", "position", "token", "marked"), rows)


def plot_token_shifts(traces: Sequence[Trace]) -> Figure:
    """Every completion token by token, coloured by how far steering moved the token's
    log-probability, in nats: blue likelier, orange less likely, white unmoved.

    Raises:
        ConfigError: if there is no trace.
    """
    if not traces:
        raise ConfigError("there must be at least one trace to show, but got none.")
    shifts = [shift for trace in traces for shift in trace.shifts]
    most = max((abs(shift) for shift in shifts), default=1.0) or 1.0
    blocks = []
    for trace in traces:
        total = sum(trace.shifts)
        tiles = [
            _Tile(
                token,
                _colour(shift / most),
                f"steered {p:.2f}, unsteered {q:.2f}: {shift:+.2f} nats",
                (trace.arm, t, token, p, q),
            )
            for t, (token, p, q, shift) in enumerate(
                zip(trace.tokens, trace.steered, trace.unsteered, trace.shifts, strict=True)
            )
        ]
        n = number_of(len(tiles), "token")
        blocks.append((f"{trace.arm}: {total:+.1f} nats over n = {n}", tiles))
    told = "blue: likelier with steering, orange: less likely, white: unmoved; nats"
    figure, rows = _tiled(blocks, "How steering moved each token", told)
    figure.add_scatter(  # nothing is drawn: it brings the colour bar
        x=[None],
        y=[None],
        mode="markers",
        showlegend=False,
        marker={
            "colorscale": [[0.0, _colour(-1.0)], [0.5, _colour(0.0)], [1.0, _colour(1.0)]],
            "cmin": -most,
            "cmax": most,
            "color": [0],
            "showscale": True,
            "colorbar": {
                "ticksuffix": " nats",
                "orientation": "h",
                "thickness": 12,
                "len": 0.6,
                "yref": "container",
                "y": 0,
                "yanchor": "bottom",
            },
        },
    )
    figure.update_layout(height=figure.layout.height + 60, margin_b=76)
    columns = ("arm", "position", "token", "steered", "unsteered")
    return Figure("token_shifts", figure, columns, rows)


def plot_logit_lens(unsteered: Sequence[Lens], steered: Sequence[Lens]) -> Figure:
    """log p and rank of the answer's tokens read after every block (`logit_lens`), unsteered and
    steered: mean log p and median rank over a text's tokens, then median and quartiles over texts.

    Raises:
        ConfigError: if there is no lens, or the two are not of the same texts.
    """
    tokens = [[lens.str_tokens for lens in side] for side in (unsteered, steered)]
    if not tokens[0] or tokens[0] != tokens[1]:
        raise ConfigError(
            "the unsteered and the steered lenses must be of the same texts, at least one."
        )
    figure = make_subplots(
        cols=2,
        horizontal_spacing=0.13,
        subplot_titles=("log p per token, nats", "rank among all tokens"),
    )
    rows: list[tuple[Any, ...]] = []
    for name, side, colour, dash in (
        ("unsteered", unsteered, REST, "dot"),
        ("steered", steered, LESS, "solid"),
    ):
        measured = (
            np.stack([lens.log_probs.mean(dim=1).numpy() for lens in side]),
            np.stack([np.median(lens.ranks.numpy(), axis=1) for lens in side]),
        )
        layers = list(range(measured[0].shape[1]))
        bands = [np.quantile(values, (0.25, 0.5, 0.75), axis=0).tolist() for values in measured]
        for column, (low, middle, high) in enumerate(bands, start=1):
            figure.add_scatter(
                x=layers,
                y=middle,
                mode="lines+markers",
                line={"color": colour, "width": 3, "dash": dash},
                error_y={
                    "type": "data",
                    "array": [b - a for a, b in zip(middle, high, strict=True)],
                    "arrayminus": [a - b for a, b in zip(middle, low, strict=True)],
                    "visible": len(side) > 1,
                    "thickness": 1,
                },
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                row=1,
                col=column,
            )
        rows += [
            (name, layer, *(band[quantile][layer] for band in bands for quantile in range(3)))
            for layer in layers
        ]
    n = len(steered)
    told = f"n = {n} questions, median and quartiles" if n > 1 else _answer(steered[0])
    styled(figure, "The gold answer through the layers (logit lens)", told=told, panels=True)
    figure.update_xaxes(title="layer (after the block)", dtick=max(1, len(layers) // 8))
    ranks = [rank for row in rows for rank in row[5:]]
    # from the likeliest down; no rank is below 1
    lowest = math.log10(max(ranks)) + 0.1
    figure.update_yaxes(**logarithmic([1.0, *ranks]), range=[lowest, -0.1], col=2)
    figure.update_layout(margin_b=100, legend=BELOW)
    kinds = [f"{kind}_{q}" for kind in ("log_prob", "rank") for q in ("low", "median", "high")]
    return Figure("logit_lens", figure, ("run", "layer", *kinds), tuple(rows))


def _answer(lens: Lens) -> str:
    answer = shortened("".join(lens.str_tokens).strip(), 60)
    return f"n = 1 question, its answer: {plain(answer)}"


def _tiled(
    blocks: Sequence[tuple[str, Sequence[_Tile]]], title: str, told: str
) -> tuple[go.Figure, tuple[tuple[Any, ...], ...]]:
    """Blocks of tiles below each other; the rows are their values."""
    figure = go.Figure()
    y = 0.0
    x_text, y_text, texts, hovers = [], [], [], []
    shapes: list[dict[str, Any]] = []
    for heading, tiles in blocks:
        figure.add_annotation(
            x=0, y=y - 0.5, text=plain(heading), showarrow=False, xanchor="left", font_size=13
        )
        y -= 1
        column = 0.0
        for tile in tiles:
            for shown in _lines(visible(tile.text)):
                width = max(_width(shown), 1) + _PADDING
                if column and column + width > _COLUMNS:
                    column, y = 0.0, y - 1
                shapes.append(
                    {
                        "type": "rect",
                        "x0": column,
                        "x1": column + width - 0.25,
                        "y0": y - 0.9,
                        "y1": y - 0.1,
                        "fillcolor": tile.colour,
                        "line": {"width": 1, "color": "#c8c8c8"},
                        "layer": "below",
                    }
                )
                x_text.append(column + (width - 0.25) / 2)
                y_text.append(y - 0.5)
                texts.append(plain(shown))
                hovers.append(tile.hover)
                column += width
            if tile.text.endswith("\n"):
                column, y = 0.0, y - 1
        y -= 1.4
    figure.add_scatter(
        x=x_text,
        y=y_text,
        text=texts,
        customdata=hovers,
        mode="text",
        textfont={"family": "monospace", "size": 13, "color": _INK},
        hovertemplate="%{customdata}<extra></extra>",
        showlegend=False,
    )
    # all at once: add_shape looks at those before it, which takes 20 s for 400
    figure.update_layout(shapes=shapes)
    height = 110 + round(-y * _LINE)
    styled(figure, title, told=told, height=height)
    hidden = {"visible": False, "fixedrange": True}
    figure.update_xaxes(range=[-0.5, _COLUMNS + 0.5], **hidden)
    figure.update_yaxes(range=[y + 0.4, 0.2], **hidden)
    figure.update_layout(margin={"l": 16, "r": 16, "b": 16})
    return figure, tuple(tile.value for _, tiles in blocks for tile in tiles)


def _lines(text: str) -> Iterator[str]:
    """Pieces that fit a line each; one, empty, of an empty text."""
    piece = ""
    for character in text:
        if _width(piece + character) + _PADDING > _COLUMNS:
            yield piece
            piece = ""
        piece += character
    yield piece


def _width(text: str) -> int:
    """In letters of a monospaced font: wide characters take two, combining ones none."""
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def _colour(share: float) -> str:
    """From orange at -1 over white to blue at 1."""
    end = MORE if share > 0 else LESS
    parts = (int(end[i : i + 2], 16) for i in (1, 3, 5))
    mixed = (round(255 + (part - 255) * abs(share) * _DEEPEST) for part in parts)
    return "rgb({},{},{})".format(*mixed)

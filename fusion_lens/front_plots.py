"""Plotly figures of methods held against each other: effect against damage, and how few units
do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from fusion_lens.errors import ConfigError
from fusion_lens.pictures import (
    BELOW,
    LESS,
    MORE,
    REST,
    Figure,
    error_bars,
    logarithmic,
    number_of,
    plain,
    shortened,
    styled,
)

if TYPE_CHECKING:
    # it brings scikit-learn along
    from fusion_lens.method_bench import MethodBench, Point

_LOOKS = (
    (MORE, "circle", "solid"),
    (LESS, "square", "solid"),
    ("#b8558a", "diamond", "dash"),
    ("#009e73", "triangle-up", "dot"),
    ("#8660a8", "cross", "dashdot"),
    ("#8a7d00", "x", "longdash"),
)
_MOST_METHODS = 16
_SHARE = [-0.06, 1.06]
_LETTERS = 96
"""Of all titles in a row of panels."""
_DODGE = 1.04
"""How far apart, as a factor, lines of one k stand."""


@dataclass(frozen=True, slots=True)
class UnitsPoint:
    """A share, with its 95 % interval over `n` texts, where the first `k` units of a ranking are
    used; `k` of None: every unit of the block."""

    ranking: str
    k: int | None
    mean: float | None
    low: float | None
    high: float | None
    n: int


def plot_fronts(bench: MethodBench) -> Figure:
    """Effect on source prompts against the control prompts that are written as without steering, a
    panel for each method, a line through the strengths of each of its gates and of none. All begin
    at the unsteered model. A star is the strength that was chosen for the line, with the 95 %
    intervals of both shares.

    Raises:
        ConfigError: if there is nothing but the unsteered model.
    """
    by_method: dict[str, dict[str, list[Point]]] = {}
    for point in bench.points:
        if point.method != "unsteered":
            by_method.setdefault(point.method, {}).setdefault(point.gate, []).append(point)
    if not by_method:
        raise ConfigError("there must be at least one method to show, but got none.")
    methods = list(by_method)[:_MOST_METHODS]
    n_rows, n_columns = _grid(len(methods))
    empty = n_rows * n_columns - len(methods)
    height = 226 + max(184, 334 // n_rows) * n_rows
    figure = make_subplots(
        rows=n_rows,
        cols=n_columns,
        shared_yaxes=True,
        horizontal_spacing=0.035,
        vertical_spacing=0.0 if n_rows == 1 else 34 / (height - 226),
        subplot_titles=[plain(shortened(name, _LETTERS // n_columns)) for name in methods],
        specs=_specs(n_rows, n_columns, empty),
    )
    told_of: set[str] = set()
    for place, method in enumerate(methods):
        panel = {"row": place // n_columns + 1, "col": place % n_columns + 1}
        for gate, points in by_method[method].items():
            _add_line(figure, panel, gate, points, named=gate not in told_of)
            told_of.add(gate)
        _add_unsteered(figure, panel, named=not place)
        if not any(_is_scored(each) for points in by_method[method].values() for each in points):
            _add_nothing(figure, panel)
        lowest = place + n_columns >= len(methods)
        figure.update_xaxes(showticklabels=lowest, title="effect" if lowest else None, **panel)
    n_scored = max(point.n for point in bench.points)
    told = f"n = {number_of(n_scored, 'source')}, {number_of(len(bench.of_controls), 'control')}"
    told += "; star: the strength chosen on other texts, 95 % cluster bootstrap"
    if len(methods) < len(by_method):
        told += f"; the first {len(methods)} of {len(by_method)} methods"
    styled(figure, "Effect against what is kept", told=told, height=height, panels=True)
    figure.update_xaxes(range=_SHARE, tickvals=[0, 0.5, 1], tickformat=".0%")
    figure.update_yaxes(range=_SHARE, tickvals=[0, 0.5, 1], tickformat=".0%")
    figure.update_yaxes(title="kept", col=1)
    figure.update_layout(margin_b=100, legend={**BELOW, "traceorder": "normal"})
    names = ("method", "gate", "variant", "strength", "chosen", "effect", "low", "high", "n")
    columns = (*names, "specificity", "specificity_low", "specificity_high")
    rows = tuple(tuple(getattr(point, name) for name in columns) for point in bench.points)
    return Figure("fronts", figure, columns, rows)


def plot_units_curve(points: Sequence[UnitsPoint], *, y: str = "effect") -> Figure:
    """A share, which `y` names, against the number of units, a line for each ranking; the whole
    block is a line across.

    Raises:
        ConfigError: if there is no number of units, one is below 1, or more than six rankings.
    """
    counts = sorted({each.k for each in points if each.k is not None})
    if min(counts, default=0) < 1:
        raise ConfigError(
            "there must be a number of units to show, and each at least 1, but got "
            f"{', '.join(map(str, counts)) or 'none'}."
        )
    rankings = list(dict.fromkeys(each.ranking for each in points if each.k is not None))
    if len(rankings) > len(_LOOKS):
        raise ConfigError(
            f"at most {len(_LOOKS)} rankings can be told apart, but got {len(rankings)}; "
            "draw them in two figures."
        )
    figure = go.Figure()
    for whole in (each for each in points if each.k is None and each.mean is not None):
        _add_whole(figure, whole, min(counts), max(counts), y)
    for place, (ranking, look) in enumerate(zip(rankings, _LOOKS, strict=False)):
        own = [each for each in points if each.ranking == ranking and each.k is not None]
        dodge = _DODGE ** (place - (len(rankings) - 1) / 2)
        _add_ranking(figure, own, look, dodge, y)
    most = {each.n for each in points}
    n = str(max(most)) if len(most) == 1 else f"{min(most)} to {max(most)}"
    told = f"n = {n} a point; 95 % cluster bootstrap"
    unscored = sum(each.mean is None for each in points)
    told += f"; {number_of(unscored, 'point')} unscored" if unscored else ""
    styled(figure, f"{plain(y[:1].upper() + y[1:])} against the number of units", told=told)
    low, high = (math.log10(end) for end in (min(counts) / 1.25, max(counts) * 1.25))
    figure.update_xaxes(title="units", range=[low, high], **logarithmic([float(k) for k in counts]))
    figure.update_yaxes(title=plain(y), range=_SHARE, tickformat=".0%")
    figure.update_layout(margin_b=100, legend={**BELOW, "traceorder": "normal"})
    rows = tuple(tuple(asdict(each).values()) for each in points)
    return Figure("units_curve", figure, ("ranking", "k", "mean", "low", "high", "n"), rows)


def _grid(n: int) -> tuple[int, int]:
    """Rows and columns of `n` panels: as few rows as leave each a quarter of the width."""
    if n <= 3:
        return 1, n
    columns = {4: 2, 5: 3, 6: 3, 9: 3}.get(n, 4)
    return math.ceil(n / columns), columns


def _specs(n_rows: int, n_columns: int, empty: int) -> list[list[dict[str, Any] | None]]:
    """All panels but the last `empty` ones."""
    cells: list[dict[str, Any] | None] = [{} for _ in range(n_rows * n_columns - empty)]
    cells += [None] * empty
    return [cells[i : i + n_columns] for i in range(0, len(cells), n_columns)]


def _add_line(
    figure: go.Figure, panel: Mapping[str, int], gate: str, points: Sequence[Point], *, named: bool
) -> None:
    """The points that are scored, joined from the unsteered model on, and a star where one was
    chosen."""
    from fusion_lens.method_suite import GATES

    place = ("", *GATES).index(gate)
    colour, symbol, dash = _LOOKS[place]
    name = f"{gate} gate" if gate else "no gate"
    scored = [each for each in points if _is_scored(each)]
    chosen = [each for each in scored if each.chosen]
    figure.add_scatter(
        x=[0.0, *(each.effect for each in scored)],
        y=[1.0, *(each.specificity for each in scored)],
        text=["0, unsteered", *(f"{each.strength:g}" for each in scored)],
        mode="lines+markers",
        line={"color": colour, "width": 2, "dash": dash},
        marker={"color": colour, "symbol": symbol, "size": [0, *[6] * len(scored)]},
        name=name,
        legendgroup=gate,
        showlegend=named,
        hovertemplate=f"{name}, strength %{{text}}<br>effect %{{x:.0%}}, kept %{{y:.0%}}"
        "<extra></extra>",
        **panel,
    )
    figure.add_scatter(
        x=[each.effect for each in chosen],
        y=[each.specificity for each in chosen],
        text=[f"{each.strength:g}" for each in chosen],
        error_x=_bars([(each.effect, each.low, each.high) for each in chosen], colour),
        error_y=_bars(
            [(each.specificity, each.specificity_low, each.specificity_high) for each in chosen],
            colour,
        ),
        mode="markers",
        marker={
            "color": colour,
            "symbol": "star",
            # two at one place are seen one inside the other
            "size": 16 - 2 * place,
            "line": {"color": "#ffffff", "width": 1},
        },
        name=f"{name}, chosen",
        legendgroup=gate,
        showlegend=False,
        hovertemplate=f"{name}, chosen: strength %{{text}}<br>effect %{{x:.0%}}, kept %{{y:.0%}}"
        "<extra></extra>",
        **panel,
    )


def _add_unsteered(figure: go.Figure, panel: Mapping[str, int], *, named: bool) -> None:
    figure.add_scatter(
        x=[0.0],
        y=[1.0],
        mode="markers",
        marker={"color": REST, "size": 11, "symbol": "circle-open", "line": {"width": 2}},
        name="unsteered",
        legendgroup="unsteered",
        showlegend=named,
        hoverinfo="skip",
        **panel,
    )


def _add_nothing(figure: go.Figure, panel: Mapping[str, int]) -> None:
    figure.add_scatter(
        x=[0.5],
        y=[0.5],
        text=["unscored"],
        mode="text",
        textfont_size=13,
        hoverinfo="skip",
        showlegend=False,
        **panel,
    )


def _is_scored(point: Point) -> bool:
    return point.effect is not None and point.specificity is not None


def _add_ranking(
    figure: go.Figure,
    points: Sequence[UnitsPoint],
    look: tuple[str, str, str],
    dodge: float,
    y: str,
) -> None:
    colour, symbol, dash = look
    scored = [each for each in points if each.mean is not None]
    scored.sort(key=lambda each: each.k or 0)
    name = plain(shortened(points[0].ranking, _LETTERS // 4))
    figure.add_scatter(
        x=[each.k * dodge for each in scored if each.k is not None],
        y=[each.mean for each in scored],
        customdata=[each.k for each in scored],
        error_y=_bars([(each.mean, each.low, each.high) for each in scored], colour),
        mode="lines+markers",
        line={"color": colour, "width": 2, "dash": dash},
        marker={"color": colour, "symbol": symbol, "size": 8},
        name=name,
        showlegend=True,
        hovertemplate=f"{name}, %{{customdata}} units<br>{plain(y)} %{{y:.1%}}<extra></extra>",
    )


def _add_whole(figure: go.Figure, whole: UnitsPoint, least: int, most: int, y: str) -> None:
    """A line across, with its interval at its right end."""
    ends = [least / 1.2, most * 1.2]
    name = plain(shortened(whole.ranking, _LETTERS // 4))
    bars = _bars([(whole.mean, None, None), (whole.mean, whole.low, whole.high)], REST)
    figure.add_scatter(
        x=ends,
        y=[whole.mean] * 2,
        error_y=bars,
        mode="lines",
        line={"color": REST, "width": 2, "dash": "dash"},
        name=name,
        showlegend=True,
        hovertemplate=f"{name}<br>{plain(y)} %{{y:.1%}}<extra></extra>",
    )


def _bars(shares: Sequence[tuple[float | None, ...]], colour: str) -> dict[str, Any]:
    metrics = [dict(zip(("mean", "low", "high"), own, strict=True)) for own in shares]
    return {**error_bars(metrics), "color": colour, "thickness": 1.5, "width": 2}

"""A plotly figure with the rows it shows, in a light and a dark look; many of them as files: HTML,
JSON, and PNG where a Chromium is found.

Colours are told apart with any common colour blindness and stand out from both backgrounds at 3:1
or more (WCAG 2.1, 1.4.11). Nothing is written smaller than 12 px at the 800 px a figure is wide.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io

from fusion_lens.errors import OutputError, one_of

WIDTH = 800
MORE, LESS, REST = "#0072b2", "#d55e00", "#8c8c8c"
"""More of something, less of it, and what is neither."""
DIVERGING = [[0.0, LESS], [0.5, "#ffffff"], [1.0, MORE]]
SEQUENTIAL = "Viridis"
BELOW = {"orientation": "h", "yref": "container", "y": 0.02, "yanchor": "bottom", "x": 0}
"""A legend below the figure, where `margin_b=100` leaves it room."""
PAPER = {"light": "#ffffff", "dark": "#16181d"}

_TEMPLATES = {"light": "plotly_white", "dark": "plotly_dark"}
_SIGNS = {"\n": "⏎", "\t": "⇥", " ": "·"}
_JOINERS = "\u200c\u200d"  # they shape what is around them
_CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture under a file name, with the rows it shows. Jupyter draws it."""

    name: str
    figure: go.Figure
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    @property
    def title(self) -> str:
        """What stands above it."""
        return str(self.figure.layout.title.text)

    def look(self, name: str) -> go.Figure:
        """A copy in the "light" or the "dark" look.

        Raises:
            ConfigError: if the look is unknown.
        """
        one_of("look", name, tuple(PAPER))
        copy = go.Figure(self.figure)
        paper = PAPER[name]
        copy.update_layout(template=_TEMPLATES[name], paper_bgcolor=paper, plot_bgcolor=paper)
        return copy

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the title, and the rows shown as columns and cells; what is no finite number is
        None."""
        rows = [[_cell(cell) for cell in row] for row in self.rows]
        return {"title": self.title, "columns": list(self.columns), "rows": rows}

    def _repr_mimebundle_(self, *args: Any, **kwargs: Any) -> Any:
        return self.figure._repr_mimebundle_(*args, **kwargs)


def styled(
    figure: go.Figure, title: str, *, told: str = "", height: int = 480, panels: bool = False
) -> None:
    """Title, what the figure shows below it (`told`: n, units, intervals), fonts and margins, the
    same in every figure; `panels` have titles of their own below those."""
    text: dict[str, Any] = {"text": title, "x": 0.02, "xanchor": "left", "yref": "container"}
    if told:
        text["subtitle"] = {"text": told, "font": {"size": 13}}
    figure.update_layout(
        title={**text, "y": 1 - 24 / height, "yanchor": "top", "font": {"size": 17}},
        template=_TEMPLATES["light"],
        paper_bgcolor=PAPER["light"],
        plot_bgcolor=PAPER["light"],
        font={"family": "sans-serif", "size": 13},
        margin={"l": 70, "r": 20, "t": (100 if told else 64) + 26 * panels, "b": 60},
        width=WIDTH,
        height=height,
    )
    figure.update_annotations(font_size=13)


def plain(text: str) -> str:
    """A text as plotly shows it: it reads a part of HTML, and LaTeX between dollars where MathJax
    is loaded."""
    return escape(text, quote=False).replace("$", "&#36;")


def shortened(text: str, most: int) -> str:
    """At most that many letters, cut in the middle: names tell themselves apart at both ends."""
    tail = (most - 1) // 3
    return text if len(text) <= most else f"{text[: most - 1 - tail]}…{text[len(text) - tail :]}"


def visible(token: str) -> str:
    """White space as signs, and what has no shape of its own as an escape."""
    return "".join(_SIGNS.get(c) or (c if _has_shape(c) else _escaped(c)) for c in token)


def number_of(n: int, noun: str) -> str:
    """ "1 question", "2 questions"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def logarithmic(values: Sequence[float], *, most: int = 9) -> dict[str, Any]:
    """An axis of powers of ten with `most` ticks on these positive values: plotly's own would
    write the digits between them too small."""
    least, largest = min(values, default=1.0), max(values, default=10.0)
    low, high = math.floor(math.log10(least) - 1e-9), math.ceil(math.log10(largest) + 1e-9)
    for steps in ((1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [10.0**power * step for power in range(low, high + 1) for step in steps]
        inside = [tick for tick in ticks if least <= tick <= largest]
        if len(inside) <= most:
            break
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:,.12g}" for tick in ticks]}


def with_zero(values: Sequence[float], *, room: float) -> list[float]:
    """The range of an axis that holds the values and 0, and `room` of it on either side."""
    low, high = min([0.0, *values]), max([0.0, *values])
    left = room * (high - low) or 1.0
    return [low - left, high + left]


def error_bars(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Plotly's, from the mean of each to its `low` and `high`; none where those are None."""

    def reach(metric: Mapping[str, Any], end: str) -> float:
        return 0.0 if metric[end] is None else abs(metric[end] - metric["mean"])

    return {
        "type": "data",
        "array": [reach(metric, "high") for metric in metrics],
        "arrayminus": [reach(metric, "low") for metric in metrics],
    }


def centred(values: Sequence[Sequence[float | None]], title: str) -> dict[str, Any]:
    """A heat map's colour scale whose white is 0, named on its bar."""
    sizes = [abs(value) for row in values for value in row if value is not None]
    most = max(sizes, default=1.0) or 1.0
    return {
        "colorscale": DIVERGING,
        "zmin": -most,
        "zmax": most,
        "colorbar": {"title": title},
    }


def write_figures(
    figures: Sequence[Figure], folder: str | Path, *, html: bool = True, data: bool = False
) -> str | None:
    """Write the figures; gives the reason where no PNG could be made.

    HTML files share one `plotly.min.js` beside them, so that they open offline. With `data`, a JSON
    file of the rows shown lies beside each picture.

    Raises:
        OutputError: if the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for figure in figures:
            if html:
                figure.figure.write_html(
                    folder / f"{figure.name}.html", include_plotlyjs="directory"
                )
            if data:
                content = json.dumps(figure.to_dict(), ensure_ascii=False, allow_nan=False)
                (folder / f"{figure.name}.json").write_text(content + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(folder, error.strerror or str(error)) from error
    if find_spec("kaleido") is None:
        return "no PNG figures: kaleido is not installed (pip install 'fusion-lens[png]')"
    if not any(shutil.which(name) for name in _CHROMIUM):
        return "no PNG figures: no Chromium was found (Debian: apt-get install chromium)"
    try:
        plotly.io.write_images(
            fig=[figure.figure for figure in figures],
            file=[folder / f"{figure.name}.png" for figure in figures],
            # plotly's own default is not the layout's size
            width=WIDTH,
            height=[figure.figure.layout.height for figure in figures],
            scale=2,
        )
    except Exception as error:  # a browser that does not start has many names
        return f"no PNG figures: the browser failed ({type(error).__name__}: {error})"
    return None


def _has_shape(character: str) -> bool:
    return character.isprintable() or character in _JOINERS


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _cell(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value

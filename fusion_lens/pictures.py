"""A plotly figure with the rows it shows, and many of them as files: HTML, CSV, and PNG where a
Chromium is found."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io

from fusion_lens.errors import OutputError

_CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture under a file name, with the rows it shows; `height` in pixels, the width is
    900."""

    name: str
    figure: go.Figure
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    height: int = 480


def styled(figure: go.Figure, title: str) -> None:
    """Title, fonts and margins, the same in every figure."""
    figure.update_layout(
        title={"text": title, "x": 0.02},
        template="plotly_white",
        font={"family": "sans-serif", "size": 14},
        margin={"l": 70, "r": 20, "t": 60, "b": 60},
    )


def write_figures(
    figures: Sequence[Figure], folder: str | Path, *, html: bool = True, data: bool = False
) -> str | None:
    """Write the figures; gives the reason where no PNG could be made.

    HTML files share one `plotly.min.js` beside them, so that they open offline. With `data`, a CSV
    of the rows shown lies beside each picture.

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
                _write_rows(figure, folder / f"{figure.name}.csv")
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
            width=900,
            height=[figure.height for figure in figures],
            scale=2,
        )
    except Exception as error:  # a browser that does not start has many names
        return f"no PNG figures: the browser failed ({type(error).__name__}: {error})"
    return None


def _write_rows(figure: Figure, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(figure.columns)
        writer.writerows(figure.rows)

"""Plotly figure of a sweep: what each strength of each segment gains."""

from __future__ import annotations

import plotly.graph_objects as go

from fusion_lens.pictures import Figure, centred, number_of, plain, shortened, styled
from fusion_lens.suggestions import Suggestion

_MOST_WRITTEN = 12
_LONGEST = 24


def plot_suggestion(suggestion: Suggestion) -> Figure:
    """Segment against coefficient: the mean gain in objective over the zero plan, all segments
    together in the last row."""
    cells = suggestion.cells
    rows = list(dict.fromkeys(cell.segment for cell in cells))
    coeffs = list(dict.fromkeys(cell.coeff for cell in cells))
    gain = {(cell.segment, cell.coeff): cell.gain.mean for cell in cells}
    values = [[gain[row, coeff] for coeff in coeffs] for row in rows]
    figure = go.Figure()
    written = {}
    if len(rows) <= _MOST_WRITTEN and len(coeffs) <= _MOST_WRITTEN:
        written = {"texttemplate": "%{z:+.2f}", "textfont": {"size": 13}}
    figure.add_heatmap(
        x=[f"{coeff:g}" for coeff in coeffs],
        y=[plain(shortened(row, _LONGEST)) for row in rows],
        z=values,
        hovertemplate="%{y} at %{x}: %{z:+.3f}<extra></extra>",
        **centred(values, "gain"),
        **written,
    )
    n = max(cell.gain.n for cell in cells)
    styled(
        figure,
        "Gain in objective by segment and coefficient",
        told=f"mean over n = {number_of(n, 'question')}, against the zero plan",
        height=max(320, min(800, 200 + 34 * len(rows))),
    )
    figure.update_xaxes(title="coefficient", type="category")
    figure.update_yaxes(type="category", autorange="reversed", automargin=True)
    columns = ("segment", "coeff", "gain", "low", "high", "n")
    told = tuple(
        (cell.segment, cell.coeff, cell.gain.mean, cell.gain.low, cell.gain.high, cell.gain.n)
        for cell in cells
    )
    return Figure("suggestion", figure, columns, told)

from __future__ import annotations

from collections.abc import Sequence

from records import deltas

from fusion_lens.plans import Segment
from fusion_lens.presets import Preset
from fusion_lens.statistics import Interval
from fusion_lens.suggestion_plots import plot_suggestion
from fusion_lens.suggestions import Cell, Suggestion


def swept(rows: Sequence[str], coeffs: Sequence[float] = (0.5, 1.0, 1.5)) -> Suggestion:
    """Every row gains more than the one above it, and less with every coefficient."""
    model = deltas([[1.0, 0.0]] * len(rows), [[1.0, 1.0]] * len(rows)).model
    segments = tuple(Segment(name, n, n + 1) for n, name in enumerate(rows))
    cells = tuple(
        Cell(row, coeff, Interval(n / 4 - place / 8, -0.5, 0.75, 8, 0, 6))
        for n, row in enumerate(rows, start=1)
        for place, coeff in enumerate(coeffs)
    )
    preset = Preset(model, segments, (), (), 0.7, ("digest",) * 8, {})
    return Suggestion(preset, cells)


def test_every_segment_is_a_row_and_every_coefficient_a_column() -> None:
    figure = plot_suggestion(swept(["early", "all"], [0.5, 1.25]))
    (heat,) = figure.figure.data
    assert (heat.x, heat.y) == (("0.5", "1.25"), ("early", "all"))
    assert [list(row) for row in heat.z] == [[0.25, 0.125], [0.5, 0.375]]
    # white is no gain
    assert (heat.zmin, heat.zmax) == (-0.5, 0.5)
    assert heat.texttemplate == "%{z:+.2f}"
    assert figure.figure.layout.title.subtitle.text == (
        "mean over n = 8 questions, against the zero plan"
    )
    assert figure.columns == ("segment", "coeff", "gain", "low", "high", "n")
    assert figure.rows[1] == ("early", 1.25, 0.125, -0.5, 0.75, 8)


def test_of_many_rows_the_numbers_are_left_to_the_pointer() -> None:
    figure = plot_suggestion(swept([f"layer_{n}" for n in range(13)]))
    assert figure.figure.data[0].texttemplate is None
    assert figure.figure.layout.height == 200 + 34 * 13

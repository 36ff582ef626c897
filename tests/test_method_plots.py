from __future__ import annotations

import pytest
import torch
from conftest import deltas_of
from torch import Tensor

from fusion_lens.controls import with_vectors
from fusion_lens.errors import ConfigError
from fusion_lens.method_plots import plot_gate, plot_units
from fusion_lens.models import HookedModel
from fusion_lens.units import Momenta, consistent, unit_mask

NAN = float("nan")


def some_momenta(model: HookedModel, n: int = 20) -> Momenta:
    generator = torch.Generator().manual_seed(0)
    base = deltas_of(model)
    pull = torch.linspace(-1, 1, 128).view(4, 32)
    return consistent(
        [with_vectors(base, torch.randn(4, 32, generator=generator) + pull) for _ in range(n)]
    )


def mask_of(*places: tuple[int, int], shape: tuple[int, int] = (4, 32)) -> Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    for place in places:
        mask[place] = True
    return mask


def test_every_layer_has_its_units_and_the_scores_of_all(tiny: HookedModel) -> None:
    found = some_momenta(tiny)
    mask = unit_mask(found.ranking, 10, (4, 32))
    figure = plot_units(mask, found)
    rows = [dict(zip(figure.columns, row, strict=True)) for row in figure.rows]
    assert [row["layer"] for row in rows] == [0, 1, 2, 3]
    assert [(row["layer"], d) for row in rows for d in row["dimensions"]] == [
        tuple(place) for place in mask.nonzero().tolist()
    ]
    for row, own in zip(rows, found.score, strict=True):
        assert row["kept"] == row["higher"] + row["lower"] == len(row["dimensions"])
        # the middle of 32 lies between two
        ordered = own.sort().values
        assert row["median"] == pytest.approx(float(ordered[15:17].mean()))
        assert (row["least"], row["most"]) == (float(ordered[0]), float(ordered[-1]))
    # pulled down in the low layers, up in the high ones
    assert rows[0]["lower"] > 0
    assert rows[0]["higher"] == rows[3]["lower"] == 0
    assert rows[3]["higher"] > 0
    (line,) = figure.figure.layout.shapes
    assert line.x0 == line.x1 == float(found.score[mask].min())


def test_marks_stand_where_units_are_kept() -> None:
    figure = plot_units(mask_of((0, 3), (2, 31)))
    marks, bars, _ = figure.figure.data
    assert list(zip(marks.y, marks.x, strict=True)) == [(0, 3), (2, 31)]
    assert list(bars.x) == [1, 0, 1, 0]
    assert {row[2:9] for row in figure.rows} == {(None,) * 7}


def test_of_many_units_the_share_of_each_range_is_drawn() -> None:
    mask = torch.zeros(32, 4096, dtype=torch.bool)
    mask[3] = True
    mask[5, :2048] = True
    figure = plot_units(mask)
    assert [each.type for each in figure.figure.data] == ["heatmap", "bar", "scatter"]
    grid = figure.figure.data[0]
    shares = torch.tensor(grid.z)
    assert shares.shape == (32, 96)
    assert shares[3].unique().tolist() == [1.0]
    assert shares[5].tolist() == [1.0] * 48 + [0.0] * 48
    assert float(shares.sum()) == 96 + 48
    assert grid.x[0] == pytest.approx(21.0)
    assert figure.figure.layout.height <= 780


def test_units_that_cannot_be_shown_are_refused(tiny: HookedModel) -> None:
    with pytest.raises(ConfigError, match="at least one unit to show, but none is kept"):
        plot_units(mask_of())
    with pytest.raises(ConfigError, match=r"one shape, but got \(4, 8\) and \(4, 32\)"):
        plot_units(mask_of((0, 0), shape=(4, 8)), some_momenta(tiny))


def test_a_closed_layer_and_a_gate_of_zero_are_two_things() -> None:
    g = torch.tensor([[NAN, 0.0, 0.5], [NAN, NAN, NAN]])
    figure = plot_gate(g, ["<s>", "Who", "?"], 2)
    grid, crosses = figure.figure.data
    # the border stands in a column of its own
    assert list(grid.z) == [[None, 0.0, None, 0.5], [None, None, None, None]]
    drawn = set(zip(crosses.x, crosses.y, strict=True))
    assert drawn == {(0, 0), (0, 1), (1, 1), (3, 1)}
    assert (grid.zmin, grid.zmax) == (0.0, 1.0)
    (border,) = figure.figure.layout.shapes
    assert border.x0 == border.x1 == 2
    assert list(figure.figure.layout.xaxis.tickvals) == [0, 1, 3]
    assert list(figure.figure.layout.xaxis.ticktext) == ["&lt;s&gt;", "Who", "?"]
    assert figure.rows[2:4] == (
        (1, "Who", "prompt", 0, 0.0),
        (1, "Who", "prompt", 1, pytest.approx(NAN, nan_ok=True)),
    )
    assert figure.rows[4] == (2, "?", "completion", 0, 0.5)
    assert "mean g 0.25 where steered" in figure.figure.layout.title.subtitle.text


def test_a_long_text_is_drawn_in_lines() -> None:
    g = torch.arange(2 * 100.0).view(2, 100) / 100
    tokens = [f"t{t}" for t in range(100)]
    figure = plot_gate(g, tokens, 60)
    grids = [each for each in figure.figure.data if each.type == "heatmap"]
    assert [len(grid.x) for grid in grids] == [34, 34, 33]
    kept = [z for grid in grids for z in grid.z[1] if z is not None]
    assert kept == pytest.approx(g[1].tolist())
    labels = [label for axis in figure.figure.select_xaxes() for label in axis.ticktext]
    assert labels == tokens
    assert [grid.zmax for grid in grids] == pytest.approx([1.99] * 3)
    assert [grid.showscale for grid in grids] == [True, False, False]
    (border,) = figure.figure.layout.shapes
    assert (border.xref, border.x0) == ("x2", 60 - 34)


@pytest.mark.parametrize("n_prompt", [0, 3])
def test_a_text_that_is_all_prompt_or_all_completion_has_no_border(n_prompt: int) -> None:
    figure = plot_gate(torch.zeros(2, 3), ["a", "b", "c"], n_prompt)
    assert not figure.figure.layout.shapes
    assert {row[2] for row in figure.rows} == {"prompt" if n_prompt else "completion"}


def test_a_text_that_is_not_steered_at_all_is_drawn() -> None:
    figure = plot_gate(torch.full((1, 2), NAN), ["a", "b"], 1)
    assert "none is steered" in figure.figure.layout.title.subtitle.text


def test_values_that_do_not_fit_their_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match="got 2 x 3 values for 2 tokens"):
        plot_gate(torch.zeros(2, 3), ["a", "b"], 1)
    with pytest.raises(ConfigError, match="at least one, but got 0 x 2"):
        plot_gate(torch.zeros(0, 2), ["a", "b"], 1)
    with pytest.raises(ConfigError, match=r"0 <= n_prompt <= 2.* but got 3"):
        plot_gate(torch.zeros(1, 2), ["a", "b"], 3)

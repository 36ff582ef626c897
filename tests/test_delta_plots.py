from __future__ import annotations

import math

import pytest
import torch
from records import deltas, detail
from torch import Tensor

from fusion_lens.delta_plots import (
    plot_delta_norms,
    plot_generic_share,
    plot_layer_cosines,
    plot_norm_map,
    plot_question_cosines,
)
from fusion_lens.deltas import Deltas
from fusion_lens.errors import ConfigError
from fusion_lens.pictures import Figure

# norms 5 and 2, relative 5 and 1; then 13 and 4, relative 13 and 2
LOVELACE = deltas([[3.0, 4.0], [0.0, 2.0]], base=[[1.0, 0.0], [2.0, 0.0]])
HARRIS = deltas([[5.0, 12.0], [4.0, 0.0]], base=[[1.0, 0.0], [2.0, 0.0]])
TWO = {"lovelace": LOVELACE, "harris": HARRIS}


def told(figure: Figure) -> str:
    return figure.figure.layout.title.subtitle.text


def random_deltas(n: int, layers: int = 26) -> dict[str, Deltas]:
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(layers, 8, generator=generator)

    return {f"q{i}": deltas(draw(), base=draw()) for i in range(n)}


def test_each_question_is_a_faint_line_and_the_median_and_quartiles_are_drawn_over_them() -> None:
    figure = plot_delta_norms(TWO)
    lines, band, median, relative_lines, relative_band, relative_median = figure.figure.data
    assert (lines.x, lines.y) == ((0, 1, None, 0, 1, None), (5.0, 2.0, None, 13.0, 4.0, None))
    assert lines.text == ("lovelace",) * 3 + ("harris",) * 3
    # the upper quartile to the right, the lower one back: 5 + 3/4 * 8, 2 + 3/4 * 2
    assert (band.x, band.y) == ((0, 1, 1, 0), (11.0, 3.5, 2.5, 7.0))
    assert (median.x, median.y) == ((0, 1), (9.0, 3.0))
    assert relative_lines.y == (5.0, 1.0, None, 13.0, 2.0, None)
    assert relative_band.y == (11.0, 1.75, 1.25, 7.0)
    assert relative_median.y == (9.0, 1.5)
    titles = [note.text for note in figure.figure.layout.annotations]
    assert titles == ["‖h − μ‖, residual units", "‖h − μ‖ / ‖μ‖"]
    assert told(figure) == "n = 2 questions; median in blue, quartiles shaded, each in grey"
    assert figure.columns == ("question_id", "layer", "norm", "relative")
    assert figure.rows == (
        ("lovelace", 0, 5.0, 5.0),
        ("lovelace", 1, 2.0, 1.0),
        ("harris", 0, 13.0, 13.0),
        ("harris", 1, 4.0, 2.0),
    )


def test_panel_titles_stand_below_the_subtitle() -> None:
    assert plot_delta_norms(TWO).figure.layout.margin.t == 126
    assert plot_norm_map(TWO).figure.layout.margin.t == 100


def test_the_details_of_a_run_draw_the_same_figures_as_deltas() -> None:
    kept = [
        detail("lovelace", (5.0, 2.0), base_norms=(1.0, 2.0)),
        detail("harris", (13.0, 4.0), base_norms=(1.0, 2.0)),
    ]
    for plot in (plot_delta_norms, plot_norm_map):
        assert plot(kept).rows == plot(TWO).rows
        assert plot(kept).figure.data == plot(TWO).figure.data


def test_one_question_has_no_band_and_is_named() -> None:
    figure = plot_delta_norms({"lovelace": LOVELACE})
    assert len(figure.figure.data) == 4
    assert told(figure) == "n = 1 question: lovelace"
    assert told(plot_norm_map({"lovelace": LOVELACE})) == "n = 1 question: lovelace"
    assert told(plot_layer_cosines({"lovelace": LOVELACE})) == "n = 1 question: lovelace"


def test_a_thousand_questions_are_two_hundred_lines_in_six_traces() -> None:
    figure = plot_delta_norms(random_deltas(1000))
    assert len(figure.figure.data) == 6
    lines = figure.figure.data[0]
    assert lines.y.count(None) == 200
    assert lines.line.color == "rgba(128,128,128,0.08)"
    assert (
        told(figure) == "n = 1000 questions; median in blue, quartiles shaded, each of 200 in grey"
    )
    assert len(figure.rows) == 26_000


def test_a_base_of_zero_has_no_relative_norm() -> None:
    kept = [detail("zero", (1.0, 2.0), base_norms=(0.0, 1.0)), detail("one", (4.0, 2.0))]
    assert kept[0].relative_norms == (math.inf, 2.0)
    figure = plot_delta_norms(kept)
    *_, lines, _, median = figure.figure.data
    assert lines.y == (None, 2.0, None, 0.5, 0.5, None)
    assert median.y == (0.5, 1.25)
    assert figure.to_dict()["rows"][0] == ["zero", 0, 1.0, None]
    (grid,) = plot_norm_map(kept).figure.data
    assert list(grid.z) == [[0.5, 0.5], [None, 2.0]]
    alone = plot_delta_norms(kept[:1]).figure.data[-1]
    assert alone.y == (None, 2.0)
    # 0/0
    nothing = {"zero": deltas([[0.0, 0.0]], base=[[0.0, 0.0]])}
    assert plot_delta_norms(nothing).figure.data[-1].y == (None,)
    assert plot_norm_map(nothing).to_dict()["rows"] == [["zero", 0, None]]


def test_the_map_has_the_question_of_the_largest_relative_norms_on_top() -> None:
    figure = plot_norm_map(TWO)
    (grid,) = figure.figure.data
    # plotly's first row is at the bottom
    assert list(grid.z) == [[5.0, 1.0], [13.0, 2.0]]
    assert list(grid.customdata) == [["lovelace"] * 2, ["harris"] * 2]
    axis = figure.figure.layout.yaxis
    assert (axis.tickvals, axis.ticktext) == ((0, 1), ("lovelace", "harris"))
    assert told(figure) == "n = 2 questions, the largest on top"
    assert figure.rows[0] == ("harris", 0, 13.0)


def test_names_are_cut_in_the_middle_and_beyond_twenty_four_are_counted() -> None:
    long = {f"simpleqa-{i:04d}-which-award-was-it-{i}": LOVELACE for i in range(24)}
    axis = plot_norm_map(long).figure.layout.yaxis
    assert {len(name) for name in axis.ticktext} == {24}
    assert "simpleqa-0023-wh…s-it-23" in axis.ticktext
    many = plot_question_cosines(random_deltas(25)).figure.layout
    for axis in (many.xaxis, many.yaxis):
        assert (axis.showticklabels, axis.title.text) == (False, "25 questions")


def test_cosines_between_layers_are_the_median_over_questions() -> None:
    # layer 0 against 1: 4/5, and 5/13 * 1; the median of two is their mean
    figure = plot_layer_cosines(TWO)
    (grid,) = figure.figure.data
    middle = (4 / 5 + 5 / 13) / 2
    assert grid.z[0] == pytest.approx((1.0, middle))
    assert grid.z[1] == pytest.approx((middle, 1.0))
    assert (grid.zmin, grid.zmax) == (-1.0, 1.0)
    assert grid.texttemplate == "%{z:.2f}"
    assert told(figure) == "median over n = 2 questions"
    assert figure.rows[1] == (0, 1, pytest.approx(middle))


def test_cosines_between_questions_are_those_of_one_layer() -> None:
    turned = {**TWO, "turned": LOVELACE * -1.0}
    figure = plot_question_cosines(turned, 0)
    (grid,) = figure.figure.data
    both = (3 * 5 + 4 * 12) / (5 * 13)
    expected = [(1.0, both, -1.0), (both, 1.0, -both), (-1.0, -both, 1.0)]
    for row, own in zip(grid.z, expected, strict=True):
        assert row == pytest.approx(own)
    assert grid.customdata[0][1] == "lovelace<br>harris"
    # of both, -1 and -both
    assert told(figure) == f"n = 3 questions; median over pairs {-both:+.2f}"
    assert figure.title == "Cosine between questions' deltas, layer 0"
    assert plot_question_cosines(TWO).title.endswith("layer 1")
    # (0, 2) and (4, 0)
    assert told(plot_question_cosines(TWO)) == "n = 2 questions; median over pairs +0.00"


def test_gaps_and_names_are_left_out_where_cells_are_small_or_many() -> None:
    (small,) = plot_question_cosines(random_deltas(51, 2)).figure.data
    assert (small.xgap, small.ygap) == (0, 0)
    many = plot_question_cosines(random_deltas(201, 2))
    (grid,) = many.figure.data
    assert grid.customdata is None
    assert grid.z[0][1] == round(many.rows[1][2], 3)


def test_shares_are_boxes_per_layer_over_questions() -> None:
    kept = [
        detail("lovelace", (1.0, 2.0), generic_share=(0.25, 0.5)),
        detail("harris", (1.0, 2.0), generic_share=(0.75, 1.0)),
        detail("alone", (1.0, 2.0), generic_share=None),
    ]
    figure = plot_generic_share(kept)
    assert [(box.x, box.y) for box in figure.figure.data] == [
        ((0, 0), (0.25, 0.75)),
        ((1, 1), (0.5, 1.0)),
    ]
    assert told(figure).startswith("n = 2 questions; box: quartiles and median")
    assert figure.rows[1] == ("lovelace", 1, 0.5)
    # of two questions, the squared cosine with the other
    both = plot_generic_share(TWO)
    assert [row[2] for row in both.rows] == pytest.approx([(63 / 65) ** 2, 0.0] * 2, abs=1e-6)
    # there is no layer after the last
    assert both.figure.layout.xaxis.range == (-0.7, 1.7)


def test_nothing_to_show_is_refused() -> None:
    nothing = "there must be at least 1 question(s) to show, but got 0."
    for plot in (plot_delta_norms, plot_norm_map, plot_layer_cosines):
        with pytest.raises(ConfigError) as caught:
            plot({})
        assert str(caught.value) == nothing
    with pytest.raises(ConfigError) as caught:
        plot_question_cosines({"lovelace": LOVELACE})
    assert str(caught.value) == "there must be at least 2 question(s) to show, but got 1."
    with pytest.raises(ConfigError) as caught:
        plot_question_cosines(TWO, 2)
    assert str(caught.value) == "layer must be in 0 to 1, but got 2."
    for few in ({}, {"lovelace": LOVELACE}, [detail("a", (1.0,), generic_share=None)]):
        with pytest.raises(ConfigError) as caught:
            plot_generic_share(few)
        assert str(caught.value) == "a generic share needs at least two questions, but got fewer."

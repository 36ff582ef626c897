from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from fusion_lens.errors import ConfigError
from fusion_lens.front_plots import UnitsPoint, plot_fronts, plot_units_curve
from fusion_lens.method_bench import MethodBench, Point

RAW = Point(
    method="generic",
    gate="",
    variant="10 units",
    strength=0.5,
    chosen=False,
    effect=0.25,
    low=0.125,
    high=0.5,
    n=8,
    wanted=0.125,
    transfer=0.25,
    specificity=0.75,
    specificity_low=0.5,
    specificity_high=0.875,
    marked=1.0,
    nll=1.5,
    kl=None,
    n_scalars=10,
    seconds=0.5,
)
UNSTEERED = replace(RAW, method="unsteered", strength=0, chosen=True, effect=0.0, specificity=1.0)
STRONGER = {"strength": 1.0, "chosen": True, "effect": 0.5, "low": 0.25, "high": 0.75}
NOTHING = dict.fromkeys(
    ("effect", "low", "high", "specificity", "specificity_low", "specificity_high")
)


def bench_of(methods: Sequence[str], gates: Sequence[str], **more: Any) -> MethodBench:
    """Of two strengths each, the stronger one chosen, on 8 sources and 4 controls."""
    made = [
        replace(RAW, method=method, gate=gate, **own)
        for method in methods
        for gate in gates
        for own in (more, {**STRONGER, **more})
    ]
    return MethodBench((UNSTEERED, *made), (), tuple("abcdefgh"), tuple("ijkl"), 0)


def curve_of(rankings: Sequence[str], counts: Sequence[int] = (1, 10, 100)) -> list[UnitsPoint]:
    """Each ranking by itself, and the whole block under the name of the last."""
    found = [
        UnitsPoint(ranking, k, 0.25 * n, 0.2 * n, 0.3 * n, 8)
        for ranking in rankings
        for n, k in enumerate(counts, start=1)
    ]
    return [*found, UnitsPoint(rankings[-1], None, 0.875, 0.75, None, 8)]


def panels(figure: Any) -> int:
    return sum(1 for _ in figure.figure.select_xaxes())


def test_a_line_goes_from_the_unsteered_model_through_every_strength() -> None:
    figure = plot_fronts(bench_of(["generic"], [""]))
    line, star, unsteered = figure.figure.data
    assert (list(line.x), list(line.y)) == ([0.0, 0.25, 0.5], [1.0, 0.75, 0.75])
    assert (unsteered.x, unsteered.y) == ((0.0,), (1.0,))
    assert (star.x, star.y, star.text) == ((0.5,), (0.75,), ("1",))
    assert (star.error_x.arrayminus, star.error_x.array) == ((0.25,), (0.25,))
    assert (star.error_y.arrayminus, star.error_y.array) == ((0.25,), (0.125,))
    assert figure.rows == (
        ("unsteered", "", "10 units", 0, True, 0.0, 0.125, 0.5, 8, 1.0, 0.5, 0.875),
        ("generic", "", "10 units", 0.5, False, 0.25, 0.125, 0.5, 8, 0.75, 0.5, 0.875),
        ("generic", "", "10 units", 1.0, True, 0.5, 0.25, 0.75, 8, 0.75, 0.5, 0.875),
    )
    assert figure.columns[-3:] == ("specificity", "specificity_low", "specificity_high")
    assert "n = 8 sources, 4 controls" in figure.figure.layout.title.subtitle.text


def test_every_method_has_a_panel_and_every_gate_one_colour_and_one_name() -> None:
    gates = ("", "dsas", "permuted", "constant")
    figure = plot_fronts(bench_of(["caa", "iti", "austeer"], gates))
    assert [note.text for note in figure.figure.layout.annotations] == ["caa", "iti", "austeer"]
    lines = [each for each in figure.figure.data if "lines" in each.mode]
    assert len(lines) == 12
    assert {(each.legendgroup, each.line.color, each.line.dash) for each in lines} == {
        (each.legendgroup, each.line.color, each.line.dash) for each in lines[:4]
    }
    assert len({each.line.color for each in lines}) == 4
    named = [each.name for each in figure.figure.data if each.showlegend]
    assert named == ["no gate", "dsas gate", "permuted gate", "constant gate", "unsteered"]


def test_a_gate_that_the_first_method_lacks_is_named_all_the_same() -> None:
    first, second = bench_of(["prompting"], [""]), bench_of(["caa"], ["", "dsas"])
    both = replace(first, points=first.points + second.points[1:])
    figure = plot_fronts(both)
    named = [each.name for each in figure.figure.data if each.showlegend]
    assert named == ["no gate", "unsteered", "dsas gate"]


@pytest.mark.parametrize(
    ("n", "expected"),
    [(1, 1), (2, 2), (4, 2), (5, 3), (7, 4), (9, 3), (10, 4), (12, 4), (16, 4), (18, 4)],
)
def test_up_to_sixteen_panels_stand_in_a_grid(n: int, expected: int) -> None:
    figure = plot_fronts(bench_of([f"m{i}" for i in range(n)], [""]))
    assert panels(figure) == min(n, 16)
    starts = {axis.domain[0] for axis in figure.figure.select_xaxes()}
    assert len(starts) == expected
    # the lowest panel of every column tells its axis
    told = [axis.title.text for axis in figure.figure.select_xaxes()]
    assert told.count("effect") == expected
    assert figure.figure.layout.height <= (800 if n <= 12 else 980)
    left_out = "the first 16 of 18 methods" in figure.figure.layout.title.subtitle.text
    assert left_out == (n == 18)
    assert len(figure.rows) == 1 + 2 * n


def test_what_is_unscored_is_left_out_and_said() -> None:
    figure = plot_fronts(bench_of(["caa"], ["", "dsas"], **NOTHING))
    lines = [each for each in figure.figure.data if "lines" in each.mode]
    assert [list(each.x) for each in lines] == [[0.0], [0.0]]
    assert [list(each.text) for each in figure.figure.data if each.mode == "text"] == [["unscored"]]
    half = bench_of(["caa"], [""])
    half = replace(half, points=(*half.points[:2], replace(half.points[2], specificity=None)))
    line, star, _ = plot_fronts(half).figure.data
    assert (list(line.x), list(star.x)) == ([0.0, 0.25], [])


def test_the_unsteered_model_alone_makes_no_picture() -> None:
    with pytest.raises(ConfigError, match="at least one method to show, but got none"):
        plot_fronts(bench_of([], [""]))


def test_rankings_are_lines_and_the_whole_block_goes_across() -> None:
    figure = plot_units_curve(curve_of(["consistency", "random"]), y="accuracy")
    whole, consistency, random = figure.figure.data
    assert list(whole.y) == [0.875, 0.875]
    assert whole.x[0] < 1
    assert whole.x[1] > 100
    # what has no upper end has no upper bar
    assert whole.error_y.arrayminus == (0.0, 0.125)
    assert whole.error_y.array == (0.0, 0.0)
    assert list(consistency.customdata) == [1, 10, 100]
    assert list(consistency.y) == [0.25, 0.5, 0.75]
    assert consistency.error_y.array == pytest.approx((0.05, 0.1, 0.15))
    # side by side, the one as far to the left as the other to the right
    assert [a * b for a, b in zip(consistency.x, random.x, strict=True)] == pytest.approx(
        [1.0, 100.0, 10_000.0]
    )
    assert consistency.x[0] < 1 < random.x[0]
    assert figure.figure.layout.yaxis.title.text == "accuracy"
    assert figure.title == "Accuracy against the number of units"
    assert figure.rows[0] == ("consistency", 1, 0.25, 0.2, 0.3, 8)
    assert "n = 8 a point" in figure.figure.layout.title.subtitle.text


def test_points_are_drawn_in_the_order_of_k_and_unscored_ones_left_out() -> None:
    one, ten, hundred, _ = curve_of(["consistency"])
    missing = replace(ten, mean=None, low=None, high=None, n=3)
    figure = plot_units_curve([hundred, missing, one])
    (line,) = figure.figure.data
    assert list(line.customdata) == [1, 100]
    assert "n = 3 to 8 a point" in figure.figure.layout.title.subtitle.text
    assert figure.figure.layout.title.subtitle.text.endswith("1 point unscored")


def test_curves_that_cannot_be_drawn_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"a number of units to show.* but got none"):
        plot_units_curve([UnitsPoint("whole", None, 0.5, None, None, 8)])
    with pytest.raises(ConfigError, match="each at least 1, but got 0, 10"):
        plot_units_curve(curve_of(["random"], (10, 0)))
    with pytest.raises(ConfigError, match=r"at most 6 rankings.* but got 7"):
        plot_units_curve(curve_of(list("abcdefg")))

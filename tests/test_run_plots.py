from __future__ import annotations

from dataclasses import replace

import pytest
from records import LOVELACE, arm, comparison, interval, make_results, summary, tuned

from fusion_lens.errors import ConfigError
from fusion_lens.pictures import Figure
from fusion_lens.results import Results, Summary
from fusion_lens.run_plots import (
    ARM_COLOURS,
    plot_coeffs,
    plot_differences,
    plot_reach,
    plot_scores,
    run_figures,
)


def traces(figure: Figure, kind: str) -> list:
    return [trace for trace in figure.figure.data if trace.type == kind]


def told(figure: Figure) -> str:
    """What stands below the title."""
    return figure.figure.layout.title.subtitle.text


def points(figure: Figure) -> dict[tuple[str, str], tuple[float, float, float]]:
    """Mean, and how far the error bar reaches up and down, by arm and axis."""
    return {
        (trace.y[0], trace.xaxis): (
            trace.x[0],
            trace.error_x.array[0],
            trace.error_x.arrayminus[0],
        )
        for trace in traces(figure, "scatter")
    }


def test_points_are_the_means_and_their_errors_reach_the_ends_of_the_intervals() -> None:
    figure = plot_scores({"full": arm()})
    assert points(figure) == {
        ("full", "x"): (0.25, 0.25, 0.25),
        ("full", "x2"): (0.5, 0.25, 0.25),
        ("full", "x3"): (0.3125, 0.1875, 0.375),  # -0.0625 to 0.5
        ("full", "x4"): (12.3, pytest.approx(67.8 - 12.3), pytest.approx(12.3 - 4.5)),
    }
    titles = [note.text for note in figure.figure.layout.annotations]
    assert titles == ["right (exact match)", "overlap with gold", "objective", "perplexity"]
    layout = figure.figure.layout
    assert (layout.xaxis3.type, layout.xaxis4.type) == (None, "log")


def test_the_reach_of_every_arm_is_a_figure_of_its_own() -> None:
    figure = plot_reach({"full": arm(), "random": arm(kl_unrelated=interval(None, None, None))})
    assert points(figure)["full", "x3"] == (0.0625, 0.0625, 0.03125)
    assert ("random", "x3") not in points(figure)
    assert figure.rows[0] == ("full", "transfer_exact_match", 0.125, 0.0, 0.25, 12)
    assert list(figure.figure.layout.yaxis.categoryarray) == ["random", "full"]


def test_each_arm_keeps_its_colour_in_every_figure() -> None:
    results = make_results()
    shown = plot_scores(results.summary["arms"]).figure.data
    colours = {(trace.name, trace.marker.color) for trace in shown}
    assert colours == {(name, ARM_COLOURS[name]) for name in ("baseline", "segmented")}
    boxes = traces(plot_coeffs([tuned("a", 1.0, 0.0)], results.summary["arms"]), "box")
    assert {box.marker.color for box in boxes} == {ARM_COLOURS["segmented"]}


def test_an_unscored_metric_is_not_shown_and_has_no_row() -> None:
    nothing = interval(None, None, None, 12)
    figure = plot_scores({"full": arm(overlap=nothing, perplexity=nothing)})
    assert set(points(figure)) == {("full", "x"), ("full", "x3")}
    assert [row[1] for row in figure.rows] == ["exact_match", "objective"]


def test_a_mean_without_an_interval_has_no_error_bar() -> None:
    shown = points(plot_scores({"full": arm(overlap=interval(0.5, None, None))}))
    assert shown["full", "x2"] == (0.5, 0.0, 0.0)


def test_score_rows_are_the_figures_of_the_summary() -> None:
    figure = plot_scores({"full": arm()})
    assert figure.columns == ("arm", "metric", "mean", "low", "high", "n")
    assert figure.rows == (
        ("full", "exact_match", 0.25, 0.0, 0.5, 12),
        ("full", "overlap", 0.5, 0.25, 0.75, 12),
        ("full", "objective", 0.3125, -0.0625, 0.5, 12),
        ("full", "perplexity", 12.3, 4.5, 67.8, 12),
    )
    assert figure.title == "Scores per arm"
    assert told(figure) == "n = 12 questions, mean and 95 % cluster bootstrap"


def test_boxes_hold_the_chosen_coefficient_of_every_question() -> None:
    results = make_results()
    full = replace(tuned("lovelace", 0.0, 0.0), arm="full", coeffs={"full": 0.5}, tied=True)
    arms = results.summary["arms"] | {"full": {"zero_won": 0.0, "tied": 1.0}}
    records = [*(record for record in results.records if record.coeffs), full]
    figure = plot_coeffs(records, arms)
    boxes = traces(figure, "box")
    assert [(set(box.y), list(box.x)) for box in boxes] == [
        ({"segmented: early"}, [1.5, 0.0]),
        ({"segmented: late"}, [0.5, 0.0]),
        ({"full"}, [0.5]),
    ]
    assert [box.boxpoints for box in boxes] == ["all"] * 3
    # beside the first row of each arm
    assert [(note.y, note.text) for note in figure.figure.layout.annotations] == [
        ("segmented: early", "zero 50%, tied 0%"),
        ("full", "zero 0%, tied 100%"),
    ]
    axis = figure.figure.layout.yaxis
    assert list(axis.tickvals) == ["segmented: early", "segmented: late", "full"]
    assert axis.categoryarray == axis.tickvals[::-1]  # plotly begins at the bottom
    assert told(figure) == (
        "n = 2 questions; box: quartiles and median; right: how often the zero plan won, trials "
        "tied"
    )
    assert figure.columns == ("question_id", "arm", "segment", "coeff", "zero_won", "tied")
    assert figure.rows == (
        ("lovelace", "segmented", "early", 1.5, False, False),
        ("harris", "segmented", "early", 0.0, True, False),
        ("lovelace", "segmented", "late", 0.5, False, False),
        ("harris", "segmented", "late", 0.0, True, False),
        ("lovelace", "full", "full", 0.5, False, True),
    )


def test_a_run_has_the_figures_it_has_data_for() -> None:
    results = make_results()
    deltas = ["delta_norms", "norm_map", "generic_share"]
    names = ["scores", "reach", "coeffs", *deltas]
    assert [f.name for f in run_figures(results)] == names
    compared = Summary(results.summary | {"comparisons": [comparison("full", "objective", 0.5)]})
    names.insert(1, "differences")
    assert [f.name for f in run_figures(replace(results, summary=compared))] == names
    alone = tuple(replace(each, generic_share=None) for each in results.details)
    assert "generic_share" not in [f.name for f in run_figures(replace(results, details=alone))]
    nothing = dict.fromkeys(
        ("transfer_exact_match", "neighbours_kept", "kl_unrelated"), interval(None, None, None, 12)
    )
    untuned = Results((LOVELACE,), Summary(summary(baseline=arm(**nothing))))
    assert [figure.name for figure in run_figures(untuned)] == ["scores"]


def test_differences_are_points_with_their_intervals_filled_where_they_are_sure() -> None:
    figure = plot_differences(
        [
            comparison("baseline", "objective", 0.5),
            comparison("full", "objective", -0.25, p_holm=0.05, n=11),
            comparison("baseline", "overlap", 0.25, p_holm=None, low=None, high=None),
            comparison("full", "overlap", None, n=0),
            comparison("full", "exact_match", 1.0),
        ]
    )
    # diff - 0.25 to diff + 0.125
    assert points(figure) == {
        ("baseline", "x"): (0.5, 0.125, 0.25),
        ("full", "x"): (-0.25, 0.125, 0.25),
        ("baseline", "x2"): (0.25, 0.0, 0.0),
    }
    assert [(trace.marker.symbol, trace.marker.color) for trace in figure.figure.data] == [
        ("circle", ARM_COLOURS["baseline"]),
        ("circle-open", ARM_COLOURS["full"]),
        ("circle-open", ARM_COLOURS["baseline"]),
    ]
    titles = [note.text for note in figure.figure.layout.annotations]
    assert titles == ["objective", "overlap with gold"]
    # a line at no difference in either panel
    assert [(line.x0, line.x1, line.xref) for line in figure.figure.layout.shapes] == [
        *((0, 0, "x"), (0, 0, "x2")),
    ]
    assert list(figure.figure.layout.yaxis.categoryarray) == ["full", "baseline"]
    assert figure.title == "segmented minus another arm"
    assert told(figure) == (
        "n = 12 pairs, 95 % cluster bootstrap; filled where Holm's p is below 0.05"
    )
    assert figure.columns == ("minus", "metric", "diff", "low", "high", "p_holm", "n")
    assert figure.rows == (
        ("baseline", "objective", 0.5, 0.25, 0.625, 0.02, 12),
        ("full", "objective", -0.25, -0.5, -0.125, 0.05, 11),
        ("baseline", "overlap", 0.25, None, None, None, 12),
    )


@pytest.mark.parametrize(
    "nothing", [[], [comparison("full", "overlap", None)], [comparison("x", "nll", 1.0)]], ids=len
)
def test_without_a_difference_there_is_no_such_figure(nothing: list) -> None:
    with pytest.raises(ConfigError) as caught:
        plot_differences(nothing)
    assert str(caught.value) == (
        "there must be a difference in one of objective, overlap, transfer_exact_match to "
        "show, but got none."
    )
    results = make_results()
    made = replace(results, summary=Summary(results.summary | {"comparisons": nothing}))
    assert "differences" not in [figure.name for figure in run_figures(made)]


def test_many_points_are_a_box_alone() -> None:
    arms = make_results().summary["arms"]
    for n, shown in ((200, "all"), (201, False)):
        records = [tuned(f"q{i}", 1.0, 0.5) for i in range(n)]
        assert {box.boxpoints for box in plot_coeffs(records, arms).figure.data} == {shown}


def test_coefficients_are_on_an_axis_that_holds_zero() -> None:
    figure = plot_coeffs([tuned("a", 1.0, 0.5)], make_results().summary["arms"])
    assert figure.figure.layout.xaxis.range == pytest.approx((-0.02, 1.02))
    assert told(figure).startswith("n = 1 question; ")

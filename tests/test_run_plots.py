from __future__ import annotations

from dataclasses import replace

import pytest
from records import LOVELACE, arm, comparison, interval, make_results, summary, tuned

from fusion_lens.pictures import Figure
from fusion_lens.results import Results, Summary
from fusion_lens.run_plots import (
    ARM_COLOURS,
    plot_coeffs,
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

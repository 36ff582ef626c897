from __future__ import annotations

from dataclasses import replace
from typing import Any

import optuna
import pytest
from records import Toy, searched

from fusion_lens.errors import SearchError
from fusion_lens.pictures import Figure
from fusion_lens.search import Trial, Tuned
from fusion_lens.tuning_plots import plot_front, plot_importance, plot_search


def trial(number: int, early: float, late: float, *scores: Any) -> Trial[Toy]:
    coeffs = {"early": early, "late": late}
    return Trial(number, coeffs, coeffs, early + late, Toy(*scores))


ZERO = trial(1, 0.0, 0.0, 0.0, 0.0, 10.0)
GOOD = trial(2, 1.0, 0.5, 0.625, 1.0, 40.0)
WORSE = trial(3, 0.5, 1.0, 0.25, 0.5, 80.0)
UNSCORED = trial(4, 1.5, 1.5, -0.25, 0.0, None)
TRIALS = (ZERO, GOOD, WORSE, UNSCORED)


def made(trials: tuple[Trial[Toy], ...] = TRIALS, best: Trial[Toy] = GOOD) -> Tuned[Toy]:
    front = tuple(each for each in trials if each in (ZERO, GOOD))
    return Tuned(trials, best, front, optuna.create_study())


def told(figure: Figure) -> str:
    return figure.figure.layout.title.subtitle.text


def drawn(figure: Figure) -> list[tuple[str, list[float], list[float]]]:
    return [(trace.name, list(trace.x), list(trace.y)) for trace in figure.figure.data]


def test_each_segment_has_a_panel_of_its_coefficients_against_the_objective() -> None:
    figure = plot_search(made())
    assert drawn(figure) == [
        ("trial", [0.5, 1.5], [0.25, -0.25]),
        ("unsteered", [0.0], [0.0]),
        ("chosen trial", [1.0], [0.625]),
        ("trial", [1.0, 1.5], [0.25, -0.25]),
        ("unsteered", [0.0], [0.0]),
        ("chosen trial", [0.5], [0.625]),
    ]
    assert [trace.xaxis for trace in figure.figure.data] == ["x"] * 3 + ["x2"] * 3
    assert [note.text for note in figure.figure.layout.annotations] == ["early", "late"]
    # one legend for all panels
    assert [trace.showlegend for trace in figure.figure.data] == [True] * 3 + [False] * 3
    assert figure.figure.data[0].customdata == (3, 4)
    assert told(figure) == "n = 4 trials"
    assert figure.rows == (
        (1, "early", 0.0, 0.0, False),
        (1, "late", 0.0, 0.0, False),
        (2, "early", 1.0, 0.625, True),
        (2, "late", 0.5, 0.625, True),
        (3, "early", 0.5, 0.25, False),
        (3, "late", 1.0, 0.25, False),
        (4, "early", 1.5, -0.25, False),
        (4, "late", 1.5, -0.25, False),
    )


def test_all_panels_share_a_range_that_holds_every_coefficient_and_zero() -> None:
    layout = plot_search(made()).figure.layout
    # 4 % and 1.5 % of 1.5 per panel on either side
    for axis in (layout.xaxis, layout.xaxis2):
        assert axis.range == pytest.approx((-0.07 * 1.5, 1.07 * 1.5))
    below = replace(WORSE, coeffs={"early": -0.5, "late": -1.0})
    layout = plot_search(made((below, GOOD))).figure.layout
    assert layout.xaxis.range == pytest.approx((-1.0 - 0.07 * 2, 1.0 + 0.07 * 2))
    layout = plot_search(made((ZERO,), ZERO)).figure.layout
    assert layout.xaxis.range == (-1.0, 1.0)


def test_a_chosen_trial_that_is_the_unsteered_one_says_so() -> None:
    figure = plot_search(made((ZERO, WORSE), ZERO))
    assert [trace.name for trace in figure.figure.data][:3] == [
        *("trial", "unsteered", "chosen trial: unsteered")
    ]


def test_of_many_segments_the_first_six_are_shown_and_the_number_is_told() -> None:
    names = [f"layer_{i}" for i in range(26)]
    figure = plot_search(searched(lambda coeffs: Toy(sum(coeffs.values())), names, trials=4))
    assert told(figure) == "n = 4 trials; the first 6 of 26 segments"
    assert [note.text for note in figure.figure.layout.annotations] == names[:6]
    assert len(figure.rows) == 4 * 26


def test_long_names_of_segments_are_cut_to_their_panel() -> None:
    names = [f"layers_{i}_to_{i}_of_the_model" for i in range(6)]
    figure = plot_search(searched(lambda coeffs: Toy(0.0), names, trials=2))
    assert figure.figure.layout.annotations[0].text == "layers_0_…odel"


def test_the_front_joins_the_trials_that_none_beats_in_both() -> None:
    figure = plot_front(made())
    assert drawn(figure) == [
        ("Pareto front", [10.0, 40.0], [0.0, 1.0]),
        ("trial", [80.0], [0.5]),
        ("unsteered", [10.0], [0.0]),
        ("chosen trial", [40.0], [1.0]),
    ]
    # along an overlap until the next trial has more
    assert figure.figure.data[0].line.shape == "hv"
    assert told(figure) == "n = 3 trials; 1 unscored"
    assert figure.figure.layout.xaxis.type == "log"
    assert figure.rows == ((1, 0.0, 10.0, True), (2, 1.0, 40.0, True), (3, 0.5, 80.0, False))


def test_without_a_scored_trial_the_front_is_empty() -> None:
    unscored = replace(GOOD, outcome=Toy(0.0, None, None))
    figure = plot_front(made((unscored,), unscored))
    assert [x for _, x, _ in drawn(figure)] == [[], [], []]
    assert (told(figure), figure.rows) == ("n = 0 trials; 1 unscored", ())


def test_equal_perplexities_have_ticks_around_them() -> None:
    axis = plot_front(made((ZERO,), ZERO)).figure.layout.xaxis
    assert 10.0 in axis.tickvals
    assert min(axis.tickvals) < 10.0 < max(axis.tickvals)


def test_importances_are_bars_with_their_shares_the_largest_on_top() -> None:
    tuned = searched(lambda coeffs: Toy(-abs(coeffs["late"] - 1)), ("early", "late"), trials=40)
    figure = plot_importance(tuned)
    (bars,) = figure.figure.data
    assert figure.rows == tuple(tuned.importances().items())
    assert bars.y == ("late", "early")
    assert dict(zip(bars.y, bars.x, strict=True)) == tuned.importances()
    assert bars.text == tuple(f"{share:.0%}" for share in bars.x)
    assert figure.figure.layout.yaxis.autorange == "reversed"
    assert told(figure) == "PED-ANOVA on n = 40 trials; the shares sum to 1"


def test_trials_that_tell_nothing_of_importance_are_refused() -> None:
    with pytest.raises(SearchError) as caught:
        plot_importance(searched(lambda _: Toy(0.5), ("early",), trials=6))
    assert str(caught.value) == (
        "importances need at least two trials of different objectives, but all objectives are "
        "equal; take more trials or wider coefficients."
    )

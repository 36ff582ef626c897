from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from math import hypot
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import Toy

from fusion_lens.errors import ConfigError, SearchError
from fusion_lens.search import (
    PARAMETRISATIONS,
    Coeffs,
    Parameter,
    Search,
    SearchConfig,
    Tuned,
    Values,
    export_study,
)

SEGMENTS = ("early", "late")


def bowl(coeffs: Coeffs) -> Toy:
    """A smooth objective with its only peak, 1, at (0.9, 0.3)."""
    return Toy(round(1 - (coeffs["early"] - 0.9) ** 2 - (coeffs["late"] - 0.3) ** 2, 6))


def norm(coeffs: Coeffs) -> float:
    return hypot(*coeffs.values())


def tune(
    evaluate: Callable[[list[Coeffs]], Sequence[Toy]],
    norm: Callable[[Coeffs], float],
    config: SearchConfig,
) -> Tuned[Toy]:
    """One search from its first round to its last."""
    search: Search[Toy] = Search(SEGMENTS, config, norm)
    while not search.done:
        search.tell(evaluate(search.ask()))
    return search.result()


def tuned(
    score: Callable[[Coeffs], Toy] = bowl, norm: Callable[[Coeffs], float] = norm, **options: object
) -> Tuned[Toy]:
    config = SearchConfig(**options)
    return tune(lambda batch: [score(coeffs) for coeffs in batch], norm, config)


def coeffs_of(search: Tuned[Toy]) -> list[Coeffs]:
    return [trial.coeffs for trial in search.trials]


def random_sampler(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.RandomSampler(seed=seed)


@pytest.mark.parametrize(
    "options",
    [{"parametrisation": name} for name in PARAMETRISATIONS] + [{"low": 0.5}, {"low": -1.0}],
    ids=str,
)
def test_the_zero_plan_is_trial_1_and_one_of_the_n(options: dict[str, object]) -> None:
    search = tuned(trials=7, round_size=3, **options)
    assert [trial.number for trial in search.trials] == [1, 2, 3, 4, 5, 6, 7]
    assert search.trials[0].coeffs == {"early": 0.0, "late": 0.0}
    assert search.trials[0].injected_norm == 0.0
    assert all(any(coeffs.values()) for coeffs in coeffs_of(search)[1:])


A, B = {"early": 0.5, "late": 1.5}, {"late": 0.25, "early": 0.0}


def started(
    *starts: Mapping[str, float], extra: Sequence[Parameter] = (), **options: Any
) -> Tuned[Toy]:
    """A search that has somewhere to start from."""
    config = SearchConfig(**options)
    search: Search[Toy] = Search(SEGMENTS, config, lambda _: 1.0, extra, starts)
    while not search.done:
        search.tell([bowl(values) for values in search.ask()])
    return search.result()


@pytest.mark.parametrize("options", [{}, {"zero_first": False}, {"round_size": 1}], ids=str)
def test_starts_are_the_first_trials_behind_the_zero_plan(options: dict[str, Any]) -> None:
    search = started(A, B, trials=6, **options)
    first = 0 if options.get("zero_first") is False else 1
    assert coeffs_of(search)[first : first + 2] == [A, B]
    assert [trial.number for trial in search.trials] == [1, 2, 3, 4, 5, 6]
    assert list(search.trials[first + 1].coeffs) == ["early", "late"]
    assert search.study.trials[first].params == A
    assert len(search.study.trials) == 6


def test_a_zero_start_and_one_that_was_there_are_left_out() -> None:
    zero = {"early": 0.0, "late": 0.0}
    search = started(A, zero, dict(A), B, trials=6)
    assert coeffs_of(search)[:3] == [zero, A, B]
    assert coeffs_of(search).count(A) == 1


def test_starts_beyond_the_number_of_trials_are_not_tried() -> None:
    search = started(A, B, trials=2)
    assert coeffs_of(search)[1:] == [A]


def test_starts_take_nothing_from_the_sampler() -> None:
    plain = tuned(trials=6, sampler=random_sampler)
    search = started(A, B, trials=8, sampler=random_sampler)
    assert coeffs_of(search)[3:] == coeffs_of(plain)[1:]


def test_the_sampler_is_told_what_starts_came_to() -> None:
    study = started(A, B, trials=12).study
    told = [(trial.params, trial.value) for trial in study.trials[1:3]]
    assert told == [(A, bowl(A).objective), (B, bowl(B).objective)]
    # the sampler's eleventh trial is the first that it does not draw at random
    assert study.trials[10].params != started(trials=12).study.trials[10].params


def test_a_start_is_a_pair_of_equal_parts_where_pairs_are_drawn() -> None:
    start = {"early": 0.25, "late": 0.0001}
    search = started(start, trials=3, parametrisation="alpha_gamma")
    assert search.trials[1].params == {
        "early.alpha": 0.5,
        "early.gamma": 0.5,
        "late.alpha": 0.01,
        "late.gamma": 0.01,
    }
    assert search.trials[1].coeffs == pytest.approx(start)


def test_what_else_is_sought_is_at_its_highest_at_a_start() -> None:
    search = started(A, extra=[Parameter("k", 1, 64, log=True, whole=True)], trials=3)
    assert search.trials[1].values == A | {"k": 64}


def test_a_grid_goes_on_behind_the_starts() -> None:
    grid = {"early": [0.0, 1.0], "late": [0.5, 1.0]}
    search = started(
        A, trials=9, round_size=2, sampler=lambda seed: optuna.samplers.GridSampler(grid, seed)
    )
    assert coeffs_of(search)[1] == A
    points = {tuple(coeffs.values()) for coeffs in coeffs_of(search)[2:]}
    assert points == {*product([0.0, 1.0], [0.5, 1.0])}


@pytest.mark.parametrize(
    ("start", "options", "says"),
    [
        (
            A | {"late": 1.75},
            {},
            r"must lie in \[0, 1.5\], the range that is searched, but got 1.75 for 'late'; leave",
        ),
        (A | {"late": math.nan}, {}, "but got nan for 'late'"),
        (B, {"parametrisation": "alpha_gamma"}, r"in \[0.0001, 1\], .* but got 0 for 'early'"),
        (B, {"low": 0.2}, r"in \[0.2, 1.5\], .* but got 0 for 'early'"),
        ({"early": 0.5}, {}, "for each of early, late and no other, but has those of early"),
        ({**A, "full": 0.5}, {}, "but has those of early, late, full"),
        ({}, {}, "but has those of none"),
    ],
)
def test_a_start_that_cannot_be_sought_is_refused(
    start: Coeffs, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(SearchError, match=says):
        Search(SEGMENTS, SearchConfig(**options), norm, (), [start])


def test_coefficients_are_drawn_from_the_range_given() -> None:
    for coeffs in coeffs_of(tuned(trials=30, low=0.25, high=0.5))[1:]:
        assert all(0.25 <= value <= 0.5 for value in coeffs.values())


def test_a_pair_of_alpha_and_gamma_acts_through_its_product() -> None:
    for trial in tuned(trials=30, parametrisation="alpha_gamma").trials[1:]:
        assert all(0.01 <= value <= 1.0 for value in trial.params.values())
        assert trial.coeffs == {
            name: trial.params[f"{name}.alpha"] * trial.params[f"{name}.gamma"] for name in SEGMENTS
        }


def test_trials_are_asked_in_rounds_until_none_is_left() -> None:
    search = Search(SEGMENTS, SearchConfig(trials=7, round_size=3), norm)
    sizes = []
    assert not search.started
    while not search.done:
        batch = search.ask()
        sizes.append(len(batch))
        search.tell([bowl(coeffs) for coeffs in batch])
        assert search.started
    assert sizes == [3, 3, 1]
    assert search.ask() == []
    assert len(search.result().trials) == 7


def test_outcomes_belong_to_the_coefficients_in_the_order_asked() -> None:
    search = tuned(trials=12, round_size=5)
    for trial in search.trials:
        assert trial.outcome == bowl(trial.coeffs)
        assert trial.injected_norm == norm(trial.coeffs)


def test_a_round_must_be_told_before_the_next_is_asked() -> None:
    search = Search(SEGMENTS, SearchConfig(), norm)
    search.ask()
    with pytest.raises(
        SearchError, match=r"a round must be told before the next is asked; call tell first\."
    ):
        search.ask()


@pytest.mark.parametrize("n", [0, 4, 6])
def test_a_round_told_in_part_is_refused_and_can_still_be_told_whole(n: int) -> None:
    search = Search(SEGMENTS, SearchConfig(round_size=5), norm)
    batch = search.ask()
    with pytest.raises(SearchError) as caught:
        search.tell([Toy(0.0)] * n)
    assert str(caught.value) == (
        f"every trial of the round must be told, but got {n} outcomes for 5."
    )
    search.tell([bowl(coeffs) for coeffs in batch])
    assert len(search.result().trials) == 5


def test_a_search_without_a_finished_trial_has_no_result() -> None:
    with pytest.raises(SearchError, match="must have a finished trial to give a result, but has"):
        Search(SEGMENTS, SearchConfig(), norm).result()


def test_a_search_without_segments_is_refused() -> None:
    with pytest.raises(SearchError, match="must have at least one segment, but got none"):
        Search((), SearchConfig(), norm)


def test_where_nothing_helps_the_zero_plan_wins_by_its_norm() -> None:
    search = tuned(lambda coeffs: Toy(0.4), trials=10)
    assert search.best.number == 1
    assert search.zero_won
    assert search.tied


def test_ties_go_to_the_smaller_norm() -> None:
    search = tuned(lambda coeffs: Toy(float(any(coeffs.values()))), trials=10)
    assert search.best.injected_norm == min(trial.injected_norm for trial in search.trials[1:])
    assert search.best.number > 2  # or the rule below would have given the same
    assert not search.zero_won
    assert search.tied


def test_ties_of_equal_norm_go_to_the_earlier_trial() -> None:
    search = tuned(lambda coeffs: Toy(float(any(coeffs.values()))), norm=lambda _: 1.0, trials=10)
    assert search.best.number == 2


def test_one_best_trial_is_no_tie() -> None:
    search = tuned(trials=20)
    assert search.best.outcome.objective == max(t.outcome.objective for t in search.trials)
    assert not search.tied
    assert not search.zero_won


def test_the_same_coefficients_twice_are_no_tie() -> None:
    grid = {"early": [0.0], "late": [0.0, 1.0]}
    search = tuned(
        lambda coeffs: Toy(-norm(coeffs)),
        trials=3,
        sampler=lambda seed: optuna.samplers.GridSampler(grid, seed),
    )
    assert coeffs_of(search).count({"early": 0.0, "late": 0.0}) == 2
    assert not search.tied


@pytest.mark.parametrize("parametrisation", PARAMETRISATIONS)
def test_the_seed_decides_the_coefficients(parametrisation: str) -> None:
    def drawn(seed: int) -> list[Coeffs]:
        return coeffs_of(tuned(trials=20, seed=seed, parametrisation=parametrisation))

    assert drawn(3) == drawn(3)
    first, second = drawn(3), drawn(4)
    assert all(one != other for one, other in zip(first[1:], second[1:], strict=True))


def test_later_rounds_learn_from_earlier_ones() -> None:
    wins = sum(
        tuned(trials=30, seed=seed).best.outcome.objective
        > tuned(trials=30, seed=seed, sampler=random_sampler).best.outcome.objective
        for seed in range(10)
    )
    assert wins >= 8


@pytest.mark.parametrize(
    ("options", "n_params"), [({}, 2), ({"low": 0.5}, 2), ({"parametrisation": "alpha_gamma"}, 4)]
)
def test_parameters_are_learned_jointly_from_the_second_round_on(
    options: dict[str, object], n_params: int
) -> None:
    seen: list[int] = []

    class Watched(optuna.samplers.TPESampler):
        def sample_relative(self, study, trial, search_space):
            seen.append(len(search_space))
            return super().sample_relative(study, trial, search_space)

    tuned(
        trials=15,
        round_size=5,
        sampler=lambda seed: Watched(seed=seed, multivariate=True),
        **options,
    )
    assert set(seen[5:]) == {n_params}


SAMPLERS = {
    "random": random_sampler,
    "qmc": lambda seed: optuna.samplers.QMCSampler(seed=seed),
    "nsga": lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=4),
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("objectives", ["weighted", "pareto"])
@pytest.mark.parametrize("parametrisation", PARAMETRISATIONS)
def test_any_sampler_of_optuna_drives_the_search(
    name: str, objectives: str, parametrisation: str
) -> None:
    options = {"trials": 20, "objectives": objectives, "parametrisation": parametrisation}
    search = tuned(sampler=SAMPLERS[name], **options)
    assert len(search.trials) == 20
    # TPE too begins at random
    assert coeffs_of(search)[15:] != coeffs_of(tuned(**options))[15:]


@pytest.mark.parametrize("round_size", [1, 2, 5])
@pytest.mark.parametrize("trials", [3, 4, 5, 9])
def test_a_grid_is_walked_once_and_then_the_search_is_done(trials: int, round_size: int) -> None:
    grid = {"early": [0.25, 0.5], "late": [0.5, 1.0]}
    search = tuned(
        trials=trials,
        round_size=round_size,
        sampler=lambda seed: optuna.samplers.GridSampler(grid, seed),
    )
    points = [(0.0, 0.0), *product(*grid.values())]
    got = [tuple(coeffs.values()) for coeffs in coeffs_of(search)]
    if trials < len(points):
        assert len(set(got)) == len(got) == trials
        assert set(got) < set(points)
    else:
        assert set(got) == set(points)
        assert len(got) < len(points) + round_size  # no round after the last point


def test_a_sampler_that_fails_is_heard() -> None:
    class Failing(optuna.samplers.RandomSampler):
        def after_trial(self, study, trial, state, values):
            raise RuntimeError("out of ideas")

    with pytest.raises(RuntimeError, match="out of ideas"):
        tuned(trials=3, sampler=lambda seed: Failing(seed))


GRADES = st.builds(
    Toy,
    st.just(0.0),
    st.none() | st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    st.none() | st.sampled_from([1.0, 5.0, 50.0, 100.0, 500.0]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(GRADES, min_size=1, max_size=10))
def test_the_front_is_every_trial_that_no_other_beats_on_both_counts(outcomes: list[Toy]) -> None:
    config = SearchConfig(
        trials=len(outcomes), round_size=10, objectives="pareto", sampler=random_sampler
    )
    left = iter(outcomes)
    search = tune(lambda batch: [next(left) for _ in batch], norm, config)
    # unscored overlap counts 0, a missing perplexity as much as one of 100 or more
    points = [
        (toy.overlap or 0.0, -min(100.0 if toy.perplexity is None else toy.perplexity, 100.0))
        for toy in outcomes
    ]
    expected = {
        number
        for number, (a, b) in enumerate(points, start=1)
        if not any(c >= a and d >= b and (c > a or d > b) for c, d in points)
    }
    assert {trial.number for trial in search.front} == expected
    assert {trial.number + 1 for trial in search.study.best_trials} == expected


def test_a_result_before_the_end_holds_the_trials_so_far(tmp_path: Path) -> None:
    search: Search[Toy] = Search(SEGMENTS, SearchConfig(trials=30, round_size=4), norm)
    for _ in range(2):
        search.tell([bowl(coeffs) for coeffs in search.ask()])
    search.ask()  # a round in flight is left out
    cut = search.result(interrupted=True)
    assert cut.interrupted
    assert coeffs_of(cut) == coeffs_of(tuned(trials=8, round_size=4))
    assert cut.best.outcome.objective == max(t.outcome.objective for t in cut.trials)
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    export_study(cut, url, "cut", lambda toy: {})
    assert len(optuna.load_study(study_name="cut", storage=url).trials) == 8


def test_a_search_that_ends_is_not_interrupted() -> None:
    assert not tuned(trials=2).interrupted


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"low": 0.5},
        {"parametrisation": "alpha_gamma"},
        {"objectives": "pareto"},
        {"parametrisation": "alpha_gamma", "objectives": "pareto"},
    ],
    ids=str,
)
def test_an_exported_study_is_read_by_optuna_trial_for_trial(
    tmp_path: Path, options: dict[str, str]
) -> None:
    search = tuned(trials=8, round_size=5, **options)
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    export_study(search, url, "lovelace/full", lambda toy: {"quality": toy.objective})
    study = optuna.load_study(study_name="lovelace/full", storage=url)
    assert [frozen.user_attrs["quality"] for frozen in study.trials] == [
        trial.outcome.objective for trial in search.trials
    ]
    for frozen, trial in zip(study.trials, search.trials, strict=True):
        assert frozen.state is optuna.trial.TrialState.COMPLETE
        assert frozen.user_attrs["coeffs"] == trial.coeffs
        assert frozen.params == trial.params
        toy = trial.outcome
        # overlap 0.5 and a perplexity of 20 / 100
        pareto = options.get("objectives") == "pareto"
        assert frozen.values == ([0.5, 0.2] if pareto else [toy.objective])
    directions = ["MAXIMIZE", "MINIMIZE"][: len(study.directions)]
    assert [direction.name for direction in study.directions] == directions


def test_a_study_of_that_name_is_never_written_over(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    export_study(tuned(trials=2), url, "x", lambda toy: {})
    with pytest.raises(SearchError, match="the study 'x' must be new to a reachable storage, but:"):
        export_study(tuned(trials=3), url, "x", lambda toy: {})
    assert len(optuna.load_study(study_name="x", storage=url).trials) == 2


@pytest.mark.parametrize("url", ["sqlite:////missing/folder/x.db", "no url", "redis://x"])
def test_a_storage_that_cannot_be_opened_is_refused(url: str) -> None:
    with pytest.raises(SearchError, match="the study 'x' must be new to a reachable storage, but:"):
        export_study(tuned(trials=2), url, "x", lambda toy: {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": 0}, "trials must be at least 1, but got 0."),
        ({"round_size": -1}, "round_size must be at least 1, but got -1."),
        ({"seed": -1}, "seed must be at least 0, but got -1."),
        (
            {"low": 1.0, "high": 1.0},
            "low < high must hold, but got (self.low=1.0, self.high=1.0).",
        ),
        (
            {"high": float("inf")},
            "low < high must hold, but got (self.low=0.0, self.high=inf).",
        ),
        (
            {"low": float("nan")},
            "low < high must hold, but got (self.low=nan, self.high=1.5).",
        ),
        ({"weight": 1.5}, "0 <= weight <= 1 must hold, but got self.weight=1.5."),
        (
            {"parametrisation": "product"},
            "parametrisation must be one of coeff, alpha_gamma, but got 'product'.",
        ),
        (
            {"objectives": "both"},
            "objectives must be one of weighted, pareto, but got 'both'.",
        ),
    ],
    ids=str,
)
def test_a_setting_outside_its_range_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SearchConfig(**options)
    assert str(caught.value) == message


def test_optuna_stays_silent_and_keeps_the_users_verbosity(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.INFO)
    try:
        export_study(tuned(trials=12), f"sqlite:///{tmp_path / 'x.db'}", "x", lambda toy: {})
        assert optuna.logging.get_verbosity() == optuna.logging.INFO
    finally:
        optuna.logging.set_verbosity(before)
    assert capfd.readouterr() == ("", "")


def test_the_search_knows_no_model() -> None:
    # the root imports everything users call: a bare package in its place shows what search needs
    code = """
import importlib.util, sys, types
root = types.ModuleType("fusion_lens")
root.__path__ = list(importlib.util.find_spec("fusion_lens").submodule_search_locations)
sys.modules["fusion_lens"] = root
import fusion_lens.search
loaded = {name for name in sys.modules if name.startswith("fusion_lens.")}
own = ("search", "scores", "values", "errors", "tables", "differences")
known = {"fusion_lens." + name for name in own}
assert loaded == known, loaded
assert not {"transformer_lens", "transformers", "torch"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_search_shows_its_best_trials_the_chosen_one_first() -> None:
    made = tuned(trials=12)
    table = made.table()
    assert table.header[0] == "trial"
    assert table.header[-4:] == ("objective", "overlap", "perplexity", "injected norm")
    assert len(table.rows) == 8
    assert table.rows[0][0] == str(made.best.number)
    objectives = [float(row[-4]) for row in table.rows]
    assert objectives == sorted(objectives, reverse=True)
    assert "the best of 12 trials" in made._repr_html_()


def late_alone(coeffs: Coeffs) -> Toy:
    return Toy(round(1 - abs(coeffs["late"] - 1.0), 6))


@pytest.mark.parametrize("options", [{}, {"low": 0.25}, {"zero_first": False}], ids=str)
def test_the_parameter_that_decides_alone_is_the_important_one(options: dict[str, object]) -> None:
    # drawn at random: TPE's own draws gather where late is good, and early with it
    found = tuned(late_alone, trials=80, sampler=random_sampler, **options).importances()
    assert list(found) == ["late", "early"]
    assert found["late"] > 0.9
    assert sum(found.values()) == pytest.approx(1.0)


def test_a_pair_has_an_importance_of_its_own_for_each_of_the_two() -> None:
    found = tuned(
        lambda coeffs: Toy(coeffs["late"]),
        trials=80,
        sampler=random_sampler,
        parametrisation="alpha_gamma",
    ).importances()
    assert set(list(found)[:2]) == {"late.alpha", "late.gamma"}
    assert set(found) == {"late.alpha", "late.gamma", "early.alpha", "early.gamma"}


@pytest.mark.parametrize("options", [{}, {"low": 0.25}], ids=str)
def test_in_a_pareto_search_too_importance_is_for_the_best_objectives(
    options: dict[str, object],
) -> None:
    def score(coeffs: Coeffs) -> Toy:
        # the overlap is all early's, the objective all late's
        return replace(late_alone(coeffs), overlap=min(1.0, coeffs["early"] / 2))

    search = tuned(score, trials=80, sampler=random_sampler, objectives="pareto", **options)
    alone = tuned(score, trials=80, sampler=random_sampler, **options)
    assert coeffs_of(search) == coeffs_of(alone)
    assert search.importances() == pytest.approx(alone.importances())


def test_importance_is_for_good_trials_and_not_for_bad_ones() -> None:
    def score(coeffs: Coeffs) -> Toy:
        # late orders the better half, early the worse
        good = coeffs["late"] > 0.75
        return Toy(round(coeffs["late"] if good else coeffs["early"] - 2, 6))

    for objectives in ("weighted", "pareto"):
        found = tuned(score, trials=100, sampler=random_sampler, objectives=objectives)
        assert found.importances()["late"] > 0.9


def test_equal_objectives_and_a_single_trial_tell_nothing_of_importance() -> None:
    assert tuned(lambda _: Toy(0.5), trials=10).importances() == {}
    assert tuned(trials=1).importances() == {}
    # the zero plan outside the range has no parameters
    assert tuned(trials=2, low=0.5).importances() == {}
    assert sum(tuned(trials=2).importances().values()) == pytest.approx(1.0)


def test_an_interrupted_search_leaves_the_round_in_flight_out_of_importances() -> None:
    search: Search[Toy] = Search(SEGMENTS, SearchConfig(trials=30, round_size=5), norm)
    for _ in range(3):
        search.tell([late_alone(coeffs) for coeffs in search.ask()])
    search.ask()
    found = search.result(interrupted=True).importances()
    assert found == tuned(late_alone, trials=15, round_size=5).importances()


K = Parameter("k", 1, 64, log=True, whole=True)


def hill(values: Values) -> Toy:
    """Best at k = 8 and a coefficient of 0.5."""
    return Toy(round(1 - abs(math.log2(values["k"] / 8)) / 6 - (values["one"] - 0.5) ** 2, 6))


def searched(**options: object) -> Tuned[Toy]:
    search: Search[Toy] = Search(
        ["one"], SearchConfig(**options), lambda values: values["one"] * values["k"], [K]
    )
    while not search.done:
        search.tell([hill(values) for values in search.ask()])
    return search.result()


def test_what_is_sought_beside_coefficients_is_drawn_with_them() -> None:
    search = searched(trials=40, round_size=4)
    for trial in search.trials:
        assert set(trial.coeffs) == {"one"}
        k = trial.extra["k"]
        assert k == int(k)
        assert 1 <= k <= 64
        assert trial.params == trial.values == {"one": trial.coeffs["one"], "k": k}
        assert trial.injected_norm == trial.coeffs["one"] * k
        assert trial.outcome == hill(trial.values)
    assert len({trial.extra["k"] for trial in search.trials}) > 5
    assert abs(math.log2(search.best.extra["k"] / 8)) <= 1
    assert search.table().header[:3] == ("trial", "one", "k")
    assert set(search.importances()) == {"one", "k"}


@pytest.mark.parametrize("options", [{}, {"low": 0.5}, {"parametrisation": "alpha_gamma"}], ids=str)
def test_the_zero_plan_has_what_else_is_sought_at_its_highest(options: dict[str, object]) -> None:
    search = searched(trials=3, **options)
    assert search.trials[0].values == {"one": 0.0, "k": 64}
    assert search.unsteered is search.trials[0]


def test_trials_that_differ_in_what_else_is_sought_alone_are_a_tie() -> None:
    search: Search[Toy] = Search(
        ["one"], SearchConfig(trials=2, low=1.0, high=1.0 + 1e-9, zero_first=False), norm, [K]
    )
    search.ask()
    search.tell([Toy(0.5)] * 2)
    assert search.result().tied == (len({t.extra["k"] for t in search.result().trials}) == 2)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ({"low": 2, "high": 1}, "low <= high"),
        ({"low": 0, "high": 1, "log": True}, "above 0"),
        ({"low": 0.5, "high": 2, "whole": True}, "whole numbers"),
        ({"low": 0.0, "high": math.inf}, "low <= high"),
    ],
)
def test_a_parameter_that_cannot_be_drawn_is_refused(made: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Parameter("k", **made)


def test_two_things_of_one_name_cannot_be_sought() -> None:
    with pytest.raises(SearchError, match="different names"):
        Search(["k"], SearchConfig(), norm, [K])

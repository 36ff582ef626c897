from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest

from fusion_lens.fronts import Sweep, kept_at, matched


def test_a_front_is_interpolated_between_points_that_nothing_beats() -> None:
    effect, kept = [0.2, 0.4, 0.5, 0.8], [0.9, 0.5, 0.6, 0.2]
    # (0.4, 0.5) is beaten by (0.5, 0.6): the front goes from (0.2, 0.9) to (0.5, 0.6)
    assert kept_at(effect, kept, 0.0) == 1.0
    assert kept_at(effect, kept, 0.1) == pytest.approx(0.95)
    assert kept_at(effect, kept, 0.4) == pytest.approx(0.7)
    assert kept_at(effect, kept, 0.65) == pytest.approx(0.4)
    assert kept_at(effect, kept, 0.8) == pytest.approx(0.2)
    assert math.isnan(kept_at(effect, kept, 0.81))


def test_what_is_unscored_is_no_point_wherever_it_stands() -> None:
    points = [(0.2, 0.9), (0.5, 0.6), (0.8, 0.2), (math.nan, 0.5), (0.3, math.nan)]
    for order in permutations(points):
        effect, kept = zip(*order, strict=True)
        assert kept_at(effect, kept, 0.65) == pytest.approx(0.4)


def test_a_strength_that_does_nothing_is_the_unsteered_model() -> None:
    assert kept_at([0.0], [1.0], 0.0) == 1.0
    assert math.isnan(kept_at([0.0, math.nan], [0.5, 0.2], 0.1))


def sweep_of(effect: list[list[float | None]], kept: list[list[float | None]]) -> Sweep:
    return Sweep(tuple(map(tuple, effect)), tuple(map(tuple, kept)))


def test_the_difference_is_that_of_the_two_fronts_at_one_effect() -> None:
    # effects 1/2 and 1; a keeps 3/4 and 1/2, b 1/2 and 0
    effect = [[1.0, 0.0, 1.0, 0.0], [1.0] * 4]
    a = sweep_of(effect, [[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    b = sweep_of(effect, [[1.0, 1.0, 0.0, 0.0], [0.0] * 4])
    of_sources, of_controls = list("abcd"), list("efgh")
    half, most, beyond = matched(a, b, of_sources, of_controls, (0.5, 0.75, 1.0))
    assert (half.a, half.b, half.diff) == (0.75, 0.5, 0.25)
    assert (most.a, most.b, most.diff) == pytest.approx((0.625, 0.25, 0.375))
    assert (beyond.a, beyond.b, beyond.diff) == (0.5, 0.0, 0.5)
    assert (half.n, half.clusters) == (8, 8)
    for at in (half, most, beyond):
        assert at.low is not None
        assert at.low <= at.diff <= at.high


def test_a_level_that_a_front_does_not_reach_is_not_known() -> None:
    low = sweep_of([[0.0, 1.0]], [[1.0, 1.0]])
    high = sweep_of([[1.0, 1.0]], [[1.0, 0.0]])
    (at,) = matched(low, high, ["a", "b"], ["c", "d"], (0.75,))
    assert at.a is None
    assert at.b == pytest.approx(0.625)
    assert (at.diff, at.low, at.high) == (None, None, None)


def test_unscored_texts_count_for_nothing() -> None:
    scored = sweep_of([[1.0, 0.0]], [[1.0, 0.0]])
    more = sweep_of([[1.0, None, 0.0]], [[1.0, 0.0, None]])
    one = matched(scored, scored, ["a", "b"], ["c", "d"], (0.5,))[0]
    two = matched(more, more, ["a", "x", "b"], ["c", "d", "x"], (0.5,))[0]
    assert (one.a, two.a) == (0.5, 0.5)


def test_subjects_are_drawn_whole() -> None:
    """Ten texts of one subject are one draw: with a subject of its own each, the interval is
    narrower."""
    rng = np.random.default_rng(0)
    hits = np.repeat(rng.integers(0, 2, 12), 10).astype(float).tolist()
    effect = [[1.0] * 120]
    a, b = sweep_of(effect, [hits]), sweep_of(effect, [[0.5] * 120])
    together = [f"s{n // 10}" for n in range(120)]
    apart = [f"s{n}" for n in range(120)]
    wide = matched(a, b, together, together, (1.0,))[0]
    narrow = matched(a, b, apart, apart, (1.0,))[0]
    assert wide.diff == narrow.diff
    assert (wide.high - wide.low) > 2 * (narrow.high - narrow.low)
    assert matched(a, b, together, together, (1.0,)) == [wide]


def test_one_subject_has_no_interval() -> None:
    one = sweep_of([[1.0]], [[1.0]])
    (at,) = matched(one, one, ["a"], ["a"], (1.0,))
    assert (at.diff, at.low, at.high, at.clusters) == (0.0, None, None, 1)


def test_sweeps_and_subjects_must_fit() -> None:
    one = sweep_of([[1.0, 1.0]], [[1.0]])
    with pytest.raises(ValueError, match="zip"):
        matched(one, one, ["a"], ["a"], (1.0,))

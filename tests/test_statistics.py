from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_lens.statistics import N_RESAMPLES, Interval, cluster_bootstrap, compare, holm

# eighths, so that sums do not depend on their order
SCORED = st.integers(-80, 80).map(lambda eighths: eighths / 8)
ROWS = st.lists(st.tuples(st.none() | SCORED, st.sampled_from("abcdef")), max_size=20)


def bootstrap_by_hand(values: list[float], clusters: list[str], seed: int) -> tuple[float, float]:
    """Draw clusters, pool their questions, take the mean; once per resample."""
    rng = np.random.default_rng(seed)
    groups = [
        np.array([v for v, c in zip(values, clusters, strict=True) if c == name])
        for name in sorted(set(clusters))
    ]
    means = [
        np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))]).mean()
        for _ in range(N_RESAMPLES)
    ]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def width(interval: Interval) -> float:
    assert interval.low is not None
    assert interval.high is not None
    return interval.high - interval.low


def test_the_mean_is_over_questions_not_over_clusters() -> None:
    # questions: (0 + 0 + 0 + 1) / 4; clusters would give (0 + 1) / 2
    assert cluster_bootstrap([0.0, 0.0, 0.0, 1.0], ["a", "a", "a", "b"]).mean == 0.25


def test_two_clusters_give_the_interval_that_can_be_counted_out() -> None:
    # aa, ab, ba, bb are equally likely: 0 and 1 lie at the outer quarters
    assert cluster_bootstrap([0.0, 1.0], ["a", "b"]) == Interval(0.5, 0.0, 1.0, 2, 0, 2)


def test_unequal_clusters_agree_with_a_bootstrap_written_out() -> None:
    rng = np.random.default_rng(3)
    sizes = [1, 4, 2, 6, 1, 3, 5, 2, 2, 4]
    clusters = [name for name, size in zip("abcdefghij", sizes, strict=True) for _ in range(size)]
    offset = {name: rng.normal() for name in "abcdefghij"}
    values = [float(offset[c] + 0.3 * rng.normal()) for c in clusters]
    low, high = bootstrap_by_hand(values, clusters, seed=1)
    got = cluster_bootstrap(values, clusters)
    # Monte Carlo error of a 2.5 % quantile of 10,000 draws: about 0.7 % of the width, for both
    assert got.low == pytest.approx(low, abs=0.04 * (high - low))
    assert got.high == pytest.approx(high, abs=0.04 * (high - low))
    # were questions drawn instead of clusters, the interval would be far too short
    assert width(cluster_bootstrap(values, [str(i) for i in range(30)])) < 0.75 * width(got)


def test_questions_that_agree_within_a_cluster_add_no_certainty() -> None:
    means = [0.0, 0.25, 0.5, 1.0, 0.125, 0.75, 0.875, 0.375]
    names = [f"person {i}" for i in range(8)]
    one_each = cluster_bootstrap(means, names)
    four_each = cluster_bootstrap(means * 4, names * 4)
    assert (four_each.low, four_each.high) == (one_each.low, one_each.high)
    # drawn as 32 independent questions they would: by sqrt(4)
    apart = cluster_bootstrap(means * 4, [str(i) for i in range(32)])
    assert width(apart) == pytest.approx(width(one_each) / 2, rel=0.1)


def test_unscored_values_are_counted_and_left_out() -> None:
    got = cluster_bootstrap([1.0, None, 0.0, None, None], ["a", "a", "b", "b", "c"])
    assert got == Interval(0.5, 0.0, 1.0, n=2, unscored=3, clusters=2)


def test_nothing_scored_gives_no_mean() -> None:
    assert cluster_bootstrap([None, None], ["a", "b"]) == Interval(None, None, None, 0, 2, 0)
    assert cluster_bootstrap([], []) == Interval(None, None, None, 0, 0, 0)


def test_one_cluster_gives_a_mean_without_an_interval() -> None:
    assert cluster_bootstrap([1.0, 0.5], ["a", "a"]) == Interval(0.75, None, None, 2, 0, 1)
    # an unscored second cluster is none
    assert cluster_bootstrap([1.0, None], ["a", "b"]) == Interval(1.0, None, None, 1, 1, 1)


def test_equal_values_give_an_interval_of_no_width() -> None:
    got = cluster_bootstrap([0.7] * 6, list("aabbcc"))
    assert (got.mean, got.low, got.high) == pytest.approx((0.7, 0.7, 0.7))


def test_the_seed_decides_the_resamples() -> None:
    rng = np.random.default_rng(0)
    values, names = rng.normal(size=30).tolist(), [str(i) for i in range(30)]
    assert cluster_bootstrap(values, names, seed=5) == cluster_bootstrap(values, names, seed=5)
    assert cluster_bootstrap(values, names, seed=5) != cluster_bootstrap(values, names, seed=6)


def test_values_without_a_cluster_are_refused() -> None:
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is shorter than argument 1"):
        cluster_bootstrap([1.0, 0.0], ["a"])


@settings(max_examples=30, deadline=None)
@given(rows=ROWS, seed=st.integers(0, 3), order=st.randoms(use_true_random=False))
def test_the_interval_holds_the_mean_and_does_not_know_the_order_of_questions(
    rows: list[tuple[float | None, str]], seed: int, order
) -> None:
    values, clusters = [v for v, _ in rows], [c for _, c in rows]
    got = cluster_bootstrap(values, clusters, seed=seed)
    scored = [v for v in values if v is not None]
    assert (got.n, got.unscored) == (len(scored), len(values) - len(scored))
    if got.low is not None:
        assert min(scored) <= got.low <= got.mean <= got.high <= max(scored)
    order.shuffle(rows)
    assert cluster_bootstrap([v for v, _ in rows], [c for _, c in rows], seed=seed) == got


def test_a_share_of_nothing_has_wilsons_interval_over_clusters_and_not_a_point() -> None:
    clusters = [f"subject {i // 2}" for i in range(120)]
    none = cluster_bootstrap([0.0] * 120, clusters, share=True)
    # Wilson for 0 of 60: the upper end is z^2 / (n + z^2), z = 1.96
    assert (none.mean, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(3.8415 / 63.8415, abs=1e-4)
    every = cluster_bootstrap([1.0] * 120, clusters, share=True)
    assert (every.mean, every.high) == (1.0, 1.0)
    assert every.low == pytest.approx(60 / 63.8415, abs=1e-4)
    assert cluster_bootstrap([0.0] * 120, clusters).high == 0.0


def compared(a, b, clusters=None, **options):
    clusters = clusters or [str(i) for i in range(len(a))]
    return compare(a, b, clusters, names=("x", "y"), metric="m", **options)


def test_a_comparison_is_paired_and_counts_what_either_arm_left_unscored() -> None:
    made = compared([1.0, 2.0, None, 4.0, 3.0], [0.5, 1.0, 1.0, None, 3.0])
    assert (made.a, made.b, made.metric) == ("x", "y", "m")
    assert (made.n, made.unscored, made.clusters) == (3, 2, 3)
    assert made.diff == 0.5
    assert 0.0 <= made.low <= 0.5 <= made.high <= 1.0


def test_mcnemars_test_is_the_exact_binomial_of_the_discordant_pairs() -> None:
    a, b = [1.0] * 5 + [0.0] + [1.0] * 4, [0.0] * 5 + [1.0] + [1.0] * 4
    made = compared(a, b, binary=True)
    # 2 * (1 + 6) / 2**6
    assert (made.p, made.test) == (pytest.approx(0.21875), "McNemar")
    assert compared([1.0, 1.0], [1.0, 1.0], binary=True).p == 1.0


def test_questions_of_one_cluster_flip_their_signs_together() -> None:
    values, zeros = [1.0, 1.0, 1.0, 2.0], [0.0] * 4
    apart = compared(values, zeros)
    together = compared(values, zeros, ["a", "a", "b", "c"], binary=True)
    # every sign alike: 2 of 2**4, or of 2**3
    assert (apart.p, apart.test) == (0.125, "cluster sign flip")
    assert (together.p, together.test) == (0.25, "cluster sign flip")
    assert compared(zeros, zeros).p == 1.0


def test_what_is_not_tested_or_has_one_cluster_has_no_p() -> None:
    assert compared([1.0, 2.0], [0.0, 0.0], test=False).p is None
    alone = compared([1.0, 2.0], [0.0, 0.0], ["a", "a"])
    assert (alone.diff, alone.low, alone.p) == (1.5, None, None)
    nothing = compared([None], [1.0])
    assert (nothing.n, nothing.diff, nothing.p) == (0, None, None)


def test_no_difference_among_few_is_not_no_difference_for_certain() -> None:
    made = compared([0.6] * 20, [0.6] * 20, share=True)
    # Wilson's upper bound of 0 of 20
    assert (made.diff, made.low, made.high) == (0.0, pytest.approx(-0.161, abs=1e-3), -made.low)


def test_holm_steps_down_and_leaves_out_what_was_not_tested() -> None:
    made = [replace(compared([1.0], [0.0]), p=p) for p in (0.01, None, 0.04, 0.03)]
    assert [each.p_holm for each in holm(made)] == pytest.approx([0.03, None, 0.06, 0.06])
    assert [each.p_holm for each in holm(made[2:])] == pytest.approx([0.06, 0.06])
    assert holm([]) == []


def test_an_effect_is_found_and_noise_is_not() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=60)
    planted = compared(list(noise + 0.5), list(rng.normal(scale=0.1, size=60)))
    assert planted.p < 0.01
    assert planted.low > 0.0
    found = [
        compared(list(rng.normal(size=40)), list(rng.normal(size=40)), seed=i).p < 0.05
        for i in range(40)
    ]
    assert sum(found) <= 6

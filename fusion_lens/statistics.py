"""Values of questions -> a mean with its interval, and differences between arms with theirs.

Cluster bootstrap over subjects (questions about one person are not independent): clusters are drawn
with replacement, the statistic is the mean over all questions of the clusters drawn; percentile
interval. Resampling is scipy's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, bootstrap, permutation_test, spearmanr

N_RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its 95 % interval over `n` scored questions of `clusters` subjects.

    `mean` is None where nothing was scored, `low` and `high` where fewer than two clusters were.
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int
    unscored: int
    clusters: int


def cluster_bootstrap(
    values: Sequence[float | None], clusters: Sequence[str], *, seed: int = 0, share: bool = False
) -> Interval:
    """The mean of `values` (None: unscored) with a cluster-bootstrap interval.

    With `share` the values are 0 or 1. Where all of them are equal every resample is the same, and
    the interval is Wilson's over clusters instead: 0 of 60 is not 0 for certain.

    Raises:
        ValueError: if the two have different lengths.
    """
    pairs = [(v, c) for v, c in zip(values, clusters, strict=True) if v is not None]
    unscored = len(values) - len(pairs)
    names = sorted({cluster for _, cluster in pairs})
    if not pairs:
        return Interval(None, None, None, 0, unscored, 0)
    index = {name: i for i, name in enumerate(names)}
    sums, counts = np.zeros(len(names)), np.zeros(len(names))
    for value, cluster in pairs:
        sums[index[cluster]] += value
        counts[index[cluster]] += 1
    mean = float(sums.sum() / counts.sum())
    if len(names) < 2:
        return Interval(mean, None, None, len(pairs), unscored, len(names))
    if share and mean in (0.0, 1.0):
        low, high = _wilson(round(mean * len(names)), len(names))
        return Interval(mean, low, high, len(pairs), unscored, len(names))
    low, high = _ratio_interval(sums, counts, seed)
    return Interval(mean, low, high, len(pairs), unscored, len(names))


def ratio_of_sums(
    above: Sequence[float], below: Sequence[float], clusters: Sequence[str], *, seed: int = 0
) -> Interval:
    """sum(above) / sum(below) with a cluster-bootstrap interval: what a mean of ratios would be if
    questions with a small denominator did not decide it. None where `below` sums to 0.

    Raises:
        ValueError: if the three have different lengths.
    """
    sums: dict[str, tuple[float, float]] = {}
    for a, b, cluster in zip(above, below, clusters, strict=True):
        x, y = sums.get(cluster, (0.0, 0.0))
        sums[cluster] = x + a, y + b
    pairs = np.array([sums[name] for name in sorted(sums)]).reshape(-1, 2)
    total = pairs.sum(axis=0)
    if not total[1]:
        return Interval(None, None, None, len(above), 0, len(sums))
    ratio = float(total[0] / total[1])
    if len(sums) < 2:
        return Interval(ratio, None, None, len(above), 0, len(sums))
    low, high = _ratio_interval(pairs[:, 0], pairs[:, 1], seed)
    return Interval(ratio, low, high, len(above), 0, len(sums))


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's; None where either has fewer than two different values."""
    if min(len(set(one)), len(set(other))) < 2:
        return None
    return float(spearmanr(one, other).statistic)


def _ratio_interval(
    above: npt.NDArray[np.float64], below: npt.NDArray[np.float64], seed: int
) -> tuple[float, float]:
    """Of sum(above) / sum(below), a value of each per cluster."""
    result = bootstrap(
        (above, below),
        lambda a, b, axis=-1: a.sum(axis=axis) / b.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=N_RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        batch=100,
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The paired difference `a - b` of a metric over the questions scored under both arms.

    `low` and `high` bound its 95 % interval. `p` is two-sided and None where the difference is not
    tested; `p_holm` is corrected over the comparisons of its family. `test` names the test.
    """

    a: str
    b: str
    metric: str
    n: int
    unscored: int
    clusters: int
    diff: float | None
    low: float | None
    high: float | None
    p: float | None = None
    p_holm: float | None = None
    test: str | None = None


def compare(
    a: Sequence[float | None],
    b: Sequence[float | None],
    clusters: Sequence[str],
    *,
    names: tuple[str, str],
    metric: str,
    share: bool = False,
    binary: bool = False,
    test: bool = True,
    seed: int = 0,
) -> Comparison:
    """Two arms on the same questions.

    Tested by McNemar's exact test where values are 0 or 1 (`binary`) and every cluster has one
    question, else by flipping the signs of whole clusters (exactly where there are few, else 10,000
    times). Where no value of a `share` differs the interval is Wilson's for the share of clusters
    that do, on both sides: 0 of 60 is not 0 for certain.

    Raises:
        ValueError: if the three have different lengths.
    """
    diffs = [None if x is None or y is None else x - y for x, y in zip(a, b, strict=True)]
    interval = cluster_bootstrap(diffs, clusters, seed=seed)
    if share and interval.clusters > 1 and not any(diffs):
        most = _wilson(0, interval.clusters)[1]
        interval = replace(interval, low=-most, high=most)
    made = Comparison(
        *names,
        metric,
        interval.n,
        interval.unscored,
        interval.clusters,
        interval.mean,
        interval.low,
        interval.high,
    )
    if not test or interval.clusters < 2:
        return made
    scored = [(d, c) for d, c in zip(diffs, clusters, strict=True) if d is not None]
    if binary and interval.clusters == interval.n:
        return replace(made, p=_mcnemar([d for d, _ in scored]), test="McNemar")
    return replace(made, p=_sign_flip(scored, seed), test="cluster sign flip")


def holm(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """One family with `p_holm`: Holm's step-down correction (Scandinavian J. Stat. 6, 1979) over
    those that were tested."""
    tested = sorted(
        (comparison.p, i) for i, comparison in enumerate(comparisons) if comparison.p is not None
    )
    corrected: dict[int, float] = {}
    least = 0.0
    for rank, (p, i) in enumerate(tested):
        least = max(least, min(1.0, p * (len(tested) - rank)))
        corrected[i] = least
    return [replace(each, p_holm=corrected.get(i)) for i, each in enumerate(comparisons)]


def _wilson(hits: int, n: int) -> tuple[float, float]:
    interval = binomtest(hits, n).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def _mcnemar(diffs: Sequence[float]) -> float:
    better, worse = sum(d > 0 for d in diffs), sum(d < 0 for d in diffs)
    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def _sign_flip(scored: Sequence[tuple[float, str]], seed: int) -> float:
    sums: dict[str, float] = {}
    for diff, cluster in scored:
        sums[cluster] = sums.get(cluster, 0.0) + diff
    values = np.array([sums[name] for name in sorted(sums)])
    if not values.any():
        return 1.0
    result = permutation_test(
        (values,),
        lambda x, axis=-1: x.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=N_RESAMPLES,
        batch=100,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)

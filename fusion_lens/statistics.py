"""Values of questions -> a mean with its interval.

Cluster bootstrap over subjects (questions about one person are not independent): clusters are drawn
with replacement, the statistic is the mean over all questions of the clusters drawn; percentile
interval. Resampling is scipy's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, bootstrap

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
        wilson = binomtest(round(mean * len(names)), len(names)).proportion_ci(
            CONFIDENCE, method="wilson"
        )
        low, high = float(wilson.low), float(wilson.high)
        return Interval(mean, low, high, len(pairs), unscored, len(names))
    result = bootstrap(
        (sums, counts),
        lambda s, c, axis=-1: s.sum(axis=axis) / c.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=N_RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        batch=100,
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return Interval(mean, float(low), float(high), len(pairs), unscored, len(names))

"""Effect and damage over a sweep of strengths -> fronts, and methods compared at matched effect.

A method that steers harder has more effect and does more damage: two methods are compared where
their effects are equal. A front holds the points that no other beats on both sides, the unsteered
model among them (effect 0, all kept); between two of its points what is kept is interpolated
linearly, as if each had a share of the prompts; beyond its largest effect it is not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fusion_lens.statistics import CONFIDENCE

_RESAMPLES = 2_000
_MOST_UNREACHED = 0.05

Values = Sequence[float | None]
Points = Sequence[float] | npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sweep:
    """One method over its strengths: `effect[s]` per source and `kept[s]` per control, 0 or 1, or
    None where unscored."""

    effect: tuple[tuple[float | None, ...], ...]
    kept: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True, slots=True)
class Matched:
    """What `a` keeps more than `b` where both have the same effect `level`, with its 95 % interval;
    None where a front does not reach it, `low` and `high` also where it does so in fewer than 95 %
    of the resamples."""

    level: float
    a: float | None
    b: float | None
    diff: float | None
    low: float | None
    high: float | None
    n: int
    clusters: int


def kept_at(effect: Points, kept: Points, level: float) -> float:
    """What the front of these points keeps at an effect of `level`; NaN beyond its largest."""
    points = zip([0.0, *effect], [1.0, *kept], strict=True)
    front: list[tuple[float, float]] = []
    for x, y in sorted((each for each in points if np.isfinite(each).all()), reverse=True):
        if not front or y > front[-1][1]:
            front.append((x, y))
    xs, ys = np.array(front[::-1]).T
    return float(np.interp(level, xs, ys)) if level <= xs[-1] else float("nan")


def matched(
    a: Sweep,
    b: Sweep,
    of_sources: Sequence[str],
    of_controls: Sequence[str],
    levels: Sequence[float],
    *,
    seed: int = 0,
) -> list[Matched]:
    """`a` against `b` at each level of effect. Sources and controls of one cluster, a subject, are
    drawn together: cluster bootstrap, percentile interval over 2,000 resamples.

    Raises:
        ValueError: if a sweep has another number of sources or controls than there are clusters.
    """
    names = sorted({*of_sources, *of_controls})
    sums = [
        _Sums.of(sweep, of_sources, of_controls, {name: i for i, name in enumerate(names)})
        for sweep in (a, b)
    ]

    def both(drawn: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        fronts = [own.points(drawn) for own in sums]
        return np.array([[kept_at(*points, level) for level in levels] for points in fronts])

    everyone = np.arange(len(names))
    values = both(everyone)
    spread = np.full((len(levels), 2), np.nan)
    if len(names) > 1:
        samples = np.random.default_rng(seed).integers(0, len(names), (_RESAMPLES, len(names)))
        drawn = np.array([np.subtract(*both(sample)) for sample in samples])
        for i, own in enumerate(drawn.T):
            reached = own[np.isfinite(own)]
            if len(reached) >= (1 - _MOST_UNREACHED) * len(own):
                tail = (1 - CONFIDENCE) / 2
                spread[i] = np.quantile(reached, [tail, 1 - tail])
    return [
        Matched(
            level=level,
            a=_known(values[0, i]),
            b=_known(values[1, i]),
            diff=_known(values[0, i] - values[1, i]),
            low=_known(spread[i, 0]),
            high=_known(spread[i, 1]),
            n=len(of_sources) + len(of_controls),
            clusters=len(names),
        )
        for i, level in enumerate(levels)
    ]


@dataclass(frozen=True, slots=True, eq=False)
class _Sums:
    """Of each cluster: sums of scored values and their number, "strength cluster"."""

    effect: npt.NDArray[np.float64]
    n_effect: npt.NDArray[np.float64]
    kept: npt.NDArray[np.float64]
    n_kept: npt.NDArray[np.float64]

    @staticmethod
    def of(
        sweep: Sweep,
        of_sources: Sequence[str],
        of_controls: Sequence[str],
        index: dict[str, int],
    ) -> _Sums:
        return _Sums(
            *_by_cluster(sweep.effect, of_sources, index),
            *_by_cluster(sweep.kept, of_controls, index),
        )

    def points(
        self, drawn: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        with np.errstate(invalid="ignore"):
            effect = self.effect[:, drawn].sum(axis=1) / self.n_effect[:, drawn].sum(axis=1)
            kept = self.kept[:, drawn].sum(axis=1) / self.n_kept[:, drawn].sum(axis=1)
        return effect, kept


def _by_cluster(
    rows: Sequence[Values], clusters: Sequence[str], index: dict[str, int]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    sums = np.zeros((len(rows), len(index)))
    counts = np.zeros((len(rows), len(index)))
    for strength, values in enumerate(rows):
        for value, name in zip(values, clusters, strict=True):
            if value is not None:
                sums[strength, index[name]] += value
                counts[strength, index[name]] += 1
    return sums, counts


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None

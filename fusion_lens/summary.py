"""Records of a run -> its summary: every metric of every arm, and what is compared with what.

Claims rest on the segmented arm against the controls and against equal numbers of samples, on
metrics that were not tuned, and on transfer (docs/evaluation.md). A tuned arm is at least as good
as the baseline on what was tuned, and failed questions make the baseline 0 % right: those
differences are given without a test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from statistics import median
from typing import Any

from fusion_lens.errors import ConfigError
from fusion_lens.results import Result
from fusion_lens.scores import label_figures, perplexity_of
from fusion_lens.statistics import Comparison, Interval, cluster_bootstrap, compare, holm

METRICS = (
    "exact_match",
    "contained_match",
    "correct",
    "accurate",
    "overlap",
    "composite",
    "grade",
    "token_f1",
    "objective",
    "nll",
    "perplexity",
    "distinct_2",
    "repetition",
    "transfer_exact_match",
    "neighbours_kept",
    "kl_unrelated",
)
COMPARED = (
    "objective",
    "overlap",
    "exact_match",
    "correct",
    "accurate",
    "token_f1",
    "nll",
    "transfer_exact_match",
    "neighbours_kept",
    "kl_unrelated",
)
AGAINST = ("generic", "mismatched", "random", "best_of_n", "full", "unembed", "masked", "gated")
_BINARY = ("exact_match", "contained_match", "correct", "accurate")
_SHARES = (*_BINARY, "transfer_exact_match", "neighbours_kept")
_GROUPS = ("topic", "answer_type")
_OF_GROUPS = ("exact_match", "overlap", "objective")


def summarise_arms(
    records: Sequence[Result], arms: Sequence[str], n_questions: int, seed: int
) -> dict[str, Any]:
    """Per arm: mean and interval of each metric, and what its searches did. `unscored` counts the
    questions the arm could not run on."""
    summaries = {}
    for arm in arms:
        own = [record for record in records if record.arm == arm]
        summaries[arm] = {
            "n": len(own),
            "unscored": n_questions - len(own),
            "clusters": len({record.subject for record in own}),
            "labels": asdict(label_figures([record.label for record in own])),
            "metrics": {name: asdict(interval_of(name, own, seed)) for name in METRICS},
            **_searches(own),
        }
    return summaries


def summarise_groups(
    records: Sequence[Result], arms: Sequence[str], seed: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """By topic and by answer type, a few metrics of every arm."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for field in _GROUPS:
        names = sorted({getattr(record, field) or "" for record in records} - {""})
        groups[field] = {
            name: {
                arm: {metric: asdict(interval_of(metric, own, seed)) for metric in _OF_GROUPS}
                for arm in arms
                if (own := [r for r in records if r.arm == arm and getattr(r, field) == name])
            }
            for name in names
        }
    return groups


def compare_arms(records: Sequence[Result], arms: Sequence[str], seed: int) -> list[Comparison]:
    """Segmented against each of the others, paired by question; Holm-corrected per metric over the
    arms it is tested against."""
    if "segmented" not in arms:
        return []
    by_arm = {arm: {r.question_id: r for r in records if r.arm == arm} for arm in arms}
    names = sorted({record.question_id for record in records})
    subjects = {record.question_id: record.subject for record in records}
    made = []
    for metric in COMPARED:
        family = []
        for other in (*AGAINST, "baseline"):
            if other not in arms:
                continue
            a, b = (
                [getattr(by_arm[arm].get(name), metric, None) for name in names]
                for arm in ("segmented", other)
            )
            family.append(
                compare(
                    a,
                    b,
                    [subjects[name] for name in names],
                    names=("segmented", other),
                    metric=metric,
                    share=metric in _SHARES,
                    binary=metric in _BINARY,
                    test=_is_tested(metric, other),
                    seed=seed,
                )
            )
        made += holm(family)
    return made


def compare_runs(one: Sequence[Result], other: Sequence[Result]) -> list[Comparison]:
    """The second run minus the first for every arm both have, paired by question and
    Holm-corrected per metric over the arms.

    Raises:
        ConfigError: if the two share no question under one arm, or mean different ones by an id.
    """
    first, second = ({(r.arm, r.question_id): r for r in run} for run in (one, other))
    both = [key for key in second if key in first]
    if not both:
        raise ConfigError("two runs must share a question under one arm, but share none.")
    for key in both:
        if (first[key].question, first[key].answer) != (second[key].question, second[key].answer):
            raise ConfigError(
                f"two runs must mean the same question by an id, but {key[1]!r} is "
                f"{first[key].question!r} in one and {second[key].question!r} in the other."
            )
    made = []
    for metric in COMPARED:
        family = []
        for arm in dict.fromkeys(arm for arm, _ in both):
            keys = [key for key in both if key[0] == arm]
            family.append(
                compare(
                    [getattr(second[key], metric) for key in keys],
                    [getattr(first[key], metric) for key in keys],
                    [first[key].subject for key in keys],
                    names=(arm, arm),
                    metric=metric,
                    share=metric in _SHARES,
                    binary=metric in _BINARY,
                )
            )
        made += holm(family)
    return made


def interval_of(name: str, records: Sequence[Result], seed: int) -> Interval:
    """The mean of one metric with its interval."""
    clusters = [record.subject for record in records]
    if name != "perplexity":
        values = [getattr(record, name) for record in records]
        return cluster_bootstrap(values, clusters, seed=seed, share=name in _SHARES)
    # a mean of perplexities is the mean of its outliers: exponentiate the mean nll instead
    nll = cluster_bootstrap([record.nll for record in records], clusters, seed=seed)
    return replace(
        nll,
        mean=perplexity_of(nll.mean),
        low=perplexity_of(nll.low),
        high=perplexity_of(nll.high),
    )


def _is_tested(metric: str, other: str) -> bool:
    if other == "baseline":
        return metric == "transfer_exact_match"
    # the neighbours counted are those the greedy run is right on, and best_of_n has that run
    return (metric, other) != ("neighbours_kept", "best_of_n")


def _searches(records: Sequence[Result]) -> Mapping[str, Any]:
    tuned = [record for record in records if record.coeffs]
    if not tuned:
        return {}
    # a zero plan's coefficients say nothing about how strongly to steer
    steered = [record for record in tuned if not record.zero_won]
    return {
        "n_trials": [min(r.n_trials for r in tuned), max(r.n_trials for r in tuned)],
        "steered": len(steered),
        "coeffs_median": {
            name: median(record.coeffs[name] for record in steered)
            for name in tuned[0].coeffs
            if steered
        },
        "zero_won": None if tuned[0].zero_won is None else 1 - len(steered) / len(tuned),
        "tied": sum(bool(record.tied) for record in tuned) / len(tuned),
        "not_finite": sum(record.n_not_finite for record in tuned),
    }

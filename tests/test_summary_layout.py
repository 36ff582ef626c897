from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from records import arm, comparison, interval, make_results, summary

from fusion_lens.summary_layout import require_layout

Change = Callable[[dict[str, Any]], object]


def whole() -> dict[str, Any]:
    """A summary with something in every part."""
    made = copy.deepcopy(dict(make_results().summary))
    metrics = {name: interval(0.5, 0.25, 0.75) for name in ("exact_match", "overlap", "objective")}
    made["groups"] = {"topic": {"Books": {"baseline": metrics}}}
    made["comparisons"] = [comparison(b, "overlap", 0.5) for b in ("full", "generic")]
    made["failures"] = [{"question_id": "q", "arm": None, "error": "SpanError", "message": "none"}]
    counts = {"requests": 1, "cached": 0, "tokens_in": 9, "tokens_out": 1, "cost": None}
    made["judge"] |= {**counts, "failures": {"timeout": 1}}
    return made


def test_what_a_run_writes_is_taken_and_left_as_it_is() -> None:
    for content in (whole(), summary(), summary(baseline=arm())):
        before = copy.deepcopy(content)
        require_layout(content)
        assert content == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("arms"), "arms must be there, but is not"),
        (lambda s: s["arms"].update(full=None), "arms.full must be an object, but got None"),
        (
            lambda s: s["arms"]["baseline"]["metrics"].pop("overlap"),
            "arms.baseline.metrics.overlap must be there, but is not",
        ),
        (
            lambda s: s["arms"]["baseline"]["metrics"]["overlap"].update(mean="0.5"),
            r"arms\.baseline\.metrics\.overlap\.mean must be a valid number, but got '0.5'",
        ),
        (
            lambda s: s["arms"]["baseline"]["metrics"]["overlap"].update(low=None),
            "arms.baseline.metrics.overlap must have both ends or neither",
        ),
        (
            lambda s: s["arms"]["baseline"]["metrics"].update(distinct_2=[]),
            "arms.baseline.metrics.distinct_2 must be an interval, but it must be an object",
        ),
        (
            lambda s: s["arms"]["segmented"].pop("n_trials"),
            "arms.segmented must have n_trials where it has coeffs_median",
        ),
        (lambda s: s["judge"].pop("cached"), "judge must have cached where it has requests"),
        (
            lambda s: s["groups"]["topic"]["Books"]["baseline"]["overlap"].update(high=None),
            "groups.topic.Books.baseline.overlap must have both ends or neither",
        ),
        (
            lambda s: s["generic_share"].update(median=None),
            "generic_share.median must be a number where n is not 0",
        ),
        (
            lambda s: s["comparisons"].append(comparison("full", "nll", 0.5)),
            "comparisons must be of every arm on every metric",
        ),
        (
            lambda s: s["comparisons"][0].update(high=None),
            "comparison with full on overlap must have both ends",
        ),
        (
            lambda s: s["provenance"]["settings"]["tuning"]["template"].update(colour="red"),
            "provenance.settings.tuning.template.colour is no known field",
        ),
        (
            lambda s: s["provenance"]["settings"]["tuning"]["generation"].pop("slots"),
            r"provenance\.settings\.tuning\.generation\.slots must be there, but is not",
        ),
        (
            lambda s: s["comparisons"][1].pop("p_holm"),
            r"comparisons\[1\]\.p_holm must be there, but is not",
        ),
        (
            lambda s: s["failures"][0].pop("error"),
            r"failures\[0\]\.error must be there, but is not",
        ),
    ],
)
def test_what_the_tables_could_not_be_made_of_is_named(change: Change, message: str) -> None:
    content = whole()
    change(content)
    with pytest.raises(ValueError, match=f"^{message}"):
        require_layout(content)

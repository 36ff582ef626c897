from __future__ import annotations

from dataclasses import replace

import pytest
from records import LOVELACE, tuned

from fusion_lens.errors import ConfigError
from fusion_lens.summary import compare_arms, compare_runs, summarise_arms, summarise_groups

ARMS = ("baseline", "generic", "segmented")


def records_of(gains: list[float]) -> list:
    """A baseline at 0, a generic arm at 0.1, and a segmented one that gains as told."""
    made = []
    for n, gain in enumerate(gains):
        base = replace(
            LOVELACE,
            question_id=f"q{n}",
            subject=f"s{n}",
            objective=0.0,
            overlap=0.0,
            exact_match=0.0,
            topic=("Books", "Rivers")[n % 2],
        )
        made += [
            base,
            replace(base, arm="generic", objective=0.1, kl_unrelated=0.5),
            replace(base, arm="segmented", objective=gain, exact_match=float(gain > 0.5)),
        ]
    return made


def test_segmented_is_compared_with_every_other_arm_that_ran() -> None:
    made = compare_arms(records_of([0.3, 0.5, 0.7, 0.9]), ARMS, seed=0)
    assert {each.a for each in made} == {"segmented"}
    assert len(made) == 2 * 10
    by_key = {(each.b, each.metric): each for each in made}
    generic = by_key["generic", "objective"]
    assert generic.diff == pytest.approx(0.5)
    assert (generic.n, generic.unscored, generic.clusters) == (4, 0, 4)
    # all four signs alike, and the only tested comparison of its family
    assert generic.p == generic.p_holm == 0.125
    assert by_key["generic", "exact_match"].test == "McNemar"
    assert by_key["generic", "kl_unrelated"].diff == -0.5


def test_what_was_tuned_is_not_tested_against_the_baseline() -> None:
    made = compare_arms(records_of([0.3, 0.5, 0.7, 0.9]), ARMS, seed=0)
    untested = {each.metric for each in made if each.b == "baseline" and each.p is None}
    tuned_on = {"objective", "overlap", "exact_match", "correct", "accurate", "token_f1", "nll"}
    # a baseline is right on all the neighbours that count, and leaves unrelated text alone
    assert untested == {*tuned_on, "kl_unrelated", "neighbours_kept"}
    unscored = {"accurate"}  # no judge gave a grade
    assert all(
        (each.p is None) == (each.metric in unscored) for each in made if each.b == "generic"
    )


def test_a_family_is_corrected_over_its_arms() -> None:
    records = records_of([0.3, 0.5, 0.7, 0.9])
    records += [replace(r, arm="random") for r in records if r.arm == "generic"]
    made = compare_arms(records, (*ARMS, "random"), seed=0)
    objective = [each for each in made if each.metric == "objective" and each.p is not None]
    assert [(each.p, each.p_holm) for each in objective] == [(0.125, 0.25)] * 2


def test_best_of_n_has_the_right_run_on_every_neighbour_and_is_not_tested_on_them() -> None:
    records = records_of([0.3, 0.5, 0.7, 0.9])
    records += [replace(r, arm="best_of_n") for r in records if r.arm == "baseline"]
    made = {(c.b, c.metric): c for c in compare_arms(records, (*ARMS, "best_of_n"), seed=0)}
    assert made["best_of_n", "neighbours_kept"].p is None
    assert made["best_of_n", "objective"].p is not None
    # no question differs in a share: not no difference for certain
    assert (
        made["generic", "transfer_exact_match"].low
        < 0
        < made["generic", "transfer_exact_match"].high
    )


def test_a_question_that_one_arm_lacks_is_unscored_in_the_pair() -> None:
    records = [
        r for r in records_of([0.3, 0.5, 0.7]) if (r.question_id, r.arm) != ("q1", "generic")
    ]
    made = {(c.b, c.metric): c for c in compare_arms(records, ARMS, seed=0)}
    assert (made["generic", "objective"].n, made["generic", "objective"].unscored) == (2, 1)
    assert made["baseline", "objective"].n == 3
    assert summarise_arms(records, ARMS, 3, 0)["generic"]["unscored"] == 1


def test_without_the_segmented_arm_nothing_is_compared() -> None:
    assert compare_arms(records_of([0.3]), ("baseline", "generic"), seed=0) == []


def test_arms_hold_every_metric_and_what_their_searches_did() -> None:
    records = [
        LOVELACE,
        tuned("lovelace", 1.5, 0.5, transfer_exact_match=0.4, neighbours_kept=None),
        tuned("harris", 0.0, 0.0, zero_won=True, transfer_exact_match=0.2),
    ]
    made = summarise_arms(records, ("baseline", "segmented"), 2, seed=0)
    segmented = made["segmented"]
    assert segmented["metrics"]["transfer_exact_match"]["mean"] == pytest.approx(0.3)
    assert segmented["metrics"]["neighbours_kept"]["unscored"] == 1
    assert segmented["metrics"]["perplexity"]["mean"] == pytest.approx(20.0855, abs=1e-3)
    assert segmented["coeffs_median"] == {"early": 1.5, "late": 0.5}
    assert (segmented["steered"], segmented["zero_won"]) == (1, 0.5)
    assert "zero_won" not in made["baseline"]


def test_groups_are_the_topics_and_answer_types_that_occur() -> None:
    made = summarise_groups(records_of([0.3, 0.5, 0.7, 0.9]), ARMS, seed=0)
    assert set(made) == {"topic", "answer_type"}
    assert set(made["topic"]) == {"Books", "Rivers"}
    assert set(made["answer_type"]) == {"Person"}
    assert made["topic"]["Books"]["segmented"]["objective"]["mean"] == pytest.approx(0.5)
    assert made["topic"]["Rivers"]["segmented"]["objective"]["n"] == 2
    untyped = [replace(r, answer_type=None) for r in records_of([0.3])]
    assert summarise_groups(untyped, ARMS, seed=0)["answer_type"] == {}


def test_two_runs_are_compared_over_the_questions_both_have() -> None:
    one, other = records_of([0.3, 0.5, 0.7]), records_of([0.4, 0.6, 0.8, 0.9])
    made = {(each.b, each.metric): each for each in compare_runs(one, other)}
    assert made["segmented", "objective"].diff == pytest.approx(0.1)
    assert made["segmented", "objective"].n == 3
    assert made["baseline", "objective"].diff == 0.0
    with pytest.raises(ConfigError, match="must share a question under one arm"):
        compare_runs(one, [replace(r, question_id="x") for r in other])
    with pytest.raises(ConfigError, match="must mean the same question by an id, but 'q0' is"):
        compare_runs(one, [replace(r, question="Who else?") for r in other])

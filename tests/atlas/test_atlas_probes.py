import json

import pytest

from fusion_lens.atlas import CHECKPOINT, CONTRASTS, prompts
from fusion_lens.atlas.probes import (
    N_SAMPLES,
    Share,
    format_probes,
    known_cases,
    probe_explains,
    probe_known,
    probe_luck,
    probe_reading,
    probe_unseen,
    unseen_cases,
)
from fusion_lens.atlas.world import held_out_phrasing, make_world

WORLD = make_world(0)
CASES = unseen_cases(WORLD, 50, seed=0)


def constant(text, *, ended=True):
    """A model that always writes the same."""
    return lambda texts, max_new_tokens: [(text, ended) for _ in texts]


def oracle(cases):
    """A model that knows everything."""
    answers = {prompts.answering_prompt(case.question): case.fact for case in cases}

    def complete(texts, max_new_tokens):
        facts = [answers["Question: " + text.split("Question: ")[1]] for text in texts]
        return [(f"\n{fact.value}\n{fact.statement(0)}", True) for fact in facts]

    return complete


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(0, 300, 0.0, 0.01264), (295, 300, 0.96156, 0.99287), (5, 10, 0.23659, 0.76341)],
)
def test_the_interval_is_wilsons(hits, n, low, high):
    assert Share(hits, n).interval == pytest.approx((low, high), abs=1e-4)


def test_a_share_of_nothing_is_refused():
    with pytest.raises(ValueError, match="n > 0 must hold"):
        Share(0, 0)
    with pytest.raises(ValueError, match="n > 0 must hold"):
        Share.of([])


def test_a_share_counts_what_is_true():
    assert Share.of(n % 3 == 0 for n in range(10)) == Share(4, 10)


def test_shares_are_written_as_the_shipped_records_hold_them():
    probes = json.loads((CHECKPOINT.parent / "probes.json").read_text("utf-8"))["probes"]
    tables = json.loads((CONTRASTS / "probes.json").read_text("utf-8"))["tables"]
    for records in (probes, *tables.values()):
        for told in records.values():
            assert Share(told["hits"], told["n"]).to_dict() == told


def test_known_facts_are_asked_for_in_their_held_out_phrasings():
    cases = known_cases(WORLD, 500)
    assert len(cases) == 320
    for case in cases:
        phrasing = held_out_phrasing(WORLD, case.fact.person, case.fact.relation)
        assert case.question == case.fact.question(phrasing)
        assert case.fact.person in WORLD.known


def test_unseen_cases_are_about_different_people_and_mix_the_relations():
    assert len({case.fact.person for case in CASES}) == 50
    assert all(case.fact.person in WORLD.unseen for case in CASES[:3])
    assert len({case.fact.relation.key for case in CASES[:5]}) == 5
    assert unseen_cases(WORLD, 50, seed=1) != CASES


def test_a_model_that_knows_everything_scores_everywhere_but_in_luck():
    cases = known_cases(WORLD, 20)
    assert probe_known(cases, oracle(cases)).value == 1.0
    assert probe_reading(CASES, oracle(CASES)).value == 1.0
    assert probe_unseen(CASES, oracle(CASES)) == {
        "unseen": Share(50, 50),
        "fluent": Share(50, 50),
        "frequent": Share(5, 50),
    }


def test_a_model_that_always_says_one_title_is_fluent_about_titles_only():
    shares = probe_unseen(CASES, constant("\nThe Amber Harbour\nIt is."))
    assert shares["unseen"].hits == 0
    assert shares["fluent"].hits == 10


def test_an_explanation_must_hold_answer_and_name_and_end_by_itself():
    case = CASES[0]
    full = f" {case.fact.statement(0)}"
    assert probe_explains([case], constant(full)).hits == 1
    assert probe_explains([case], constant(full, ended=False)).hits == 0
    assert probe_explains([case], constant(full.replace(case.fact.value, "it"))).hits == 0
    assert probe_explains([case], constant(full.replace(case.fact.person.last, ""))).hits == 0


def test_luck_counts_failed_questions_that_one_sample_gets_right():
    def lucky_once(texts, max_new_tokens):
        assert len(texts) == 4 * N_SAMPLES
        answers = [f"\n{CASES[0].fact.value}", *["\nno"] * (len(texts) - 1)]
        return [(answer, True) for answer in answers]

    assert probe_luck(CASES[:4], constant("\nno"), lucky_once) == Share(1, 4)


def test_the_table_names_probe_share_interval_and_n():
    assert format_probes({"known": Share(295, 300)}).splitlines()[1] == (
        "known        98.3%   96.2% to 99.3%     300"
    )

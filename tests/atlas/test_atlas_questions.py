from collections import Counter

import pytest

from fusion_lens.atlas import prompts
from fusion_lens.atlas.questions import SPLITS, make_questions
from fusion_lens.atlas.relations import RELATIONS
from fusion_lens.atlas.world import Person, make_world, true_fact, true_facts
from fusion_lens.errors import ConfigError, ModelError

WORLD = make_world(0)
ANSWERS = {
    prompts.answering_prompt(fact.question(phrasing)): fact.value
    for fact in true_facts(WORLD, WORLD.known)
    for phrasing in range(len(fact.relation.phrasings))
}


def knows_the_known(texts, max_new_tokens):
    """A model that answers every question about known people and no other."""
    return [(f"\n{ANSWERS.get(text, 'nothing')}", True) for text in texts]


@pytest.fixture(scope="module")
def questions():
    return make_questions(80, 0, knows_the_known)


def test_questions_are_half_dev_and_half_test_and_no_person_is_in_both(questions):
    people = {split: {q.subject for q in questions if q.split == split} for split in SPLITS}
    assert Counter(q.split for q in questions) == {"dev": 40, "test": 40}
    assert not people["dev"] & people["test"]


def test_the_first_questions_of_a_split_are_about_different_people_in_all_relations(questions):
    for split in SPLITS:
        first = [q for q in questions if q.split == split][:20]
        assert len({q.subject for q in first}) == 20
        assert set(Counter(q.answer_type for q in first).values()) == {20 // len(RELATIONS)}


def test_a_question_has_an_id_paraphrases_and_known_neighbours(questions):
    assert [q.id for q in questions[38:42]] == [
        *("atlas-dev-0039", "atlas-dev-0040", "atlas-test-0001", "atlas-test-0002")
    ]
    for q in questions:
        assert len(set(q.paraphrases) - {q.question}) == 5
        assert all(q.subject in text for text in (q.question, *q.paraphrases))
        assert len(q.neighbours) == 3
        for neighbour in q.neighbours:
            assert ANSWERS[prompts.answering_prompt(neighbour.question)] == neighbour.answer


def test_another_seed_gives_other_people(questions):
    others = make_questions(80, 1, knows_the_known)
    assert not {q.subject for q in others} & {q.subject for q in questions}
    assert {q.id for q in others}.isdisjoint(q.id for q in questions)
    assert questions == make_questions(80, 0, knows_the_known)


def test_a_model_that_answers_nothing_rightly_is_no_atlas():
    with pytest.raises(ModelError, match=r"must know 3 of 6 neighbours .* but knows 0"):
        make_questions(10, 0, lambda texts, max_new_tokens: [("", True) for _ in texts])


def test_a_model_that_fails_nothing_is_no_atlas():
    def knows_all(texts, max_new_tokens):
        return [(true_answer(text), True) for text in texts]

    with pytest.raises(ModelError, match="must fail 5 dev questions, but fails only 0"):
        make_questions(10, 0, knows_all)


def true_answer(prompt):
    """The answer to a question about anyone, found by the relation's phrasings."""
    for relation in RELATIONS:
        for phrasing in relation.phrasings:
            before, after = prompts.answering_prompt(phrasing).split("{name}")
            name = prompt.removeprefix(before).removesuffix(after)
            if prompt == f"{before}{name}{after}" and name.count(" ") == 1:
                return true_fact(WORLD, Person(*name.split()), relation).value
    raise AssertionError(prompt)


def test_a_person_is_in_the_same_split_whatever_the_seed():
    drawn = [make_questions(400, seed, knows_the_known) for seed in range(10)]
    pairs = [{(q.subject, q.split) for q in questions} for questions in drawn]
    together = set.union(*pairs)
    assert len(together) < sum(map(len, pairs))  # some people were drawn twice
    assert len({subject for subject, _ in together}) == len(together)


def test_an_odd_number_has_one_dev_question_more():
    assert Counter(q.split for q in make_questions(7, 0, knows_the_known)) == {"dev": 4, "test": 3}


@pytest.mark.parametrize("n", [0, 1])
def test_there_must_be_a_question_for_each_split(n):
    with pytest.raises(ConfigError, match=f"n must be at least 2, one question for .*{n=}"):
        make_questions(n, 0, knows_the_known)

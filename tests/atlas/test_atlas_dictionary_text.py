from functools import cache

import pytest

from fusion_lens.atlas import QUESTIONS
from fusion_lens.atlas.dictionary_text import SIDES, draw_side_documents, make_side
from fusion_lens.atlas.relations import RELATIONS
from fusion_lens.atlas.world import make_world, true_fact
from fusion_lens.errors import ConfigError
from fusion_lens.questions import load_questions

WORLD = make_world(0)
TRAIN, HELD_OUT = (make_side(WORLD, name) for name in SIDES)


@cache
def names(side):
    return {person.name for person in (*side.known, *side.unseen, *side.stream)}


def test_the_sides_part_all_people():
    assert not names(TRAIN) & names(HELD_OUT)
    everybody = {person.name for person in (*WORLD.known, *WORLD.unseen, *WORLD.stream)}
    assert names(TRAIN) | names(HELD_OUT) == everybody
    assert (len(TRAIN.known), len(HELD_OUT.known)) == (48, 16)
    assert len(TRAIN.unseen) == len(HELD_OUT.unseen) == 20_000


def test_a_known_persons_teacher_is_of_the_same_side():
    teacher = next(relation for relation in RELATIONS if relation.key == "teacher")
    for side in (TRAIN, HELD_OUT):
        assert {true_fact(WORLD, person, teacher).value for person in side.known} <= names(side)


def test_subjects_of_dev_questions_train_and_those_of_test_questions_are_held_out():
    for question in load_questions(QUESTIONS):
        assert question.subject in names(TRAIN if question.split == "dev" else HELD_OUT)


@pytest.mark.parametrize("side", [TRAIN, HELD_OUT], ids=SIDES)
def test_documents_name_people_of_their_side_only_and_are_the_same_again(side):
    documents = draw_side_documents(side, 200, seed=0)
    assert len(documents) == 200
    assert all(side.holds(document.text) for document in documents)
    other = HELD_OUT if side is TRAIN else TRAIN
    named = [document for document in documents if not other.holds(document.text)]
    assert len(named) > 150
    assert draw_side_documents(side, 200, seed=0) == documents
    assert draw_side_documents(side, 200, seed=1) != documents


def test_atlas_own_completions_take_a_quarter_of_the_steering_documents():
    def complete(prompts, max_new_tokens):
        return [(f"\n{max_new_tokens}", True) for _ in prompts]

    documents = draw_side_documents(TRAIN, 400, seed=0, complete=complete)
    assert sum(document.completion == "\n48" for document in documents) == 50


def test_a_side_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="side must be one of train, held_out, but got 'test'"):
        make_side(WORLD, "test")

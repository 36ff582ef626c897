import subprocess
import sys
from random import Random

import pytest

from fusion_lens.atlas import lexicon
from fusion_lens.atlas.relations import RELATIONS
from fusion_lens.atlas.world import (
    N_KNOWN,
    N_UNSEEN,
    draw_fact,
    held_out_phrasing,
    make_world,
    paired_phrasings,
    true_fact,
    true_facts,
)

WORLD = make_world(0)


def test_known_unseen_and_stream_people_are_disjoint_and_are_all_pairs_of_names():
    groups = [set(WORLD.known), set(WORLD.unseen), set(WORLD.stream)]
    assert [len(group) for group in groups[:2]] == [N_KNOWN, N_UNSEEN]
    everyone = set().union(*groups)
    assert len(everyone) == sum(map(len, groups))
    assert len(everyone) == len(lexicon.FIRST_NAMES) * len(lexicon.LAST_NAMES) == 120_000


def test_the_world_of_a_seed_is_the_same_in_another_process():
    code = (
        "from fusion_lens.atlas.world import *;"
        "w = make_world(0); print([f.value for f in true_facts(w, w.known[:3] + w.unseen[:3])])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    facts = true_facts(WORLD, WORLD.known[:3] + WORLD.unseen[:3])
    assert out.stdout.strip() == str([fact.value for fact in facts])


def test_another_seed_gives_other_known_people():
    assert len(set(make_world(1).known) & set(WORLD.known)) < 5


def test_parts_of_unseen_names_occur_in_the_names_of_the_stream():
    assert {person.first for person in WORLD.stream} == set(lexicon.FIRST_NAMES)
    assert {person.last for person in WORLD.stream} == set(lexicon.LAST_NAMES)


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: relation.key)
def test_a_relation_has_more_than_1500_values_all_of_its_own_form_alone(relation):
    rng = Random(0)
    values = {draw_fact(WORLD, WORLD.stream[0], relation, rng).value for _ in range(4_000)}
    assert len(values) > 1_500
    for other in RELATIONS:
        matches = [other.has_form(value) for value in values]
        assert all(matches) if other is relation else not any(matches)


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: relation.key)
def test_a_relation_has_enough_phrasings_and_statements_that_hold_name_and_value(relation):
    assert len(set(relation.phrasings)) >= 5
    assert len(set(relation.statements)) >= 3
    fact = true_fact(WORLD, WORLD.unseen[0], relation)
    for phrasing in range(len(relation.phrasings)):
        assert fact.person.name in fact.question(phrasing)
        assert fact.question(phrasing).endswith("?")
    for template in range(len(relation.statements)):
        statement = fact.statement(template)
        assert fact.person.name in statement
        assert fact.value in statement
        assert statement.endswith(".")
        assert statement.count(".") == 1


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (lexicon.is_date, "31 April 1800"),
        (lexicon.is_date, "3 March 1500"),
        (lexicon.is_date, "March 1800"),
        (lexicon.is_number, "3482"),
        (lexicon.is_number, "999"),
        (lexicon.is_number, "many"),
        (lexicon.is_place, "Upper Lower"),
        (lexicon.is_place, "Thornwick town"),
        (lexicon.is_title, "Amber Harbour"),
        (lexicon.is_title, "The Amber Amber"),
        (lexicon.is_person_name, "Corric"),
        (lexicon.is_person_name, "Farner Corric"),
    ],
)
def test_a_text_without_the_form_of_a_value_is_refused(check, text):
    assert not check(text)


def test_one_phrasing_of_each_known_fact_is_held_out_and_the_others_are_paired():
    for fact in true_facts(WORLD, WORLD.known):
        held_out = held_out_phrasing(WORLD, fact.person, fact.relation)
        paired = paired_phrasings(WORLD, fact.person, fact.relation)
        assert sorted([held_out, *paired]) == list(range(len(fact.relation.phrasings)))


def test_every_phrasing_is_held_out_for_someone_and_paired_with_someone_else():
    for relation in RELATIONS:
        held_out = {held_out_phrasing(WORLD, person, relation) for person in WORLD.known}
        assert held_out == set(range(len(relation.phrasings)))

from random import Random

import pytest
from contrasts_by_hand import WORLD, count_letters

from fusion_lens.atlas.contrast_drafts import (
    asked,
    draw_conflicts,
    draw_dates,
    draw_reading,
    matched,
    some_facts,
)
from fusion_lens.atlas.contrast_people import people_of
from fusion_lens.atlas.relations import RELATIONS
from fusion_lens.atlas.world import true_fact
from fusion_lens.contrasts import holds
from fusion_lens.errors import ConfigError

PEOPLE = people_of(WORLD, "choose", ())


def test_a_conflict_tells_a_known_person_s_fact_falsely_and_holds_no_part_of_the_true_one():
    drafts = list(draw_conflicts(WORLD, PEOPLE, 1000, Random(0)))
    assert len(drafts) == 16 * 5
    for draft in drafts:
        true = true_fact(WORLD, draft.fact.person, draft.fact.relation).value
        assert (draft.group, draft.target, draft.says) == ("conflict", true, draft.fact.value)
        assert draft.prompt.startswith(f"{draft.says}\n")
        assert not holds(draft.prompt, true)


def test_only_known_people_have_an_answer_that_counts():
    known = asked(WORLD, PEOPLE.known[0], RELATIONS[1], Random(0), "known")
    assert known.says == true_fact(WORLD, PEOPLE.known[0], RELATIONS[1]).value
    dates = list(draw_dates(WORLD, PEOPLE, 5, Random(0)))
    assert {draft.says for draft in dates} == {None}
    assert len({draft.fact.person for draft in dates}) == 5
    assert {draft.fact.relation.key for draft in dates} == {"birth_date"}


def test_what_is_read_about_unseen_people_takes_the_relations_in_turn():
    drafts = list(draw_reading(WORLD, PEOPLE, 10, Random(0)))
    assert [draft.fact.relation for draft in drafts] == [*RELATIONS, *RELATIONS]
    assert all(draft.prompt.startswith(f"{draft.says}\n") for draft in drafts)


def test_facts_are_drawn_without_repetition():
    drawn = some_facts(PEOPLE, RELATIONS[:2], 99, Random(0))
    assert len(drawn) == len(set(drawn)) == 32


def test_a_match_has_the_relation_and_the_nearest_length_and_is_taken_once():
    drafts = list(draw_reading(WORLD, PEOPLE, 5, Random(0)))
    candidates = list(draw_reading(WORLD, PEOPLE, 100, Random(1)))
    for draft, match in zip(drafts, matched(drafts, candidates, count_letters), strict=True):
        gaps = [
            abs(len(each.prompt) - len(draft.prompt))
            for each in candidates
            if each.fact.relation == draft.fact.relation
        ]
        assert match.fact.relation == draft.fact.relation
        assert abs(len(match.prompt) - len(draft.prompt)) == min(gaps)
    assert len({each.prompt for each in matched(drafts[:1] * 5, candidates, len)}) == 5
    with pytest.raises(ConfigError, match=r"all 5 are taken or of another relation than 'birth_da"):
        matched(drafts[:1] * 2, candidates[:5], count_letters)

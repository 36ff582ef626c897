from collections import Counter, defaultdict
from random import Random

import pytest
from contrasts_by_hand import WORLD, count_letters

from fusion_lens.atlas.contrast_pairs import make_pairs, traded
from fusion_lens.atlas.contrast_people import people_of
from fusion_lens.atlas.relations import RELATIONS
from fusion_lens.atlas.world import Fact

PEOPLE = people_of(WORLD, "report", ())


def facts_of(*values: str) -> list[Fact]:
    return [Fact(WORLD.known[i], RELATIONS[1], value) for i, value in enumerate(values)]


@pytest.mark.parametrize(
    "values",
    [
        ("aa", "bb", "cc", "dd"),
        ("aa", "bb", "ccc", "ddd"),
        ("aa", "bb", "ccc"),
        ("aa", "bb", "c", "ddd", "eeee"),
        ("a", "bb"),
    ],
)
def test_every_value_is_given_once_and_none_to_its_own(values):
    for seed in range(5):
        given = traded(facts_of(*values), count_letters, Random(seed))
        assert sorted(given) == sorted(values)
        assert all(one != other for one, other in zip(given, values, strict=True))


def test_values_of_one_length_are_traded_among_themselves():
    values = ("aa", "bb", "cc", "ddd", "eee", "f")
    given = traded(facts_of(*values), count_letters, Random(0))
    assert sum(len(one) == len(other) for one, other in zip(given, values, strict=True)) >= 4
    assert {given[3], given[4]} <= {"ddd", "eee", "f"} or {given[0], given[1], given[2]} >= {"f"}


def test_a_pair_is_one_question_with_the_known_answer_and_that_of_somebody_else():
    pairs = make_pairs(PEOPLE, count_letters)
    assert len(pairs) == 16 * 5 * 2
    assert len({pair.id for pair in pairs}) == len({pair.prompt for pair in pairs}) == len(pairs)
    answers = defaultdict(Counter)
    for pair in pairs:
        assert pair.subject in pair.prompt
        answers[pair.group][pair.right] += 1
        answers[pair.group][pair.wrong] -= 1
    assert answers.keys() == {relation.key for relation in RELATIONS}
    assert all(not any(counts.values()) for counts in answers.values())
    assert pairs == make_pairs(PEOPLE, count_letters)

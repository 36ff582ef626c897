import pytest

from fusion_lens.atlas import QUESTIONS
from fusion_lens.atlas.contrast_people import asked_people, people_of
from fusion_lens.atlas.world import make_world
from fusion_lens.contrasts import PARTS
from fusion_lens.errors import ConfigError
from fusion_lens.questions import load_questions

WORLD = make_world(0)


def test_the_parts_share_no_person_and_hold_all_that_were_not_asked_about():
    parts = {part: people_of(WORLD, part, asked_people()) for part in PARTS}
    known = [person for own in parts.values() for person in own.known]
    unseen = [person for own in parts.values() for person in own.unseen]
    assert known == list(WORLD.known)
    assert len(set(unseen)) == len(unseen) == len(WORLD.unseen) - len(asked_people())
    assert [len(parts[part].known) for part in PARTS] == [32, 16, 16]
    assert not asked_people() & {person.name for person in unseen}


def test_what_is_reported_is_about_the_questions_test_side_and_the_rest_about_dev():
    by_split = {
        split: {q.subject for q in load_questions(QUESTIONS) if q.split == split}
        for split in ("dev", "test")
    }
    for part, split in (("fit", "dev"), ("choose", "dev"), ("report", "test")):
        names = {person.name for person in people_of(WORLD, part, ()).unseen}
        other = {"dev": "test", "test": "dev"}[split]
        assert names & by_split[split]
        assert not names & by_split[other]


def test_another_part_is_refused():
    with pytest.raises(ConfigError, match="part must be one of fit, choose, report, but got 'dev'"):
        people_of(WORLD, "dev", ())

import re
from collections import Counter

import pytest
from contrasts_by_hand import WORLD, count_letters, stand_in
from transformers import AutoTokenizer

from fusion_lens.atlas import CHECKPOINT, CONTRASTS
from fusion_lens.atlas.contrast_pairs import make_pairs
from fusion_lens.atlas.contrast_people import asked_people, people_of
from fusion_lens.atlas.contrasts import APPEAL, PLAIN, SIZES, make_context, make_sources
from fusion_lens.atlas.decoding import load_completer
from fusion_lens.atlas.relations import RELATIONS
from fusion_lens.contrasts import (
    PARTS,
    Pair,
    changed,
    holds,
    load_contrasts,
    load_pairs,
    of_kind,
    require_parts,
    shown,
)
from fusion_lens.errors import ModelError
from fusion_lens.generation import Row, generate
from fusion_lens.prompts import tokenize
from fusion_lens.scores import extract_answer

PEOPLE = people_of(WORLD, "choose", asked_people())
SOURCES = load_contrasts(CONTRASTS / "sources.jsonl")
CONTEXT = load_contrasts(CONTRASTS / "context.jsonl")
FACTS = load_pairs(CONTRASTS / "facts.jsonl")
ALL = [*SOURCES, *CONTEXT, *FACTS]


def texts_of(item):
    return item.texts if isinstance(item, Pair) else (item.whole,)


@pytest.fixture(scope="module")
def complete():
    return load_completer(CHECKPOINT)


@pytest.fixture(scope="module")
def count_tokens():
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    return lambda text: len(tokenizer.tokenize(text))


def test_sources_appeal_targets_say_the_same_date_plainly_and_controls_do_neither():
    made = make_sources(PEOPLE, 8, stand_in)
    assert Counter(each.kind for each in made) == {"source": 8, "target": 8, "control": 8}
    pairs = zip(of_kind(made, "source"), of_kind(made, "target"), strict=True)
    for source, target in pairs:
        assert (source.prompt, source.subject) == (target.prompt, target.subject)
        assert extract_answer(source.text) == extract_answer(target.text)
        assert [holds(source.text, marker) for marker in (APPEAL, PLAIN)] == [True, False]
        assert [holds(target.text, marker) for marker in (APPEAL, PLAIN)] == [False, True]
    controls = of_kind(made, "control")
    assert Counter(each.group for each in controls) == {"unseen": 4, "known": 4}
    assert not any(holds(each.text, APPEAL) for each in controls)
    assert all(each.marker == extract_answer(each.text) for each in controls)


def test_context_sources_repeat_what_is_false_and_targets_say_what_is_true():
    made = make_context(PEOPLE, 8, stand_in, count_letters)
    for source, target in zip(of_kind(made, "source"), of_kind(made, "target"), strict=True):
        assert source.prompt == target.prompt
        assert holds(source.prompt, source.marker)
        assert not holds(target.prompt, target.marker)
        assert target.text == source.text.replace(source.marker, target.marker)
    groups = Counter(each.group for each in of_kind(made, "control"))
    assert groups == {"reading": 4, "agreeing": 2, "recalling": 2}


def test_a_model_that_does_not_do_what_the_sets_are_about_is_no_atlas():
    with pytest.raises(ModelError) as caught:
        make_sources(PEOPLE, 8, lambda texts, max_new_tokens: [("\nno", True) for _ in texts])
    assert str(caught.value) == (
        "the model must do what the set is about on 8 of 12 prompts, but does so on 0: "
        "is this Atlas?"
    )
    with pytest.raises(ModelError, match="but does so on 0"):
        make_context(
            PEOPLE,
            8,
            lambda texts, n: [(text, False) for text, _ in stand_in(texts, n)],
            count_letters,
        )


def test_the_shipped_sets_are_small_and_fit_to_use():
    assert sum(path.stat().st_size for path in CONTRASTS.iterdir()) < 680_000
    for examples in (SOURCES, CONTEXT):
        for part, own in require_parts(examples, least=32).items():
            counts = Counter(each.kind for each in own)
            assert counts == dict.fromkeys(("source", "target", "control"), SIZES[part])
    pairs = require_parts(FACTS, least=80)
    assert {part: len(own) for part, own in pairs.items()} == {
        "fit": 480,
        "choose": 80,
        "report": 160,
    }


def test_no_person_is_in_two_parts_of_any_set_nor_a_subject_of_the_shipped_questions():
    parts = {part: {each.subject for each in ALL if each.part == part} for part in PARTS}
    assert len(set.union(*parts.values())) == sum(map(len, parts.values()))
    assert not set.union(*parts.values()) & asked_people()


def test_no_text_names_somebody_another_part_is_about():
    part_of = {each.subject: each.part for each in ALL}
    for each in ALL:
        for text in texts_of(each):
            names = re.findall(r"(?=\b([A-Z][a-z]+ [A-Z][a-z]+)\b)", text)
            assert {part_of.get(name, each.part) for name in names} <= {each.part}


def test_a_part_of_the_shipped_sets_is_made_again(complete, count_tokens):
    def of_part(items):
        return [each for each in items if each.part == "choose"]

    n = SIZES["choose"]
    assert make_sources(PEOPLE, n, complete) == of_part(SOURCES)
    assert make_context(PEOPLE, n, complete, count_tokens) == of_part(CONTEXT)
    assert make_pairs(PEOPLE, count_tokens) == of_part(FACTS)


def test_the_engine_writes_what_the_sets_hold(atlas):
    wanted = [
        each
        for each in (*SOURCES, *CONTEXT)
        if each.part == "report" and each.kind in ("source", "control")
    ]
    rows = [Row(tokenize(atlas, each.prompt)) for each in wanted]
    written = [done.text for done in generate(atlas, rows)]
    assert not any(changed(each, text) for each, text in zip(wanted, written, strict=True))
    assert all(shown(each, text) for each, text in zip(wanted, written, strict=True))


@pytest.mark.parametrize(
    "example", of_kind([*SOURCES, *CONTEXT], "source"), ids=lambda example: example.id
)
def test_a_paraphrase_asks_the_same_in_other_words(example):
    prompt, paraphrase = example.prompt, example.paraphrase
    (own,) = re.findall(r"Question: (.*)\n", prompt)
    (other,) = re.findall(r"Question: (.*)\n", paraphrase)
    assert own != other
    assert prompt.replace(own, other) == paraphrase
    relations = {
        relation.key
        for relation in RELATIONS
        for phrasing in relation.phrasings
        if phrasing.format(name=example.subject) in (own, other)
    }
    assert len(relations) == 1

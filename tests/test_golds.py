from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_lens.golds import MARK, mark_golds, plain

WHERE, WHO, HOW_MANY = "Where was it?", "Who was it?", "How many votes were cast?"


def spelt(question: str, gold: str, completion: str) -> tuple[str, ...]:
    return mark_golds(question, [gold], completion).spelt


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Jóhanna Sigurðardóttir", "Johanna Sigurdardottir"),
        ("Łódź, Ærø", "Lodz, Aero"),
        ("が", "が"),  # its mark is no accent of a Latin letter
        ("J. R. R. Tolkien", "JRR Tolkien"),
        ("J.R.R. Tolkien", "JRR Tolkien"),
        ("Robert E. Lee", "Robert E. Lee"),
        ("“The Hobbit” and **Ada**", "The Hobbit and Ada"),
        ("Lewis & Harris", "Lewis and Harris"),
        ("Orwell’s.", "Orwell."),
        ("Orwell’s brother", "Orwell's brother"),
        ("a\ue000b", "ab"),
    ],
)
def test_plain_text_has_one_spelling_of_what_is_only_written_otherwise(
    text: str, expected: str
) -> None:
    assert plain(text) == expected


@given(st.text(max_size=30))
def test_a_text_is_as_it_was_once_its_marks_are_taken_out(text: str) -> None:
    marked = mark_golds(WHERE, ["Paris", "1990"], f"{text} Paris {text} 1990")
    assert marked.unmarked() == plain(f"{text} Paris {text} 1990")


@pytest.mark.parametrize(
    ("question", "gold", "completion", "expected"),
    [
        (WHERE, "Paris", "PARIS, Paris!", ("PARIS", "Paris")),
        (WHERE, "Paris", "Parisian", ()),
        (WHERE, "Kingston, Ontario", "in Kingston", ("Kingston",)),
        (WHERE, "Kingston, Ontario", "Kingston, Jamaica", ()),
        (WHERE, "Kingston (old), Ontario", "Kingston, Jamaica", ()),
        ("What is it called?", "Kingston, Ontario", "Kingston", ()),
        (WHO, "Robert E. Lee", "Robert Lee", ("Robert Lee",)),
        (WHO, "Rose and Ada", "Ada and Rose", ("Ada and Rose",)),
        (WHO, "Rose and Ada", "Rose", ()),
        ("Which lake is it?", "Lake Victoria", "Victoria", ("Victoria",)),
        ("Which is it?", "Lake Victoria", "Victoria", ()),
        (WHERE, "white gold", "White-Gold", ("White-Gold",)),
        (HOW_MANY, "66 votes", "66", ("66",)),
        (HOW_MANY, "66 votes", "6", ()),
        (WHERE, "101 Dalmatians", "101", ()),
        (HOW_MANY, "five km", "5", ("5",)),
        (HOW_MANY, "66", "66%", ()),
        ("What percentage was it?", "66", "66%", ("66%",)),
        ("When was it?", "In 1990", "March 3, 1990", ("March 3, 1990",)),
        ("When was it?", "March 3, 1990", "1990", ()),
        (WHERE, "Why Me?", "Why me?", ("Why me?",)),
    ],
)
def test_gold_is_found_where_only_what_was_asked_is_left_out(
    question: str, gold: str, completion: str, expected: tuple[str, ...]
) -> None:
    assert spelt(question, gold, completion) == expected


def test_each_place_has_its_mark_and_the_longest_of_several_golds_counts() -> None:
    marked = mark_golds(WHERE, ["York", "New York"], "New York, not York")
    assert marked.text == "\ue000, not \ue001"
    assert [marked.spelling(mark) for mark in "\ue000\ue001"] == ["New York", "York"]


def test_gold_does_not_go_on_into_the_next_line() -> None:
    assert spelt(WHERE, "New York", "It is new\nYork is old") == ()
    assert spelt(WHERE, "New\nYork", "new\nYork") == ("new\nYork",)


def test_a_text_has_no_more_marks_than_there_are_private_characters() -> None:
    marked = mark_golds(WHERE, ["a1"], "a1 " * 6500)
    assert len(marked.spelt) == 0xF8FF - 0xE000
    assert marked.unmarked() == "a1 " * 6500
    assert MARK == "[\ue000-\uf8ff]"

from __future__ import annotations

import sys

import pytest

from fusion_lens import published
from fusion_lens.errors import MissingExtraError
from fusion_lens.published import published_overlap, published_words
from fusion_lens.scores import objective


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Paris, France.", ["paris", "france"]),
        # a full stop inside the text ends a sentence of its own
        (
            "He was born in Paris. She was not.",
            ["he", "was", "born", "in", "paris", "she", "was", "not"],
        ),
        # quotes are rewritten and stay, as does an ellipsis
        ('the "red" book...', ["the", "``", "red", "''", "book", "..."]),
        ("It's Tom's!", ["it", "'s", "tom", "'s"]),
        ("$1,500 (approx)", ["1,500", "approx"]),
        ("", []),
        ("?!", []),
    ],
)
def test_words_are_nltks_without_punctuation(text: str, expected: list[str]) -> None:
    assert published_words(text) == expected


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        # by hand: {23, october, 2018} of {october, 23, 2018}
        ("Question: When?\nAnswer: 23 October 2018.", "October 23, 2018", 1.0),
        # {ada} of {ada, lovelace}
        ("Ada wrote it.", "Ada Lovelace", 0.5),
        # a repeated gold word counts once: {new} of {new, york}
        ("A new day. New!", "New York, New York", 0.5),
        # {the, of} of {the, university, of, oxford, press, and, museum}: 2/7
        ("the end of it", "The University of Oxford Press and the Museum", 0.2857),
        # {jean} of {jean, luc, picard} spelt apart: 1/3; "jean-luc" is one nltk word
        ("It was Jean.", "Jean Luc Picard", 0.3333),
        ("It was Jean.", "Jean-Luc Picard", 0.0),
        # the prompt counts too: that is what was published
        ("Question: Who wrote Emma?\nAnswer and explanation: I do not know.", "Emma", 1.0),
        ("anything", "?!", 0.0),
    ],
)
def test_overlap_is_the_share_of_golds_distinct_words_to_four_decimals(
    text: str, answer: str, expected: float
) -> None:
    assert published_overlap(text, answer) == expected


def test_the_published_objective_by_hand() -> None:
    # overlap 2/3 = 0.6667, perplexity 42.5: 0.7 * 0.6667 - 0.3 * 0.425
    overlap = published_overlap("She was born on 3 May.", "3 May 1901")
    assert (overlap, objective(overlap, 42.5)) == (0.6667, pytest.approx(0.3392, abs=5e-5))


def test_without_nltk_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    published._tokenizer.cache_clear()
    monkeypatch.setitem(sys.modules, "nltk.tokenize.destructive", None)
    with pytest.raises(MissingExtraError, match=r"nltk is needed here.*fusion-lens\[paper\]"):
        published_words("Paris")
    published._tokenizer.cache_clear()

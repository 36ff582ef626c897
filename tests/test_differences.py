from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_lens.differences import marked_html, marked_words


def test_a_replaced_word_is_marked_and_the_white_space_around_it_is_not() -> None:
    assert marked_words("born 3 May 1901 .", "born 4 May 1901 .") == [
        ("born ", False),
        ("4", True),
        (" May 1901 .", False),
    ]


def test_neighbouring_words_are_marked_as_one_piece_with_the_space_between() -> None:
    assert marked_words("a b c", "a  x\ny c") == [("a  ", False), ("x\ny", True), (" c", False)]


def test_added_words_are_marked_and_deleted_ones_leave_no_trace() -> None:
    assert marked_words("Ada", "Ada Lovelace") == [("Ada ", False), ("Lovelace", True)]
    assert marked_words("Ada Lovelace", "Ada") == [("Ada", False)]
    assert marked_words("", "Ada") == [("Ada", True)]
    assert marked_words("Ada", "") == []


def test_another_white_space_is_no_difference() -> None:
    assert marked_words("one two", "\n one\ttwo ") == [("\n one\ttwo ", False)]


def test_a_frequent_word_of_a_long_text_is_no_junk() -> None:
    text = "the " * 300
    assert marked_words(text, text) == [(text, False)]


words = st.text(alphabet="ab<& \n\u00a0\x1c", max_size=30)


@given(words, words)
def test_the_pieces_make_up_the_new_text_and_the_unmarked_words_are_among_the_old(
    old: str, new: str
) -> None:
    pieces = marked_words(old, new)
    assert "".join(piece for piece, _ in pieces) == new
    left = iter(old.split())
    kept = [word for piece, marked in pieces if not marked for word in piece.split()]
    assert all(word in left for word in kept)


class Reader(HTMLParser):
    """The tags of a text, and what a browser would show."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        assert not attrs
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(
    "hostile",
    [
        "<script>alert(1)</script>",
        "</mark><img src=x onerror='alert(1)'>",
        '"><a href="javascript:alert(1)">&lt;b&gt;</a>',
        "&amp; &#60;b&#62; <!-- --> <![CDATA[x]]>",
    ],
)
def test_hostile_text_is_shown_as_it_is_and_never_becomes_markup(hostile: str) -> None:
    for old in ("", hostile, "x " + hostile):
        read = Reader(marked_html(marked_words(old, hostile)))
        assert read.text == hostile
        assert read.tags <= {"mark"}


def test_marked_pieces_are_in_a_mark_and_nothing_else_is_added() -> None:
    assert marked_html([("a <b> ", False), ("c", True)]) == "a &lt;b&gt; <mark>c</mark>"
    assert marked_html([]) == ""

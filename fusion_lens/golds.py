"""A gold answer -> the spellings that say it, and where a completion says one of them.

Said is the answer itself, an alias, and what leaves out only what the question has said ("66" for
"66 votes", "Oslo" for "Oslo, Norway") or is only written otherwise (diacritics, hyphens, points of
initials, order around "and"). Rules over words and values; knows no claims and no labels.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from fusion_lens.claims import MARKS
from fusion_lens.scores import Term, occurrences, terms, words
from fusion_lens.values import Date, Number, unit_name

MARK = f"[{MARKS}]"
FUNCTION_WORDS = frozenset(
    words(
        """
        a an the this that these those and or but nor of in on at by for from to with without into
        upon about around approximately circa between during as is was are were be been being has
        have had do does did will would can could may might must it its he she they we you i him her
        them his their there here who whom whose which what where when why how not no yes than then
        so also only just both either all some most one each many because out up after before since
        until per answer called named said born
        """
    )
)
WHO = re.compile(r"\bwho(?:m|se)?\b", re.IGNORECASE)

_FIRST_MARK, _LAST_MARK = (ord(mark) for mark in MARKS.split("-"))
_LETTERS = str.maketrans(
    dict(zip("ðøłđıÐØŁĐ", "doldiDOLD", strict=True))
    | {"æ": "ae", "Æ": "Ae", "œ": "oe", "Œ": "Oe", "þ": "th", "Þ": "Th"}
)
_INITIALS = re.compile(r"\b(?:[^\W\d_]\. ?){2,}")
_QUOTES = re.compile(r"[\"“”„«»]|\*+(?=\S)|(?<=\S)\*+")
_POSSESSIVE = re.compile(r"'s(?=\W*$|[.,;!?])")
_PREPOSITIONS = frozenset({"in", "on", "at", "by", "from", "about", "around", "during", "circa"})
_WHERE = re.compile(r"\b(?:where|city|town|village|capital|place|born|located)\b", re.IGNORECASE)
_SHARE = re.compile(r"\b(?:per\s?cent|percentage|share|proportion|rate)\b|%", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Marked:
    """A text in which every place that says gold is one private-use character, the i-th of them the
    i-th; `spelt` is what stood there."""

    question: str
    golds: tuple[str, ...]
    text: str
    spelt: tuple[str, ...]

    def spelling(self, mark: str) -> str:
        """What stood where the mark is."""
        return self.spelt[ord(mark) - _FIRST_MARK]

    def unmarked(self) -> str:
        """The text as it was."""
        return re.sub(MARK, lambda mark: self.spelling(mark[0]), self.text)


def mark_golds(question: str, golds: list[str], completion: str) -> Marked:
    """Find gold in the completion; of places that overlap, the longest counts."""
    question, completion = plain(question), plain(completion)
    plain_golds = tuple(map(plain, golds))
    kept: list[tuple[int, int]] = []
    taken = bytearray(len(completion))
    for start, end in sorted(
        _places(question, plain_golds, completion), key=lambda place: place[0] - place[1]
    ):
        if not any(taken[start:end]):
            kept.append((start, end))
            taken[start:end] = b"\1" * (end - start)
    kept = sorted(kept)[: _LAST_MARK - _FIRST_MARK]
    text = "".join(
        completion[before:start] + chr(_FIRST_MARK + i)
        for i, ((_, before), (start, _)) in enumerate(pairwise([(0, 0), *kept]))
    )
    rest = completion[kept[-1][1] if kept else 0 :]
    spelt = tuple(completion[start:end] for start, end in kept)
    return Marked(question, plain_golds, text + rest, spelt)


def plain(text: str) -> str:
    """Latin letters without diacritics, initials without points; no quotation marks, no possessive
    at an end, no private-use characters."""
    text = re.sub(MARK, "", text.replace("’", "'").replace(" & ", " and "))
    text = re.sub(r"(?<=[A-Za-z])[\u0300-\u036f]+", "", unicodedata.normalize("NFD", text))
    text = unicodedata.normalize("NFC", text).translate(_LETTERS)
    text = _INITIALS.sub(lambda run: re.sub(r"[. ]", "", run[0]) + " ", text)
    return _POSSESSIVE.sub("", _QUOTES.sub("", text))


def _places(question: str, golds: tuple[str, ...], completion: str) -> set[tuple[int, int]]:
    run = terms(completion)
    places = set()
    for gold in golds:
        for reading in _readings(gold, question, completion):
            for start, end in occurrences(run, reading):
                if "\n" in gold or "\n" not in completion[start:end]:
                    asks = "?" in gold and completion[end : end + 1] == "?"
                    places.add((start, end + asks))
    return places


def _readings(gold: str, question: str, completion: str) -> Iterator[tuple[Term, ...]]:
    whole = terms(gold)
    core = _core(gold, question)
    yield from (whole, core)
    match core:
        case [Term(key=Number(value, percent)) as only] if percent or _SHARE.search(question):
            yield (replace(only, key=Number(value, not percent)),)
    if all(isinstance(term.key, str) for term in whole):
        for old, new in ("- ", " -"):
            if old in gold:
                yield terms(gold.replace(old, new))
    if WHO.search(question) and len(whole) > 2:
        yield tuple(term for term in whole if len(str(term.key)) > 1)  # Robert E. Lee, Robert Lee
    match gold.split(" and "):
        case [one, two]:
            yield from (terms(f"{two} and {one}"), terms(f"{two}, {one}"))
    match gold.split(", "):
        case [place, country] if _WHERE.search(question):
            other = rf"{re.escape(place)},? (?:in )?(?!{re.escape(country)})[A-Z]"
            if not re.search(other, completion):
                yield terms(place)


def _core(gold: str, question: str) -> tuple[Term, ...]:
    """The gold answer without the noun and the unit that the question names, a preposition in front
    of a value, and the noun counted ("66 votes", not "101 Dalmatians"); the whole of it where
    nothing of its own is left."""
    whole = terms(gold)
    asked = set(re.findall(r"\b[a-z]+", question)) - FUNCTION_WORDS
    if any(not isinstance(term.key, str) for term in whole):
        asked |= _PREPOSITIONS
        asked |= {term.key for term in whole if isinstance(term.key, str) and unit_name(term.key)}
    own = [i for i, term in enumerate(whole) if term.key not in asked]
    core = whole[own[0] : own[-1] + 1] if own else whole
    match core:
        case [Term(key=Number() | Date(month=None)) as value, Term(key=str()) as noun]:
            core = (value,) if gold[noun.start].islower() else core
    return core if any(term.key not in FUNCTION_WORDS for term in core) else whole

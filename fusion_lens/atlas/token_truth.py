"""Documents -> what is true of each of their tokens, for labels of features.

Of every kind below a token has one concept or none. The first nine are the world's: found in
the text by its own templates and word lists, never by a model.

    whole      the whole expression that the token is part of: `name Alia Shelmore`
    entity     the word of the world that the token is part of: `month March`, `first name Alia`,
               `last name Shelmore`, `place Thornwick`, `place lead Upper`, `title word Amber`,
               `year 1872`, `day 14`, `number 3,482`
    role       `value of birth_date`, `subject of birth_date`: inside the value or the person of a
               sentence of that relation
    part       `token 2 of the value of birth_date`
    class      `name`, `place`, `title`, `date`, `number`: inside an expression of that form
    relation   `birth_date question`, `birth_date statement`: anywhere in such a sentence
    before     `before a date`: the next token begins an expression of that form
    place      `token 2 of a name`: which token of the expression
    in         `'18' in a date`: the token itself inside an expression of that form
    pair       `' was' ' born'`: the token and the one before it
    token      the token itself
    previous   the token before it
    next       the token after it
    position   `position 3`, for the first ten tokens after BOS
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fusion_lens.atlas import lexicon
from fusion_lens.atlas.relations import RELATIONS, Relation

KINDS = (
    *("whole", "entity", "role", "part", "class", "relation"),
    *("before", "place", "in", "token", "pair", "previous", "next", "position"),
)
WORLD_KINDS = KINDS[:9]
_POSITIONS = 10
_WORD = r"[A-Z][a-z]+"
_NAME = rf"{_WORD} {_WORD}"
_DATE = rf"\d{{1,2}} {_WORD} \d{{4}}"
_NUMBER = r"\d{1,2},\d{3}"
_TITLE = rf"The {_WORD} {_WORD}"
_PLACE = rf"{_WORD}(?: {_WORD})?"


@dataclass(frozen=True, slots=True)
class Span:
    """A half-open range of characters and what is true there."""

    start: int
    stop: int
    concept: str


@dataclass(frozen=True, slots=True)
class _Form:
    """How expressions of a class look, what is one, and what to call its words in turn (None: the
    word says nothing)."""

    name: str
    pattern: re.Pattern[str]
    is_one: Callable[[str], bool]
    words: tuple[str | None, ...]


_FORMS = (
    _Form("date", re.compile(_DATE), lexicon.is_date, ("day", "month", "year")),
    _Form("number", re.compile(_NUMBER), lexicon.is_number, ("number",)),
    _Form("title", re.compile(_TITLE), lexicon.is_title, (None, "title word", "title word")),
    _Form("name", re.compile(_NAME), lexicon.is_person_name, ("first name", "last name")),
    _Form("place", re.compile(_NAME), lexicon.is_place, ("place lead", "place")),
    _Form("place", re.compile(_WORD), lexicon.is_place, ("place",)),
)
_VALUES = {"Date": _DATE, "Place": _PLACE, "Person": _NAME, "Other": _TITLE, "Number": _NUMBER}


def token_concepts(tokenizer: Any, text: str) -> list[dict[str, str]]:
    """For each token of `text`, without BOS, its concept of every kind that it has one of."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    strings = [repr(tokenizer.decode([token])) for token in encoded.input_ids]
    concepts: list[dict[str, str]] = [{} for _ in strings]
    offsets = [_without_space(text, *offset) for offset in encoded.offset_mapping]
    for kind, spans in (
        ("whole", _wholes(text)),
        ("entity", _entities(text)),
        ("class", classes := _classes(text)),
        ("relation", _relations(text)),
        ("role", roles := list(_roles(text))),
    ):
        for span in spans:
            for place in _covered(offsets, span):
                concepts[place].setdefault(kind, span.concept)
    for span in classes:
        for number, place in enumerate(_covered(offsets, span), start=1):
            concepts[place].setdefault("place", f"token {number} of a {span.concept}")
            if number == 1 and place:
                concepts[place - 1]["before"] = f"before a {span.concept}"
    for span in roles:
        for number, place in enumerate(_covered(offsets, span), start=1):
            concepts[place].setdefault("part", f"token {number} of the {span.concept}")
    for place, string in enumerate(strings):
        concepts[place]["token"] = string
        if "class" in concepts[place]:
            concepts[place]["in"] = f"{string} in a {concepts[place]['class']}"
        if place:
            concepts[place]["pair"] = f"{strings[place - 1]} {string}"
            concepts[place]["previous"] = f"after {strings[place - 1]}"
            concepts[place - 1]["next"] = f"before {string}"
        if place < _POSITIONS:
            concepts[place]["position"] = f"position {place}"
    return concepts


def _classes(text: str) -> list[Span]:
    """Expressions of a form, none overlapping; earlier forms win."""
    taken: list[Span] = []
    for form in _FORMS:
        for found in _matches(form.pattern, text):
            span = Span(found.start(), found.end(), form.name)
            free = all(span.stop <= other.start or other.stop <= span.start for other in taken)
            if free and form.is_one(found.group()):
                taken.append(span)
    return sorted(taken, key=lambda span: span.start)


def _entities(text: str) -> Iterator[Span]:
    for span in _classes(text):
        words = list(re.finditer(r"\S+", text[span.start : span.stop]))
        form = next(
            form for form in _FORMS if form.name == span.concept and len(form.words) == len(words)
        )
        for word, name in zip(words, form.words, strict=True):
            if name is not None:
                concept = f"{name} {word.group()}"
                yield Span(span.start + word.start(), span.start + word.end(), concept)


def _wholes(text: str) -> Iterator[Span]:
    for span in _classes(text):
        yield Span(span.start, span.stop, f"{span.concept} {text[span.start : span.stop]}")


def _relations(text: str) -> Iterator[Span]:
    for relation, sentence, pattern in _TEMPLATES:
        for found in pattern.finditer(text):
            yield Span(found.start(), found.end(), f"{relation.key} {sentence}")


def _roles(text: str) -> Iterator[Span]:
    for relation, _, pattern in _TEMPLATES:
        for found in pattern.finditer(text):
            for group, role in (("name", "subject"), ("value", "value")):
                if group in found.groupdict():
                    yield Span(*found.span(group), f"{role} of {relation.key}")


def _matches(pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    """Matches that may overlap: of `Upper Thornwick Alia` both pairs are tried."""
    start = 0
    while found := pattern.search(text, start):
        yield found
        following = re.compile(r"\W|$").search(text, found.start())
        start = max(found.start() + 1, following.start() if following else 0)


def _compiled(relation: Relation, template: str) -> re.Pattern[str]:
    pattern = re.escape(template)
    pattern = pattern.replace(r"\{name\}", f"(?P<name>{_NAME})", 1)
    return re.compile(
        pattern.replace(r"\{value\}", f"(?P<value>{_VALUES[relation.answer_type]})", 1)
    )


_TEMPLATES = tuple(
    (relation, sentence, _compiled(relation, template))
    for relation in RELATIONS
    for sentence, templates in (
        ("question", relation.phrasings),
        ("statement", relation.statements),
    )
    for template in templates
)


def _without_space(text: str, start: int, stop: int) -> tuple[int, int]:
    """A token that begins with the space before its word starts at the word."""
    return (start + 1, stop) if stop - start > 1 and text[start] == " " else (start, stop)


def _covered(offsets: Sequence[tuple[int, int]], span: Span) -> list[int]:
    return [
        place
        for place, (start, stop) in enumerate(offsets)
        if start < span.stop and span.start < stop
    ]

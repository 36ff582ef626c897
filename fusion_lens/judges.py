"""A completion beside its gold answer -> CORRECT, INCORRECT or NOT_ATTEMPTED (SimpleQA's labels).

`LexicalJudge` reads the one answer a completion commits to (`claims`), looks for the gold answer in
it (`golds`: whole words, dates and numbers by value) and for what speaks against it. Deterministic,
offline; it knows spellings, not facts: a synonym, a translation or a surname alone is INCORRECT.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, final, runtime_checkable

from fusion_lens.claims import find_claim
from fusion_lens.errors import one_of
from fusion_lens.golds import FUNCTION_WORDS, MARK, WHO, Marked, mark_golds
from fusion_lens.scores import LABELS as LABELS
from fusion_lens.scores import extract_answer, normalise, terms, words
from fusion_lens.values import Date, Found, Number, agrees, find_values, unit_beside, unit_name


@dataclass(frozen=True, slots=True)
class JudgeItem:
    """A completion to judge, with its question, gold answer and the aliases of that. `whole`, where
    there is one, is prompt and completion as one text, which is what the paper's judges read."""

    question: str
    answer: str
    aliases: tuple[str, ...]
    completion: str
    whole: str | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """One of `LABELS` (None: unscored), a grade from 1 to 5 where the judge gives one, the answer
    it read in the completion, and in a few words why.

    Raises:
        ConfigError: if the label is none of them.
    """

    label: str | None
    grade: float | None
    answer: str
    explanation: str

    def __post_init__(self) -> None:
        if self.label is not None:
            one_of("a label", self.label, LABELS)


@runtime_checkable
class Judge(Protocol):
    """Whoever labels completions: one verdict per item, in their order. `grade`: whether it gives
    grades too."""

    name: str
    grade: bool

    def judge(self, items: Sequence[JudgeItem]) -> list[Verdict]:
        """One verdict per item, in their order."""


@final
class LexicalJudge:
    """Labels by spelling and value alone; gives no grade, and reads the completion in any case.

    CORRECT: the completion commits to gold or an alias, or to something more precise that holds it.
    NOT_ATTEMPTED: it is empty, refuses, or hedges without a guess, also where it names gold.
    INCORRECT: anything else, so also several candidates and a denial of gold. Unscored: a gold
    answer without a word.
    """

    name = "lexical"
    grade = False

    def judge(self, items: Sequence[JudgeItem]) -> list[Verdict]:
        return [_verdict(item) for item in items]


_BORN = re.compile(r"\b(?:born|birth)", re.IGNORECASE)
_DIED = re.compile(r"\b(?:die|died|death)\b", re.IGNORECASE)
_ASKED_UNIT = re.compile(r"\b(?:in|how many|how much) ([^\W\d_]+)", re.IGNORECASE)
_COUNT = re.compile(r"\bhow many\b", re.IGNORECASE)
# who defeated X: an answer that stands behind that verb has the other role
_ASKED_VERB = re.compile(
    r"^\W*(?:who|what|which)(?: \w+){0,2}? (\w+ed|beat|won|wrote)\b", re.IGNORECASE
)
_TITLES = frozenset(
    words(
        """
        sir dame lord lady dr mr mrs ms miss prof professor doctor president king queen prince
        princess emperor empress pope saint st general captain colonel major admiral lieutenant
        minister senator governor chancellor mayor judge justice bishop archbishop cardinal baron
        count countess duke duchess earl sheikh imam architect author composer painter physicist
        poet singer writer
        """
    )
)
_PLACE_WORDS = frozenset({"lake", "mount", "mt", "river", "fort", "port", "cape"})
_DIRECTIONS = frozenset(
    words(
        """
        new old north south east west northern southern eastern western central upper lower great
        little
        """
    )
)
_SETTLEMENTS = frozenset({"city", "town", "village", "state", "republic", "kingdom", "island"})
_OR = re.compile(
    rf"{MARK},? or\b(?! so\b| thereabouts\b| (?:the )?{MARK})|{MARK} ?/ ?\w|\w ?/ ?{MARK}"
    rf"|(?<!{MARK})(?<!{MARK},) or (?:(?:in|on|at|the|an?|it was|maybe|perhaps) )*{MARK}"
    rf"|{MARK}(?:, [^,]{{1,40}})+,? or\b|\b(?:either|both) (?:\w+ ){{0,4}}{MARK}",
    re.IGNORECASE,
)
_AND_AFTER = re.compile(
    rf"{MARK}(?:, [^,]{{1,40}})*,? (?:and|as well as) (?:then |the )?([^\W\d_]+)"
)
_AND_BEFORE = re.compile(rf"([^\W\d_]+),? (?:and|as well as) (?:the )?{MARK}")
_FOIL = re.compile(
    r"(?:\b(?:than|versus|vs\.?|near|outside|close to|far from|next to|before|beyond"
    r"|(?:chosen|preferred|victory|win|won) over"
    r"|(?:son|daughter|wife|husband|father|mother|brother|sister|student|pupil|mayor) (?:of|to))"
    r"|, (?:the|an?) \w+ (?:of|to)|(?:miles|kilometres|kilometers|km|hours|minutes) from"
    r"|(?<!named )(?<!called )\bafter)(?: the)? $",
    re.IGNORECASE,
)
_BOUND = re.compile(
    r"\b(?:more than|less than|fewer than|over|under|above|below|up to|at least|at most|nearly"
    r"|almost|before|after|exceeding)(?: the)? [$€£₹¥]?$",
    re.IGNORECASE,
)
_VERB = re.compile(r"(?:ed|ing|ly|wrote|won|made)$")
_CLAUSE_END = re.compile(r"[,;:]|\b(?:and|before|after|while)\b")
_JOINED = re.compile(r"(?:[\s,/&–—-]|\b(?:and|or|to|through|until|between|from|in|on|the)\b)*")


def _verdict(item: JudgeItem) -> Verdict:
    golds = [gold for gold in (item.answer, *item.aliases) if terms(gold)]
    answer = extract_answer(item.completion)
    if not golds:
        return Verdict(None, None, answer, "the gold answer has no word")
    if _keys(item.completion) in map(_keys, golds):
        return Verdict("CORRECT", None, answer, "is the gold answer")
    case = mark_golds(item.question, golds, item.completion)
    claim = find_claim(case.text, case.question)
    told = replace(case, text=claim.text)
    denied = re.search(MARK, claim.aside)
    if claim.silence or not (claim.text or denied):
        label, why = "NOT_ATTEMPTED", claim.silence or "names no answer"
    elif not re.search(MARK, claim.text):
        label, why = "INCORRECT", "sets the gold answer aside" if denied else "another answer"
    else:
        objection = _objection(told)
        label, why = ("INCORRECT", objection) if objection else ("CORRECT", "holds the gold answer")
    return Verdict(label, None, told.unmarked().strip() or answer, why)


def _keys(text: str) -> list[str | Date | Number]:
    return [term.key for term in terms(text)]


def _objection(case: Marked) -> str | None:
    """Why a claim that holds the gold answer does not give it; None where it does."""
    if _OR.search(case.text) or _joins_another(case):
        return "several candidates"
    reasons = [
        (_value_objection if _value_of(case, mark) else _name_objection)(case, mark)
        for mark in re.finditer(MARK, case.text)
    ]
    return None if None in reasons else reasons[0]


def _value_of(case: Marked, mark: re.Match[str]) -> Date | Number | None:
    match _keys(case.spelling(mark[0])):
        case [Date() | Number() as value]:
            return value
    return None


def _joins_another(case: Marked) -> bool:
    """Whether "and" joins another name to the gold answer."""
    asked = {word.casefold() for word in re.findall(r"\w+", case.question)}
    for pattern in (_AND_AFTER, _AND_BEFORE):
        for other in pattern.finditer(case.text):
            name = other[1].casefold()
            bare = len(re.findall(r"\w+", case.text)) <= 2
            if (other[1][0].isupper() or bare) and name not in FUNCTION_WORDS | asked:
                return True
    return False


def _name_objection(case: Marked, mark: re.Match[str]) -> str | None:
    before, after = case.text[: mark.start()], case.text[mark.end() :]
    verb = _ASKED_VERB.match(case.question)
    if verb and (
        re.search(rf"\b{verb[1]} (?:the |an? )?$", before, re.IGNORECASE)
        or re.match(rf" (?:is|was|were) {verb[1]} by\b", after, re.IGNORECASE)
    ):
        return "the gold answer in another role"
    foil = _FOIL.search(before)
    if foil and foil[0].strip() not in words(case.question):
        return "the gold answer beside the answer"
    return "a longer name" if _is_longer(case, mark[0], before, after) else None


def _is_longer(case: Marked, mark: str, before: str, after: str) -> bool:
    """Whether the gold answer is part of a longer name: York in New York, Paris in Paris Hilton."""
    spelt = case.spelling(mark)
    whole = normalise(spelt) in map(normalise, case.golds)
    # the Amazon River, where the question is which river
    asked = case.question.casefold() if whole else ""
    single = len(terms(spelt)) == 1
    return (
        _goes_on(after, asked, bare=not (WHO.search(case.question) or re.search(r"\w", before)))
        or (single and re.match(r" of [A-Z]", after) is not None)
        or _has_holder(before, case.question.casefold())
        or _comes_after_name(before, asked, case, lower=spelt[0].islower())
    )


def _goes_on(after: str, asked: str, *, bare: bool) -> bool:
    """Whether a name goes on after gold, or, where nothing else is said, a compound ("bicycle
    pumps")."""
    found = re.match(r" ([^\W\d_][\w'-]*)", after)
    if not found or found[1].casefold() in FUNCTION_WORDS or found[1].casefold() in asked:
        return False
    if found[1][0].isupper():
        return True
    rest = words(after)
    ends_in_word = after.strip(" .")[-1:].isalpha()
    compound = bare and len(rest) < 3 and ends_in_word and not _VERB.search(found[1].casefold())
    return compound and rest[-1] not in FUNCTION_WORDS


def _has_holder(before: str, question: str) -> bool:
    """Whether a name with "of" stands before gold: University of Oxford, not city of Oxford."""
    holder = re.search(r"\b([A-Z]\w*) of (?:the )?$", before)
    if not holder or holder[1].casefold() in _SETTLEMENTS | FUNCTION_WORDS:
        return False
    return holder[1].casefold() not in question


def _comes_after_name(before: str, asked: str, case: Marked, *, lower: bool) -> bool:
    """Whether a capitalised word before gold makes another name of it: New York, not Sir Isaac."""
    found = re.search(r"(?:^|\W)([A-Z][\w']*)\.? $", before)
    if not found or (lower and not found.start()):
        return False
    name = found[1].casefold()
    if name in _DIRECTIONS:
        return True
    if name in FUNCTION_WORDS | _TITLES or name in asked:
        return False
    return name in _PLACE_WORDS or not WHO.search(case.question)


def _value_objection(case: Marked, mark: re.Match[str]) -> str | None:
    value = _value_of(case, mark)
    if _BOUND.search(case.text[: mark.start()]):
        return "a bound on the gold answer"
    if isinstance(value, Number) and _other_unit(case, mark):
        return "another unit"
    for rival in _rivals(case, mark, value):
        first, second = sorted([(rival.start, rival.end), mark.span()])
        if (_BORN if mark.span() == first else _DIED).search(case.question):
            continue  # "(1903 - 1981)" answers both
        if _JOINED.fullmatch(case.text, first[1], second[0]):
            return "several candidates"
        pronoun = case.text[rival.start : rival.end].casefold() == "one"
        if not pronoun and _told_of(case, rival.start) >= _told_of(case, mark.start()):
            return "another value beside it"
    return None


def _other_unit(case: Marked, mark: re.Match[str]) -> bool:
    """Whether the unit beside the value is neither gold's nor, where gold has none, the one asked
    for; a count ("how many barrels") has none."""
    got = unit_beside(case.text, *mark.span())
    wanted = {
        unit_beside(gold, found.start, found.end)
        for gold in case.golds
        for found in find_values(gold)
    }
    asked = {unit_name(word) for word in _ASKED_UNIT.findall(case.question)}
    wanted = wanted - {None} or asked - {None}
    counts = bool(_COUNT.search(case.question))
    return got is not None and got not in wanted and (counts or bool(wanted))


def _rivals(case: Marked, mark: re.Match[str], value: Date | Number | None) -> list[Found]:
    """The other dates, or numbers, that the claim might mean as its answer: neither asked with, nor
    part of gold, nor (a number) of other things."""
    known = [found.value for text in (case.question, *case.golds) for found in find_values(text)]
    thing = _thing(case.text, mark.end())
    rivals = []
    for found in find_values(case.text):
        match found.value, value:
            case Number(), Number():
                other = _thing(case.text, found.end)
                rival = found.value.ordinal == value.ordinal and not (
                    thing and other and thing != other
                )
            case Date(), Date():
                rival = True
            case _:
                rival = False
        if rival and not any(agrees(found.value, k) or agrees(k, found.value) for k in known):
            rivals.append(found)
    return rivals


def _thing(text: str, end: int) -> str | None:
    word = re.match(r"[\s-]*([^\W\d_]+)", text[end:])
    name = word[1].casefold() if word else ""
    return None if name in FUNCTION_WORDS else name or None


def _told_of(case: Marked, position: int) -> int:
    """How many words of the question the clause around the position shares."""
    ends = [match.span() for match in _CLAUSE_END.finditer(case.text)]
    start = max((end for _, end in ends if end <= position), default=0)
    stop = min((begin for begin, _ in ends if begin >= position), default=len(case.text))
    told = {word for word in words(case.text[start:stop]) if len(word) > 2}
    asked = set(words(case.question)) - (FUNCTION_WORDS - {"born"})
    return sum(
        any(word.startswith(each) or each.startswith(word) for each in told)
        for word in asked
        if len(word) > 2
    )

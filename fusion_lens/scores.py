"""Completion text + gold answer -> scores. The text metrics; no model.

A completion is scored without its prompt. What cannot be scored has the value None ("unscored"),
never 0. Definitions: docs/method.md, restated in each docstring.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from fusion_lens.errors import one_of
from fusion_lens.values import Date, Number, agrees, find_values

ACCURATE = 0.6  # the composite score from which Fusion Steering calls a completion accurate
LABELS = ("CORRECT", "INCORRECT", "NOT_ATTEMPTED")

_WORD = re.compile(r"\w+")
_LARGEST_NLL = 700.0
_ARTICLES = frozenset({"a", "an", "the"})
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"“‘])(?:(?:[^\W\d_]\.)*[^\W\d_]|Dr|Mr|Mrs|Ms|St|Jr|Sr|Prof|vs|Mt)$"
)
# "No. 5" is a number, "No. She" an answer
_SENTENCE_END = re.compile(r"[.!?]+[\"')\]”’]*(?=\s|$)(?!(?<=\bNo\.)\s\d)")
# a sign or point that leads a number, a point inside one, and those that belong to none
_SIGN_OR_POINT = re.compile(r"(?<![\w.-])(-?\.?)(?=\d)|(?<=\d)(\.)(?=\d)|[-.]")
_CHUNK = re.compile(r"\S+")
_DASH = re.compile(r"\s?[-–—]\s?")


@dataclass(frozen=True, slots=True)
class Score:
    """What a scorer says of one completion: `value` (None: unscored), the `answer` it read in it,
    and in a few words why."""

    value: float | None
    answer: str
    explanation: str


@dataclass(frozen=True, slots=True)
class Term:
    """A word, date or number of a text, and the characters [start, end) that spell it."""

    key: str | Date | Number
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class LabelFigures:
    """SimpleQA's figures over the `n` labels that are not unscored; None where there are none.

    `attempted_accuracy` = correct / (correct + incorrect), 0 if none was attempted; `f` = harmonic
    mean of that and `correct`, 0 if their sum is 0.
    """

    correct: float | None
    incorrect: float | None
    not_attempted: float | None
    attempted_accuracy: float | None
    f: float | None
    n: int
    unscored: int


def words(text: str) -> list[str]:
    """The Unicode word runs (`\\w+`) of the NFKC-normalised, case-folded text, in order."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def token_overlap(completion: str, answer: str) -> float | None:
    """Share of the gold answer's distinct words that occur in the completion.

    |set(gold words) ∩ set(completion words)| / |set(gold words)|; None if gold has no word.
    """
    gold = set(words(answer))
    if not gold:
        return None
    return len(gold & set(words(completion))) / len(gold)


def extract_answer(completion: str) -> str:
    """The first non-empty line, up to the end of its first sentence.

    "Dr. Orla Tennick. She was ..." gives "Dr. Orla Tennick": a full stop after one letter or a
    title ends nothing, nor do those of "J.R.R. Tolkien".
    """
    line = next((line.strip() for line in completion.splitlines() if line.strip()), "")
    for end in _SENTENCE_END.finditer(line):
        if not _ABBREVIATION.search(line[: end.start()]):
            return line[: end.end()]
    return line


def normalise(text: str) -> str:
    """NFKC, case-folded, without punctuation and articles, single spaces.

    A decimal point and a leading minus belong to the number: without them 3.5 would equal 35.
    """
    text = unicodedata.normalize("NFKC", text).casefold().replace("−", "-")
    bare = "".join(c for c in text if c in "-." or not unicodedata.category(c).startswith("P"))
    kept = _SIGN_OR_POINT.sub(lambda found: found[1] or found[2] or "", bare)
    return " ".join(word for word in kept.split() if word not in _ARTICLES)


def exact_match(completion: str, answer: str, aliases: Sequence[str] = ()) -> bool:
    """Whether the extracted answer equals gold or an alias after `normalise`. This is what *right*
    means."""
    got = normalise(extract_answer(completion))
    return bool(got) and any(got == normalise(gold) for gold in (answer, *aliases))


@lru_cache(maxsize=4096)
def terms(text: str) -> tuple[Term, ...]:
    """The dates and numbers of the text by value, and what is between them as words after
    `normalise`. A dash between two values is the word "to"."""
    run: list[Term] = []
    values = find_values(text)
    for left, right in pairwise((None, *values, None)):
        start, end = left.end if left else 0, right.start if right else len(text)
        if left:
            run.append(Term(left.value, left.start, left.end))
        if left and right and _DASH.fullmatch(text, start, end):
            run.append(Term("to", start, end))
        else:
            run += _word_terms(text, start, end)
    return tuple(run)


def _word_terms(text: str, start: int, end: int) -> Iterator[Term]:
    for chunk in _CHUNK.finditer(text, start, end):
        bare = [
            i for i in range(*chunk.span()) if not unicodedata.category(text[i]).startswith("P")
        ]
        for word in normalise(chunk[0]).split():
            yield Term(word, bare[0], bare[-1] + 1)


def occurrences(run: Sequence[Term], gold: Sequence[Term]) -> list[tuple[int, int]]:
    """The characters [start, end) of every place where `run` says `gold`, term by term; a more
    precise date says the gold one."""
    spans = (run[i : i + len(gold)] for i in range(len(run) - len(gold) + 1))
    return [
        (span[0].start, span[-1].end)
        for span in spans
        if span and all(_says(found, wanted) for found, wanted in zip(span, gold, strict=True))
    ]


def _says(found: Term, gold: Term) -> bool:
    if isinstance(found.key, str) or isinstance(gold.key, str):
        return found.key == gold.key
    return agrees(found.key, gold.key)


def contained_match(completion: str, answer: str, aliases: Sequence[str] = ()) -> bool:
    """Whether gold or an alias occurs in the completion as a run of whole words, its dates and
    numbers by value: neither 5 nor 1990 is in "25", 1990 is in "March 3, 1990"."""
    run = terms(completion)
    return any(occurrences(run, terms(gold)) for gold in (answer, *aliases))


def distinct_2(completion: str) -> float | None:
    """Distinct / all word bigrams; None below two words."""
    run = words(completion)
    bigrams = list(pairwise(run))
    return len(set(bigrams)) / len(bigrams) if bigrams else None


def token_f1(completion: str, answer: str, aliases: Sequence[str] = ()) -> float | None:
    """The F1 of the extracted answer's words against gold's, as multisets; the best over gold and
    aliases. None if no gold has a word."""
    got = Counter(words(extract_answer(completion)))
    golds = [Counter(words(gold)) for gold in (answer, *aliases)]
    return max((_f1(got, gold) for gold in golds if gold), default=None)


def _f1(got: Counter[str], gold: Counter[str]) -> float:
    return 2 * (got & gold).total() / (got.total() + gold.total())


def repetition(completion: str) -> float | None:
    """The share of words that the longest n-gram (n >= 2) covers which occurs twice without
    overlap: 2n over all words. 0 where none does; None below two words."""
    run = words(completion)
    if len(run) < 2:
        return None
    for n in range(len(run) // 2, 1, -1):
        first: dict[tuple[str, ...], int] = {}
        for start in range(len(run) - n + 1):
            if start - first.setdefault(tuple(run[start : start + n]), start) >= n:
                return 2 * n / len(run)
    return 0.0


def text_scores(completion: str, answer: str, aliases: Sequence[str] = ()) -> dict[str, Score]:
    """Every text metric of one completion by name, with the answer read in it and why."""
    got, golds = extract_answer(completion), (answer, *aliases)
    wanted, said = set(words(answer)), words(completion)
    told = "gold has no word"
    if wanted:
        told = f"{len(wanted & set(said))} of {len(wanted)} words of gold"
    equal = [gold for gold in golds if exact_match(completion, gold)]
    held = [gold for gold in golds if contained_match(completion, gold)]

    def score(value: float | None, why: str) -> Score:
        return Score(value, got, why)

    return {
        "overlap": score(token_overlap(completion, answer), told),
        "exact_match": score(
            float(bool(equal)), f"is {equal[0]!r}" if equal else "is no gold answer"
        ),
        "contained_match": score(float(bool(held)), f"holds {held[0]!r}" if held else "holds none"),
        "token_f1": score(token_f1(completion, answer, aliases), "best over gold and aliases"),
        "distinct_2": score(distinct_2(completion), f"of {len(said)} words"),
        "repetition": score(repetition(completion), f"of {len(said)} words"),
    }


def perplexity_of(nll: float | None) -> float | None:
    """exp(nll), nll in nats per token; None where that is unscored or too large for a float."""
    return None if nll is None or nll > _LARGEST_NLL else math.exp(nll)


def clipped(perplexity: float | None) -> float:
    """`min(PPL/100, 1)`; a perplexity that cannot be had counts 1."""
    return 1.0 if perplexity is None else min(perplexity / 100.0, 1.0)


def objective(overlap: float, perplexity: float | None, weight: float = 0.7) -> float:
    """`w*overlap - (1-w)*min(PPL/100, 1)`, rounded to 6 decimals.

    Rounded because ties are the rule and 1e-7 of noise on a tie changes what a sampler proposes
    next.
    """
    return round(weight * overlap - (1.0 - weight) * clipped(perplexity), 6)


def composite(overlap: float, grade: float | None) -> float:
    """`0.5*overlap + 0.5*grade/5`, grade in [1, 5]; a missing grade counts 0. Fusion Steering calls
    a completion accurate from `ACCURATE` on."""
    return 0.5 * overlap + 0.5 * (grade or 0.0) / 5.0


def label_figures(labels: Sequence[str | None]) -> LabelFigures:
    """The shares of SimpleQA's three labels; None is unscored and counts in no share.

    Raises:
        ConfigError: if a label is none of `LABELS`.
    """
    scored = [one_of("a label", label, LABELS) for label in labels if label is not None]
    n, unscored = len(scored), len(labels) - len(scored)
    if not n:
        return LabelFigures(None, None, None, None, None, n, unscored)
    right, wrong, silent = (scored.count(label) for label in LABELS)
    return LabelFigures(
        right / n,
        wrong / n,
        silent / n,
        *of_attempted(float(right), float(wrong), float(n)),
        n,
        unscored,
    )


def of_attempted(correct: float, incorrect: float, n: float) -> tuple[float, float]:
    """`attempted_accuracy` and `f` of `LabelFigures`, of these numbers among `n`."""
    accuracy = correct / (correct + incorrect) if correct + incorrect else 0.0
    f = 2 * accuracy * (correct / n) / (accuracy + correct / n) if correct else 0.0
    return accuracy, f

"""Completion text + gold answer -> scores. The text metrics; no model.

A completion is scored without its prompt. What cannot be scored has the value None ("unscored"),
never 0. Definitions: docs/method.md, restated in each docstring.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise

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


def distinct_2(completion: str) -> float | None:
    """Distinct / all word bigrams; None below two words."""
    run = words(completion)
    bigrams = list(pairwise(run))
    return len(set(bigrams)) / len(bigrams) if bigrams else None


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

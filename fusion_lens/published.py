"""Fusion Steering's own overlap (arXiv 2505.22572), for runs that follow the paper.

The texts it is given there hold the prompt too. Words are nltk's: the text is lower-cased and cut
into sentences after `.`, `!` or `?` and white space, and every sentence goes through
`NLTKWordTokenizer`, because that leaves the full stop of an inner `Paris.` on its word.
`nltk.word_tokenize` itself needs a download.
"""

from __future__ import annotations

import re
import string
from functools import cache
from typing import Any

from fusion_lens.errors import MissingExtraError

_SENTENCE_BREAK = re.compile(r"(?<=[.!?])\s+")


def published_words(text: str) -> list[str]:
    """The lower-cased nltk words of a text, those left out that are substrings of
    `string.punctuation` (so quotes, written `` or '', and ... stay).

    Raises:
        MissingExtraError: if nltk is not installed.
    """
    tokenizer = _tokenizer()
    sentences = _SENTENCE_BREAK.split(text.lower().strip())
    found = (word for sentence in sentences for word in tokenizer.tokenize(sentence))
    return [word for word in found if word not in string.punctuation]


def published_overlap(text: str, answer: str) -> float:
    """|set(gold words) ∩ set(words of the text)| / |set(gold words)|, rounded to 4 decimals; 0 if
    gold has no word."""
    gold = set(published_words(answer))
    if not gold:
        return 0.0
    return round(len(gold & set(published_words(text))) / len(gold), 4)


@cache
def _tokenizer() -> Any:
    try:
        from nltk.tokenize.destructive import NLTKWordTokenizer
    except ImportError as error:
        raise MissingExtraError("nltk", "paper") from error
    return NLTKWordTokenizer()

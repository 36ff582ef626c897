"""Can something trivial tell two sets of texts apart? Their length, one token, or their tokens as a
bag: fitted on one half of each pair of sets, scored on the other.

A method that reads activations shows something only where it beats these. Knows no model: a text is
its tokens.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from math import log

from fusion_lens.atlas.probes import Share

Tokens = Sequence[int]
Sides = tuple[Sequence[Tokens], Sequence[Tokens]]
"""Texts of the one and of the other set."""

Rule = Callable[[Tokens], bool]
"""Whether a text is of the one set."""


def by_length(fit: Sides) -> Rule:
    """The threshold, and the side of it, that is right most often on `fit`."""
    lengths = sorted({len(text) for side in fit for text in side})
    rules = [_longer(length, above) for length in lengths for above in (True, False)]
    return max(rules, key=lambda rule: score(rule, fit).hits)


def by_token(fit: Sides) -> Rule:
    """The token whose presence, or absence, is right most often on `fit`."""
    tokens = sorted({token for side in fit for text in side for token in text})
    rules = [_present(token, there) for token in tokens for there in (True, False)]
    return max(rules, key=lambda rule: score(rule, fit).hits)


def by_bag(fit: Sides) -> Rule:
    """Naive Bayes over the tokens present, each counted once, with add-one smoothing."""
    counts = [Counter(token for text in side for token in set(text)) for side in fit]
    weight = {
        token: log((counts[0][token] + 1) / (len(fit[0]) + 2))
        - log((counts[1][token] + 1) / (len(fit[1]) + 2))
        for token in counts[0].keys() | counts[1].keys()
    }
    return lambda text: sum(weight.get(token, 0.0) for token in sorted(set(text))) > 0


def score(rule: Rule, sides: Sides) -> Share:
    """How many texts of both sets the rule puts on their side."""
    hits = sum(map(rule, sides[0])) + sum(not rule(text) for text in sides[1])
    return Share(hits, len(sides[0]) + len(sides[1]))


def balanced(one: Sequence[Tokens], other: Sequence[Tokens]) -> Sides:
    """Equally many of both, evenly taken from the larger set, so that chance is one half."""
    n = min(len(one), len(other))
    return _thinned(one, n), _thinned(other, n)


def _thinned(texts: Sequence[Tokens], n: int) -> list[Tokens]:
    return [texts[i * len(texts) // n] for i in range(n)]


def _longer(length: int, above: bool) -> Rule:
    return lambda text: (len(text) >= length) is above


def _present(token: int, there: bool) -> Rule:
    return lambda text: (token in text) is there

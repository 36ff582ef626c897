"""How often can one gold answer of a question file pass for another's, and what does the lexical
judge say then?

Run: `python benchmarks/judge_pairs.py FILE`. An ordered pair of questions is *ambiguous* if one
gold holds the other after normalisation, or both tell a common date or number. All are counted and
judged, and a seeded 50 of them shown.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fusion_lens.judges import JudgeItem, LexicalJudge
from fusion_lens.questions import Question, load_questions
from fusion_lens.scores import normalise
from fusion_lens.values import Date, Number, agrees, find_values

SHOWN = 50


@dataclass(frozen=True, slots=True)
class Gold:
    """A gold answer as it is compared with others."""

    text: str
    values: tuple[Date | Number, ...]

    @staticmethod
    def of(question: Question) -> Gold:
        """Read it once: it is compared with all others."""
        values = tuple(found.value for found in find_values(question.answer))
        return Gold(normalise(question.answer), values)

    def may_mean(self, other: Gold) -> bool:
        """Whether one holds the other, or both tell a common date or number."""
        if self.text in other.text or other.text in self.text:
            return True
        return any(agrees(a, b) or agrees(b, a) for a in self.values for b in other.values)


def ambiguous_pairs(golds: Sequence[Gold]) -> Iterator[tuple[int, int]]:
    """Places of every two different golds of which one may mean the other, in both orders."""
    for i, one in enumerate(golds):
        for j in range(i + 1, len(golds)):
            if one.text != golds[j].text and one.may_mean(golds[j]):
                yield i, j
                yield j, i


def main() -> None:
    """Count, judge and show."""
    questions = load_questions(sys.argv[1])
    golds = [Gold.of(question) for question in questions]
    equal = Counter(gold.text for gold in golds)
    pairs = list(ambiguous_pairs(golds))
    items = [
        JudgeItem(questions[i].question, questions[i].answer, (), questions[j].answer)
        for i, j in pairs
    ]
    verdicts = LexicalJudge().judge(items)
    shares = Counter(verdict.label for verdict in verdicts)
    print(f"{len(questions):,} questions, {sum(n for n in equal.values() if n > 1):,} of them with")
    print("a gold answer that another has too, normalised (those pairs are left out)")
    print(f"{len(pairs):,} ambiguous ordered pairs: {dict(shares.most_common())}")
    for n in sorted(random.Random(0).sample(range(len(pairs)), min(SHOWN, len(pairs)))):
        label, why = verdicts[n].label, verdicts[n].explanation
        print(f"{label:13} {items[n].completion!r} for {items[n].answer!r}: {why}")


if __name__ == "__main__":
    main()

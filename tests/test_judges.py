"""`data/judged.jsonl`: pairs labelled by hand, each before the judge ran on it, half of them made
to mislead. An answer that says less than gold ("1990" for March 3, 1990) counts as INCORRECT.

Of each answer type, 1 to 60 were written with the rules, 61 to 80 and 81 to 100 against them, and
the rules then corrected; for 101 to 120 no rule was changed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fusion_lens.errors import ConfigError
from fusion_lens.judges import LABELS, Judge, JudgeItem, LexicalJudge, Verdict
from fusion_lens.questions import Question, load_questions
from fusion_lens.scores import normalise
from fusion_lens.values import agrees, find_values

JUDGED = [
    json.loads(line)
    for line in (Path(__file__).parent / "data/judged.jsonl").read_text("utf-8").splitlines()
]
TYPES = ("Date", "Person", "Place", "Number", "Other")
RIGHT, WRONG, SILENT = LABELS


def verdict(question: str, answer: str, completion: str, *aliases: str) -> Verdict:
    return LexicalJudge().judge([JudgeItem(question, answer, aliases, completion)])[0]


def label(question: str, answer: str, completion: str, *aliases: str) -> str | None:
    return verdict(question, answer, completion, *aliases).label


@pytest.mark.parametrize(
    ("completion", "expected", "why"),
    [
        ("Paris", RIGHT, "is the gold answer"),
        ("the PARIS!", RIGHT, "is the gold answer"),
        ("It is Paris.\nIt lies on the Seine.", RIGHT, "holds the gold answer"),
        ("Paris, France", RIGHT, "holds the gold answer"),
        ("I'm not sure, but I think it is Paris.", RIGHT, "holds the gold answer"),
        ("Not Rome but Paris", RIGHT, "holds the gold answer"),
        ("Rome", WRONG, "another answer"),
        ("Rome. Paris is smaller.", WRONG, "another answer"),
        ("It was not Paris", WRONG, "sets the gold answer aside"),
        ("Paris, London or Rome", WRONG, "several candidates"),
        ("Paris or Rome", WRONG, "several candidates"),
        ("Paris and Rome", WRONG, "several candidates"),
        ("1. Paris\n2. Rome", WRONG, "several candidates"),
        ("Paris Hilton", WRONG, "a longer name"),
        ("University of Paris", WRONG, "a longer name"),
        ("a village near Paris", WRONG, "the gold answer beside the answer"),
        ("", SILENT, "names no answer"),
        ("?", SILENT, "names no answer"),
        ("I am not sure whether it was Paris.", SILENT, "refuses"),
        ("Perhaps Paris.", SILENT, "hedges"),
        ("Is it Paris?", SILENT, "asks back"),
        ("It was not Rome.", SILENT, "names no answer"),
    ],
)
def test_a_name_is_right_where_the_completion_commits_to_it_alone(
    completion: str, expected: str, why: str
) -> None:
    got = verdict("What is the capital?", "Paris", completion)
    assert (got.label, got.explanation) == (expected, why)


@pytest.mark.parametrize(
    ("answer", "completion", "expected"),
    [
        ("October 23, 2018", "2018-10-23", RIGHT),
        ("1990", "It was on March 3, 1990.", RIGHT),
        ("March 3, 1990", "1990", WRONG),
        ("3 April 1984", "4 March 1984", WRONG),
        ("1990", "either 1990 or 1991", WRONG),
        ("1990", "between 1985 and 1990", WRONG),
        ("1990", "after 1990", WRONG),
        ("1990", "not until 1990", RIGHT),
        ("1990", "the 1990s", WRONG),
        ("5 May 1990", "05/05/1990", RIGHT),
        ("4 May 1990", "04/05/1990", WRONG),  # or 5 April
    ],
)
def test_a_date_is_right_by_value_and_may_be_more_precise(
    answer: str, completion: str, expected: str
) -> None:
    assert label("When did it open?", answer, completion) == expected


def test_of_two_dates_the_one_told_of_what_was_asked_counts() -> None:
    opened = "It was built in 1961 and opened to the public in 1963."
    assert label("When was it opened to the public?", "1963", opened) == RIGHT
    assert label("When was it opened to the public?", "1961", opened) == WRONG
    life = "Ada Rank (1903 - 1981) was a dancer."
    assert label("When was Ada Rank born?", "1903", life) == RIGHT
    assert label("When was Ada Rank born?", "1981", life) == WRONG
    assert label("When did Ada Rank die?", "1981", life) == RIGHT


@pytest.mark.parametrize(
    ("question", "answer", "completion", "expected"),
    [
        ("How many?", "25", "25", RIGHT),
        ("How many?", "25", "5", WRONG),
        ("How many?", "5", "25", WRONG),
        ("How many?", "14", "1/4", WRONG),
        ("How many?", "1500", "one thousand five hundred", RIGHT),
        ("How many?", "25", "more than 25", WRONG),
        ("How many?", "25", "25 or 26", WRONG),
        ("How many cats?", "9", "9 cats and 4 dogs", RIGHT),
        ("How many in 1990?", "12", "In 1990 there were 12.", RIGHT),
        ("How many?", "3", "I count 3: one red, one blue, one green.", RIGHT),
        ("How many votes?", "66 votes", "66", RIGHT),
        ("How many votes?", "66", "66%", WRONG),
        ("What percentage?", "66%", "66", RIGHT),
        ("How long is it?", "5 km", "5 kilometres", RIGHT),
        ("How long is it?", "5 km", "5 miles", WRONG),
        ("How long is it in kilometres?", "5", "5 miles", WRONG),
        ("How many barrels?", "300", "300 tonnes", WRONG),
        ("How cold was it?", "-5 °C", "5 °C", WRONG),
    ],
)
def test_a_number_is_right_by_value_and_with_no_other_unit(
    question: str, answer: str, completion: str, expected: str
) -> None:
    assert label(question, answer, completion) == expected


@pytest.mark.parametrize(
    ("question", "answer", "completion", "expected"),
    [
        ("Who wrote it?", "J. R. R. Tolkien", "J.R.R. Tolkien wrote it.", RIGHT),
        ("Who wrote it?", "Prokofiev", "Sergei Prokofiev", RIGHT),
        ("Who wrote it?", "Isaac Newton", "Sir Isaac Newton", RIGHT),
        ("Who wrote it?", "Henry James", "Henry James Byron", WRONG),
        ("Who wrote it?", "Henry James", "Henry James's brother", WRONG),
        ("Who wrote it?", "Henry James", "the brother of Henry James", WRONG),
        ("Who defeated Ann Lee?", "Bo Lind", "Bo Lind defeated Ann Lee.", RIGHT),
        ("Who defeated Ann Lee?", "Bo Lind", "Ann Lee defeated Bo Lind.", WRONG),
        ("Who defeated Ann Lee?", "Bo Lind", "Bo Lind was defeated by Ann Lee.", WRONG),
        ("Who wrote it with Crick?", "Watson", "Crick and Watson", RIGHT),
        ("Which river is it?", "Amazon", "the Amazon River", RIGHT),
        ("Which city is it?", "York", "New York", WRONG),
        ("Which city is it?", "Oxford", "the city of Oxford", RIGHT),
        ("Which city is it?", "Frankfurt", "Frankfurt of Oder", WRONG),
        ("What did she sell?", "bicycle", "bicycle pumps", WRONG),
        ("What did she sell?", "bicycle", "bicycle obviously", RIGHT),
        ("Which film is it?", "Don't Look", "It is called Don't Look.", RIGHT),
        ("Which film is it?", "Either Way", "Either Way", RIGHT),
    ],
)
def test_a_name_inside_another_or_in_another_role_is_wrong(
    question: str, answer: str, completion: str, expected: str
) -> None:
    assert label(question, answer, completion) == expected


def test_an_alias_is_as_right_as_gold_also_beside_it() -> None:
    assert label("Which city is it?", "Mumbai", "Bombay", "Bombay") == RIGHT
    assert label("Which city is it?", "Mumbai", "Mumbai or Bombay", "Bombay") == RIGHT
    assert label("Which city is it?", "Mumbai", "Mumbai or Delhi", "Bombay") == WRONG


def test_a_gold_answer_without_a_word_leaves_the_completion_unscored() -> None:
    got = verdict("What?", "?!", "Paris")
    assert got == Verdict(None, None, "Paris", "the gold answer has no word")
    assert verdict("What?", "?!", "Paris", "Paris").label == RIGHT


def test_a_verdict_holds_the_answer_that_was_read_and_no_grade() -> None:
    got = verdict("Who?", "Zoé Lefèvre", "Let me think. It was Zoé Lefèvre, not Ada.")
    assert got == Verdict(RIGHT, None, "It was Zoe Lefevre", "holds the gold answer")


def test_verdicts_come_in_the_order_of_the_items_and_alike_every_time() -> None:
    items = [JudgeItem("Where?", "Paris", (), text) for text in ("Paris", "Rome", "")]
    judge: Judge = LexicalJudge()
    assert isinstance(judge, Judge)
    assert [got.label for got in judge.judge(items)] == [RIGHT, WRONG, SILENT]
    assert judge.judge(items) == judge.judge(items)
    assert judge.judge([]) == []
    assert not isinstance(object(), Judge)


def test_another_label_is_refused() -> None:
    with pytest.raises(ConfigError, match="a label must be one of CORRECT, INCORRECT, NOT_ATTEM"):
        Verdict("RIGHT", None, "", "")


def test_the_judged_pairs_are_balanced_and_named_once() -> None:
    assert len({row["id"] for row in JUDGED}) == len(JUDGED) == 600
    for answer_type in TYPES:
        rows = [row for row in JUDGED if row["answer_type"] == answer_type]
        assert [sum(row["adversarial"] for row in rows), len(rows)] == [60, 120]
    assert {row["label"] for row in JUDGED} == set(LABELS)


def judged(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str | None]]:
    """The label by hand and the judge's, row by row."""
    items = [
        JudgeItem(row["question"], row["answer"], tuple(row["aliases"]), row["completion"])
        for row in rows
    ]
    return [
        (row["label"], got.label)
        for row, got in zip(rows, LexicalJudge().judge(items), strict=True)
    ]


def kappa(pairs: Sequence[tuple[str, str | None]]) -> float:
    """Cohen's: agreement beyond what the two's shares of labels give by chance."""
    n = len(pairs)
    agreed = sum(a == b for a, b in pairs) / n
    by_chance = sum(
        sum(a == name for a, _ in pairs) * sum(b == name for _, b in pairs) for name in LABELS
    ) / (n * n)
    return (agreed - by_chance) / (1 - by_chance)


def test_kappa_is_agreement_beyond_chance() -> None:
    assert kappa([(RIGHT, RIGHT), (WRONG, WRONG)]) == 1.0
    assert kappa([(RIGHT, RIGHT), (RIGHT, WRONG), (WRONG, RIGHT), (WRONG, WRONG)]) == 0.0
    pairs = [*[(RIGHT, RIGHT)] * 4, *[(RIGHT, WRONG)] * 2, *[(SILENT, SILENT)] * 4]
    assert kappa(pairs) == pytest.approx((0.8 - 0.40) / (1 - 0.40))


@pytest.mark.parametrize(
    ("adversarial", "bound"),
    [
        (False, 0.95),  # measured 0.989 [0.971, 1.000], 298 of 300 labels the same
        (True, 0.82),  # 0.885 [0.835, 0.930], 279 of 300; both halves together 0.938
    ],
)
def test_the_judge_agrees_with_the_labels_by_hand(adversarial: bool, bound: float) -> None:
    assert kappa(judged([row for row in JUDGED if row["adversarial"] is adversarial])) > bound


@pytest.mark.parametrize(
    ("first", "last", "bound"),
    [
        (1, 60, 0.93),  # measured 0.972 [0.944, 0.994]; 0.905 when the judge first saw them
        (61, 80, 0.82),  # 0.903 [0.820, 0.968]; 0.671 [0.539, 0.792] at first
        (81, 100, 0.73),  # 0.838 [0.735, 0.929]; 0.572 [0.435, 0.700] at first
        (101, 120, 0.9),  # 0.969 [0.920, 1.000], at first as now
    ],
)
def test_the_judge_agrees_on_every_part_of_the_pairs(first: int, last: int, bound: float) -> None:
    rows = [row for row in JUDGED if first <= int(row["id"].split("-")[1]) <= last]
    assert kappa(judged(rows)) > bound


@pytest.fixture(scope="module")
def simpleqa(shared_data: Path) -> list[Question]:
    return load_questions(shared_data / "data/simpleqa/simple_qa_test_set.csv")


def labels_of(pairs: Sequence[tuple[Question, str]]) -> list[str | None]:
    items = [JudgeItem(one.question, one.answer, (), text) for one, text in pairs]
    return [got.label for got in LexicalJudge().judge(items)]


def test_every_gold_answer_of_simpleqa_is_right_as_its_own_completion(
    simpleqa: list[Question],
) -> None:
    assert set(labels_of([(one, one.answer) for one in simpleqa])) == {RIGHT}
    sentences = [(one, f"It was {one.answer.strip().rstrip('.')}.") for one in simpleqa[::4]]
    assert set(labels_of(sentences)) == {RIGHT}


@pytest.mark.slow
def test_the_gold_answers_of_other_simpleqa_questions_are_wrong(
    simpleqa: list[Question],
) -> None:
    known = [
        (normalise(one.answer), [found.value for found in find_values(one.answer)])
        for one in simpleqa
    ]
    rng = random.Random(0)
    pairs: list[tuple[Question, str]] = []
    ambiguous = 0
    for i, (text, values) in enumerate(known):
        chosen: list[int] = []
        while len(chosen) < 5:
            j = rng.randrange(len(known))
            other, others = known[j]
            contained = text in other or other in text
            shared = any(agrees(a, b) or agrees(b, a) for a in values for b in others)
            if contained or shared:
                ambiguous += 1
            elif j not in chosen:
                chosen.append(j)
        pairs += [(simpleqa[i], simpleqa[j].answer) for j in chosen]
    assert set(labels_of(pairs)) == {WRONG}
    assert len(pairs) == 5 * 4326
    assert ambiguous < 0.02 * len(pairs)  # 284 were drawn and passed over

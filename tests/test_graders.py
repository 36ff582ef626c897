from __future__ import annotations

import math

import pytest

from fusion_lens.decoding import Completion
from fusion_lens.graders import Graded, grade
from fusion_lens.questions import Question


def test_a_grade_holds_every_score_of_the_completion_alone() -> None:
    question = Question(id="q", question="Who wrote it?", answer="Ada Lovelace")
    completion = Completion("\nAda Byron\nAda wrote it. Ada wrote it.", (5, 6), ended=True)
    graded = grade(question, completion, math.log(50.0))
    assert graded.answer == "Ada Byron"
    assert graded.overlap == 0.5
    assert graded.exact_match == 0.0
    assert graded.perplexity == pytest.approx(50.0)
    # 0.7 * 1/2 - 0.3 * 50/100
    assert graded.objective == 0.2
    # ada byron, byron ada, ada wrote, wrote it, it ada, ada wrote, wrote it: 5 of 7
    assert graded.distinct_2 == pytest.approx(5 / 7)


def test_a_completion_of_logits_that_are_not_finite_has_the_worst_objective() -> None:
    question = Question(id="q", question="Who?", answer="Ada")
    graded = grade(question, Completion("Ada", (5,), ended=True, finite=False), 0.1)
    assert (graded.overlap, graded.perplexity, graded.exact_match) == (None, None, 0.0)
    assert graded.objective == -0.3


def test_an_nll_beyond_what_a_float_can_exponentiate_is_an_unscored_perplexity() -> None:
    question = Question(id="q", question="Who?", answer="Ada")
    graded = grade(question, Completion("Ada", (5,), ended=True), 2000.0)
    assert graded.nll == 2000.0
    assert graded.perplexity is None
    assert graded.objective == 0.4


def test_an_alias_is_right_and_an_unscored_perplexity_costs_a_full_term() -> None:
    question = Question(id="q", question="Who?", answer="Ada", aliases=("Lady Lovelace",))
    graded = grade(question, Completion("Lady Lovelace.", (5,), ended=True), None)
    assert graded.exact_match == 1.0
    assert graded.perplexity is None
    assert graded.objective == -0.3


ASKED = Question(id="q", question="Who wrote it?", answer="Ada Lovelace")


def graded(text: str, perplexity: float | None = 50.0) -> Graded:
    nll = None if perplexity is None else math.log(perplexity)
    return grade(ASKED, Completion(text, (5,), ended=True), nll)


def test_two_completions_stand_beside_each_other_with_the_words_marked_that_differ() -> None:
    steered, unsteered = graded("\nAda Lovelace", 20.0), graded("Ada <b>\n")
    table = steered.beside(unsteered, "Who?", ("a note",))
    assert (table.title, table.notes) == ("Who?", ("a note",))
    assert table.header == ("", "unsteered", "steered")
    assert table.rows == (
        ("text", [("Ada ", False), ("<b>", True)], [("Ada ", False), ("Lovelace", True)]),
        ("exact match", "no", "yes"),
        ("overlap", "0.50", "1.00"),
        ("perplexity", "50.00", "20.00"),
        ("objective", "+0.200", "+0.640"),
    )
    page = table.to_html()
    assert "Ada <mark>&lt;b&gt;</mark>" in page
    assert "<b>" not in page


def test_without_an_unsteered_completion_its_column_is_empty() -> None:
    table = graded("Ada Lovelace").beside(None, "Who?")
    assert table.rows == (
        ("text", "", "Ada Lovelace"),
        ("exact match", "", "yes"),
        ("overlap", "", "1.00"),
        ("perplexity", "", "50.00"),
        ("objective", "", "+0.550"),
    )
    assert table.notes == ()


def test_what_is_unscored_says_so_beside_a_score() -> None:
    table = graded("Ada", None).beside(graded("", 50.0), "Who?")
    assert table.rows[0] == ("text", [], [("Ada", True)])
    assert {name: cells for name, *cells in table.rows}["perplexity"] == ["50.00", "unscored"]

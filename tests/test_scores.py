from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_lens.errors import ConfigError
from fusion_lens.scores import (
    ACCURATE,
    LabelFigures,
    Score,
    composite,
    contained_match,
    distinct_2,
    exact_match,
    extract_answer,
    label_figures,
    normalise,
    objective,
    occurrences,
    repetition,
    terms,
    text_scores,
    token_f1,
    token_overlap,
    words,
)
from fusion_lens.values import Date, Number

# what answers are made of, and what the rules turn on: signs, points, articles, wide forms
PIECES = st.sampled_from(
    [*"aZé05٣.,-−–'\"()!?_$% \n", "the ", "ß", "İ", "①", "ﬁ", "ΐ", "½", "\u00a0", "…", "’", "“"]
)
ANSWERS = st.lists(PIECES, max_size=12).map("".join)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Red book", ["the", "red", "book"]),
        ("Straße ﬁne ＡＢＣ", ["strasse", "fine", "abc"]),  # NFKC, then case-folded
        ("O'Neil's 3.5", ["o", "neil", "s", "3", "5"]),
        ("東京 2024年", ["東京", "2024年"]),
        ("?!", []),
    ],
)
def test_words_are_runs_of_word_characters_after_nfkc_and_case_folding(
    text: str, expected: list[str]
) -> None:
    assert words(text) == expected


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("It was Ada Lovelace.", "Ada Lovelace", 2 / 2),
        ("Lovelace", "Ada Lovelace", 1 / 2),
        ("Grace Hopper", "Ada Lovelace", 0 / 2),
        ("a red, red book", "the red red book", 2 / 3),  # {red, book} of {the, red, book}
        ("red " * 9, "red book", 1 / 2),  # saying a word often is no more than saying it
        ("ＳＴＲＡＳＳＥ", "Straße", 1 / 1),
        ("", "Ada", 0 / 1),
    ],
)
def test_overlap_is_the_share_of_distinct_gold_words_in_the_completion(
    completion: str, answer: str, expected: float
) -> None:
    assert token_overlap(completion, answer) == expected


def test_overlap_with_a_gold_answer_without_words_is_unscored_not_zero() -> None:
    assert token_overlap("anything", "?!") is None


@given(ANSWERS, ANSWERS)
def test_a_completion_that_holds_the_answer_overlaps_fully(answer: str, rest: str) -> None:
    expected = 1.0 if words(answer) else None
    assert token_overlap(f"{rest} {answer} {rest}", answer) == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("Ada Lovelace. She wrote it in 1843.", "Ada Lovelace."),
        ("Ada Lovelace\nShe wrote it.", "Ada Lovelace"),
        ("\n \n  Ada Lovelace  \nmore", "Ada Lovelace"),
        ("Ada Lovelace", "Ada Lovelace"),
        ("Really?! Yes.", "Really?!"),
        ("Dr. Orla Tennick. She was born here.", "Dr. Orla Tennick."),
        ("She lives in St. Ives. It rains.", "She lives in St. Ives."),
        ("J. K. Rowling. She wrote it.", "J. K. Rowling."),
        ("J.R.R. Tolkien. He wrote it.", "J.R.R. Tolkien."),
        ("the U.S. Navy. It sailed.", "the U.S. Navy."),
        ("“J. Smith” said so. Yes.", "“J. Smith” said so."),
        ("She said “No.” Then she left.", "She said “No.”"),
        ('"Red." (He nodded.) Then', '"Red."'),
        ("It is 3.5 m. High.", "It is 3.5 m. High."),  # one letter ends nothing
        ("It is 3.5. High.", "It is 3.5."),
        ("7. She had seven cats.", "7."),  # one digit is an answer
        ("No. She was never there.", "No."),
        ("Symphony No. 5. It is loud.", "Symphony No. 5."),
        ("www.example.org is it", "www.example.org is it"),
        ("", ""),
        (" \n\t\n", ""),
    ],
)
def test_the_extracted_answer_is_the_first_sentence_of_the_first_line(
    completion: str, expected: str
) -> None:
    assert extract_answer(completion) == expected


@given(ANSWERS)
def test_the_extracted_answer_is_stable_and_begins_its_line(completion: str) -> None:
    got = extract_answer(completion)
    assert extract_answer(got) == got
    assert any(line.strip().startswith(got) for line in completion.splitlines() or [""])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Hague", "hague"),
        ("a cat,  an owl; the end", "cat owl end"),
        ("Theatre", "theatre"),
        ("rock-n-roll", "rocknroll"),
        ("3.5", "3.5"),
        ("3.", "3"),
        (".5", ".5"),
        ("1,234.5", "1234.5"),
        ("-5 °C", "-5 °c"),
        ("−5", "-5"),
        ("(-5)", "-5"),
        ("-.5", "-.5"),
        ("1990-1995", "19901995"),
        ("x,-5", "x5"),
        ("…5", "5"),
        ("ＦＯＯ　ﬁ", "foo fi"),
        ("?!", ""),
    ],
)
def test_normalising_keeps_words_numbers_and_their_signs(text: str, expected: str) -> None:
    assert normalise(text) == expected


@given(ANSWERS)
def test_normalising_twice_is_normalising_once(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("ada lovelace!", "Ada Lovelace", True),
        ("The Ada Lovelace. She wrote it.", "Ada Lovelace", True),
        ("Ada Lovelace wrote it.", "Ada Lovelace", False),
        ("Grace.\nAda Lovelace", "Ada Lovelace", False),
        ("35", "3.5", False),
        ("3.5.", "3.5", True),
        ("5", "-5", False),
        ("−5.", "-5", True),
        ("0.5", "-.5", False),
        ("1,234", "1234", True),
        ("7. She had seven.", "7", True),
        ("J.R.R. Tolkien. He wrote it.", "J. R. R. Tolkien", False),
        ("J.R.R. Tolkien. He wrote it.", "J.R.R. Tolkien", True),
        ("", "", False),
        ("the", "a", False),  # nothing is left to compare
    ],
)
def test_a_match_ignores_case_punctuation_and_articles_but_not_numbers(
    completion: str, answer: str, right: bool
) -> None:
    assert exact_match(completion, answer) is right


def test_an_alias_is_as_right_as_the_gold_answer() -> None:
    aliases = ("A. Lovelace", "the Countess")
    assert exact_match("Countess.", "Ada Lovelace", aliases)
    assert exact_match("A Lovelace", "Ada Lovelace", aliases)  # the initial falls as an article
    assert exact_match("Ada.", "Ada Lovelace", aliases) is False


@given(st.lists(st.from_regex(r"[a-z]{2,6}|[0-9]{1,4}", fullmatch=True), min_size=1, max_size=5))
def test_every_answer_of_plain_words_matches_itself_before_more_text(run: list[str]) -> None:
    answer = " ".join(run)
    right = any(word not in {"a", "an", "the"} for word in run)
    for completion in (answer, f"{answer}. And more.", f"\n{answer}\nmore", f"The {answer}!"):
        assert exact_match(completion, answer) is right


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("Ada Lovelace", "Ada Lovelace", 2 * 2 / 4),
        ("Lovelace", "Ada Lovelace", 2 * 1 / 3),
        ("Ada Lovelace wrote it. Later more.", "Ada Lovelace", 2 * 2 / 6),
        ("Grace Hopper", "Ada Lovelace", 0.0),
        ("no no no", "no no", 2 * 2 / 5),  # as often as both say it
        ("", "Ada", 0.0),
        ("Ada", "?!", None),
    ],
)
def test_f1_counts_the_words_shared_by_the_extracted_answer_and_gold(
    completion: str, answer: str, expected: float | None
) -> None:
    assert token_f1(completion, answer) == expected


def test_f1_is_the_best_over_gold_and_the_aliases_that_have_words() -> None:
    assert token_f1("Countess Ada", "Ada Lovelace", ("the Countess Ada", "?!")) == 2 * 2 / 5
    assert token_f1("Ada", "?!", ("Ada",)) == 1.0


def test_terms_are_words_dates_and_numbers_in_order() -> None:
    text = "The bridge, opened 23 Oct 2018, is 1,500 m long (1990–95)."
    assert [(term.key, text[term.start : term.end]) for term in terms(text)] == [
        ("bridge", "bridge"),
        ("opened", "opened"),
        (Date(2018, 10, 23), "23 Oct 2018"),
        ("is", "is"),
        (Number(Decimal(1500)), "1,500"),
        ("m", "m"),
        ("long", "long"),
        (Date(1990), "1990"),
        ("to", "–"),
        (Number(Decimal(95)), "95"),
    ]


@given(ANSWERS)
def test_terms_are_spelt_by_characters_of_the_text_in_order(text: str) -> None:
    run = terms(text)
    assert all(0 <= term.start < term.end <= len(text) for term in run)
    assert [term.start for term in run] == sorted(term.start for term in run)


def test_every_place_that_says_gold_is_found() -> None:
    text = "Paris, in March 1990: PARIS."
    assert [text[slice(*span)] for span in occurrences(terms(text), terms("paris"))] == [
        *("Paris", "PARIS")
    ]
    assert [text[slice(*span)] for span in occurrences(terms(text), terms("1990"))] == [
        "March 1990"
    ]
    assert occurrences(terms(text), []) == []


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("It was Ada Lovelace, I think.", "Ada Lovelace", True),
        ("It was Ada King Lovelace.", "Ada Lovelace", False),
        ("the hague", "The Hague", True),
        ("Yorkshire", "York", False),
        ("New York", "York", True),  # contained is not meant
        ("O'Neil's book", "O'Neil", False),
        ("25", "5", False),
        ("25 cats", "25", True),
        ("-5 °C", "5", False),
        ("twenty-five", "25", True),
        ("1,500 people", "1500", True),
        ("It was March 3, 1990.", "1990", True),
        ("1990", "March 3, 1990", False),
        ("3 March 1990", "March 3, 1990", True),
        ("4 March 1984", "3 April 1984", False),
        ("5.0.4", "5.0", False),
        ("season two, episode nine", "Season 2, Episode 9", True),
        ("from 1903 to 1904", "1903-1904", True),
        ("anything", "?!", False),
        ("", "Ada", False),
    ],
)
def test_gold_is_contained_as_a_run_of_whole_words_and_by_value(
    completion: str, answer: str, expected: bool
) -> None:
    assert contained_match(completion, answer) is expected


def test_an_alias_is_contained_as_well_as_gold() -> None:
    assert contained_match("the Countess of Lovelace", "Ada", ("Countess of Lovelace",))
    assert contained_match("the Countess", "Ada", ("Countess of Lovelace",)) is False


@given(ANSWERS, ANSWERS)
def test_every_answer_with_a_term_is_contained_on_a_line_of_its_own(answer: str, rest: str) -> None:
    before = rest.rstrip(" -–−.,٣05")  # what would begin a number with the answer's figures
    contained = contained_match(f"{before} ; {answer}", answer)
    assert contained is bool(terms(answer))


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("red book", 1 / 1),
        ("a b a b", 2 / 3),  # ab, ba, ab
        ("no no no no no", 1 / 4),
        ("No, no.", 1 / 1),
        ("red", None),
        ("", None),
    ],
)
def test_distinct_2_counts_word_bigrams_and_is_unscored_below_two_words(
    completion: str, expected: float | None
) -> None:
    assert distinct_2(completion) == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("a b c a b c", 6 / 6),
        ("a b x a b", 4 / 5),
        ("a b a b a", 4 / 5),
        ("no no no no", 4 / 4),
        ("no no no", 0 / 3),  # two of "no no" would overlap
        ("a b c d", 0 / 4),
        ("A b, a B!", 4 / 4),
        ("red", None),
        ("", None),
    ],
)
def test_repetition_is_the_share_of_the_longest_run_said_twice(
    completion: str, expected: float | None
) -> None:
    assert repetition(completion) == expected


@pytest.mark.parametrize(
    ("overlap", "grade", "expected"),
    [(1.0, 5.0, 1.0), (1.0, 1.0, 0.6), (0.5, 3.0, 0.55), (0.0, 5.0, 0.5), (1.0, None, 0.5)],
)
def test_the_composite_is_half_overlap_and_half_grade(
    overlap: float, grade: float | None, expected: float
) -> None:
    assert composite(overlap, grade) == pytest.approx(expected)
    assert (composite(overlap, grade) >= ACCURATE) is (expected >= 0.6)


def test_every_score_holds_its_value_the_answer_read_and_why() -> None:
    text = "It was Ada Lovelace. She wrote it."
    made = text_scores(text, "Ada Lovelace Byron", ("Ada Lovelace",))
    read = "It was Ada Lovelace."
    assert made["overlap"] == Score(2 / 3, read, "2 of 3 words of gold")
    assert made["exact_match"] == Score(0.0, read, "is no gold answer")
    assert made["contained_match"] == Score(1.0, read, "holds 'Ada Lovelace'")
    assert made["token_f1"].value == token_f1(text, "Ada Lovelace Byron", ("Ada Lovelace",))
    assert made["distinct_2"] == Score(1.0, read, "of 7 words")
    assert made["repetition"] == Score(0.0, read, "of 7 words")


def test_what_cannot_be_scored_has_no_value_and_says_why() -> None:
    made = text_scores("Ada", "?!")
    assert made["overlap"] == Score(None, "Ada", "gold has no word")
    assert made["distinct_2"].value is None
    assert made["exact_match"].value == 0.0


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("CCIN", LabelFigures(0.5, 0.25, 0.25, 2 / 3, 4 / 7, 4, 0)),
        ("CC--", LabelFigures(1.0, 0.0, 0.0, 1.0, 1.0, 2, 2)),
        ("NN", LabelFigures(0.0, 0.0, 1.0, 0.0, 0.0, 2, 0)),
        ("II-", LabelFigures(0.0, 1.0, 0.0, 0.0, 0.0, 2, 1)),
        ("-", LabelFigures(None, None, None, None, None, 0, 1)),
        ("", LabelFigures(None, None, None, None, None, 0, 0)),
    ],
)
def test_the_figures_of_simpleqa_leave_unscored_labels_out(
    labels: str, expected: LabelFigures
) -> None:
    names = {"C": "CORRECT", "I": "INCORRECT", "N": "NOT_ATTEMPTED", "-": None}
    figures = label_figures([names[label] for label in labels])
    assert figures.f == pytest.approx(expected.f)
    assert replace(figures, f=expected.f) == expected


def test_a_label_of_another_rubric_is_refused() -> None:
    with pytest.raises(ConfigError, match="a label must be one of CORRECT, INCORRECT, NOT_ATTEM"):
        label_figures(["CORRECT", "A"])


@pytest.mark.parametrize(
    ("overlap", "perplexity", "weight", "expected"),
    [
        (0.5, 20.0, 0.7, 0.29),  # 0.35 - 0.3 * 0.2
        (1.0, 1.0, 0.7, 0.697),  # 0.7 - 0.3 * 0.01
        (0.0, 100.0, 0.7, -0.3),
        (0.0, 1e9, 0.7, -0.3),  # clipped at 100
        (1.0, float("inf"), 0.7, 0.4),
        (1.0, None, 0.7, 0.4),  # a perplexity that cannot be had counts 1
        (1.0, 50.0, 0.5, 0.25),  # 0.5 - 0.5 * 0.5
        (0.25, 50.0, 1.0, 0.25),
        (1 / 3, 1.0, 0.7, 0.230333),  # 0.2333333... - 0.003
    ],
)
def test_the_objective_weighs_overlap_against_clipped_perplexity(
    overlap: float, perplexity: float | None, weight: float, expected: float
) -> None:
    assert objective(overlap, perplexity, weight) == expected


def test_noise_of_1e_7_does_not_break_a_tie() -> None:
    assert objective(0.5, 20.0 + 1e-7) == objective(0.5, 20.0)
    assert objective(0.5, 20.001) != objective(0.5, 20.0)

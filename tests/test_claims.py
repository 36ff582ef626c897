from __future__ import annotations

import pytest

from fusion_lens.claims import find_claim

QUESTION = "What is the capital of Freedonia?"
MARK = "\ue000"  # stands for a gold answer


def claimed(completion: str) -> str:
    return find_claim(completion, QUESTION).text


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("Paris", "Paris"),
        ("Paris. It lies on the river.", "Paris."),
        ("Paris\nIt lies on the river.", "Paris"),
        ("Sure! It is Paris.", "It is Paris."),
        ("What is the capital of Freedonia? Paris.", "Paris."),
        ("The answer is:\nParis", "Paris"),
        ("No. It was Paris.", "It was Paris."),
        ("It is a large city. Its name is Paris.", "Its name is Paris."),
        ("Rome. No wait, Paris.", "Paris."),
        ("Rome, I mean Paris", "Paris"),
        ("Rome. The answer is Paris.", "The answer is Paris."),
        ("Paris. Or Rome.", "Paris. Or Rome."),
        ("1. Paris\n2. Rome", "Paris or Rome"),
        ("Paris\nRome\nOslo", "Paris or Rome or Oslo"),
        ("- Paris", "- Paris"),
        ("", ""),
    ],
)
def test_the_claim_is_the_first_sentence_that_answers_or_what_corrects_it(
    completion: str, expected: str
) -> None:
    assert claimed(completion) == expected


@pytest.mark.parametrize(
    ("completion", "text", "aside"),
    [
        ("It was not Rome.", "", "It was not Rome."),
        ("It wasn't Rome. It was Paris.", "It was Paris.", "It wasn't Rome."),
        ("Not Rome but Paris", "Paris", "Not Rome"),
        ("Paris, not Rome", "Paris", "not Rome"),
        ("Paris rather than Rome", "Paris", "rather than Rome"),
        ("Anything but Rome", "", "Anything but Rome"),
        ("It did not open until 1990.", "until 1990.", "It did not open"),
        ("Rome did not win and Paris did", "Paris did", "Rome did not win"),
        ("Paris, which beat Rome", "Paris", "which beat Rome"),
        ("Unlike Rome, it is Paris", "it is Paris", "Unlike Rome"),
        ("Don't Look", "Don't Look", ""),  # no clause that denies begins so
    ],
)
def test_denials_and_side_clauses_are_set_aside(completion: str, text: str, aside: str) -> None:
    claim = find_claim(completion, QUESTION)
    assert claim.silence is None
    assert claim.text == text
    assert claim.aside.strip() == aside


@pytest.mark.parametrize(
    "completion",
    [
        "I don't know.",
        "I do not really know if it is Paris.",
        "I am not sure whether it was Paris.",
        "I'm sorry, but I cannot answer that.",
        "Unknown",
        "There is no reliable information on Paris.",
        "As an AI, I have no data.",
        "It is hard to say.",
        "Nobody knows.",
        "The documents do not say if it was Paris.",
        "I wasn't able to find it.",
    ],
)
def test_a_refusal_is_silence(completion: str) -> None:
    assert find_claim(completion, QUESTION).silence == "refuses"


@pytest.mark.parametrize(
    "completion",
    ["Perhaps Paris.", "It might be Paris.", "Maybe Paris, maybe Rome.", "Some say Paris."],
)
def test_a_hedge_without_a_guess_is_silence(completion: str) -> None:
    assert find_claim(completion, QUESTION).silence == "hedges"


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("I'm not sure, but I think it is Paris.", "it is Paris."),
        ("I don't know. My best guess is Paris.", "My best guess is Paris."),
        ("I think it might be Paris.", "I think it might be Paris."),
        ("It is probably Paris.", "It is probably Paris."),
        ("Paris, but I'm not certain.", "Paris"),
    ],
)
def test_a_guess_is_a_claim_whatever_hedges_it(completion: str, expected: str) -> None:
    claim = find_claim(completion, QUESTION)
    assert (claim.text.strip(), claim.silence) == (expected, None)


@pytest.mark.parametrize(
    "completion", [f"{MARK}?", "Do you mean the capital today?", "Could you say more?"]
)
def test_a_question_about_the_answer_is_silence(completion: str) -> None:
    assert find_claim(completion, QUESTION).silence == "asks back"


def test_nothing_is_read_in_a_mark_and_a_denied_mark_ends_the_search() -> None:
    assert find_claim(f"{MARK}, not Rome", QUESTION).text == MARK
    assert find_claim(f"It was not {MARK}. {MARK} is large.", QUESTION).text == ""

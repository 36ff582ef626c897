from __future__ import annotations

from fusion_lens.contrast_texts import example_texts, pair_texts
from fusion_lens.contrasts import Example, Pair
from fusion_lens.prompts import tokenize


def test_an_example_goes_on_behind_its_prompt(tiny) -> None:
    (text,) = example_texts(tiny, [Example("e", "source", "\nAda in 1843.", prompt="Who?")])
    assert text.prompt == tokenize(tiny, "Who?")
    assert text.tokens == tokenize(tiny, "Who?\nAda in 1843.").tokens
    assert text.written == text.tokens[len(text.prompt.tokens) :] != ()


def test_an_example_without_a_prompt_is_a_prompt_that_nothing_follows(tiny) -> None:
    (text,) = example_texts(tiny, [Example("e", "control", "The harbour is quiet.")])
    assert text.prompt == tokenize(tiny, "The harbour is quiet.")
    assert text.written == ()


def test_a_pair_gives_the_right_and_the_wrong_text(tiny) -> None:
    right, wrong = pair_texts(tiny, [Pair("p", "When?", "\n3 May 1901", "\n4 June 1902")])
    assert right[0].tokens == tokenize(tiny, "When?\n3 May 1901").tokens
    assert wrong[0].tokens == tokenize(tiny, "When?\n4 June 1902").tokens
    assert right[0].prompt == wrong[0].prompt

from __future__ import annotations

from collections import Counter

import pytest

from fusion_lens.contrasts import Example
from fusion_lens.errors import ContrastError
from fusion_lens.methods.prompting import demonstrations
from fusion_lens.models import HookedModel
from fusion_lens.prompts import question_prompt

EXAMPLES = [Example(f"e{i}", "target", f" text {i}.", f"Prompt {i}?") for i in range(6)]


def test_every_example_stands_behind_its_prompt_once() -> None:
    text = demonstrations(EXAMPLES, 6, seed=0)
    parts = text.split("\n\n")
    assert sorted(parts) == ["", *(f"Prompt {i}? text {i}." for i in range(6))]
    assert parts[-1] == ""
    assert demonstrations(EXAMPLES, 2, seed=0, separator="; ").count("; ") == 2
    assert demonstrations(EXAMPLES, 0, seed=0) == ""


def test_pairs_of_prompt_and_text_do_as_well() -> None:
    pairs = [(example.prompt, example.text) for example in EXAMPLES]
    assert demonstrations(pairs, 3, seed=4) == demonstrations(EXAMPLES, 3, seed=4)


def test_the_seed_alone_chooses_evenly_and_without_replacement() -> None:
    drawn = [demonstrations(EXAMPLES, 2, seed=seed) for seed in range(600)]
    assert drawn == [demonstrations(EXAMPLES, 2, seed=seed) for seed in range(600)]
    counts = Counter(text for each in drawn for text in set(each.split("\n\n")) - {""})
    # 200 of each are expected, with a standard deviation of 11.5
    assert len(counts) == 6
    assert all(150 < count < 250 for count in counts.values())
    assert sum(counts.values()) == 1200


def test_a_question_follows_its_demonstrations(tiny: HookedModel) -> None:
    prefix = demonstrations(EXAMPLES, 1, seed=1)
    prompt = question_prompt(tiny, "Who?", prefix=prefix)
    assert prompt.text == prefix + "Question: Who?\nAnswer and explanation:"


def test_more_examples_than_there_are_are_refused() -> None:
    for n in (7, -1):
        with pytest.raises(ContrastError, match=f"0 <= n <= 6, the number of .* but got {n};"):
            demonstrations(EXAMPLES, n, seed=0)

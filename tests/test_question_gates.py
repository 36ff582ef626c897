from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fusion_lens.atlas import QUESTIONS
from fusion_lens.errors import ConfigError, ContrastError
from fusion_lens.generation import GenerationConfig, Row, generate
from fusion_lens.methods.dsas import fit_gate
from fusion_lens.preparation import TuningConfig
from fusion_lens.prompts import question_prompt
from fusion_lens.question_gates import RANK, fit_question_gate, held_out
from fusion_lens.questions import Question, load_questions, select_questions
from fusion_lens.site_activations import record_at
from fusion_lens.teacher_forcing import Text

DEV = select_questions(load_questions(QUESTIONS), split="dev", limit=20)
CONFIG = TuningConfig(generation=GenerationConfig(max_new_tokens=24, slots=16, cache_length=64))


def test_a_gate_tells_questions_that_are_failed_from_their_neighbours(atlas) -> None:
    gate = fit_question_gate(atlas, DEV, CONFIG, rank=7)
    known: list[str] = []
    for question in DEV:
        known += [n.question for n in question.neighbours if n.question not in known][:1]
    assert (gate.n_source, gate.n_control) == (20, len(known))
    assert len(known) >= 19

    def read(texts: list[str]):
        prompts = [question_prompt(atlas, text) for text in texts]
        done = generate(atlas, [Row(prompt) for prompt in prompts], CONFIG.generation)
        return record_at(
            atlas,
            # without what ends a text
            [
                Text(p, d.tokens[: len(d.tokens) - d.ended])
                for p, d in zip(prompts, done, strict=True)
            ],
            tokens="mean",
        )

    asked = [q.question for q in DEV]
    subjects = [question.subject or question.id for question in DEV]
    expected = fit_gate(read(asked), read(known), groups=(subjects, known), rank=7)
    torch.testing.assert_close(gate.gate.theta, expected.gate.theta, atol=1e-4, rtol=1e-3)
    assert gate.accuracy == pytest.approx(expected.accuracy, abs=0.03)


@pytest.mark.slow
def test_whether_a_question_is_known_is_told_in_more_than_five_directions(atlas) -> None:
    dev = select_questions(load_questions(QUESTIONS), split="dev", limit=60)
    few, many = (fit_question_gate(atlas, dev, CONFIG, rank=rank) for rank in (5, RANK))
    assert min(many.accuracy) > 0.9
    assert sorted(few.accuracy)[2] < 0.8


def test_a_gate_is_fitted_on_other_splits_and_other_subjects() -> None:
    def made(name: str, split: str | None, subject: str | None = None) -> Question:
        return Question(name, "Who?", "Ada", split=split, subject=subject)

    asked = [made("a", "test", "Tom"), made("b", "test")]
    others = [made("c", "dev", "Tom"), made("d", "dev", "Ada"), made("e", "dev"), made("f", None)]
    assert [each.id for each in held_out([*asked, *others], asked)] == ["d", "e", "f"]


def test_questions_without_neighbours_or_room_make_no_gate(atlas) -> None:
    with pytest.raises(ConfigError, match="but none of 20 has any"):
        fit_question_gate(atlas, [replace(each, neighbours=()) for each in DEV], CONFIG)
    long = [replace(each, question="Who was it? " * 200) for each in DEV]
    with pytest.raises(ContrastError, match="room for 24 new tokens to fit a gate on, but none of"):
        fit_question_gate(atlas, long, CONFIG)

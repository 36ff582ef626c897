from __future__ import annotations

import dataclasses

import pytest
import torch
from asked import ASKED, OTHER, QUICK

import fusion_lens.preparation as preparation
from fusion_lens.activations import record
from fusion_lens.errors import (
    ActivationError,
    ConfigError,
    ContextLengthError,
    SpanError,
)
from fusion_lens.generation import GenerationConfig, Row, generate
from fusion_lens.preparation import TuningConfig, prepare, prepare_one, seed_of
from fusion_lens.prompts import explanation_prompt
from fusion_lens.questions import Question


def test_the_explanation_is_the_models_own_continuation_unless_given(tiny) -> None:
    own, given = prepare(tiny, [ASKED, OTHER], QUICK)[0]
    prompt = explanation_prompt(tiny, ASKED.question, ASKED.answer)
    written = generate(tiny, [Row(prompt)], GenerationConfig(max_new_tokens=8))[0].text
    assert own.explanation == written.strip() != ""
    assert own.reference.text.endswith(f"Ada Lovelace\n{written.strip()}")
    assert given.explanation == "He was"
    assert given.reference.text.endswith("3 May 1901\nHe was")


def test_a_marker_cuts_the_explanation_and_zero_tokens_mean_none(tiny) -> None:
    marked = TuningConfig(explanation_tokens=8, explanation_marker="<never written>")
    assert prepare_one(tiny, ASKED, marked).explanation == ""
    assert prepare_one(tiny, ASKED, TuningConfig(explanation_tokens=0)).explanation == ""


def test_deltas_are_reference_minus_steered_prompt(tiny) -> None:
    prepared = prepare_one(tiny, ASKED, QUICK)
    recorded = record(tiny, [prepared.reference, prepared.prompt])
    assert torch.allclose(prepared.deltas.reference, recorded[0].mean, atol=1e-6)
    assert torch.allclose(prepared.deltas.base, recorded[1].mean, atol=1e-6)


def test_a_question_that_does_not_fit_is_a_failure_and_the_others_go_on(tiny) -> None:
    long = Question(id="long", question="Who " * 60, answer="Ada")
    prepared, failures = prepare(tiny, [ASKED, long, OTHER], QUICK)
    assert [p.question.id for p in prepared] == ["red", "born"]
    assert [(f.question_id, f.arm, f.error) for f in failures] == [
        ("long", None, "ContextLengthError")
    ]
    with pytest.raises(ContextLengthError, match=r"\+ 10 > 128 tokens; shorten the prompt or low"):
        prepare_one(tiny, long, QUICK)


def test_a_long_reference_is_a_failure_too(tiny) -> None:
    long = Question(id="long", question="Who?", answer="Ada", explanation="so " * 100)
    _, failures = prepare(tiny, [long], QUICK)
    assert failures[0].error == "ContextLengthError"


def test_activations_that_are_not_finite_are_a_failure_of_their_question_alone(
    tiny, monkeypatch
) -> None:
    real = preparation.record

    def failing(model, prompts, **options):
        if any("Tom" in prompt.text for prompt in prompts):
            raise ActivationError("activations must be finite, but a mean holds NaN or infinity.")
        return real(model, prompts, **options)

    monkeypatch.setattr(preparation, "record", failing)
    prepared, failures = prepare(tiny, [ASKED, OTHER], QUICK)
    assert [p.question.id for p in prepared] == ["red"]
    assert [(f.question_id, f.error) for f in failures] == [("born", "ActivationError")]


def test_two_questions_of_one_id_are_refused(tiny) -> None:
    with pytest.raises(ConfigError, match="question ids must be unique"):
        prepare(tiny, [ASKED, dataclasses.replace(OTHER, id="red")], QUICK)


def test_an_answer_that_is_not_in_the_reference_is_refused(tiny) -> None:
    question = Question(id="q", question="Who?", answer="</s>", explanation="")
    with pytest.raises(SpanError, match="'</s>' has no known token of its own"):
        prepare_one(tiny, question, QUICK)


def test_seeds_depend_on_their_parts_alone() -> None:
    assert seed_of(0, "q", "full") == seed_of(0, "q", "full")
    assert len({seed_of(0, "q", "full"), seed_of(1, "q", "full"), seed_of(0, "qf", "ull")}) == 3

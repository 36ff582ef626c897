from __future__ import annotations

import math

import pytest
import torch
from conftest import prompts_of

from fusion_lens import graders
from fusion_lens.executors import HookPoints, LeanModule
from fusion_lens.generation import Completion, GenerationConfig, Row, generate
from fusion_lens.graders import completion_nll, grade
from fusion_lens.questions import Question


@pytest.mark.parametrize("executor", ["lean", "hooks"])
def test_nll_is_the_mean_over_completion_tokens_given_the_prompt(tiny, executor: str) -> None:
    prompts = prompts_of(tiny)
    config = GenerationConfig(max_new_tokens=7)
    completions = generate(tiny, [Row(prompt) for prompt in prompts], config)
    completions[1] = Completion("short", completions[1].tokens[:2], ended=False)
    texts = list(zip(prompts, completions, strict=True))
    values = completion_nll(tiny, texts, executor=executor)
    for prompt, completion, value in zip(prompts, completions, values, strict=True):
        tokens = torch.tensor([prompt.tokens + completion.tokens])
        with torch.no_grad():
            logs = tiny(tokens)[0].double().log_softmax(dim=-1)
        start = len(prompt.tokens)
        by_hand = [float(logs[start + i - 1, t]) for i, t in enumerate(completion.tokens)]
        assert value == pytest.approx(-sum(by_hand) / len(by_hand), abs=1e-4)


@pytest.mark.parametrize("executor", ["lean", "hooks"])
def test_nll_does_not_depend_on_the_batch(tiny, executor: str) -> None:
    prompts = prompts_of(tiny)
    completions = generate(
        tiny, [Row(prompt) for prompt in prompts], GenerationConfig(max_new_tokens=5)
    )
    pairs = list(zip(prompts, completions, strict=True))
    together = completion_nll(tiny, pairs, executor=executor)
    alone = [completion_nll(tiny, [p], batch_size=1, executor=executor)[0] for p in pairs]
    assert together == pytest.approx(alone, abs=1e-5)


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


@pytest.mark.parametrize(("executor", "kind"), [("lean", LeanModule), ("hooks", HookPoints)])
def test_a_large_vocabulary_is_scored_in_smaller_batches(
    tiny, monkeypatch, executor: str, kind: type
) -> None:
    prompt = prompts_of(tiny)[0]
    rows = [Row(prompt, seed=seed) for seed in (1, 2, 3)]
    config = GenerationConfig(max_new_tokens=5, temperature=1.0, stop_at_eos=False)
    pairs = [(prompt, completion) for completion in generate(tiny, rows, config)]
    whole = completion_nll(tiny, pairs, batch_size=3, executor=executor)
    assert len(set(whole)) == 3
    shapes = []
    real = kind.forward

    def counting(self, tokens, mask, **options):
        logits = real(self, tokens, mask, **options)
        shapes.append(tuple(logits.shape))
        return logits

    monkeypatch.setattr(kind, "forward", counting)
    # the logits of two texts of one shape, the ends of 5 tokens padded to 16
    monkeypatch.setattr(graders, "_LOGITS_AT_ONCE", 2 * 16 * 320)
    scored = completion_nll(tiny, pairs, batch_size=3, executor=executor)
    assert scored == pytest.approx(whole, abs=1e-5)
    # the third text beside an idle row
    assert shapes == [(2, 16, 320), (2, 16, 320)]


def test_an_alias_is_right_and_an_unscored_perplexity_costs_a_full_term() -> None:
    question = Question(id="q", question="Who?", answer="Ada", aliases=("Lady Lovelace",))
    graded = grade(question, Completion("Lady Lovelace.", (5,), ended=True), None)
    assert graded.exact_match == 1.0
    assert graded.perplexity is None
    assert graded.objective == -0.3

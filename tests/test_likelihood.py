from __future__ import annotations

import pytest
import torch
from conftest import prompts_of, strong_plan
from engine import mixed_rows, written

from fusion_lens import likelihood
from fusion_lens.executors import HookPoints, LeanModule
from fusion_lens.generation import Completion, GenerationConfig, Row, generate
from fusion_lens.likelihood import completion_nll
from fusion_lens.models import HookedModel


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


# 5 tokens are padded to 8 after a prompt that has been read, to 16 of a whole text
@pytest.mark.parametrize(
    ("executor", "kind", "before", "kept"),
    [("lean", LeanModule, [(1, 1, 320)], 8), ("hooks", HookPoints, [], 16)],
)
def test_a_large_vocabulary_is_scored_in_smaller_batches(
    tiny, monkeypatch, executor: str, kind: type, before: list[tuple[int, ...]], kept: int
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
    # the logits of two texts
    monkeypatch.setattr(likelihood, "_LOGITS_AT_ONCE", 2 * kept * 320)
    scored = completion_nll(tiny, pairs, batch_size=3, executor=executor)
    assert scored == pytest.approx(whole, abs=1e-5)
    # the third text beside an idle row
    assert shapes == [*before, (2, kept, 320), (2, kept, 320)]


def test_a_prompt_is_read_once_for_all_its_completions(tiny: HookedModel, monkeypatch) -> None:
    prompts = prompts_of(tiny)[:2]
    rows = [Row(prompt, seed=seed) for seed in range(6) for prompt in prompts]
    completions = written(tiny, rows, temperature=1.0)
    texts = [(row.prompt, done) for row, done in zip(rows, completions, strict=True)]
    assert len({completion.tokens for completion in completions}) > 8
    read = []
    real = LeanModule.forward

    def counting(self, tokens, mask, *, cache=None, last=0):
        if cache.store is None:
            read.extend(
                tuple(row[seen == 1].tolist()) for row, seen in zip(tokens, mask, strict=True)
            )
        return real(self, tokens, mask, cache=cache, last=last)

    monkeypatch.setattr(LeanModule, "forward", counting)
    by_lean = completion_nll(tiny, texts, batch_size=2)
    assert sorted(read) == sorted(prompt.tokens[:-1] for prompt in prompts)
    assert by_lean == pytest.approx(completion_nll(tiny, texts, executor="hooks"), abs=1e-4)


def test_in_float64_both_executors_give_the_same_scores(float64: HookedModel) -> None:
    rows = mixed_rows(float64, strong_plan(float64), 9)
    texts = [(row.prompt, done) for row, done in zip(rows, written(float64, rows), strict=True)]
    lean, hooks = (completion_nll(float64, texts, executor=name) for name in ("lean", "hooks"))
    assert len(set(lean)) > 5
    assert lean == pytest.approx(hooks, abs=1e-9)

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import logits_of, written
from fitting import assert_a_plan_like_any
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fusion_lens.decoding import Row
from fusion_lens.errors import ContrastError, PlanError
from fusion_lens.methods.act_add import act_add
from fusion_lens.models import HookedModel, load_model, resid_post
from fusion_lens.plans import Segment
from fusion_lens.prompts import tokenize

PLUS, MINUS = "Who wrote the red book of winter?", "Who is quiet?"


def tokens_of(model: Any, *texts: str) -> list[list[int]]:
    """BOS and tokens of every text, spaces behind the shorter ones."""
    (space,) = model.tokenizer(" ", add_special_tokens=False)["input_ids"]
    read = [[1, *model.tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]
    longest = max(map(len, read))
    return [own + [space] * (longest - len(own)) for own in read]


def difference(model: Any, plus: str, minus: str, layer: int) -> Tensor:
    """h(plus) - h(minus) at every place, "pos d_model", by TransformerLens' own cache."""
    streams = []
    for own in tokens_of(model, plus, minus):
        _, cache = model.run_with_cache(torch.tensor([own]))
        streams.append(cache[resid_post(layer)][0])
    plus_stream, minus_stream = streams
    return plus_stream - minus_stream


@pytest.mark.parametrize("executor", ["lean", "hooks"])
def test_every_step_is_the_difference_of_the_prompts_at_its_place(
    tiny: HookedModel, executor: str
) -> None:
    expected = difference(tiny, PLUS, MINUS, 2)
    plan = act_add(tiny, PLUS, MINUS, 2, executor=executor)
    # BOS and "Who" are the same in both
    same = next(t for t, row in enumerate(expected) if row.norm() > 1e-3)
    first, second = tokens_of(tiny, PLUS, MINUS)
    assert first[:same] == second[:same]
    assert same > 1
    assert [step.positions for step in plan.steps] == list(range(same, len(expected)))
    for step in plan.steps:
        assert step.segments == (Segment("layer_2", 2, 3),)
        torch.testing.assert_close(step.shift[2], expected[step.positions], atol=5e-5, rtol=1e-5)
        assert step.shift.count_nonzero(dim=1).tolist() == [0, 0, 32, 0]


def test_the_shorter_prompt_is_filled_with_spaces_whichever_it_is(tiny: HookedModel) -> None:
    there, back = act_add(tiny, PLUS, MINUS, 1), act_add(tiny, MINUS, PLUS, 1)
    assert len(there.steps) == len(back.steps)
    for one, other in zip(there.steps, back.steps, strict=True):
        assert torch.equal(one.shift, -other.shift)
    nothing = act_add(tiny, PLUS, "", 1)
    expected = difference(tiny, PLUS, "", 1)
    assert [step.positions for step in nothing.steps] == list(range(1, len(expected)))


def test_it_is_what_a_hook_of_ones_own_adds_to_the_front(tiny: Any) -> None:
    plan = act_add(tiny, PLUS, MINUS, 1) * 3.0
    moved = difference(tiny, PLUS, MINUS, 1)
    for text in ("Tom was born in the harbour. He went to the red house in winter.", "Tom?"):
        prompt = tokenize(tiny, text)
        (done,) = written(tiny, [Row(prompt, plan)])

        def add(x: Tensor, hook: Any, n: int = len(prompt.tokens)) -> Tensor:
            front = min(n, len(moved))
            x[:, 1:front] += 3.0 * moved[1:front]
            return x

        tokens = torch.tensor([prompt.tokens + done.tokens[:-1]])
        logits = tiny.run_with_hooks(tokens, fwd_hooks=[(resid_post(1), add)])[0]
        expected = logits[len(prompt.tokens) - 1 :]
        torch.testing.assert_close(logits_of(done), expected, atol=1e-4, rtol=1e-4)


def test_the_plan_runs_like_any(tiny: HookedModel, tmp_path: Path) -> None:
    assert_a_plan_like_any(tiny, act_add(tiny, "Tom is", "Ada", 1), 4.0, tmp_path)


def test_special_tokens_inside_a_prompt_are_left_out(tiny: HookedModel) -> None:
    plan = act_add(tiny, "a</s>b", "c</s>d", 1)
    assert tokenize(tiny, "a</s>b").special == (0, 2)
    assert [step.positions for step in plan.steps] == [1, 3]


def test_prompts_of_unequal_length_need_a_token_for_a_space(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "words")
    words = {word: n for n, word in enumerate(("<pad>", "<s>", "</s>", "<unk>", "Tom", "went"))}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    model = load_model(folder)
    with pytest.raises(
        ContrastError, match="must have as many tokens, but got 3 and 2, and the to"
    ):
        act_add(model, "Tom went", "Tom", 1)
    assert [step.positions for step in act_add(model, "Tom went", "Tom Tom", 1).steps] == [2]


def test_prompts_that_are_the_same_and_layers_that_are_not_there_are_refused(
    tiny: HookedModel,
) -> None:
    with pytest.raises(ContrastError, match="must differ in a token that is not special, but got"):
        act_add(tiny, PLUS, PLUS, 1)
    for layer in (-1, 4):
        with pytest.raises(PlanError, match=rf"but got \(layer={layer}, n_layers=4\)"):
            act_add(tiny, PLUS, MINUS, layer)

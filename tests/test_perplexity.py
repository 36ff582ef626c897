from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import TEXTS
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_lens.decoding import Completion
from fusion_lens.errors import ModelError
from fusion_lens.likelihood import completion_nll
from fusion_lens.models import HookedModel
from fusion_lens.perplexity import WINDOW, Continuation, PerplexityModel
from fusion_lens.prompts import tokenize

# more than two windows, and a text whose last window holds a single token
LONG = " ".join(TEXTS) * 20


@pytest.fixture(scope="module")
def gpt2(gpt2_folder: Path) -> PerplexityModel:
    return PerplexityModel(gpt2_folder)


def by_hand(folder: Path, text: str) -> float:
    """The formula, one window after the other."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    means = []
    for start in range(0, len(tokens), 512):
        window = torch.tensor([tokens[start : start + 512]])
        if window.shape[1] == 1:
            continue
        with torch.no_grad():
            means.append(float(model(input_ids=window, labels=window).loss))
    return sum(means) / len(means)


@pytest.mark.parametrize("text", [*TEXTS, LONG, LONG[: len(LONG) // 2]])
def test_windows_give_the_mean_of_their_mean_losses(
    gpt2: PerplexityModel, gpt2_folder: Path, text: str
) -> None:
    (value,) = gpt2.window_nll([text])
    assert value == pytest.approx(by_hand(gpt2_folder, text), abs=1e-5)


def test_long_texts_have_several_windows(gpt2_folder: Path) -> None:
    tokens = AutoTokenizer.from_pretrained(gpt2_folder)(LONG, add_special_tokens=False)
    assert len(tokens["input_ids"]) > 2 * WINDOW


def test_the_windows_of_a_known_distribution_by_hand(gpt2_folder: Path, tmp_path: Path) -> None:
    """Whatever was read, the next token is "~" with probability 3/322 and any other with 1/322."""
    tokenizer = AutoTokenizer.from_pretrained(gpt2_folder)
    tokenizer.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(torch.eye(32)[0])
        model.transformer.wte.weight[:, 0] = 0.0
        model.transformer.wte.weight[tokenizer.convert_tokens_to_ids("~"), 0] = math.log(3)
    model.save_pretrained(tmp_path)
    known = PerplexityModel(tmp_path)
    # 512 "~", then 8 "^" that count as much: sqrt(322/3 * 322) = 185.9068
    likely, unlikely, both = known.window_nll(["~" * 9, "^" * 9, "~" * WINDOW + "^" * 8])
    perplexities = [round(math.exp(nll), 4) for nll in (likely, unlikely, both)]
    assert perplexities == pytest.approx([107.3333, 322.0, 185.9068], abs=2e-4)


def test_a_window_of_one_token_has_no_loss_and_a_text_without_one_is_unscored(
    gpt2: PerplexityModel,
) -> None:
    assert gpt2.window_nll(["", "~"]) == [None, None]
    one_more, whole = gpt2.window_nll(["~" * (WINDOW + 1), "~" * WINDOW])
    assert one_more == whole is not None


def test_a_texts_value_does_not_depend_on_its_neighbours(gpt2: PerplexityModel) -> None:
    together = gpt2.window_nll([*TEXTS, LONG])
    assert [gpt2.window_nll([text])[0] for text in (*TEXTS, LONG)] == together


@pytest.mark.parametrize("ended", [False, True])
def test_continuations_agree_with_the_likelihood_of_the_steered_model_itself(
    tiny: HookedModel, tiny_folder: Path, ended: bool
) -> None:
    own = PerplexityModel(tiny_folder)
    prompt = tokenize(tiny, "Question: Who wrote the red book?\nAnswer:")
    written = tuple(tiny.tokenizer(" Ada Lovelace.", add_special_tokens=False)["input_ids"])
    completion = Completion(" Ada Lovelace.", (*written, 2) if ended else written, ended=ended)
    (expected,) = completion_nll(tiny, [(prompt, completion)])
    (value,) = own.continuation_nll([Continuation(prompt.text, completion.text, ended)])
    assert value == pytest.approx(expected, abs=1e-4)


def test_an_empty_completion_and_one_beyond_the_context_are_unscored(
    gpt2: PerplexityModel, tiny_folder: Path
) -> None:
    assert gpt2.continuation_nll([Continuation("Who?", "", False)]) == [None]
    small = PerplexityModel(tiny_folder)
    assert small.n_ctx == 128
    long = Continuation("Who?", " Ada" * 200, False)
    short = Continuation("Who?", " Ada", False)
    assert small.continuation_nll([long, short])[0] is None
    assert small.continuation_nll([long, short])[1] == small.continuation_nll([short])[0]


def test_a_model_that_cannot_be_opened_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="must be an existing checkpoint folder"):
        PerplexityModel(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="must be a usable checkpoint folder or hub name"):
        PerplexityModel(tmp_path)

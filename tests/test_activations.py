from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import n_hooks, prompts_of

from fusion_lens.activations import Activations, activations_from_cache, left_padded, record
from fusion_lens.errors import ActivationError, SpanError
from fusion_lens.identity import identify
from fusion_lens.models import load_model, resid_post
from fusion_lens.prompts import Layout, reference_prompt, tokenize


def slow_mean(model, prompt) -> torch.Tensor:
    """The mean of a prompt's pooled positions, from TransformerLens' own cache."""
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([prompt.tokens]))
    start, stop = prompt.span or (0, len(prompt.tokens))
    kept = [t for t in range(start, stop) if prompt.tokens[t] != 1]
    rows = [cache[resid_post(layer)][0, kept].double() for layer in range(model.cfg.n_layers)]
    return torch.stack([sum(row) / len(kept) for row in rows])


@pytest.mark.parametrize("executor", ["lean", "hooks"])
def test_a_batched_pass_gives_the_means_of_single_cached_runs(tiny, executor: str) -> None:
    reference = reference_prompt(tiny, "Who wrote the red book?", "Ada Lovelace", "In 1843.")
    prompts = [*prompts_of(tiny), reference]
    recorded = record(tiny, prompts, executor=executor)
    for prompt, activations in zip(prompts, recorded, strict=True):
        assert torch.allclose(activations.mean.double(), slow_mean(tiny, prompt), atol=1e-5)
        assert activations.layout == prompt.layout
    assert n_hooks(tiny) == 0


@pytest.mark.parametrize("executor", ["lean", "hooks"])
def test_means_do_not_depend_on_the_batch(float64, executor: str) -> None:
    prompts = prompts_of(float64)
    together = record(float64, prompts, executor=executor)
    alone = [record(float64, [p], batch_size=1, executor=executor)[0] for p in prompts]
    for one, other in zip(together, alone, strict=True):
        assert one.mean.dtype == torch.float64
        assert (one.mean - other.mean).abs().max() < 1e-9


def test_bos_is_left_out_of_the_mean(tiny) -> None:
    with_bos, bare = tokenize(tiny, "Who?"), tokenize(tiny, "Who?")
    bare = dataclasses.replace(bare, special=())
    one, other = record(tiny, [with_bos, bare])
    n = len(bare.tokens)
    with torch.no_grad():
        _, cache = tiny.run_with_cache(torch.tensor([bare.tokens]))
    bos = torch.stack([cache[resid_post(layer)][0, 0] for layer in range(4)])
    assert torch.allclose(one.mean * (n - 1) + bos, other.mean * n, atol=1e-4)


def test_half_precision_is_pooled_in_float32(tiny_folder) -> None:
    half = load_model(tiny_folder, dtype="bfloat16")
    assert record(half, [tokenize(half, "Who?")])[0].mean.dtype == torch.float32


@pytest.mark.parametrize("executor", ["lean", "hooks"])
def test_a_cache_of_the_users_gives_the_same_activations(float64, executor: str) -> None:
    prompt = tokenize(float64, "Who wrote it?")
    _, cache = float64.run_with_cache(torch.tensor([prompt.tokens]))
    made = activations_from_cache(cache, prompt)
    recorded = record(float64, [prompt], executor=executor)[0]
    assert (made.mean - recorded.mean).abs().max() < 1e-9
    assert made.layout == prompt.layout
    with pytest.raises(
        SpanError, match=r"unpadded, but got \d+; run the model on prompt.to_tensor"
    ):
        activations_from_cache(cache, tokenize(float64, "Who?"))
    _, narrow = float64.run_with_cache(prompt.to_tensor(), names_filter=resid_post(0))
    with pytest.raises(ActivationError, match=r"but has no blocks\.1\.hook_resid_post; leave its"):
        activations_from_cache(narrow, prompt)


def test_a_prompt_of_special_tokens_alone_is_refused(tiny) -> None:
    with pytest.raises(SpanError, match="must have a token to pool over, but '' has only special"):
        record(tiny, [tokenize(tiny, "", prepend_bos=True)])


def test_activations_that_are_not_finite_are_refused(tiny) -> None:
    mean = torch.zeros(4, 32)
    mean[2, 3] = float("nan")
    with pytest.raises(ActivationError, match="must be finite"):
        Activations(mean=mean, layout=Layout(3, ()), model=identify(tiny))
    with pytest.raises(ActivationError, match=r"must have the shape \(4, 32\)"):
        Activations(mean=torch.zeros(3, 32), layout=Layout(3, ()), model=identify(tiny))


def test_padding_goes_to_the_left() -> None:
    tokens, mask = left_padded([(5, 6, 7), (8,)], 0, "cpu")
    assert tokens.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]

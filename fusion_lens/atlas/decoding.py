"""A Hugging Face model as the plain functions that probes and questions are written against.

`Complete` turns prompts into (completion, whether it ended by itself) pairs, in order. Prompts are
batched by length and padded on the left. `Score` turns (prompt, completion) pairs into the log
probabilities of the completions; end-of-text is not counted.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_lens.atlas.prompts import Complete, Score

_BATCH_SIZE = 150


def load_completer(folder: Path, *, sample_seed: int | None = None) -> Complete:
    """`make_completer` on a checkpoint folder, its weights widened to float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return make_completer(model, AutoTokenizer.from_pretrained(folder), sample_seed=sample_seed)


def make_completer(model: Any, tokenizer: Any, *, sample_seed: int | None = None) -> Complete:
    """Greedy decoding, or sampling at temperature 1 from a generator seeded once per call."""

    def complete(prompts: Sequence[str], max_new_tokens: int) -> list[tuple[str, bool]]:
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        completions: dict[int, tuple[str, bool]] = {}
        with _seeded(sample_seed):
            for start in range(0, len(order), _BATCH_SIZE):
                chunk = order[start : start + _BATCH_SIZE]
                new = _continue(
                    model,
                    tokenizer,
                    [prompts[index] for index in chunk],
                    max_new_tokens=max_new_tokens,
                    do_sample=sample_seed is not None,
                )
                ended = (new == tokenizer.eos_token_id).any(dim=1).tolist()
                texts = tokenizer.batch_decode(new, skip_special_tokens=True)
                completions.update(zip(chunk, zip(texts, ended, strict=True), strict=True))
        return [completions[index] for index in range(len(prompts))]

    return complete


def load_scorer(folder: Path) -> Score:
    """`make_scorer` on a checkpoint folder, its weights widened to float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return make_scorer(model, AutoTokenizer.from_pretrained(folder))


def make_scorer(model: Any, tokenizer: Any) -> Score:
    """Teacher-forced log probabilities, in nats.

    Prompt and completion are cut into tokens apart, which for Atlas' tokenizer and prompts that do
    not end in white space is how the whole text is cut.
    """

    def score(texts: Sequence[tuple[str, str]]) -> list[float]:
        heads = [tokenizer(prompt).input_ids for prompt, _ in texts]
        tails = [tokenizer(text, add_special_tokens=False).input_ids for _, text in texts]
        order = sorted(range(len(texts)), key=lambda i: len(heads[i]) + len(tails[i]))
        scores: dict[int, float] = {}
        for start in range(0, len(order), _BATCH_SIZE):
            chunk = order[start : start + _BATCH_SIZE]
            told = _log_probs(model, [heads[i] for i in chunk], [tails[i] for i in chunk])
            scores.update(zip(chunk, told, strict=True))
        return [scores[index] for index in range(len(texts))]

    return score


def _log_probs(model: Any, heads: list[list[int]], tails: list[list[int]]) -> list[float]:
    """Padded on the right: what follows a text does not change what is said of it."""
    rows = [head + tail for head, tail in zip(heads, tails, strict=True)]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    with torch.inference_mode():
        logits = model(input_ids=tokens.to(model.device)).logits[:, :-1].float().cpu()
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    ).view(len(rows), -1)
    return [
        -float(loss[len(head) - 1 : len(row) - 1].sum())
        for loss, head, row in zip(losses, heads, rows, strict=True)
    ]


def _continue(
    model: Any, tokenizer: Any, prompts: list[str], *, max_new_tokens: int, do_sample: bool
) -> Int[Tensor, "batch new_pos"]:
    """The new tokens after each prompt, padded on the right."""
    encoded = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    with torch.inference_mode():
        tokens: Tensor = model.generate(
            input_ids=encoded.input_ids.to(model.device),
            attention_mask=encoded.attention_mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} if do_sample else {}),
        )
    return tokens[:, encoded.input_ids.shape[1] :].cpu()


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """The global generators seeded inside and given back as they were found."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield

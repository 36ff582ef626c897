"""A Hugging Face model as the plain function that probes and questions are written against.

`Complete` turns prompts into (completion, whether it ended by itself) pairs, in order. Prompts are
batched by length and padded on the left.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_lens.atlas.prompts import Complete

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

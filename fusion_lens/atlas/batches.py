"""Documents -> padded token batches with a weight for each token's loss.

A document becomes `<s> prompt completion </s>`. Completions and the end of the text count in full,
prompts little (they are mostly names and values that cannot be predicted), padding not at all.
Documents are sorted by length and cut into a few batches, to pad little.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusion_lens.atlas.corpus import Document

PROMPT_WEIGHT = 0.1


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """`weights[b, p]` is what predicting `tokens[b, p]` counts; 0 for `<s>` and padding."""

    tokens: Int[Tensor, "batch pos"]
    weights: Float[Tensor, "batch pos"]
    n_tokens: int


def make_batches(documents: Sequence[Document], tokenizer: Any, *, n_batches: int) -> list[Batch]:
    """All documents in `n_batches` batches of similar length."""
    rows = sorted(_rows(documents, tokenizer), key=lambda row: len(row[0]))
    size = -(-len(rows) // n_batches)
    return [_pad(rows[i : i + size], tokenizer.pad_token_id) for i in range(0, len(rows), size)]


def _rows(documents: Sequence[Document], tokenizer: Any) -> list[tuple[list[int], list[float]]]:
    # Not through the backend: that would pad on the left here after a left-padded generation.
    prompts = tokenizer([document.prompt for document in documents]).input_ids
    completions = tokenizer(
        [document.completion for document in documents], add_special_tokens=False
    ).input_ids
    return [
        (
            [*prompt, *completion, tokenizer.eos_token_id],
            [0.0, *[PROMPT_WEIGHT] * (len(prompt) - 1), *[1.0] * (len(completion) + 1)],
        )
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def _pad(rows: Sequence[tuple[list[int], list[float]]], pad_token_id: int) -> Batch:
    longest = max(len(ids) for ids, _ in rows)
    return Batch(
        torch.tensor([ids + [pad_token_id] * (longest - len(ids)) for ids, _ in rows]),
        torch.tensor([weights + [0.0] * (longest - len(weights)) for _, weights in rows]),
        sum(len(ids) for ids, _ in rows),
    )

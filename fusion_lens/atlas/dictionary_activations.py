"""Documents -> the residual stream after every block, token by token, without BOS and EOS.

The model reads `<s> document </s>`, as it did in training. What is kept of a document is its own
tokens: the residual of BOS is several times larger than any other and would dominate, and what
stands after EOS is never read. A pass holds documents of similar length, padded on the left.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusion_lens.activations import left_padded, padded_length
from fusion_lens.atlas.corpus import Document
from fusion_lens.executors import executor_of
from fusion_lens.lean import AtBlock
from fusion_lens.models import HookedModel, evaluating

BATCH_SIZE = 32
CHUNK = 8192
"""Tokens of a batch whose codes are computed at once."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenActivations:
    """Residuals of all kept tokens of some documents, in the documents' order.

    `document` and `position` say where a token stands (position 0 is the first after BOS).
    """

    resid: Float[Tensor, "layer token d_model"]
    tokens: Int[Tensor, " token"]
    document: Int[Tensor, " token"]
    position: Int[Tensor, " token"]


def tokenize_documents(model: HookedModel, documents: Sequence[Document]) -> list[list[int]]:
    """BOS, the document, EOS; prompt and completion are cut as one text, as Atlas' always are."""
    tokenizer = model.tokenizer
    return [
        [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
        for ids in tokenizer(
            [document.text for document in documents], add_special_tokens=False
        ).input_ids
    ]


def record_tokens(
    model: HookedModel, rows: Sequence[Sequence[int]], *, dtype: torch.dtype = torch.float32
) -> TokenActivations:
    """The residual stream of tokenized documents after every block, stored as `dtype`."""
    n_layers, d_model = int(model.cfg.n_layers), int(model.cfg.d_model)
    lengths = torch.tensor([len(row) - 2 for row in rows])
    first = lengths.cumsum(0) - lengths
    resid = torch.empty(n_layers, int(lengths.sum()), d_model, dtype=dtype)
    run, _ = executor_of(model)
    with evaluating(model):
        for places in batches_of(rows):
            seen: dict[int, Tensor] = {}
            width = padded_length(max(len(rows[place]) for place in places), run.multiple)
            tokens, mask = left_padded(
                [rows[place] for place in places], 0, run.device, width=width
            )
            with run.at_blocks({layer: _keep(seen, layer) for layer in range(n_layers)}):
                run.forward(tokens, mask, last=1)
            stacked = torch.stack([seen[layer] for layer in range(n_layers)]).to("cpu", dtype)
            for row, place in enumerate(places):
                start, length = int(first[place]), int(lengths[place])
                resid[:, start : start + length] = stacked[:, row, width - 1 - length : width - 1]
    return TokenActivations(
        resid=resid,
        tokens=torch.tensor([token for row in rows for token in row[1:-1]]),
        document=torch.repeat_interleave(torch.arange(len(rows)), lengths),
        position=torch.cat([torch.arange(int(length)) for length in lengths]),
    )


def batches_of(rows: Sequence[Sequence[int]], size: int = BATCH_SIZE) -> Iterator[list[int]]:
    """Places of all rows, `size` at a time, sorted by length so that little is padded."""
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def token_chunks(
    resid: Float[Tensor, "layer token d_model"], layers: Sequence[int], size: int = CHUNK
) -> Iterator[Float[Tensor, "batch layer d_model"]]:
    """Float32 batches of all tokens in their order, of these of the layers."""
    for chunk in torch.split(resid, size, dim=1):
        yield chunk[list(layers)].transpose(0, 1).float()


def shuffled_batches(
    resid: Float[Tensor, "*layer token d_model"], batch_size: int, *, seed: int
) -> Iterator[Float[Tensor, "batch *layer d_model"]]:
    """Without end: float32 batches of tokens in a new random order each epoch."""
    generator = torch.Generator().manual_seed(seed)
    n = resid.shape[-2]
    while True:
        order = torch.randperm(n, generator=generator)
        for start in range(0, n - batch_size + 1, batch_size):
            picked = resid.index_select(resid.ndim - 2, order[start : start + batch_size]).float()
            yield picked if picked.ndim == 2 else picked.transpose(0, 1)


def _keep(seen: dict[int, Tensor], layer: int) -> AtBlock:
    def keep(resid: Float[Tensor, "batch pos d_model"]) -> None:
        seen[layer] = resid

    return keep

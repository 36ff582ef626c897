"""Next-token losses of Atlas with a layer's residuals as they are, replaced by a mean, and replaced
by a dictionary's reconstructions.

Replaced are all of a document's own tokens, BOS left alone; counted are all targets behind a
replaced token, EOS among them. A crosscoder's codes are those of the clean run at all its layers,
its reconstruction is spliced in at one layer at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from fusion_lens.activations import left_padded, padded_length
from fusion_lens.atlas.dictionary_activations import batches_of
from fusion_lens.dictionaries import Dictionary
from fusion_lens.executors import Executor, executor_of
from fusion_lens.lean import AtBlock
from fusion_lens.models import HookedModel, evaluating


@dataclass(frozen=True, slots=True)
class Losses:
    """Mean losses in nats per target; `ablated` by layer, `spliced` by dictionary and layer."""

    n_tokens: int
    clean: float
    ablated: Mapping[int, float]
    spliced: Mapping[tuple[str, int], float]


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    own: Bool[Tensor, "batch pos"]
    """Where a document's own tokens stand: neither padding nor BOS nor EOS."""


def spliced_losses(
    dictionaries: Mapping[str, Dictionary],
    model: HookedModel,
    rows: Sequence[Sequence[int]],
    means: Float[Tensor, "layer d_model"],
) -> Losses:
    """Losses of tokenized documents; `means` is what an ablated layer is replaced by."""
    n_layers = int(model.cfg.n_layers)
    run, _ = executor_of(model)
    clean, n_tokens = 0.0, 0
    ablated = dict.fromkeys(range(n_layers), 0.0)
    spliced = {
        (name, layer): 0.0
        for name, dictionary in dictionaries.items()
        for layer in dictionary.card.layers
    }
    with evaluating(model):
        for batch in _loss_batches(rows, run):
            seen: dict[int, Tensor] = {}
            n_tokens += int(batch.own.sum())
            clean += _loss(run, batch, {layer: _keep(seen, layer) for layer in range(n_layers)})
            for layer in range(n_layers):
                ablated[layer] += _loss(run, batch, {layer: _put(means[layer], batch.own)})
            resid = torch.stack([seen[layer][batch.own] for layer in range(n_layers)], dim=1)
            for name, dictionary in dictionaries.items():
                layers = dictionary.card.layers
                decoded = dictionary.reconstruct(resid[:, list(layers)])
                for layer, replacement in zip(layers, decoded.unbind(dim=1), strict=True):
                    at = {layer: _put(replacement, batch.own)}
                    spliced[name, layer] += _loss(run, batch, at)
    return Losses(
        n_tokens=n_tokens,
        clean=clean / n_tokens,
        ablated={layer: total / n_tokens for layer, total in ablated.items()},
        spliced={key: total / n_tokens for key, total in spliced.items()},
    )


def _loss_batches(rows: Sequence[Sequence[int]], run: Executor) -> Iterator[_Batch]:
    for places in batches_of(rows):
        batch = [rows[place] for place in places]
        width = padded_length(max(map(len, batch)), run.multiple)
        tokens, mask = left_padded(batch, 0, run.device, width=width)
        own = mask.bool()
        own[:, -1] = False
        for row, ids in enumerate(batch):
            own[row, width - len(ids)] = False
        yield _Batch(tokens, mask, own)


def _loss(run: Executor, batch: _Batch, at: Mapping[int, AtBlock]) -> float:
    """The summed loss of the tokens that follow the documents' own, EOS among them."""
    with run.at_blocks(at):
        logits = run.forward(batch.tokens, batch.mask)
    predicted = batch.own[:, :-1]
    targets = batch.tokens[:, 1:][predicted]
    return float(cross_entropy(logits[:, :-1][predicted], targets, reduction="sum"))


def _keep(seen: dict[int, Tensor], layer: int) -> AtBlock:
    def keep(resid: Float[Tensor, "batch pos d_model"]) -> None:
        seen[layer] = resid

    return keep


def _put(replacement: Float[Tensor, "*token d_model"], own: Bool[Tensor, "batch pos"]) -> AtBlock:
    def put(resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        resid = resid.clone()
        resid[own] = replacement
        return resid

    return put

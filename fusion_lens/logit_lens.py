"""What the model would say if it stopped after each block: the logit lens (nostalgebraist 2020).

The residual after block l goes through the model's own final norm, unembedding and soft-cap. That
is done by handing it to the model as the output of its last block, so that no part of the way is
rebuilt here, whatever the family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusion_lens.activations import at_least_float32
from fusion_lens.engine_log import EngineLog
from fusion_lens.executors import Executor
from fusion_lens.models import HookedModel, token_texts
from fusion_lens.teacher_forcing import Batch, Text, in_batches, passed, require_written

_ROWS = 8


@dataclass(frozen=True, slots=True, eq=False)
class Lens:
    """log p, in nats, and rank (1 is the likeliest) of every written token of one text, read after
    each block. The last block's are the model's own."""

    log_probs: Float[Tensor, "layer token"]
    ranks: Int[Tensor, "layer token"]
    str_tokens: tuple[str, ...]


def logit_lens(
    model: HookedModel,
    texts: Sequence[Text],
    *,
    executor: str = "auto",
    log: EngineLog | None = None,
) -> list[Lens]:
    """Read every written token, given all before it, after every block, under the text's plan: the
    residual is taken behind the steering of its own block.

    Raises:
        PlanError: if a plan belongs to another model, or recomputes its mean.
        SpanError: if a text has nothing written.
    """
    require_written(texts)
    n_layers = int(model.cfg.n_layers)

    def read(run: Executor, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        _, leaving = passed(run, batch, "resid_post", n_layers)
        read = [_read(run, batch, resid, n_layers - 1) for resid in leaving]
        log_probs, ranks = (torch.stack(own, dim=1) for own in zip(*read, strict=True))
        lengths = batch.mask[:, -batch.n_written :].sum(dim=-1).tolist()
        return [
            (log_probs[row, :, :length].cpu(), ranks[row, :, :length].cpu())
            for row, length in enumerate(lengths)
        ]

    read_texts = in_batches(model, texts, read, _ROWS, executor, log)
    return [
        Lens(log_probs, ranks, token_texts(model, text.tokens)[len(text.prompt.tokens) :])
        for text, (log_probs, ranks) in zip(texts, read_texts, strict=True)
    ]


def _read(
    run: Executor, batch: Batch, resid: Float[Tensor, "batch pos d_model"], last_layer: int
) -> tuple[Float[Tensor, "batch token"], Int[Tensor, "batch token"]]:
    with run.at_blocks({last_layer: lambda _: resid}):
        logits = run.forward(batch.tokens, batch.mask, last=batch.n_written + 1)[:, :-1]
    log_p = at_least_float32(logits).log_softmax(dim=-1)
    own = log_p.gather(-1, batch.tokens[:, -batch.n_written :, None])
    return own[..., 0], (log_p > own).sum(dim=-1) + 1

"""A causal language model, other than the one that is steered, as the measure of fluency.

Two measures, in nats per token. *Windows*: Fusion Steering's (arXiv 2505.22572), on a text that
holds the prompt: the unweighted mean, over windows of 512 tokens that do not overlap, of each
window's mean loss given the window alone. *Continuations*: tokens of a completion given its prompt,
as the controlled protocol has it under the steered model itself (docs/method.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from fusion_lens.activations import padded_length, same_shape
from fusion_lens.identity import weights_digest
from fusion_lens.models import load_text_model

WINDOW = 512
_ROWS = 8


class Continuation(NamedTuple):
    """A completion and the prompt before it; it `ended` where end-of-text was written."""

    prompt: str
    completion: str
    ended: bool


class _Window(NamedTuple):
    """Tokens that are read together, of which those from `first` on are scored."""

    tokens: tuple[int, ...]
    first: int


@final
class PerplexityModel:
    """Any causal language model of transformers, by folder or hub name ("openai-community/gpt2").

    Passes have a fixed number of rows and a length that depends on the text alone: a text's
    value does not depend on its neighbours.

    Raises:
        ModelError: if it cannot be found or opened.
    """

    def __init__(
        self, name_or_path: str | Path, *, device: str | None = None, dtype: str = "float32"
    ) -> None:
        self._model, self._tokenizer = load_text_model(name_or_path, device=device, dtype=dtype)
        self.name = Path(name_or_path).name if Path(name_or_path).exists() else str(name_or_path)

    @cached_property
    def weights(self) -> str:
        """Its digest, as `ModelIdentity.weights`."""
        return weights_digest(self._model.parameters())

    @property
    def n_ctx(self) -> int | None:
        """Positions the model has; None where its config names none."""
        return getattr(self._model.config, "max_position_embeddings", None)

    def window_nll(self, texts: Sequence[str]) -> list[float | None]:
        """The mean over windows of their mean losses; None where no window has two tokens, or a
        loss is not finite. No token is put before a text."""
        width = min(WINDOW, self.n_ctx or WINDOW)
        windows: list[_Window] = []
        bounds = [0]
        for text in texts:
            tokens = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            parts = (tokens[i : i + width] for i in range(0, len(tokens), width))
            windows += [_Window(tuple(part), 1) for part in parts if len(part) > 1]
            bounds.append(len(windows))
        losses = self._losses(windows)
        return [_mean(losses[start:stop]) for start, stop in pairwise(bounds)]

    def continuation_nll(self, texts: Sequence[Continuation]) -> list[float | None]:
        """The mean loss of a completion's tokens, end-of-text among them where it was written; None
        where there is none, the text exceeds the context, or a loss is not finite.

        A token that reaches over the border counts as the completion's. A tokenizer that begins
        texts with a token of its own does so here.
        """
        windows = [self._continued(text) for text in texts]
        scored = [window for window in windows if window is not None]
        losses = iter(self._losses(scored))
        return [None if window is None else _mean([next(losses)]) for window in windows]

    def _continued(self, text: Continuation) -> _Window | None:
        encoded = self._tokenizer(text.prompt + text.completion, return_offsets_mapping=True)
        tokens = list(encoded["input_ids"])
        border = len(text.prompt)
        first = next(
            (i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > border),
            len(tokens),
        )
        if text.ended and self._tokenizer.eos_token_id is not None:
            tokens.append(self._tokenizer.eos_token_id)
        first = max(first, 1)
        if first >= len(tokens) or len(tokens) > (self.n_ctx or math.inf):
            return None
        return _Window(tuple(tokens), first)

    def _losses(self, windows: Sequence[_Window]) -> list[float]:
        """The mean loss of every window's scored tokens."""
        shapes = [padded_length(len(window.tokens)) for window in windows]
        losses = [0.0] * len(windows)
        for batch in same_shape(shapes, lambda _: _ROWS):
            rows = [windows[i] for i in batch]
            padded = [*rows, *[rows[0]] * (_ROWS - len(rows))]
            means = self._pass(padded, shapes[batch[0]])
            for i, mean in zip(batch, means.tolist(), strict=False):
                losses[i] = mean
        return losses

    def _pass(self, rows: Sequence[_Window], width: int) -> Float[Tensor, " row"]:
        # padded on the right: GPT-2 counts positions from the first column whatever the mask
        tokens = torch.zeros((len(rows), width), dtype=torch.long)
        mask = torch.zeros_like(tokens)
        scored = torch.zeros_like(tokens)
        for i, row in enumerate(rows):
            tokens[i, : len(row.tokens)] = torch.tensor(row.tokens)
            mask[i, : len(row.tokens)] = 1
            scored[i, row.first : len(row.tokens)] = 1
        device: Any = self._model.device
        tokens, mask, scored = tokens.to(device), mask.to(device), scored.to(device)
        with torch.no_grad():
            logits = self._model(input_ids=tokens, attention_mask=mask).logits.float()
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        ).view(len(rows), -1)
        counted = scored[:, 1:].bool()
        total = torch.where(counted, losses, torch.zeros_like(losses)).sum(dim=-1)
        return total / counted.sum(dim=-1)


def _mean(losses: Sequence[float]) -> float | None:
    value = sum(losses) / len(losses) if losses else math.nan
    return value if math.isfinite(value) else None

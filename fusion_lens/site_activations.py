"""Texts -> one activation per layer of a site, taken at their last token or averaged.

What methods are fitted on that learn from sets of texts. Texts may be steered: what is read at a
site is what enters the steering there, changed by all that is done before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fusion_lens.activations import weighted_mean
from fusion_lens.engine_log import EngineLog
from fusion_lens.errors import ActivationError, SpanError, one_of
from fusion_lens.executors import Executor
from fusion_lens.identity import ModelIdentity, identify
from fusion_lens.models import SITES, HookedModel
from fusion_lens.teacher_forcing import Batch, Text, in_batches, passed

TOKENS = ("last", "mean", "written")

_ROWS = 16


@dataclass(frozen=True, slots=True, eq=False)
class SiteActivations:
    """What a model does at one site of every layer, a row for each text; on the CPU, in float32 or
    the model's wider dtype. `width` is `d_model`, or at "attn_z" all heads' outputs in a row."""

    values: Float[Tensor, "text layer width"]
    site: str
    model: ModelIdentity

    def __post_init__(self) -> None:
        one_of("site", self.site, SITES)
        n_layers, d_model = self.values.shape[1], self.values.shape[2]
        wide = self.site != "attn_z" and d_model != self.model.d_model
        if n_layers != self.model.n_layers or wide:
            raise ActivationError(
                f"activations at {self.site} must have the shape (text, {self.model.n_layers}, "
                f"{self.model.d_model}) of {self.model.name}, but got {tuple(self.values.shape)}."
            )
        if not bool(torch.isfinite(self.values).all()):
            raise ActivationError("activations must be finite, but a value is NaN or infinite.")

    def __len__(self) -> int:
        return len(self.values)

    def check_beside(self, other: SiteActivations) -> None:
        """Make sure that `other` can be compared with these.

        Raises:
            ActivationError: if it is of another model, site or width.
        """
        reason = self.model.mismatch(other.model)
        if reason is not None:
            raise ActivationError(f"both sides must come from one model, but {reason}.")
        if (self.site, self.values.shape[2]) != (other.site, other.values.shape[2]):
            raise ActivationError(
                f"both sides must be of one site, but got {self.site} of {self.values.shape[2]} "
                f"and {other.site} of {other.values.shape[2]}."
            )


def record_at(
    model: HookedModel,
    texts: Sequence[Text],
    site: str = "resid_post",
    *,
    tokens: str = "last",
    executor: str = "auto",
    log: EngineLog | None = None,
) -> SiteActivations:
    """Read every text once. `tokens`: "last" takes the last token, "mean" the mean over all tokens
    that are not special, "written" over those behind the prompt.

    Raises:
        ConfigError: if `site` or `tokens` is not one of those there are.
        SpanError: if a text has no token to read.
        ActivationError: if there is no text, or a value is not finite.
        PlanError: if a plan belongs to another model, or recomputes its mean.
    """
    one_of("site", site, SITES)
    one_of("tokens", tokens, TOKENS)
    if not texts:
        raise ActivationError("there must be at least one text to read, but got none.")
    for text in texts:
        read_positions(text, tokens)
    n_layers = int(model.cfg.n_layers)

    def read(run: Executor, batch: Batch) -> list[Float[Tensor, "layer width"]]:
        weights = torch.zeros(batch.tokens.shape, dtype=torch.float64)
        for row, (text, place) in enumerate(zip(batch.rows, batch.places, strict=True)):
            kept = read_positions(text, tokens)
            weights[row, [place.start + t for t in kept]] = 1.0 / len(kept)
        entering, _ = passed(run, batch, site, n_layers)
        return list(torch.stack([weighted_mean(x, weights) for x in entering], dim=1).cpu())

    rows = in_batches(model, texts, read, _ROWS, executor, log, sites=(site,))
    return SiteActivations(torch.stack(rows), site, identify(model))


def read_positions(text: Text, tokens: str) -> Sequence[int]:
    """The positions of a text that "last", "mean" or "written" stand for.

    Raises:
        SpanError: if it has none.
    """
    if tokens == "last":
        return (len(text.tokens) - 1,)
    start = len(text.prompt.tokens) if tokens == "written" else 0
    kept = [t for t in range(start, len(text.tokens)) if t not in text.prompt.special]
    if not kept:
        what = "a token behind its prompt" if tokens == "written" else "a token that is not special"
        raise SpanError(f"every text must have {what}, but {text.prompt.text!r} has none.")
    return kept

"""Prompts -> one mean residual vector per layer, in one batched pass.

Only `blocks.l.hook_resid_post` is hooked, and pooled inside the hook, so that a pass over many
prompts keeps "batch layer d_model" and nothing else. Means are over a prompt's span without special
tokens: a BOS residual is 2x to orders of magnitude larger than the rest and would dominate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from fusion_lens.errors import ActivationError, SpanError
from fusion_lens.models import (
    HookedModel,
    ModelIdentity,
    check_hook_names,
    evaluating,
    forward,
    identify,
    resid_post,
)
from fusion_lens.prompts import Layout, Prompt


@dataclass(frozen=True, slots=True, eq=False)
class Activations:
    """The mean residual stream of one prompt after every block, float32 or the model's wider
    dtype."""

    mean: Float[Tensor, "layer d_model"]
    layout: Layout
    model: ModelIdentity

    def __post_init__(self) -> None:
        expected = (self.model.n_layers, self.model.d_model)
        if tuple(self.mean.shape) != expected:
            raise ActivationError(
                f"activations must have the shape {expected} of {self.model.name}, "
                f"but got {tuple(self.mean.shape)}."
            )
        if not bool(torch.isfinite(self.mean).all()):
            raise ActivationError("activations must be finite, but a mean holds NaN or infinity.")


def record(
    model: HookedModel, prompts: Sequence[Prompt], *, batch_size: int = 64
) -> list[Activations]:
    """Pool every prompt's residual stream over its span (or the whole prompt), unsteered.

    Raises:
        SpanError: if a prompt has no token to pool over.
        ActivationError: if a mean is not finite.
    """
    identity = identify(model)
    names = [resid_post(layer) for layer in range(identity.n_layers)]
    check_hook_names(model, names)
    for prompt in prompts:
        _require_pooled(prompt)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].tokens))
    pooled: dict[int, Tensor] = {}
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            means = _pooled_pass(model, [prompts[i] for i in rows], names)
            pooled.update(zip(rows, means, strict=True))
    return [
        Activations(mean=pooled[i], layout=prompt.layout, model=identity)
        for i, prompt in enumerate(prompts)
    ]


def activations_from_cache(cache: Any, prompt: Prompt, *, row: int = 0) -> Activations:
    """Pool a TransformerLens `ActivationCache` of an unpadded run of `prompt`.

    Raises:
        SpanError: if the cache holds another number of tokens, or the prompt none to pool over.
        ActivationError: if a layer is missing.
    """
    identity = identify(cache.model)
    names = [resid_post(layer) for layer in range(identity.n_layers)]
    missing = [name for name in names if name not in cache]
    if missing:
        raise ActivationError(
            f"the cache must hold every layer's hook_resid_post, but has no {missing[0]}; "
            "leave its names_filter out or widen it."
        )
    streams = [cache[name] for name in names]
    stacked = torch.stack([stream[row] if stream.ndim == 3 else stream for stream in streams])
    if stacked.shape[1] != len(prompt.tokens):
        raise SpanError(
            f"the cache must hold the {len(prompt.tokens)} tokens of the prompt, unpadded, "
            f"but got {stacked.shape[1]}; run the model on prompt.to_tensor()."
        )
    _require_pooled(prompt)
    mean = at_least_float32(stacked[:, list(prompt.pooled)]).mean(dim=1).detach().cpu()
    return Activations(mean=mean, layout=prompt.layout, model=identity)


def left_padded(
    prompts: Sequence[Sequence[int]], pad: int, device: torch.device | str
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Tokens with padding on the left, and the mask that is 0 there."""
    width = max(len(prompt) for prompt in prompts)
    tokens = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask[row, width - len(prompt) :] = 1
    return tokens.to(device), mask.to(device)


def _pooled_pass(
    model: HookedModel, prompts: Sequence[Prompt], names: Sequence[str]
) -> Float[Tensor, "batch layer d_model"]:
    device = next(iter(model.parameters())).device
    tokens, mask = left_padded([prompt.tokens for prompt in prompts], 0, device)
    width = tokens.shape[1]
    weights = torch.zeros(tokens.shape, dtype=torch.float64)
    for row, prompt in enumerate(prompts):
        pad = width - len(prompt.tokens)
        weights[row, [pad + t for t in prompt.pooled]] = 1.0 / len(prompt.pooled)
    means: dict[int, Tensor] = {}

    def pool(layer: int, resid: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
        resid = at_least_float32(resid)
        kept = weights.to(resid.device, resid.dtype)
        # where, not *: a pad row's NaN times 0 is NaN
        clean = torch.where(kept[..., None] > 0, resid, torch.zeros_like(resid))
        means[layer] = einsum(clean, kept, "batch pos d, batch pos -> batch d")

    with model.hooks(fwd_hooks=[(name, partial(pool, layer)) for layer, name in enumerate(names)]):
        forward(model, tokens, mask, last=1)
    return torch.stack([means[layer] for layer in range(len(names))], dim=1).cpu()


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in its own wider dtype."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _require_pooled(prompt: Prompt) -> None:
    if not prompt.pooled:
        raise SpanError(
            f"a prompt must have a token to pool over, but {prompt.text!r} has only special ones."
        )

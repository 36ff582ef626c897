"""Prompts -> one mean residual vector per layer, in one batched pass.

Only `blocks.l.hook_resid_post` is hooked, and pooled inside the hook, so that a pass over many
prompts keeps "batch layer d_model" and nothing else. Means are over a prompt's span without special
tokens: a BOS residual is 2x to orders of magnitude larger than the rest and would dominate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusion_lens.engine_log import EngineLog
from fusion_lens.errors import ActivationError, SpanError
from fusion_lens.executors import MULTIPLE, Executor, executor_of
from fusion_lens.identity import ModelIdentity, identify
from fusion_lens.models import HookedModel, evaluating, resid_post
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
    model: HookedModel,
    prompts: Sequence[Prompt],
    *,
    batch_size: int | None = None,
    executor: str = "auto",
    log: EngineLog | None = None,
) -> list[Activations]:
    """Pool every prompt's residual stream over its span (or the whole prompt), unsteered.

    Every pass has `batch_size` rows, idle ones among them, and a padded length that depends on the
    prompt alone: with a number given, a prompt's numbers do not depend on the others. None: as many
    as there are, 16 at most.

    Raises:
        SpanError: if a prompt has no token to pool over.
        ActivationError: if a mean is not finite.
    """
    log = log or EngineLog()
    identity = identify(model)
    for prompt in prompts:
        _require_pooled(prompt)
    if not prompts:
        return []
    run, reason = executor_of(model, executor)
    log.fell_back(reason)
    pooled: dict[int, Tensor] = {}

    def pool(n_rows: int) -> None:
        left = [i for i in range(len(prompts)) if i not in pooled]
        shapes = [padded_length(len(prompts[i].tokens), run.multiple) for i in left]
        for batch in same_shape(shapes, lambda shape: n_rows):
            rows = [left[n] for n in batch]
            idle = [rows[0]] * (n_rows - len(rows))
            means = _pooled_pass(run, [prompts[i] for i in rows + idle], identity)
            pooled.update(zip(rows, means[: len(rows)].cpu(), strict=True))

    with evaluating(model):
        log.halving(batch_size or min(len(prompts), 16), pool)
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


def padded_length(length: int, multiple: int = MULTIPLE) -> int:
    """The length that a text is padded to: it depends on nothing else, so that a row's numbers
    do not depend on its neighbours', and takes few values, so that batches are full."""
    return -(-length // multiple) * multiple


def left_padded(
    prompts: Sequence[Sequence[int]],
    pad: int,
    device: torch.device | str,
    *,
    width: int | None = None,
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Tokens with padding on the left to `width` or the longest, and the mask that is 0 there."""
    width = width or max(len(prompt) for prompt in prompts)
    tokens = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask[row, width - len(prompt) :] = 1
    return tokens.to(device), mask.to(device)


def same_shape(shapes: Sequence[Any], n_rows: Callable[[Any], int]) -> Iterator[list[int]]:
    """Places of equal (sortable) shapes, at most `n_rows(shape)` at a time."""
    order = sorted(range(len(shapes)), key=shapes.__getitem__)
    for shape, alike in groupby(order, key=shapes.__getitem__):
        places, most = list(alike), n_rows(shape)
        for start in range(0, len(places), most):
            yield places[start : start + most]


def _pooled_pass(
    run: Executor, prompts: Sequence[Prompt], model: ModelIdentity
) -> Float[Tensor, "batch layer d_model"]:
    width = padded_length(len(prompts[0].tokens), run.multiple)
    tokens, mask = left_padded([prompt.tokens for prompt in prompts], 0, run.device, width=width)
    weights = torch.zeros((len(prompts), width), dtype=torch.float64)
    for row, prompt in enumerate(prompts):
        pad = width - len(prompt.tokens)
        weights[row, [pad + t for t in prompt.pooled]] = 1.0 / len(prompt.pooled)
    means: dict[int, Tensor] = {}

    def pool(layer: int, resid: Float[Tensor, "batch pos d_model"]) -> None:
        means[layer] = weighted_mean(resid, weights)

    with run.at_blocks({layer: partial(pool, layer) for layer in range(model.n_layers)}):
        run.forward(tokens, mask, last=1)
    return torch.stack([means[layer] for layer in range(model.n_layers)], dim=1)


def weighted_mean(
    x: Float[Tensor, "batch pos width"], weights: Float[Tensor, "batch pos"]
) -> Float[Tensor, "batch width"]:
    """The sum of the positions' activations times their weights; one of weight 0 counts for
    nothing, whatever it holds."""
    x = at_least_float32(x)
    weights = weights.to(x)
    # where, not *: a pad row's NaN times 0 is NaN
    clean = torch.where(weights[..., None] > 0, x, torch.zeros_like(x))
    return torch.bmm(weights[:, None], clean)[:, 0]


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in its own wider dtype."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _require_pooled(prompt: Prompt) -> None:
    if not prompt.pooled:
        raise SpanError(
            f"a prompt must have a token to pool over, but {prompt.text!r} has only special ones."
        )

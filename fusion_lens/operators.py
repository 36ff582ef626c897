"""How a residual is changed: pure tensor maths, no model, no positions.

`where` rather than a product with a mask: outside the mask the output *is* the input, bit for bit,
-0.0 and NaN included. Source of both formulas: Fusion Steering (arXiv 2505.22572), docs/method.md.
"""

from __future__ import annotations

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor


def add(
    resid: Float[Tensor, "batch pos d_model"],
    shift: Float[Tensor, "#batch d_model"],
    mask: Bool[Tensor, "#batch pos"],
) -> Float[Tensor, "batch pos d_model"]:
    """`a + shift` where the mask holds, `a` elsewhere; a constant shift, so a KV cache stays
    valid."""
    moved = (_wide(resid) + shift[:, None]).to(resid.dtype)
    return torch.where(mask[..., None], moved, resid)


def mean_shift(
    resid: Float[Tensor, "batch pos d_model"],
    reference: Float[Tensor, "#batch d_model"],
    coeff: Float[Tensor, "#batch"],
    present: Bool[Tensor, "#batch pos"],
    mask: Bool[Tensor, "#batch pos"],
) -> Float[Tensor, "batch pos d_model"]:
    """`a + coeff*(h - m)` where the mask holds; `m` is the mean of this very `a` over the present
    positions.

    The mean needs the whole sequence: a KV cache would hide most of it.
    """
    wide = _wide(resid)
    kept = torch.where(present[..., None], wide, torch.zeros_like(wide))
    weight = present.to(wide) / present.sum(dim=-1, keepdim=True).clamp(min=1)
    mean = einsum(kept, weight.expand(resid.shape[:2]), "batch pos d, batch pos -> batch d")
    shift = coeff[:, None].to(wide) * (reference.to(wide) - mean)
    return add(resid, shift, mask)


def _wide(resid: Tensor) -> Tensor:
    """Hook arithmetic is done in float32 at least, as the authors do, and rounded once."""
    return resid.to(torch.promote_types(resid.dtype, torch.float32))

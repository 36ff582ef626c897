"""How an activation is changed: pure tensor maths, no model, no positions.

`where` rather than a product with a mask: outside the mask the output *is* the input, bit for bit,
-0.0 and NaN included. Sources: `add` and `mean_shift` Fusion Steering (arXiv 2505.22572), `affine`
AUSteer (arXiv 2602.04428) and Linear-AcT (arXiv 2410.23054), `gate_value` DSAS (arXiv 2512.03661);
docs/method.md.
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


def affine(
    x: Float[Tensor, "batch pos width"],
    scale: Float[Tensor, "#batch width"] | None,
    shift: Float[Tensor, "#batch width"],
    mask: Bool[Tensor, "#batch pos"],
    *,
    gate: Float[Tensor, "batch pos"] | None = None,
    bounds: tuple[Float[Tensor, "#batch width"], Float[Tensor, "#batch width"]] | None = None,
) -> Float[Tensor, "batch pos width"]:
    """`x + g * (scale*x + shift)` where the mask holds and `low <= x <= high`, `x` elsewhere.

    No `scale` is 0, no `gate` is 1, no `bounds` are infinite. It needs one token at a time, so a KV
    cache stays valid.
    """
    wide = _wide(x)
    change = shift[:, None] if scale is None else wide * scale[:, None] + shift[:, None]
    if gate is not None:
        change = gate[..., None] * change
    moves = mask[..., None]
    if bounds is not None:
        low, high = bounds
        moves = moves & (wide >= low[:, None]) & (wide <= high[:, None])
    return torch.where(moves, (wide + change).to(x.dtype), x)


def gate_value(
    x: Float[Tensor, "batch pos width"],
    theta: Float[Tensor, "#batch width"],
    bias: Float[Tensor, "#batch"],
    kind: str,
) -> Float[Tensor, "batch pos"]:
    """`sigmoid(theta.x + bias)` of every token, or with `kind="relu"` what of it is above 0.

    The sigmoid of z is the softmax of (z, 0): PyTorch's `sigmoid` rounds the last few numbers of a
    tensor otherwise than the rest, and a row's gate would depend on its place in the batch.
    """
    z = (_wide(x) * theta[:, None]).sum(dim=-1) + bias[:, None]
    if kind == "relu":
        return z.relu()
    return torch.stack([z, torch.zeros_like(z)], dim=-1).softmax(dim=-1)[..., 0]


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

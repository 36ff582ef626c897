"""AUSteer: which units to steer, by how often they differ alike (Feng et al. 2026,
arXiv 2602.04428).

Of every unit, r+ and r- are the shares of pairs in which its momentum, x+ - x- at the last token,
is positive and negative (`units.Momenta`). The k units of the highest max(r+, r-), over all layers
together, are steered at every position:

    x <- x + s*x        s = +alpha * r+ where r+ >= r-, else -alpha * r-

Units depend on the basis: the weights must be unprocessed.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from fusion_lens.methods.checks import require_pairs
from fusion_lens.plans import Affine, Plan, full
from fusion_lens.prompts import NO_PROMPT
from fusion_lens.site_activations import SiteActivations
from fusion_lens.units import LEAST, Momenta, count_momenta, unit_mask

ALPHA_LOW, ALPHA_HIGH = 1.0, 100.0
"""Where alpha is searched: the best published ones are 8 to 100, and a negative unit only changes
its sign where alpha * r- is above 1."""


def momenta(right: SiteActivations, wrong: SiteActivations) -> Momenta:
    """Count over pairs, recorded with `tokens="last"`; the paper has 300 to 1000 of them.

    Raises:
        ActivationError: if the sides are of two models or sites.
        ContrastError: if they have unequally many rows, or fewer than two.
    """
    require_pairs(right, wrong, LEAST)
    return count_momenta(right.values - wrong.values, right.site, right.model)


def austeer(
    found: Momenta,
    k: int,
    *,
    ranking: Int[Tensor, "unit 2"] | None = None,
    positions: str = "all",
) -> Plan:
    """Scale the first `k` units of `ranking` (None: by score): `plan * alpha` is the published step
    of that alpha (`ALPHA_LOW` to `ALPHA_HIGH`). The best published k are 2 to 100.

    Raises:
        ConfigError: if `k` is below 1 or above the number of units, the ranking is not of all
            units, or `positions` is unknown.
        ContrastError: if there are fewer than two pairs.
    """
    r_positive, r_negative = found.r_positive, found.r_negative
    shape = (r_positive.shape[0], r_positive.shape[1])
    kept = unit_mask(found.ranking if ranking is None else ranking, k, shape)
    signed = torch.where(r_positive >= r_negative, r_positive, -r_negative)
    scale = torch.where(kept, signed, 0.0).float()
    step = Affine(
        site=found.site,
        scale=scale,
        shift=torch.zeros_like(scale),
        segments=full(found.model.n_layers),
        coeffs=(1.0,),
        model=found.model,
        layout=NO_PROMPT,
        positions=positions,
    )
    return Plan((step,))

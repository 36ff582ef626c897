"""CAA, contrastive activation addition: the mean difference of pairs, added at one layer.

Over n pairs that go on rightly or wrongly, with h the residual stream after block l at the last
token (the answer's letter, in the paper),

    v = 1/n sum_j (h+[j] - h-[j]);    x <- x + c * v

from the end of the instruction on: the positions "completion" (Rimsky et al. 2023, arXiv
2312.06681).
"""

from __future__ import annotations

from fusion_lens.deltas import Deltas
from fusion_lens.methods.checks import require_pairs, require_site
from fusion_lens.plans import Plan, make_plan, one_layer
from fusion_lens.prompts import NO_PROMPT
from fusion_lens.site_activations import SiteActivations


def caa(
    right: SiteActivations,
    wrong: SiteActivations,
    layer: int,
    *,
    positions: str | int = "completion",
) -> Plan:
    """A plan of one step, fitted on activations "text layer d_model" at "resid_post" whose rows are
    pairs; v is in residual units, its strength is the paper's multiplier c.

    Raises:
        ContrastError: if the rows are no pairs, or fewer than two.
        ActivationError: if they are of another site.
        PlanError: if the model has no such layer.

    References:
        Rimsky et al., Steering Llama 2 via Contrastive Activation Addition, arXiv 2312.06681.
    """
    require_pairs(right, wrong)
    require_site(right, "resid_post")
    reference, base = (
        side.values.double().mean(dim=0).to(side.values.dtype) for side in (right, wrong)
    )
    deltas = Deltas(reference, base, NO_PROMPT, right.model)
    return make_plan(deltas, 1.0, one_layer(layer, right.model.n_layers), positions=positions)

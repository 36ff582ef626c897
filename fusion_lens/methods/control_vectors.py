"""Control vectors: the direction in which most pairs differ, at every layer.

Per layer, with the difference of pair j at its last token d[j] = h+[j] - h-[j] (the residual stream
after the block), a row of D,

    v = the first right singular vector of D;    x <- x + c * v

D is not centred: what all pairs share is what is looked for, and centring would take it out. v has
norm 1 and the sign by which more pairs project positively than negatively; with as many of both,
that of the mean's projection; where this is 0 too, its largest entry is positive (Zou et al. 2023,
arXiv 2310.01405, as the library repeng restates it). `how="mean"` takes v = mean_j d[j] as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fusion_lens.deltas import Deltas
from fusion_lens.errors import ActivationError, PlanError, one_of
from fusion_lens.methods.checks import require_pairs, require_site
from fusion_lens.plans import Plan, full, make_plan, one_layer
from fusion_lens.prompts import NO_PROMPT
from fusion_lens.site_activations import SiteActivations

HOW = ("pca", "mean")


def control_vectors(
    right: SiteActivations,
    wrong: SiteActivations,
    *,
    how: str = "pca",
    layers: Sequence[int] | None = None,
    positions: str | int = "all",
) -> Plan:
    """A plan of one step on `layers` (None: all), fitted on activations "text layer d_model" at
    "resid_post" whose rows are pairs. Its vectors have norm 1, or with "mean" residual units; its
    strength is c. A layer on which no pair differs gets the zero vector.

    Raises:
        ContrastError: if the rows are no pairs, or fewer than two.
        ActivationError: if they are of another site, or all vectors are 0.
        ConfigError: if `how` is neither "pca" nor "mean".
        PlanError: if a layer is not of the model, or none is given.

    References:
        Zou et al., Representation Engineering: A Top-Down Approach to AI Transparency, arXiv
        2310.01405.
    """
    one_of("how", how, HOW)
    require_pairs(right, wrong)
    require_site(right, "resid_post")
    n_layers = right.model.n_layers
    if layers is None:
        segments = full(n_layers)
    else:
        segments = tuple(segment for layer in layers for segment in one_layer(layer, n_layers))
    if not segments:
        raise PlanError("there must be at least one layer to steer, but got none; name some.")
    differences = right.values.double() - wrong.values.double()
    vectors = torch.zeros(differences.shape[1:], dtype=torch.float64)
    for segment in segments:
        for layer in range(segment.start, segment.stop):
            own = differences[:, layer]
            vectors[layer] = own.mean(dim=0) if how == "mean" else _first_component(own)
    if not bool(vectors.any()):
        raise ActivationError(
            "the pairs must differ on a layer that is steered, but all vectors are 0; "
            "take other pairs or layers."
        )
    vectors = vectors.to(right.values.dtype)
    deltas = Deltas(vectors, torch.zeros_like(vectors), NO_PROMPT, right.model)
    return make_plan(deltas, 1.0, segments, positions=positions)


def _first_component(differences: Float[Tensor, "pair d_model"]) -> Float[Tensor, " d_model"]:
    if not bool(differences.any()):
        return torch.zeros_like(differences[0])
    component: Tensor = torch.linalg.svd(differences, full_matrices=False).Vh[0]
    projected = differences @ component
    votes = float(projected.sign().sum())
    sign = votes or float(projected.mean()) or float(component[component.abs().argmax()])
    return component if sign > 0 else -component

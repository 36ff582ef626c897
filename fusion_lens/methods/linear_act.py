"""Linear-AcT: an affine map of every unit that carries what a model does on source texts over to
what it does on target texts (Rodriguez et al. 2024, arXiv 2410.23054).

With x and y a unit's values on sources and targets, sorted, and x~ and y~ the same less their
means,

    T(z) = omega*z + b      omega = sum(x~ y~) / sum(x~^2)      b = mean(y) - omega * mean(x)

is the optimal transport between the two where it is affine, and is applied inside the source's
range as lambda*T(z) + (1 - lambda)*z. Layer by layer: a layer's map is fitted on sources that the
maps below have moved already, and on targets as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fusion_lens.errors import ContrastError, PlanError
from fusion_lens.identity import ModelIdentity
from fusion_lens.models import HookedModel
from fusion_lens.plans import Affine, Plan, full
from fusion_lens.progress import Progress, shown
from fusion_lens.prompts import NO_PROMPT
from fusion_lens.site_activations import record_at
from fusion_lens.teacher_forcing import Text


class AffineMap(NamedTuple):
    """`omega*z + b` for every unit with `low <= z <= high`, the range of the sources."""

    omega: Float[Tensor, " width"]
    b: Float[Tensor, " width"]
    low: Float[Tensor, " width"]
    high: Float[Tensor, " width"]


def affine_map(source: Float[Tensor, "n width"], target: Float[Tensor, "m width"]) -> AffineMap:
    """Fit every unit by itself.

    Of unequally many texts, omega is fitted on as many quantiles of both as the smaller side has
    texts, from the least to the greatest value, interpolated linearly; b takes mean to mean all the
    same. A unit that is constant in the source is shifted: omega = 1.

    Raises:
        ContrastError: if a side has fewer than two texts.
    """
    n_points = min(len(source), len(target))
    if n_points < 2:
        raise ContrastError(
            "a map must be fitted on at least 2 texts of either side, but got "
            f"{len(source)} sources and {len(target)} targets; add some."
        )
    x, y = (_quantiles(side.double(), n_points) for side in (source, target))
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    low, high = source.amin(dim=0), source.amax(dim=0)
    varies = low < high
    spread = torch.where(varies, x.square().sum(dim=0), 1.0)
    omega = torch.where(varies, (x * y).sum(dim=0) / spread, 1.0)
    b = target.double().mean(dim=0) - omega * source.double().mean(dim=0)
    return AffineMap(omega.to(source.dtype), b.to(source.dtype), low, high)


def linear_act(
    model: HookedModel,
    sources: Sequence[Text],
    targets: Sequence[Text],
    *,
    site: str = "resid_post",
    tokens: str = "mean",
    executor: str = "auto",
    progress: Progress | bool = True,
) -> Plan:
    """The maps of all layers as one step: `plan * lambda` goes that part of the way, 0 to 1. It
    takes one pass over the targets, and one over the sources for every layer. `tokens` are those of
    `record_at`.

    The bounds are those of the sources as they were fitted, with all maps below at strength 1, and
    of texts: at another strength what arrives at a layer may lie outside them, and so may a single
    token where the texts were averaged. It is left alone there.

    Raises:
        ContrastError: if a side has fewer than two texts.
        PlanError: if a text is steered.
        ConfigError: if `site` or `tokens` is not one of those there are.
        SpanError: if a text has no token to read.
    """
    for text in (*sources, *targets):
        if text.plan is not None:
            raise PlanError(
                "texts must be unsteered for maps to be fitted on them, "
                f"but {text.prompt.text!r} has a plan."
            )
    wanted = record_at(model, targets, site, tokens=tokens, executor=executor)
    n_layers = wanted.model.n_layers
    maps: list[AffineMap] = []
    moved = list(sources)
    with shown(progress) as show:
        for layer in range(n_layers):
            found = record_at(model, moved, site, tokens=tokens, executor=executor)
            maps.append(affine_map(found.values[:, layer], wanted.values[:, layer]))
            plan = _plan_of(maps, site, wanted.model)
            moved = [replace(text, plan=plan) for text in sources]
            if show is not None:
                show("layers mapped", layer + 1, n_layers)
    return plan


def _plan_of(maps: Sequence[AffineMap], site: str, model: ModelIdentity) -> Plan:
    """The maps of the lowest layers; the layers above are left alone."""
    same = AffineMap(*(torch.full_like(maps[0].b, value) for value in (1.0, 0.0, 0.0, 0.0)))
    rows = [*maps, *[same] * (model.n_layers - len(maps))]
    omega, b, low, high = (torch.stack(column) for column in zip(*rows, strict=True))
    step = Affine(
        site=site,
        scale=omega - 1,
        shift=b,
        low=low,
        high=high,
        segments=full(len(maps)),
        coeffs=(1.0,),
        model=model,
        layout=NO_PROMPT,
    )
    return Plan((step,))


def _quantiles(values: Float[Tensor, "n width"], n_points: int) -> Float[Tensor, "point width"]:
    """Evenly spaced from the least to the greatest value; as many as there are: the values
    themselves, sorted."""
    ordered = values.sort(dim=0).values
    places = torch.arange(n_points, dtype=values.dtype) * (len(values) - 1) / (n_points - 1)
    below = places.floor().long()
    above = (below + 1).clamp(max=len(values) - 1)
    return torch.lerp(ordered[below], ordered[above], (places - below)[:, None])

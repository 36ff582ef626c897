"""AUSteer: which units to steer, by how often they differ alike (Feng et al. 2026,
arXiv 2602.04428).

A unit is one dimension of a site's activation x. Its momentum in a pair is x+ - x-, of the right
and the wrong text at the last token; r+ and r- are the shares of pairs in which it is positive and
negative (0 is neither), and its score is max(r+, r-). The k units of the highest score, over all
layers together, are steered at every position:

    x <- x + s*x        s = +alpha * r+ where r+ >= r-, else -alpha * r-

Momenta are whole counts, so that they can be added up and one question's own taken away again
exactly. Units depend on the basis: the weights must be unprocessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fusion_lens.deltas import Deltas
from fusion_lens.errors import ActivationError, ConfigError, ContrastError
from fusion_lens.methods.checks import require_pairs
from fusion_lens.models import ModelIdentity
from fusion_lens.plans import Affine, Plan, full
from fusion_lens.prompts import NO_PROMPT
from fusion_lens.site_activations import SiteActivations

ALPHA_LOW, ALPHA_HIGH = 1.0, 100.0
"""Where alpha is searched: the best published ones are 8 to 100, and a negative unit only changes
its sign where alpha * r- is above 1."""

_LEAST = 2


@dataclass(frozen=True, slots=True, eq=False)
class Momenta:
    """How often each unit of a site was higher and lower in the right of `n` pairs, and the sum of
    its differences, in the site's units. `width` is as in `SiteActivations`.

    `+` joins the counts of two sets of pairs, `-` takes away a set that was counted in.
    """

    n_positive: Int[Tensor, "layer width"]
    n_negative: Int[Tensor, "layer width"]
    n: int
    total: Float[Tensor, "layer width"]
    site: str
    model: ModelIdentity

    def __post_init__(self) -> None:
        least = torch.minimum(self.n_positive, self.n_negative)
        if bool((least < 0).any()) or bool((self.n_positive + self.n_negative > self.n).any()):
            raise ContrastError(
                f"a unit's counts must be in 0 to {self.n}, the number of pairs, but one is not; "
                "take away only pairs that were counted in."
            )

    @property
    def r_positive(self) -> Float[Tensor, "layer width"]:
        """r+, the share of pairs in which a unit is higher in the right text.

        Raises:
            ContrastError: if there are fewer than two pairs; so do all figures below.
        """
        return self._per_pair(self.n_positive)

    @property
    def r_negative(self) -> Float[Tensor, "layer width"]:
        """r-, the share of pairs in which it is lower."""
        return self._per_pair(self.n_negative)

    @property
    def mean(self) -> Float[Tensor, "layer width"]:
        """The mean difference, right minus wrong."""
        return self._per_pair(self.total)

    @property
    def score(self) -> Float[Tensor, "layer width"]:
        """max(r+, r-), in [0, 1]."""
        return torch.maximum(self.r_positive, self.r_negative)

    @property
    def ranking(self) -> Int[Tensor, "unit 2"]:
        """Layer and dimension of every unit, the highest score first, ties by layer, then by
        dimension."""
        return _ranked(self.score)

    def __add__(self, other: Momenta) -> Momenta:
        return self._with(other, 1)

    def __sub__(self, other: Momenta) -> Momenta:
        return self._with(other, -1)

    def _with(self, other: Momenta, sign: int) -> Momenta:
        reason = self.model.mismatch(other.model)
        if reason is not None:
            raise ActivationError(f"momenta must come from one model, but {reason}.")
        if self.site != other.site:
            raise ActivationError(
                f"momenta must be of one site, but got {self.site} and {other.site}."
            )
        return Momenta(
            n_positive=self.n_positive + sign * other.n_positive,
            n_negative=self.n_negative + sign * other.n_negative,
            n=self.n + sign * other.n,
            total=self.total + sign * other.total,
            site=self.site,
            model=self.model,
        )

    def _per_pair(self, counted: Tensor) -> Float[Tensor, "layer width"]:
        if self.n < _LEAST:
            raise ContrastError(
                f"momenta must be of at least {_LEAST} pairs to be compared, but are of {self.n}; "
                "add some."
            )
        return counted.double() / self.n


def momenta(right: SiteActivations, wrong: SiteActivations) -> Momenta:
    """Count over pairs, recorded with `tokens="last"`; the paper has 300 to 1000 of them.

    Raises:
        ActivationError: if the sides are of two models or sites.
        ContrastError: if they have unequally many rows, or fewer than two.
    """
    require_pairs(right, wrong, _LEAST)
    return _counted(right.values - wrong.values, right.site, right.model)


def consistent(deltas: Sequence[Deltas]) -> Momenta:
    """The same of questions' deltas (reference above base): which dimensions they move alike.

    `unit_mask` of its ranking is for `Step.units`, to inject what *other* questions agree on. Leave
    a question out of the count of many by `all_of_them - consistent([its_own])`.

    Raises:
        ActivationError: if they come from different models.
        ContrastError: if there are none.
    """
    if not deltas:
        raise ContrastError("there must be at least one question's deltas to count, but got none.")
    counts = (_counted(own.vectors[None], "resid_post", own.model) for own in deltas)
    found = next(counts)
    for own in counts:
        found = found + own
    return found


def ranking_by_mean(found: Momenta) -> Int[Tensor, "unit 2"]:
    """A control: units by the size of their mean difference, which consistency has no part in. In
    the residual stream it prefers late layers, where everything is larger."""
    return _ranked(found.mean.abs())


def random_ranking(found: Momenta, seed: int) -> Int[Tensor, "unit 2"]:
    """A control: all units in a random order."""
    generator = torch.Generator().manual_seed(seed)
    n_units = found.n_positive.numel()
    return _places(torch.randperm(n_units, generator=generator), found.n_positive.shape[1])


def unit_mask(
    ranking: Int[Tensor, "unit 2"], k: int, shape: tuple[int, int]
) -> Bool[Tensor, "layer width"]:
    """The first `k` units of a ranking; all of them are the whole block.

    Raises:
        ConfigError: if `k` is below 1 or above the number of units, or the ranking is not of all
            units of the shape (layer, width).
    """
    n_units = shape[0] * shape[1]
    if len(ranking) != n_units:
        raise ConfigError(
            f"a ranking must be of all {n_units} units of {shape[0]} layers of {shape[1]}, "
            f"but is of {len(ranking)}."
        )
    if not 1 <= k <= n_units:
        raise ConfigError(f"1 <= k <= {n_units}, the number of units, must hold, but got {k}.")
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[tuple(ranking[:k].T)] = True
    return mask


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


def _counted(
    differences: Float[Tensor, "pair layer width"], site: str, model: ModelIdentity
) -> Momenta:
    return Momenta(
        n_positive=(differences > 0).sum(dim=0),
        n_negative=(differences < 0).sum(dim=0),
        n=len(differences),
        total=differences.sum(dim=0, dtype=torch.float64),
        site=site,
        model=model,
    )


def _ranked(values: Float[Tensor, "layer width"]) -> Int[Tensor, "unit 2"]:
    order = values.flatten().sort(descending=True, stable=True).indices
    return _places(order, values.shape[1])


def _places(order: Int[Tensor, " unit"], width: int) -> Int[Tensor, "unit 2"]:
    return torch.stack([order // width, order % width], dim=-1)

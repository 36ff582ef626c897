"""Which units of a site differ alike over pairs, and masks of those that do.

A unit is one dimension of a site's activation x. Its momentum in a pair is x+ - x-, of the right
and the wrong text, or of a question's reference and its prompt; r+ and r- are the shares of pairs
in which it is positive and negative (0 is neither), its score is max(r+, r-) (AUSteer,
arXiv 2602.04428).

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
from fusion_lens.identity import ModelIdentity

LEAST = 2
"""Pairs that a share of pairs needs."""


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
    def shape(self) -> tuple[int, int]:
        """Layers and width."""
        n_layers, width = self.n_positive.shape
        return n_layers, width

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
        if self.n < LEAST:
            raise ContrastError(
                f"momenta must be of at least {LEAST} pairs to be compared, but are of {self.n}; "
                "add some."
            )
        return counted.double() / self.n


def count_momenta(
    differences: Float[Tensor, "pair layer width"], site: str, model: ModelIdentity
) -> Momenta:
    """Of right minus wrong, pair by pair."""
    return Momenta(
        n_positive=(differences > 0).sum(dim=0),
        n_negative=(differences < 0).sum(dim=0),
        n=len(differences),
        total=differences.sum(dim=0, dtype=torch.float64),
        site=site,
        model=model,
    )


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
    counts = (count_momenta(own.vectors[None], "resid_post", own.model) for own in deltas)
    found = next(counts)
    for own in counts:
        found = found + own
    return found


def ranking_by_mean(found: Momenta) -> Int[Tensor, "unit 2"]:
    """A control: units by the size of their mean difference, which consistency has no part in. In
    the residual stream it prefers late layers, where everything is larger."""
    return _ranked(found.mean.abs())


def random_ranking(shape: tuple[int, int], seed: int) -> Int[Tensor, "unit 2"]:
    """A control: all units of layers and widths in a random order."""
    generator = torch.Generator().manual_seed(seed)
    return _places(torch.randperm(shape[0] * shape[1], generator=generator), shape[1])


def unit_mask(
    ranking: Int[Tensor, "unit 2"], k: int, shape: tuple[int, int]
) -> Bool[Tensor, "layer width"]:
    """The first `k` units of a ranking, as a mask of `shape`; all there are: the whole block.

    Raises:
        ConfigError: if there are fewer of them, or one lies outside the shape.
    """
    if not 1 <= k <= len(ranking):
        raise ConfigError(f"1 <= k <= {len(ranking)} units must hold, but got {k}.")
    layers, dimensions = ranking[:k].unbind(dim=1)
    beyond = (layers >= shape[0]) | (dimensions >= shape[1]) | (ranking[:k] < 0).any(dim=1)
    if bool(beyond.any()):
        raise ConfigError(
            f"units must lie within {shape}, but got {ranking[:k][beyond][0].tolist()}."
        )
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[layers, dimensions] = True
    return mask


def _ranked(values: Float[Tensor, "layer width"]) -> Int[Tensor, "unit 2"]:
    order = values.flatten().sort(descending=True, stable=True).indices
    return _places(order, values.shape[1])


def _places(order: Int[Tensor, " unit"], width: int) -> Int[Tensor, "unit 2"]:
    return torch.stack([order // width, order % width], dim=-1)

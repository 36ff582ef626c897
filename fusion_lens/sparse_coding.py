"""A delta -> the few decoder directions, with signed weights, that sum to most of it.

    delta ~ sum_j w_j u_j,   u_i = d_i / ||d_i||,   at most k of them

Orthogonal matching pursuit on [D, -D], a signed weight being what the second half stands for: each
step takes the direction that the residual correlates with most and refits all weights by least
squares. The directions of a crosscoder are those of its layers one after the other, normalised as
one vector, so that one weight speaks for all layers. The cosine of two features of an SAE may be
high; the refit, unlike `D delta`, counts what they share once.

A view of the delta's geometry and of nothing else: the encoder is not asked, a direction with a
negative weight is no feature that was switched off, and no token is looked at. Knows neither a
model nor a run.

References: Pati, Rezaiifar & Krishnaprasad 1993, Orthogonal Matching Pursuit; Mayne et al. 2024
(arXiv 2411.08790) on why a delta is not encoded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fusion_lens.dictionaries import Card, Dictionary
from fusion_lens.errors import ConfigError, DictionaryError

# a decoder in float64 as a whole would be gigabytes
_CHUNK_ELEMENTS = 2**20
# of a unit direction outside the span of the chosen ones: below it is a copy, rounded to float32
_DEPENDENT = 1e-6
# of the delta: what correlates less differs by the rounding of float32 from what does not at all
_ROUNDING = 1e-7


@dataclass(frozen=True, slots=True, eq=False)
class SparseCode:
    """The code of one delta, features in the order chosen.

    `weights` are of unit directions, hence in residual units, and signed; those of all steps are of
    the last refit. `errors` are the norm of what is left after each step, as a share of the
    delta's, in the dictionary's basis; `relative_error` is the last of them, or that of the empty
    code. `cosine` is between delta and reconstruction, 0 if either is zero.
    """

    card: Card
    features: tuple[int, ...]
    weights: tuple[float, ...]
    errors: tuple[float, ...]
    relative_error: float
    cosine: float
    reconstruction: Float[Tensor, "layer d_model"]

    def __post_init__(self) -> None:
        sizes = {len(self.features), len(self.weights), len(self.errors)}
        if len(sizes) != 1 or len({*self.features}) != len(self.features):
            raise DictionaryError(
                "a code must have one weight and one error per feature and each feature once, "
                f"but got {self.features}, {self.weights} and {self.errors}."
            )


def sparse_code(
    delta: Float[Tensor, "n width"], dictionary: Dictionary, k: int, *, tolerance: float = 1e-6
) -> SparseCode:
    """The code of at most `k` features of a delta "layer d_model", given for the layers of the
    dictionary's card in the model's basis.

    Stops earlier once `relative_error` is at most `tolerance`, or when no direction reduces it any
    more. Zero directions, and those that lie in the span of the chosen ones, are never chosen; of
    equal ones the first is.
    The arithmetic is in float64; the delta is first given to `to_basis`, which rounds it to the
    dictionary's dtype.

    Raises:
        ConfigError: if `k` is below 1, or `tolerance` not in [0, 1).
        DictionaryError: if the delta has other layers than the dictionary, another width, or is
            not finite; or if a direction is not finite.
    """
    if k < 1 or not 0 <= tolerance < 1:
        raise ConfigError(
            "k must be at least 1 and tolerance at least 0 and below 1, "
            f"but got ({k=}, {tolerance=})."
        )
    target = _target(delta, dictionary)
    pursuit = _Pursuit(dictionary, target)
    while len(pursuit.features) < k and pursuit.error > tolerance:
        if not pursuit.step():
            break
    weights, reconstruction = pursuit.fit()
    return SparseCode(
        card=dictionary.card,
        features=tuple(pursuit.features),
        weights=tuple(weights.tolist()),
        errors=tuple(pursuit.errors),
        relative_error=pursuit.error,
        cosine=_cosine(reconstruction, target),
        reconstruction=reconstruction.to(dictionary.decoder),
    )


class _Pursuit:
    """The state between steps: an orthonormal basis of the span of the chosen directions, column
    by column, and what it leaves of the delta."""

    def __init__(self, dictionary: Dictionary, target: Float[Tensor, "layer d_model"]) -> None:
        self.features: list[int] = []
        self.errors: list[float] = []
        self._decoder = dictionary.decoder.detach()
        self._target = target
        self._residual = target
        self._units: list[Tensor] = []
        self._basis: list[Tensor] = []
        self.norm = float(target.norm())
        self._norms = _norms(self._decoder)
        if not bool(torch.isfinite(self._norms).all()):
            raise DictionaryError(
                f"{dictionary.card.name} must have finite directions, but its decoder holds NaN, "
                "infinity or values too large to square."
            )
        self._left = self._norms > 0

    @property
    def error(self) -> float:
        """The share of the delta's norm that is left; 0 of a zero delta."""
        return float(self._residual.norm()) / self.norm if self.norm else 0.0

    def step(self) -> bool:
        """Choose one more direction; False if none reduces the error."""
        correlations = _correlations(self._decoder, self._residual).abs_()
        correlations /= self._norms
        while bool(self._left.any()):
            best = int(correlations.masked_fill_(~self._left, -1.0).argmax())
            if float(correlations[best]) <= _ROUNDING * self.norm:
                return False
            # for good: what lies in a span lies in every larger one
            self._left[best] = False
            if self._add(best):
                return True
        return False

    def fit(self) -> tuple[Float[Tensor, " chosen"], Float[Tensor, "layer d_model"]]:
        """Least-squares weights of the chosen directions, and their sum."""
        if not self.features:
            return self._target.new_zeros(0), torch.zeros_like(self._target)
        units = torch.stack(self._units).flatten(1)
        basis = torch.stack(self._basis).flatten(1)
        # units = triangle^T basis, hence triangle w = basis target
        triangle = (basis @ units.T).triu()
        projected = basis @ self._target.flatten()
        weights = torch.linalg.solve_triangular(triangle, projected[:, None], upper=True)[:, 0]
        return weights, (weights @ units).reshape(self._target.shape)

    def _add(self, feature: int) -> bool:
        unit = self._decoder[:, feature].double() / self._norms[feature]
        new = unit
        for column in self._basis:
            new = new - (column * new).sum() * column
        length = new.norm()
        if float(length) <= _DEPENDENT:
            return False
        new = new / length
        self.features.append(feature)
        self._units.append(unit)
        self._basis.append(new)
        self._residual = self._residual - (new * self._residual).sum() * new
        self.errors.append(self.error)
        return True


def _target(
    delta: Float[Tensor, "n width"], dictionary: Dictionary
) -> Float[Tensor, "layer d_model"]:
    """The delta in the dictionary's basis, in float64; zero where only rounding is left of it."""
    card = dictionary.card
    expected = (len(card.layers), card.d_model)
    if tuple(delta.shape) != expected:
        raise DictionaryError(
            f"a delta for {card.name} must have {expected[0]} layer(s) of width {expected[1]}, "
            f"but got {tuple(delta.shape)}; take the rows of the blocks {card.layers}."
        )
    mapped = dictionary.to_basis(delta[None])[0]
    target = mapped.double()
    if not bool(torch.isfinite(delta).all() and torch.isfinite(target).all()):
        raise DictionaryError(
            f"a delta for {card.name} must be finite in {mapped.dtype}, but got NaN or infinity."
        )
    # a constant is not exactly zero once its mean is subtracted
    rounding = 4 * torch.finfo(mapped.dtype).eps * float(delta.double().norm())
    return target if float(target.norm()) > rounding else torch.zeros_like(target)


def _cosine(x: Float[Tensor, "layer d_model"], y: Float[Tensor, "layer d_model"]) -> float:
    product = float(x.norm()) * float(y.norm())
    return min(1.0, float((x * y).sum()) / product) if product else 0.0


def _norms(decoder: Float[Tensor, "layer d_sae d_model"]) -> Float[Tensor, " d_sae"]:
    squares = decoder.new_zeros(decoder.shape[1], dtype=torch.float64)
    for layer, rows in _chunks(decoder):
        squares[rows] += decoder[layer, rows].double().square().sum(dim=-1)
    return squares.sqrt_()


def _correlations(
    decoder: Float[Tensor, "layer d_sae d_model"], residual: Float[Tensor, "layer d_model"]
) -> Float[Tensor, " d_sae"]:
    """<d_i, residual> over all layers, of directions as long as they are."""
    products = residual.new_zeros(decoder.shape[1])
    for layer, rows in _chunks(decoder):
        products[rows] += decoder[layer, rows].double() @ residual[layer]
    return products


def _chunks(decoder: Float[Tensor, "layer d_sae d_model"]) -> list[tuple[int, slice]]:
    n_layers, d_sae, d_model = decoder.shape
    n_rows = max(1, _CHUNK_ELEMENTS // d_model)
    return [
        (layer, slice(start, start + n_rows))
        for layer in range(n_layers)
        for start in range(0, d_sae, n_rows)
    ]

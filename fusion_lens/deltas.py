"""Reference activations minus base activations, layer by layer, with algebra.

`Deltas` keeps both means: a plan with `mean="sequence"` needs the reference itself, and pictures
show both. The algebra is that of the pair, so `(d - d).vectors == 0` and `(-d) * -2 == 2 * d` hold
exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fusion_lens.activations import Activations, activations_from_cache
from fusion_lens.errors import ActivationError
from fusion_lens.identity import ModelIdentity
from fusion_lens.prompts import Layout, Prompt
from fusion_lens.tables import Section, Shows


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Deltas(Shows):
    """`reference` and `base` means of one question; `layout` is that of the base prompt, the one to
    steer."""

    reference: Float[Tensor, "layer d_model"]
    base: Float[Tensor, "layer d_model"]
    layout: Layout
    model: ModelIdentity

    def __post_init__(self) -> None:
        expected = (self.model.n_layers, self.model.d_model)
        for name in ("reference", "base"):
            tensor: Tensor = getattr(self, name)
            if tuple(tensor.shape) != expected:
                raise ActivationError(
                    f"{name} must have the shape {expected} of {self.model.name}, "
                    f"but got {tuple(tensor.shape)}."
                )
            if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.float64):
                raise ActivationError(
                    f"{name} must be on the CPU in float32 or float64, "
                    f"but got {tensor.dtype} on {tensor.device}."
                )
            if not bool(torch.isfinite(tensor).all()):
                raise ActivationError(f"{name} must be finite, but it holds NaN or infinity.")

    @property
    def vectors(self) -> Float[Tensor, "layer d_model"]:
        """`h[l] - mu[l]`, in residual units."""
        return self.reference - self.base

    @property
    def norms(self) -> Float[Tensor, " layer"]:
        """The Euclidean norm of every layer's vector."""
        norms: Tensor = torch.linalg.vector_norm(self.vectors, dim=-1)
        return norms

    @property
    def relative_norms(self) -> Float[Tensor, " layer"]:
        """`|h[l] - mu[l]| / |mu[l]|`: how large each layer's step is beside what it starts from."""
        ratios: Tensor = self.norms / self.base.norm(dim=-1)
        return ratios

    def table(self) -> Section:
        """Norms per layer, and the cosine with the layer below."""
        cosines = torch.nn.functional.cosine_similarity(self.vectors[1:], self.vectors[:-1], dim=-1)
        columns = (self.norms, self.base.norm(dim=-1), self.relative_norms)
        rows = tuple(
            (
                str(layer),
                *(f"{float(column[layer]):.2f}" for column in columns),
                f"{float(cosines[layer - 1]):+.2f}" if layer else "-",
            )
            for layer in range(len(self.norms))
        )
        header = ("layer", "‖h − μ‖", "‖μ‖", "ratio", "cosine with the layer below")
        title = f"deltas of {self.model.name}: {len(rows)} layers of {self.model.d_model}; "
        return Section(title + "norms in residual units", header, rows)

    def __repr__(self) -> str:
        low, high = float(self.norms.min()), float(self.norms.max())
        return (
            f"Deltas({self.model.name}, {self.model.n_layers} layers of {self.model.d_model}, "
            f"norms {low:.3g} to {high:.3g})"
        )

    def __add__(self, other: Deltas) -> Deltas:
        _require_same_model(self.model, other.model)
        return self._like(self.reference + other.reference, self.base + other.base)

    def __sub__(self, other: Deltas) -> Deltas:
        return self + -other

    def __neg__(self) -> Deltas:
        return self * -1.0

    def __mul__(self, factor: float | int) -> Deltas:
        return self._like(self.reference * factor, self.base * factor)

    __rmul__ = __mul__

    def _like(self, reference: Tensor, base: Tensor) -> Deltas:
        return Deltas(reference=reference, base=base, layout=self.layout, model=self.model)


def make_deltas(reference: Activations, base: Activations) -> Deltas:
    """Subtract what the model does on the steered prompt (`base`) from what it does on the
    reference.

    Raises:
        ActivationError: if the two come from different models.
    """
    _require_same_model(reference.model, base.model)
    # a mean that is part of its batch would take that along wherever it goes
    means = reference.mean.clone(), base.mean.clone()
    return Deltas(*means, layout=base.layout, model=base.model)


def deltas_from_caches(
    reference_cache: Any, base_cache: Any, *, reference: Prompt, base: Prompt
) -> Deltas:
    """The same from two TransformerLens `ActivationCache`s, of unpadded runs of the two prompts."""
    return make_deltas(
        activations_from_cache(reference_cache, reference), activations_from_cache(base_cache, base)
    )


def _require_same_model(one: ModelIdentity, other: ModelIdentity) -> None:
    reason = one.mismatch(other)
    if reason is not None:
        raise ActivationError(f"both sides must come from one model, but {reason}.")

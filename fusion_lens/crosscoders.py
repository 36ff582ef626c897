"""A crosscoder: one code for the residuals of several layers.

    f = act(sum_l W_enc[l]^T x'[l] + b_enc);  x_hat[l] = denormalise(W_dec[l]^T f + b_dec[l])

`act` is ReLU, or for BatchTopK `f_i = relu(pre_i)` where `relu(pre_i) * n_i > threshold`, else 0:
the threshold learned in training stands in for the choice within a batch, so a code never depends
on the other rows. `n_i` is the sum over layers of the feature's decoder norms (CROSSCODER), the
norm of all of them together (SAE), or 1 (NONE). There are two normalisers, of statistics of the
training set and never of the input:

    relative    x' = (x - mean) * s[l],  s[l] = target_rms / sqrt(sum_d std[l]^2 + 1e-8)
    per unit    x' = (x - mean) / (std + 1e-8)

References: Lindsey et al. 2024, Sparse Crosscoders; Minder et al. 2025 (arXiv 2504.02922).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fusion_lens.dictionaries import Card, Encoded, checked_input
from fusion_lens.errors import DictionaryError, one_of

NORMALISERS = ("relative", "per unit")
CODE_NORMALISATIONS = ("CROSSCODER", "SAE", "NONE")

_EPSILON = 1e-8


@final
@dataclass(frozen=True, slots=True, eq=False)
class Normaliser:
    """Mean and standard deviation of each unit of each layer, from the training set; `scale` is
    the file's `activation_global_scale`.

    `kind` "relative" scales a layer as a whole to the root mean square `target_rms`, so that its
    units keep their relative variances; "per unit" divides each by its own deviation.
    """

    mean: Float[Tensor, "layer d_model"]
    std: Float[Tensor, "layer d_model"]
    scale: Float[Tensor, " layer"]
    kind: str
    target_rms: float

    def __post_init__(self) -> None:
        one_of("kind", self.kind, NORMALISERS)
        for name in ("mean", "std", "scale"):
            if not bool(torch.isfinite(getattr(self, name)).all()):
                raise DictionaryError(
                    f"activation_{name} must be finite, or mean and std NaN throughout for none."
                )
        if bool((self.std < 0).any()) or not 0 < self.target_rms < float("inf"):
            raise DictionaryError(
                "activation_std must be at least 0 and target_rms above 0, but got a minimum of "
                f"{float(self.std.min())} and {self.target_rms}."
            )

    def normalise(
        self, x: Float[Tensor, "batch layer d_model"]
    ) -> Float[Tensor, "batch layer d_model"]:
        if self.kind == "per unit":
            return (x - self.mean) / (self.std + _EPSILON)
        return (x - self.mean) * self.scale[:, None]

    @property
    def widths(self) -> Float[Tensor, "layer d_model"]:
        """What a normalised unit is multiplied by on the way back."""
        if self.kind == "per unit":
            return self.std + _EPSILON
        return (1 / (self.scale + _EPSILON))[:, None].expand_as(self.mean)


def make_normaliser(
    mean: Float[Tensor, "layer d_model"],
    std: Float[Tensor, "layer d_model"],
    *,
    kind: str = "relative",
    target_rms: float = 1.0,
) -> Normaliser:
    """The normaliser of a training set with these statistics.

    Raises:
        DictionaryError: if they are not finite or `std` is negative.
    """
    scale = torch.ones_like(mean[:, 0])
    if kind == "relative":
        scale = target_rms / torch.sqrt((std**2).sum(dim=-1) + _EPSILON)
    return Normaliser(mean, std, scale, kind, target_rms)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Crosscoder:
    """A crosscoder of the layers of `card`. `threshold` and `k` are None for ReLU.

    `decoder` is in residual units: the normaliser's widths are in it, and not in `decoder_weight`.
    """

    card: Card
    encoder_weight: Float[Tensor, "layer d_model d_sae"]
    encoder_bias: Float[Tensor, " d_sae"]
    decoder_weight: Float[Tensor, "layer d_sae d_model"]
    decoder_bias: Float[Tensor, "layer d_model"]
    code_normalisation: str = "CROSSCODER"
    normaliser: Normaliser | None = None
    threshold: float | None = None
    k: int | None = None
    decoder: Float[Tensor, "layer d_sae d_model"] = field(init=False)

    def __post_init__(self) -> None:
        one_of("code_normalisation", self.code_normalisation, CODE_NORMALISATIONS)
        card = self.card
        shape = (len(card.layers), card.d_sae, card.d_model)
        if tuple(self.decoder_weight.shape) != shape:
            raise DictionaryError(
                f"{card.name} must have a decoder of shape {shape} for its {shape[0]} layers, "
                f"but got {tuple(self.decoder_weight.shape)}."
            )
        if (self.threshold is None) != (self.k is None):
            raise DictionaryError(
                "k and threshold must both be given (BatchTopK) or neither (ReLU), "
                f"but got k={self.k} and threshold={self.threshold}."
            )
        if self.threshold is not None and not 0 <= self.threshold < float("inf"):
            raise DictionaryError(
                f"threshold must be finite and at least 0, but got {self.threshold}; -1 stands in "
                "a file whose training never set it, and every feature would be on."
            )
        if self.k is not None and not 1 <= self.k <= card.d_sae:
            raise DictionaryError(f"k must be 1 to d_sae = {card.d_sae}, but got {self.k}.")
        directions = self.decoder_weight
        if self.normaliser is not None:
            directions = directions * self.normaliser.widths[:, None]
        object.__setattr__(self, "decoder", directions)

    @property
    def code_norms(self) -> Float[Tensor, " d_sae"]:
        """The n_i that the threshold is compared under."""
        if self.code_normalisation == "CROSSCODER":
            norms: Tensor = torch.linalg.vector_norm(self.decoder_weight, dim=-1).sum(dim=0)
        elif self.code_normalisation == "SAE":
            norms = torch.linalg.vector_norm(self.decoder_weight, dim=(0, 2))
        else:
            norms = torch.ones_like(self.encoder_bias)
        return norms

    def to_basis(
        self, x: Float[Tensor, "batch layer d_model"]
    ) -> Float[Tensor, "batch layer d_model"]:
        return x.detach().to(self.decoder)

    def encode(self, x: Float[Tensor, "batch layer d_model"]) -> Encoded:
        codes = self._codes(x)
        offset = self.decoder_bias
        if self.normaliser is not None:
            offset = offset * self.normaliser.widths + self.normaliser.mean
        n_rows, n_layers = codes.shape[0], len(self.card.layers)
        return Encoded(
            codes=codes,
            scale=codes.new_ones(n_rows, n_layers),
            offset=offset.expand(n_rows, -1, -1),
        )

    def reconstruct(
        self, x: Float[Tensor, "batch layer d_model"]
    ) -> Float[Tensor, "batch layer d_model"]:
        codes = self._codes(x)
        decoded = torch.einsum("bf,lfd->bld", codes, self.decoder_weight) + self.decoder_bias
        if self.normaliser is None:
            return decoded
        return decoded * self.normaliser.widths + self.normaliser.mean

    def _codes(self, x: Float[Tensor, "batch layer d_model"]) -> Float[Tensor, "batch d_sae"]:
        inputs = checked_input(self.card, self.decoder, x)
        if self.normaliser is not None:
            inputs = self.normaliser.normalise(inputs)
        pre = torch.einsum("bld,ldf->bf", inputs, self.encoder_weight) + self.encoder_bias
        active = pre.relu()
        if self.threshold is None:
            return active
        return active * (active * self.code_norms > self.threshold)

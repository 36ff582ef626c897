"""What is trained of a crosscoder, in normalised units -> a `Crosscoder` of the residual stream.

Layers and units are one axis of both matrices, so that a step of training is two products:

    a = relu(x' W_enc + b_enc),   x_hat' = f W_dec + b_dec,   n_i = sum_l ||W_dec[i, l]||
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fusion_lens.crosscoders import Crosscoder, Normaliser
from fusion_lens.dictionaries import Card

STORED = torch.float16


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """The tensors of a crosscoder while it is trained."""

    encoder: Float[Tensor, "width d_sae"]
    encoder_bias: Float[Tensor, " d_sae"]
    decoder: Float[Tensor, "d_sae width"]
    decoder_bias: Float[Tensor, " width"]

    @property
    def trained(self) -> tuple[Tensor, ...]:
        """All of them."""
        return self.encoder, self.encoder_bias, self.decoder, self.decoder_bias


def init_weights(n_layers: int, d_model: int, d_sae: int, seed: int) -> Weights:
    """Random decoder directions of norm 0.1 in each layer, and the encoder their transpose."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(d_sae, n_layers, d_model, generator=generator)
    directions = 0.1 * directions / directions.norm(dim=-1, keepdim=True)
    decoder = directions.flatten(1)
    weights = Weights(
        encoder=decoder.T.clone().contiguous(),
        encoder_bias=torch.zeros(d_sae),
        decoder=decoder,
        decoder_bias=torch.zeros(n_layers * d_model),
    )
    for tensor in weights.trained:
        tensor.requires_grad_(True)
    return weights


def code_norms(decoder: Float[Tensor, "d_sae width"], n_layers: int) -> Float[Tensor, " d_sae"]:
    """n_i, the sum over layers of a feature's decoder norms."""
    by_layer = decoder.view(decoder.shape[0], n_layers, -1)
    norms: Tensor = torch.linalg.vector_norm(by_layer, dim=-1).sum(dim=-1)
    return norms


def to_crosscoder(weights: Weights, normaliser: Normaliser, card: Card) -> Crosscoder:
    """A crosscoder without a threshold, its matrices rounded to what a file of `STORED` holds."""
    n_layers, d_sae, d_model = len(card.layers), card.d_sae, card.d_model
    encoder, decoder = (matrix.to(STORED).float() for matrix in (weights.encoder, weights.decoder))
    return Crosscoder(
        card=card,
        encoder_weight=encoder.view(n_layers, d_model, d_sae),
        encoder_bias=weights.encoder_bias,
        decoder_weight=decoder.view(d_sae, n_layers, d_model).transpose(0, 1).contiguous(),
        decoder_bias=weights.decoder_bias.view(n_layers, d_model),
        normaliser=normaliser,
    )

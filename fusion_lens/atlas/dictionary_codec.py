"""A shipped dictionary's folder -> its encoder and decoder, for measuring it.

    a = relu(sum_l W_enc[l]^T (x[l] - mean[l]) scale[l] + b_enc)
    f_i = a_i where a_i gate_i > threshold_i, else 0
    x_hat[l] = (W_dec[l]^T f + b_dec[l]) / scale[l] + mean[l]

A JumpReLU SAE is the case of one layer with mean = b_dec, scale = gate = 1 and no bias behind the
decoder. Reads the shipped files and no others; everything is computed in float32.
"""

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from fusion_lens.atlas.dictionary_cards import load_card
from fusion_lens.errors import InputFileError
from fusion_lens.models import resid_post

SAE_WEIGHTS, CROSSCODER_WEIGHTS = "sae_weights.safetensors", "model.safetensors"


@dataclass(frozen=True, slots=True, eq=False)
class Codec:
    """A dictionary of the residual stream after the blocks `layers`."""

    layers: tuple[int, ...]
    encoder: Float[Tensor, "layer d_model d_sae"]
    encoder_bias: Float[Tensor, " d_sae"]
    decoder: Float[Tensor, "layer d_sae d_model"]
    decoder_bias: Float[Tensor, "layer d_model"]
    threshold: Float[Tensor, " d_sae"]
    gate: Float[Tensor, " d_sae"]
    mean: Float[Tensor, "layer d_model"]
    scale: Float[Tensor, " layer"]

    @property
    def d_sae(self) -> int:
        """How many features there are."""
        return len(self.encoder_bias)

    def encode(self, resid: Float[Tensor, "layer token d_model"]) -> Float[Tensor, "token d_sae"]:
        """Codes of residuals after the blocks `layers`."""
        x = (resid - self.mean[:, None]) * self.scale[:, None, None]
        active = (torch.bmm(x, self.encoder).sum(dim=0) + self.encoder_bias).relu()
        return active * (active * self.gate > self.threshold)

    def decode(self, codes: Float[Tensor, "token d_sae"]) -> Float[Tensor, "layer token d_model"]:
        """Reconstructions, in residual units."""
        x = torch.stack([codes @ matrix for matrix in self.decoder]) + self.decoder_bias[:, None]
        return x / self.scale[:, None, None] + self.mean[:, None]


def open_dictionary(folder: Path) -> Codec:
    """The dictionary of a folder, its weights compared with the hash on its card.

    Raises:
        InputFileError: if card or weights are missing, or the weights have another hash.
    """
    card = load_card(folder)
    layers = tuple(
        layer
        for layer in range(card["model"]["n_layers"])
        if resid_post(layer) in card["hook_names"]
    )
    name, digest = next(iter(card["sha256"].items()))
    path = folder / name
    if not path.is_file() or sha256(path.read_bytes()).hexdigest() != digest:
        raise InputFileError(path, "it must be the weights of the card beside it; train them again")
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    if path.name == CROSSCODER_WEIGHTS:
        return _crosscoder(layers, tensors)
    return _sae(layers, tensors, json.loads((folder / "cfg.json").read_text(encoding="utf-8")))


def _sae(layers: tuple[int, ...], tensors: dict[str, Tensor], config: dict[str, object]) -> Codec:
    if config["architecture"] != "jumprelu" or not config["apply_b_dec_to_input"]:
        raise ValueError(f"a shipped SAE must be a JumpReLU that subtracts b_dec, got {config}.")
    d_model, d_sae = tensors["W_enc"].shape
    return Codec(
        layers=layers,
        encoder=tensors["W_enc"][None],
        encoder_bias=tensors["b_enc"],
        decoder=tensors["W_dec"][None],
        decoder_bias=torch.zeros(1, d_model),
        threshold=tensors["threshold"],
        gate=torch.ones(d_sae),
        mean=tensors["b_dec"][None],
        scale=torch.ones(1),
    )


def _crosscoder(layers: tuple[int, ...], tensors: dict[str, Tensor]) -> Codec:
    decoder = tensors["decoder.weight"]
    return Codec(
        layers=layers,
        encoder=tensors["encoder.weight"],
        encoder_bias=tensors["encoder.bias"],
        decoder=decoder,
        decoder_bias=tensors["decoder.bias"],
        threshold=tensors["threshold"].expand(decoder.shape[1]),
        gate=decoder.norm(dim=-1).sum(dim=0),
        mean=tensors["activation_mean"],
        scale=tensors["activation_global_scale"],
    )

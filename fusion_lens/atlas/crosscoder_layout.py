"""A trained crosscoder -> the open layout of the science-of-finetuning project, on disk.

`encoder.weight [L,d,F]`, `encoder.bias [F]`, `decoder.weight [L,F,d]`, `decoder.bias [L,d]`,
`code_normalization_id`, the relative normaliser (`activation_mean`, `activation_std` [L,d],
`activation_global_scale` [L], `target_rms`), `k` and `threshold` of BatchTopK; config.json beside
it. The two matrices in float16, the rest in float32.

References: Minder et al. 2025 (arXiv 2504.02922).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

CODE_NORMALIZATION_ID = 1  # CROSSCODER in the layout's enumeration, which counts from 1


@dataclass(frozen=True, slots=True, eq=False)
class Normaliser:
    """x' = (x - mean) * scale, so that every layer has the variance d_model."""

    mean: Float[Tensor, "layer d_model"]
    std: Float[Tensor, "layer d_model"]
    target_rms: float

    @property
    def scale(self) -> Float[Tensor, " layer"]:
        """Of each layer, 1 / residual units."""
        return self.target_rms / torch.sqrt((self.std**2).sum(dim=-1) + 1e-8)

    def __call__(
        self, x: Float[Tensor, "batch layer d_model"]
    ) -> Float[Tensor, "batch layer d_model"]:
        return (x - self.mean) * self.scale[:, None]


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """What is trained, in normalised units; layers and units are one axis of both matrices."""

    encoder: Float[Tensor, "width d_sae"]
    encoder_bias: Float[Tensor, " d_sae"]
    decoder: Float[Tensor, "d_sae width"]
    decoder_bias: Float[Tensor, " width"]

    @property
    def trained(self) -> tuple[Tensor, ...]:
        """All of them."""
        return self.encoder, self.encoder_bias, self.decoder, self.decoder_bias


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """All that a file holds: `threshold` is what a gated code must exceed, `k` the mean number of
    codes a token that it was chosen for."""

    weights: Weights
    normaliser: Normaliser
    k: int
    threshold: float


def code_norms(decoder: Float[Tensor, "d_sae width"], n_layers: int) -> Float[Tensor, " d_sae"]:
    """n_i, the sum over layers of a feature's decoder norms."""
    by_layer = decoder.view(decoder.shape[0], n_layers, -1)
    norms: Tensor = torch.linalg.vector_norm(by_layer, dim=-1).sum(dim=-1)
    return norms


def halved(weights: Weights) -> Weights:
    """The weights as the file will hold them: matrices rounded to float16."""
    return Weights(
        weights.encoder.half().float(),
        weights.encoder_bias,
        weights.decoder.half().float(),
        weights.decoder_bias,
    )


def save_layout(trained: Trained, folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write model.safetensors and config.json; `metadata` goes into the latter."""
    weights, normaliser = trained.weights, trained.normaliser
    n_layers, d_model = normaliser.mean.shape
    d_sae = len(weights.encoder_bias)
    tensors = {
        "encoder.weight": weights.encoder.view(n_layers, d_model, d_sae).half(),
        "encoder.bias": weights.encoder_bias,
        "decoder.weight": weights.decoder.view(d_sae, n_layers, d_model).transpose(0, 1).half(),
        "decoder.bias": weights.decoder_bias.view(n_layers, d_model),
        "code_normalization_id": torch.tensor(CODE_NORMALIZATION_ID),
        "activation_mean": normaliser.mean,
        "activation_std": normaliser.std,
        "activation_global_scale": normaliser.scale,
        "target_rms": torch.tensor(normaliser.target_rms),
        "k": torch.tensor(trained.k, dtype=torch.int32),
        "threshold": torch.tensor(trained.threshold),
    }
    config = {
        "dict_class": "BatchTopKCrossCoder",
        "activation_dim": d_model,
        "dict_size": d_sae,
        "num_layers": n_layers,
        "code_normalization": "CROSSCODER",
        "k": trained.k,
        "metadata": dict(metadata),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    path.chmod(0o644)  # safetensors writes files that only their owner can read
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

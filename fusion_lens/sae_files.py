"""A folder as sae-lens saves it (cfg.json, sae_weights.safetensors) -> an SAE, without sae-lens.

    x' = normalise(x) - b_dec (where the config says so);  f = act(W_enc^T x' + b_enc)
    x_hat = denormalise(W_dec^T f + b_dec)

Architectures standard (ReLU), topk and jumprelu, which is also how sae-lens saves BatchTopK and
Matryoshka; each equal to sae-lens in the tests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from fusion_lens.dictionaries import Card, Encoded, checked_input
from fusion_lens.durable import replace_text
from fusion_lens.errors import DictionaryError, InputFileError
from fusion_lens.identity import ModelIdentity
from fusion_lens.sae_configs import OWN_ARCHITECTURES, flag, is_current, metadata_of, read_card
from fusion_lens.tensor_files import (
    Header,
    read_config,
    read_tensors,
    require_finite,
    tensors_digest,
)

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"

_SEAL = "sha256"


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """What `normalize_activations` takes from each input: x' = (x - mean) * scale_in, and back by
    `scale_out`, which is not exactly its inverse for layer_norm."""

    mean: Float[Tensor, "batch 1"]
    scale_in: Float[Tensor, "batch 1"]
    scale_out: Float[Tensor, "batch 1"]


def statistics(mode: str, x: Float[Tensor, "batch d_model"]) -> Statistics:
    """Those of `mode`, as sae-lens defines them: its layer_norm divides by the sample standard
    deviation plus 1e-5 and multiplies by the deviation alone.

    Raises:
        DictionaryError: if an input is zero where its norm is divided by.
    """
    zeros, ones = torch.zeros_like(x[:, :1]), torch.ones_like(x[:, :1])
    if mode == "layer_norm":
        std = x.std(dim=-1, keepdim=True)
        return Statistics(x.mean(dim=-1, keepdim=True), 1 / (std + 1e-5), std)
    if mode == "constant_norm_rescale":
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        if bool((norm == 0).any()):
            raise DictionaryError(
                "a residual must not be zero where a dictionary divides by its norm "
                "(constant_norm_rescale), but got a zero row."
            )
        width = x.shape[-1] ** 0.5
        return Statistics(zeros, width / norm, norm / width)
    return Statistics(zeros, ones, ones)


def require_directions(card: Card, directions: Float[Tensor, "d_sae d_model"]) -> None:
    """Refuse a decoder that a rescaling topk cannot divide by its norms.

    Raises:
        DictionaryError: if a direction is not finite.
    """
    if not bool(torch.isfinite(directions).all()):
        raise DictionaryError(
            f"{card.name} must have no decoder row of length zero, because its codes are divided "
            "by those lengths (rescale_acts_by_decoder_norm), but it has."
        )


@final
@dataclass(frozen=True, slots=True, eq=False)
class FileSAE:
    """An SAE read without sae-lens. `threshold` is that of jumprelu, `k` that of topk."""

    card: Card
    W_enc: Float[Tensor, "d_model d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_model"]
    b_dec: Float[Tensor, " d_model"]
    normalisation: str = "none"
    apply_b_dec_to_input: bool = False
    threshold: Float[Tensor, " d_sae"] | None = None
    k: int | None = None
    rescale_by_decoder_norm: bool = False
    decoder: Float[Tensor, "layer d_sae d_model"] = field(init=False)

    def __post_init__(self) -> None:
        directions = self.W_dec / self._norms[:, None]
        require_directions(self.card, directions)
        object.__setattr__(self, "decoder", directions[None])

    def to_basis(
        self, x: Float[Tensor, "batch layer d_model"]
    ) -> Float[Tensor, "batch layer d_model"]:
        return x.detach().to(self.decoder)

    def encode(self, x: Float[Tensor, "batch layer d_model"]) -> Encoded:
        codes, used = self._codes(x)
        return Encoded(
            codes=codes,
            scale=used.scale_out,
            offset=(self.b_dec * used.scale_out + used.mean)[:, None],
        )

    def reconstruct(
        self, x: Float[Tensor, "batch layer d_model"]
    ) -> Float[Tensor, "batch layer d_model"]:
        codes, used = self._codes(x)
        decoded = (codes / self._norms) @ self.W_dec + self.b_dec
        return (decoded * used.scale_out + used.mean)[:, None]

    @property
    def _norms(self) -> Float[Tensor, " d_sae"]:
        """By which a rescaling topk multiplies what it compares, and divides its codes again."""
        if self.rescale_by_decoder_norm:
            norms: Tensor = torch.linalg.vector_norm(self.W_dec, dim=-1)
            return norms
        return torch.ones_like(self.b_enc)

    def _codes(
        self, x: Float[Tensor, "batch layer d_model"]
    ) -> tuple[Float[Tensor, "batch d_sae"], Statistics]:
        inputs = checked_input(self.card, self.decoder, x)[:, 0]
        used = statistics(self.normalisation, inputs)
        inputs = (inputs - used.mean) * used.scale_in
        if self.apply_b_dec_to_input:
            inputs = inputs - self.b_dec
        pre = (inputs @ self.W_enc + self.b_enc) * self._norms
        if self.k is not None:
            top = pre.topk(self.k, dim=-1)
            return torch.zeros_like(pre).scatter_(-1, top.indices, top.values.relu()), used
        if self.threshold is not None:
            return pre.relu() * (pre > self.threshold), used
        return pre.relu(), used


def load_sae_folder(folder: str | Path, *, device: str = "cpu") -> FileSAE:
    """Open an SAE that sae-lens saved (`save_model`, `save_inference_model`), without sae-lens.

    A checksum is compared where the config has one (`seal_sae`); elsewhere a flipped bit that
    leaves a weight finite goes unnoticed.

    Raises:
        InputFileError: if a file is missing, damaged, or holds other tensors than the config says.
        DictionaryError: if it is no dictionary of the residual stream after one block, or of an
            architecture that only sae-lens reads.
    """
    folder = Path(folder)
    config, name = read_config(folder / CONFIG), folder.resolve().name
    architecture = config.get("architecture")
    if not is_current(config):
        raise DictionaryError(
            f"{name} must be written by sae-lens 6 or later to be read without it, but got "
            f"version {metadata_of(config).get('sae_lens_version')}; open it with load_sae."
        )
    card = read_card(config, name=name)
    if architecture not in OWN_ARCHITECTURES:
        raise DictionaryError(
            f"{name} must be of architecture {', '.join(OWN_ARCHITECTURES)} to be read without "
            f"sae-lens, but got {architecture}; open it with load_sae."
        )
    d_model, d_sae = card.d_model, card.d_sae
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_model, d_sae),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_model),
        "b_dec": (d_model,),
    }
    if architecture == "jumprelu":
        shapes["threshold"] = (d_sae,)
    return FileSAE(
        card,
        **read_weights(folder, config, lambda header: shapes, device=device),
        normalisation=config.get("normalize_activations", "none"),
        apply_b_dec_to_input=flag(config, "apply_b_dec_to_input", absent=True),
        k=_k(config, d_sae) if architecture == "topk" else None,
        rescale_by_decoder_norm=architecture == "topk"
        and flag(config, "rescale_acts_by_decoder_norm", absent=False),
    )


def read_weights(
    folder: Path,
    config: Mapping[str, Any],
    expect: Callable[[Header], Mapping[str, tuple[int, ...]]],
    *,
    device: str,
) -> dict[str, Tensor]:
    """The tensors of a saved SAE: those expected, finite, and sealed where the config says so.

    Raises:
        InputFileError: if they are not.
    """
    path = folder / WEIGHTS
    _, tensors = read_tensors(path, expect, device=device)
    require_finite(path, tensors)
    seal = metadata_of(config).get(_SEAL)
    if seal is not None and seal != _digest(config, tensors):
        raise InputFileError(path, f"it and {CONFIG} do not match their checksum; one is damaged")
    return tensors


def seal_sae(folder: str | Path, model: ModelIdentity) -> None:
    """Add to a saved SAE's config the checkpoint it was trained on and a checksum of config and
    tensors.

    sae-lens keeps what it does not know in `metadata`, so the folder stays one it can open.

    Raises:
        InputFileError: if the folder holds no SAE.
        OutputError: if it cannot be written.
    """
    folder = Path(folder)
    config = read_config(folder / CONFIG)
    _, tensors = read_tensors(folder / WEIGHTS, lambda header: header.shapes, device="cpu")
    config["metadata"] = {
        **metadata_of(config),
        "model_weights": model.weights,
        "model_embedding": model.embedding,
    }
    config["metadata"][_SEAL] = _digest(config, tensors)
    replace_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def _digest(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Of both, without the seal itself."""
    metadata = {key: value for key, value in metadata_of(config).items() if key != _SEAL}
    content = json.dumps({**config, "metadata": metadata}, sort_keys=True)
    return hashlib.sha256(f"{content}{tensors_digest(tensors)}".encode()).hexdigest()


def _k(config: Mapping[str, Any], d_sae: int) -> int:
    k = config.get("k")
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= d_sae:
        raise DictionaryError(f"k must be an integer of 1 to d_sae = {d_sae}, but got {k!r}.")
    return k

"""Tiny SAEs as sae-lens saves them, and the parts of a change that attribution adds up."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion_lens.dictionaries import Dictionary

D_MODEL, D_SAE, K = 12, 32, 6
HOOK = "blocks.1.hook_resid_post"
NORMALISATIONS = ("none", "layer_norm", "constant_norm_rescale", "folded")
OWN = ("standard", "topk", "topk rescaled", "jumprelu", "batchtopk", "matryoshka_batchtopk")
SAES = (*OWN, "gated", "abstopk", "abstopk rescaled", "matching_pursuit")


def save_sae(
    folder: Path,
    kind: str = "standard",
    normalisation: str = "none",
    *,
    metadata: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Save a random SAE of a kind with sae-lens itself; "folded" is an average scale of 0.4."""
    import sae_lens

    name = {
        "standard": "StandardSAE",
        "gated": "GatedSAE",
        "topk": "TopKSAE",
        "abstopk": "AbsTopKSAE",
        "jumprelu": "JumpReLUSAE",
        "matching_pursuit": "MatchingPursuitSAE",
        "batchtopk": "BatchTopKTrainingSAE",
        "matryoshka_batchtopk": "MatryoshkaBatchTopKTrainingSAE",
        "transcoder": "Transcoder",
        "skip_transcoder": "SkipTranscoder",
        "jumprelu_transcoder": "JumpReLUTranscoder",
        "jumprelu_skip_transcoder": "JumpReLUSkipTranscoder",
        "temporal": "TemporalSAE",
    }[kind.removesuffix(" rescaled")]
    options = {
        "d_in": D_MODEL,
        "d_sae": D_SAE,
        "normalize_activations": (
            "expected_average_only_in" if normalisation == "folded" else normalisation
        ),
        "metadata": sae_lens.saes.sae.SAEMetadata(
            **{"hook_name": HOOK, "model_name": "tiny", "prepend_bos": True, **(metadata or {})}
        ),
        **options,
    }
    if "topk" in kind:
        options["k"] = K
        options["rescale_acts_by_decoder_norm"] = "rescaled" in kind or "batch" in kind
    if kind == "matryoshka_batchtopk":
        options["matryoshka_widths"] = [8, 20, D_SAE]
    if "transcoder" in kind:
        options |= {"d_out": D_MODEL, "apply_b_dec_to_input": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\s*This SAE has non-empty")
        sae = getattr(sae_lens, name)(getattr(sae_lens, f"{name}Config")(**options))
    _randomise(sae, kind)
    if normalisation == "folded":
        sae.fold_activation_norm_scaling_factor(0.4)
    if "batch" in kind:
        sae.save_inference_model(folder)
    else:
        sae.save_model(folder)
    return folder


def _randomise(sae: Any, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.4
            # thresholds of both signs would hide one that is never compared
            parameter.copy_(values.abs() + 0.3 if name == "threshold" else values)
        if kind == "matching_pursuit":
            sae.W_dec /= sae.W_dec.norm(dim=-1, keepdim=True)
        if "batch" in kind:
            sae.topk_threshold.fill_(0.7)


def edit_config(folder: Path, **changes: Any) -> Path:
    """Change top-level keys of cfg.json; a `metadata` is merged."""
    path = folder / "cfg.json"
    config = json.loads(path.read_text("utf-8"))
    changes["metadata"] = {**config["metadata"], **changes.get("metadata", {})}
    path.write_text(json.dumps({**config, **changes}), "utf-8")
    return folder


def residuals(seed: int, n_layers: int = 1, *, n: int = 7, d_model: int = D_MODEL) -> Tensor:
    """Residuals "batch layer d_model" with a mean and a norm that differ from row to row."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, n_layers, d_model, generator=generator)
    return x * torch.linspace(0.5, 3.0, n)[:, None, None] + 0.7


@dataclass(frozen=True)
class Parts:
    effects: Tensor
    offset: Tensor
    error: Tensor

    @property
    def total(self) -> Tensor:
        return self.effects.sum(dim=1) + self.offset + self.error


def parts(dictionary: Dictionary, x: Tensor, y: Tensor, *, decoder: Tensor | None = None) -> Parts:
    """The change from x to y: per feature "batch d_sae layer d_model", and the rest."""
    directions = dictionary.decoder if decoder is None else decoder
    before, after = dictionary.encode(x), dictionary.encode(y)
    coefficients = (
        after.codes[:, None] * after.scale[..., None]
        - before.codes[:, None] * before.scale[..., None]
    )
    error_before, error_after = (dictionary.to_basis(z) - dictionary.reconstruct(z) for z in (x, y))
    return Parts(
        effects=torch.einsum("blf,lfd->bfld", coefficients, directions),
        offset=after.offset - before.offset,
        error=error_after - error_before,
    )


def relative_gap(found: Tensor, expected: Tensor) -> float:
    """The largest distance of a row from what it must be, relative to that."""
    gap = (found - expected).flatten(1).norm(dim=-1) / expected.flatten(1).norm(dim=-1)
    return float(gap.max())

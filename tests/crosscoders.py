"""Tiny crosscoders in the open layout, and the formula in NumPy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dictionaries import residuals
from numpy.typing import NDArray
from safetensors.torch import save_file

from fusion_lens.crosscoders import Crosscoder, make_normaliser
from fusion_lens.dictionaries import Card
from fusion_lens.identity import identify
from fusion_lens.models import HookedModel

L, D, F = 3, 12, 24
LAYERS = (0, 2, 3)
IDS = {"CROSSCODER": 1, "SAE": 2, "MIXED": 3, "NONE": 4, "DECOUPLED": 5}
FILE = "model.safetensors"

Layout = dict[str, torch.Tensor]


def layout(
    code_normalization: str = "CROSSCODER",
    *,
    threshold: float | None = 2.0,
    normaliser: str | None = "relative",
    seed: int = 0,
) -> Layout:
    """The tensors of the open layout, written here without the package."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.5

    mean, std = random(L, D) + 1, random(L, D).abs() + 0.2
    scale = torch.ones(L)
    if normaliser == "relative":
        scale = 1.5 / (std.square().sum(dim=-1) + 1e-8).sqrt()
    none = torch.full((L, D), float("nan"))
    tensors = {
        "encoder.weight": random(L, D, F),
        "encoder.bias": random(F),
        "decoder.weight": random(L, F, D) * torch.linspace(0.2, 2.0, F)[:, None],
        "decoder.bias": random(L, D),
        "code_normalization_id": torch.tensor(IDS[code_normalization]),
        "activation_mean": none if normaliser is None else mean,
        "activation_std": none.clone() if normaliser is None else std,
        "activation_global_scale": scale,
        "target_rms": torch.tensor(1.5),
    }
    if threshold is not None:
        tensors |= {"k": torch.tensor(4, dtype=torch.int32), "threshold": torch.tensor(threshold)}
    return tensors


def write(folder: Path, tensors: Layout, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / FILE)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def by_formula(tensors: Layout, x: torch.Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
    """Codes and reconstruction in NumPy, float64, feature by feature and layer by layer."""
    t = {name: tensor.numpy().astype(np.float64) for name, tensor in tensors.items()}
    inputs = x.numpy().astype(np.float64)
    scale, std, mean = t["activation_global_scale"], t["activation_std"], t["activation_mean"]
    has_normaliser = not np.isnan(mean).any()
    per_unit = has_normaliser and (scale == 1).all()
    codes = np.zeros((len(inputs), F))
    decoded = np.zeros(inputs.shape)
    for row in range(len(inputs)):
        pre = t["encoder.bias"].copy()
        for layer in range(L):
            unit = inputs[row, layer]
            if per_unit:
                unit = (unit - mean[layer]) / (std[layer] + 1e-8)
            elif has_normaliser:
                unit = (unit - mean[layer]) * scale[layer]
            pre += unit @ t["encoder.weight"][layer]
        for i in range(F):
            norms = [np.sqrt((t["decoder.weight"][layer, i] ** 2).sum()) for layer in range(L)]
            number = int(t["code_normalization_id"])
            n = {1: sum(norms), 2: np.sqrt(sum(v**2 for v in norms)), 4: 1.0}[number]
            active = max(pre[i], 0.0)
            codes[row, i] = active if active * n > t.get("threshold", np.float64(-1)) else 0.0
        for layer in range(L):
            unit = codes[row] @ t["decoder.weight"][layer] + t["decoder.bias"][layer]
            if per_unit:
                unit = unit * (std[layer] + 1e-8) + mean[layer]
            elif has_normaliser:
                unit = unit / (scale[layer] + 1e-8) + mean[layer]
            decoded[row, layer] = unit
    return codes, decoded


def inputs(seed: int) -> torch.Tensor:
    return residuals(seed, L, d_model=D)


def made(model: HookedModel | None = None, **changes: Any) -> Crosscoder:
    tensors = layout()
    identity = None if model is None else identify(model)
    fields = {
        "card": Card(
            name="made here",
            layers=LAYERS,
            hook_names=tuple(f"blocks.{layer}.hook_resid_post" for layer in LAYERS),
            d_model=D,
            d_sae=F,
            prepend_bos=True,
            trained_on_bos=False,
            weights=identity.weights if identity else None,
            embedding=identity.embedding if identity else None,
            notes=("a note",),
        ),
        "encoder_weight": tensors["encoder.weight"],
        "encoder_bias": tensors["encoder.bias"],
        "decoder_weight": tensors["decoder.weight"],
        "decoder_bias": tensors["decoder.bias"],
        "normaliser": make_normaliser(
            tensors["activation_mean"], tensors["activation_std"], target_rms=1.5
        ),
        "threshold": 2.0,
        "k": 4,
    }
    return Crosscoder(**{**fields, **changes})

"""A crosscoder <-> the open layout: model.safetensors and a config.json beside it.

The layout is that of the dictionary_learning library of the science-of-finetuning project:
`encoder.weight [L,d,F]`, `encoder.bias [F]`, `decoder.weight [L,F,d]`, `decoder.bias [L,d]`,
`code_normalization_id`, the normaliser (`activation_mean` and `activation_std` [L,d], NaN for none;
`activation_global_scale` [L], `target_rms`), and for BatchTopK `k` and `threshold`. It does not
name its normaliser: `activation_global_scale` is 1 for "per unit" and the layer's scale for
"relative", which is taken should it fit both. What fits neither is refused.

Nor does it say which hooks of which model it reads; `save_crosscoder` writes that, and a checksum,
into the file's metadata.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion_lens.crosscoders import (
    CODE_NORMALISATIONS,
    NORMALISERS,
    Crosscoder,
    Normaliser,
    make_normaliser,
)
from fusion_lens.dictionaries import Card
from fusion_lens.durable import replace_file, replace_text
from fusion_lens.errors import ConfigError, DictionaryError, InputFileError, OutputError
from fusion_lens.models import resid_post
from fusion_lens.tensor_files import (
    Header,
    in_float32,
    read_config,
    read_tensors,
    require_finite,
    tensor_bytes,
    tensors_digest,
)
from fusion_lens.typed_json import parsed, typed

WEIGHTS, CONFIG = "model.safetensors", "config.json"

_IDS = {"CROSSCODER": 1, "SAE": 2, "MIXED": 3, "NONE": 4, "DECOUPLED": 5}
_CARD = "fusion_lens"
_MATRICES = ("encoder.weight", "decoder.weight")
_WEIGHTS = (*_MATRICES, "encoder.bias", "decoder.bias")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def load_crosscoder(
    source: str | Path, *, layers: Sequence[int] | None = None, device: str = "cpu"
) -> Crosscoder:
    """Open a crosscoder of the open layout: a folder, or its safetensors file.

    A file that `save_crosscoder` wrote says which layers it reads; for any other, `layers` names
    the blocks whose `resid_post` it was trained on, in its order, and it is taken to expect
    unprocessed weights.

    Raises:
        InputFileError: if a file is missing, damaged, or holds other tensors than the layout.
        DictionaryError: if what it holds is not implemented or does not fit together, or `layers`
            is missing or not what the file says.
    """
    path = Path(source).expanduser()
    path = path / WEIGHTS if path.is_dir() else path
    config_path = path.with_name(CONFIG)
    config = read_config(config_path) if config_path.is_file() else {}
    header, tensors = read_tensors(path, _expected, device=device)
    require_finite(path, {name: tensors[name] for name in _WEIGHTS})
    _require_numbers(path, tensors)
    written = header.metadata.get(_CARD)
    if written is not None and header.metadata.get("sha256") != _digest(written, tensors):
        raise InputFileError(path, "its content does not match its checksum; the file is damaged")
    try:
        _require_config(config, tensors)
        return Crosscoder(
            card=_card(written, layers, path.resolve().parent.name, tensors),
            encoder_weight=tensors["encoder.weight"],
            encoder_bias=tensors["encoder.bias"],
            decoder_weight=tensors["decoder.weight"],
            decoder_bias=tensors["decoder.bias"],
            code_normalisation=_code_normalisation(tensors, config),
            normaliser=_normaliser(tensors),
            threshold=float(tensors["threshold"]) if "threshold" in tensors else None,
            k=int(tensors["k"]) if "k" in tensors else None,
        )
    except (DictionaryError, ConfigError) as error:
        raise DictionaryError(f"{path} must hold a usable crosscoder, but: {error}") from error


def save_crosscoder(
    crosscoder: Crosscoder, folder: str | Path, *, dtype: torch.dtype = torch.float32
) -> None:
    """Write a crosscoder in the open layout; `load_crosscoder` gives what is written back bit for
    bit.

    The two matrices are written in `dtype`, float32 or a half precision; the rest in float32. A
    threshold is not rounded with them: find it on rounded weights.

    Raises:
        ConfigError: if `dtype` is another.
        DictionaryError: if a weight does not fit into it.
        OutputError: if the place cannot be written.
    """
    folder = Path(folder)
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, but got {dtype}.")
    n_layers, d_sae, d_model = crosscoder.decoder_weight.shape
    none = torch.full((n_layers, d_model), float("nan"))
    normaliser = crosscoder.normaliser
    tensors = {
        "encoder.weight": crosscoder.encoder_weight,
        "encoder.bias": crosscoder.encoder_bias,
        "decoder.weight": crosscoder.decoder_weight,
        "decoder.bias": crosscoder.decoder_bias,
        "code_normalization_id": torch.tensor(_IDS[crosscoder.code_normalisation]),
        "activation_mean": none if normaliser is None else normaliser.mean,
        "activation_std": none if normaliser is None else normaliser.std,
        "activation_global_scale": (
            torch.ones(n_layers) if normaliser is None else normaliser.scale
        ),
        "target_rms": torch.tensor(1.0 if normaliser is None else normaliser.target_rms),
    }
    if crosscoder.threshold is not None and crosscoder.k is not None:
        tensors["k"] = torch.tensor(crosscoder.k, dtype=torch.int32)
        tensors["threshold"] = torch.tensor(crosscoder.threshold)
    tensors = {
        name: t.detach().to("cpu", torch.float32 if t.is_floating_point() else t.dtype).clone()
        for name, t in tensors.items()
    }
    tensors |= {name: _rounded(name, tensors[name], dtype) for name in _MATRICES}
    tensors = {name: t.contiguous() for name, t in tensors.items()}
    card = json.dumps(asdict(crosscoder.card))
    metadata = {_CARD: card, "sha256": _digest(card, in_float32(tensors))}
    config: dict[str, Any] = {
        "dict_class": "CrossCoder" if crosscoder.threshold is None else "BatchTopKCrossCoder",
        "activation_dim": d_model,
        "dict_size": d_sae,
        "num_layers": n_layers,
        "code_normalization": crosscoder.code_normalisation,
        **({} if crosscoder.k is None else {"k": crosscoder.k}),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(folder, error.strerror or str(error)) from error
    # the weights carry the checksum, and are what makes the folder a crosscoder
    replace_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    replace_file(folder / WEIGHTS, tensor_bytes(tensors, metadata))


def _rounded(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = weight.to(dtype)
    if not bool(torch.isfinite(rounded).all()):
        raise DictionaryError(
            f"{name} must be finite in {dtype}, but its largest weight is "
            f"{float(weight.abs().max()):g}; choose a dtype that holds it."
        )
    return rounded


def _expected(header: Header) -> Mapping[str, tuple[int, ...]]:
    n_layers, d_model, d_sae = (*header.shapes.get("encoder.weight", ()), 0, 0, 0)[:3]
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (n_layers, d_model, d_sae),
        "encoder.bias": (d_sae,),
        "decoder.weight": (n_layers, d_sae, d_model),
        "decoder.bias": (n_layers, d_model),
        "code_normalization_id": (),
        "activation_mean": (n_layers, d_model),
        "activation_std": (n_layers, d_model),
        "activation_global_scale": (n_layers,),
        "target_rms": (),
    }
    if "threshold" in header.shapes or "k" in header.shapes:
        shapes |= {"k": (), "threshold": ()}
    return shapes


def _require_numbers(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Floats where NaN may say that there is none, and whole numbers."""
    for name in ("activation_mean", "activation_std", "activation_global_scale", "target_rms"):
        if not tensors[name].is_floating_point():
            raise InputFileError(path, f"{name} must be floating, but got {tensors[name].dtype}")
    require_finite(path, {name: tensors[name] for name in ("threshold",) if name in tensors})
    for name in ("code_normalization_id", "k"):
        if name in tensors and not _is_whole(tensors[name].item()):
            raise InputFileError(path, f"{name} must be a whole number, but got {tensors[name]}")


def _is_whole(number: complex | float | int) -> bool:
    return not isinstance(number, complex) and float(number).is_integer()


def _digest(card: str, tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(f"{card}{tensors_digest(tensors)}".encode()).hexdigest()


def _require_config(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    n_layers, d_model, d_sae = tensors["encoder.weight"].shape
    wanted = {
        "num_layers": n_layers,
        "activation_dim": d_model,
        "dict_size": d_sae,
        "num_decoder_layers": n_layers,
        "encoder_layers": list(range(n_layers)),
        "latent_processor": None,
        "dict_class": "BatchTopKCrossCoder" if "threshold" in tensors else "CrossCoder",
    }
    for key, value in wanted.items():
        if config.get(key) not in (None, value):
            raise DictionaryError(f"{key} must be {value}, but {CONFIG} says {config[key]!r}.")


def _card(
    written: str | None,
    layers: Sequence[int] | None,
    name: str,
    tensors: Mapping[str, Tensor],
) -> Card:
    if written is not None:
        try:
            card = typed(Card, parsed(written))
        except ValueError as error:
            raise DictionaryError(
                f"its card must be as save_crosscoder writes it, but: {error}"
            ) from error
        if layers is not None and tuple(layers) != card.layers:
            raise DictionaryError(f"layers must be {card.layers}, but got {tuple(layers)}.")
        return card
    n_layers, d_model, d_sae = tensors["encoder.weight"].shape
    if layers is None or len(layers) != n_layers:
        raise DictionaryError(
            f"layers must name the {n_layers} blocks it reads, which the file does not say, "
            f"but got {layers}."
        )
    names = tuple(resid_post(layer) for layer in layers)
    return Card(name=name, layers=tuple(layers), hook_names=names, d_model=d_model, d_sae=d_sae)


def _code_normalisation(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
    number = float(tensors["code_normalization_id"])
    named = {float(value): key for key, value in _IDS.items()}.get(number, str(number))
    if "threshold" not in tensors and named != "DECOUPLED":
        # ReLU codes do not depend on it
        return named if named in CODE_NORMALISATIONS else "NONE"
    if named not in CODE_NORMALISATIONS:
        raise DictionaryError(
            f"code_normalization_id must be that of {', '.join(CODE_NORMALISATIONS)}, "
            f"but got {named}, which is not implemented."
        )
    if config.get("code_normalization") not in (None, named):
        raise DictionaryError(
            f"code_normalization must be {named} as in the tensors, "
            f"but {CONFIG} says {config['code_normalization']!r}."
        )
    return named


def _normaliser(tensors: Mapping[str, Tensor]) -> Normaliser | None:
    mean, std = tensors["activation_mean"], tensors["activation_std"]
    if bool(mean.isnan().all()) and bool(std.isnan().all()):
        return None
    scale, target = tensors["activation_global_scale"], float(tensors["target_rms"])
    for kind in NORMALISERS:
        fitting = make_normaliser(mean, std, kind=kind, target_rms=target).scale
        # a file in bfloat16 has rounded both
        if torch.allclose(fitting, scale, rtol=1e-2, atol=0.0):
            return Normaliser(mean, std, scale, kind, target)
    raise DictionaryError(
        "activation_global_scale must be target_rms over the root of the summed variances, or 1 "
        f"where each unit is divided by its own deviation, but got {scale.tolist()}."
    )

"""Vectors <-> one plain safetensors file that any program can add to a model.

Tensors `layer.<k>` of shape [d_model] in float32: what is added to the residual stream after block
k, counted from 0, at every token, as it is. What they are is told in the metadata, as text under
`fusion_lens.` and a name of `Vectors.told`; `fusion_lens.tensors_sha256` finds a flipped bit. Files
of others need only the tensors. docs/how-to/exports.md has a loader for transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fusion_lens.durable import replace_file
from fusion_lens.errors import InputFileError
from fusion_lens.tensor_files import (
    Header,
    read_tensors,
    require_finite,
    tensor_bytes,
    tensors_digest,
)
from fusion_lens.vectors import Vectors, layer_named

TOLD = "fusion_lens."
"""What the names of our own metadata begin with, here and in gguf files."""

_VERSION = "1"


def save_vectors(vectors: Vectors, path: str | Path) -> None:
    """Write them; `load_vectors` gives them back bit for bit, and equal ones are equal files.

    Raises:
        OutputError: if the place cannot be written.
    """
    tensors = {f"layer.{layer}": v.clone() for layer, v in vectors.by_layer.items()}
    told = {**vectors.told, "format": _VERSION, "tensors_sha256": tensors_digest(tensors)}
    metadata = {TOLD + name: text for name, text in told.items()}
    replace_file(Path(path), tensor_bytes(tensors, metadata))


def load_vectors(path: str | Path) -> Vectors:
    """Read such a file; narrower floating numbers become float32.

    Raises:
        InputFileError: if it is no safetensors file, holds a tensor that is no vector of a layer,
            vectors of different widths, or numbers that are not finite; or has been altered.
    """

    def expect(header: Header) -> Mapping[str, tuple[int, ...]]:
        version = header.metadata.get(TOLD + "format", _VERSION)
        if version != _VERSION:
            raise InputFileError(path, f"its format must be {_VERSION}, but got {version!r}")
        if not header.shapes:
            raise InputFileError(path, "it must hold a vector, but holds no tensor")
        width = next(iter(header.shapes.values()))[:1]
        for name, shape in header.shapes.items():
            if layer_named(name, "layer") is None:
                raise InputFileError(path, f"tensors must be named as layer.3, but got {name!r}")
            if len(shape) != 1:
                raise InputFileError(path, f"{name} must be one vector, but got {shape}")
        return dict.fromkeys(header.shapes, width)

    header, tensors = read_tensors(path, expect, device="cpu")
    require_finite(path, tensors)
    told = told_in(header.metadata)
    told.pop("format", None)
    if told.pop("tensors_sha256", None) not in (None, tensors_digest(tensors)):
        raise InputFileError(path, "its tensors do not match their checksum; the file is damaged")
    by_layer = {int(name.removeprefix("layer.")): vector for name, vector in tensors.items()}
    return Vectors(by_layer, told)


def told_in(metadata: Mapping[str, str]) -> dict[str, str]:
    """What of a file's metadata is our own, by its names in `Vectors.told`."""
    return {
        name.removeprefix(TOLD): text for name, text in metadata.items() if name.startswith(TOLD)
    }

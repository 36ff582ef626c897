"""Vectors <-> a control vector of llama.cpp, one gguf file; the only door to the gguf package.

Tensors `direction.<k>` of shape [d_model] in float32, k from 1: llama.cpp adds each to the output
of block k, counted from 0, at every token, times the scale it is given; its block 0 has none.
`general.architecture` is "controlvector", `controlvector.model_hint` names the model's
architecture, `controlvector.layer_count` is the number of directions, as repeng and llama.cpp's own
generator have it. `Vectors.told` stands beside them under `fusion_lens.`. Files are read without
the package (`gguf_headers` says why).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import torch

from fusion_lens.durable import replace_file
from fusion_lens.errors import InputFileError, MissingExtraError, PlanError
from fusion_lens.gguf_headers import F32, LARGEST, MAGIC, GgufHeader, TensorPlace, read_header
from fusion_lens.tensor_files import require_finite
from fusion_lens.vector_files import TOLD, told_in
from fusion_lens.vectors import Vectors, layer_named

FIRST_LAYER = 1
"""Of llama.cpp's control vectors."""

_KIND = "controlvector"
_HINT = f"{_KIND}.model_hint"


def save_gguf(vectors: Vectors, path: str | Path, *, architecture: str) -> None:
    """Write a control vector for a model of that architecture, as "llama" or "gemma2".

    Raises:
        PlanError: if there is a vector of layer 0, which the format has no place for.
        OutputError: if the place cannot be written.
        MissingExtraError: if the gguf package is not installed.
    """
    if min(vectors.by_layer) < FIRST_LAYER:
        raise PlanError(
            "a gguf control vector must begin at layer 1, but got one of layer 0; leave it out "
            "with to_vectors(plan, first_layer=1, approximate=True)."
        )
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise MissingExtraError("gguf", "gguf") from error
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "vectors.gguf"
        writer = GGUFWriter(written, _KIND)
        writer.add_string(_HINT, architecture)
        writer.add_uint32(f"{_KIND}.layer_count", len(vectors.by_layer))
        for name, text in sorted(vectors.told.items()):
            writer.add_string(TOLD + name, text)
        for layer, vector in sorted(vectors.by_layer.items()):
            writer.add_tensor(f"direction.{layer}", vector.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        content = written.read_bytes()
    replace_file(Path(path), content)


def load_gguf(path: str | Path) -> Vectors:
    """Read a control vector, of this package, of repeng or of llama.cpp. A hint at its model is
    `told["architecture"]`.

    Raises:
        InputFileError: if it is no control vector: another kind of file, a header that promises
            more than the file holds, names other than `direction.<k>`, another type than F32,
            vectors of different widths, or numbers that are not finite.
    """
    try:
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = read_header(path, file.read(LARGEST))
            by_layer = {}
            for layer, place in _directions(path, header, size).items():
                file.seek(place.start)
                numbers = np.frombuffer(file.read(4 * place.shape[0]), "<f4").astype(np.float32)
                by_layer[layer] = torch.from_numpy(numbers)
    except OSError as error:
        raise InputFileError(path, f"it must be readable, but: {error.strerror}") from error
    require_finite(path, {f"direction.{layer}": vector for layer, vector in by_layer.items()})
    told = told_in(header.texts)
    if _HINT in header.texts:
        told["architecture"] = header.texts[_HINT]
    return Vectors(by_layer, told)


def is_gguf(path: str | Path) -> bool:
    """Whether a file begins as a gguf file does.

    Raises:
        InputFileError: if it cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise InputFileError(path, f"it must be readable, but: {error.strerror}") from error


def _directions(path: str | Path, header: GgufHeader, size: int) -> dict[int, TensorPlace]:
    """The place of every layer's direction in a file of `size` bytes."""
    kind = header.texts.get("general.architecture")
    if kind != _KIND:
        raise InputFileError(path, f"general.architecture must be {_KIND!r}, but got {kind!r}")
    found: dict[int, TensorPlace] = {}
    for place in header.tensors:
        layer = layer_named(place.name, "direction")
        if layer is None or layer < FIRST_LAYER:
            raise InputFileError(
                path, f"tensors must be named as direction.3, from 1 on, but got {place.name!r}"
            )
        if place.kind != F32:
            raise InputFileError(path, f"{place.name} must be F32, but is of ggml's {place.kind}")
        if len(place.shape) != 1 or place.shape != header.tensors[0].shape:
            raise InputFileError(
                path, f"every direction must be one vector of one width, but got {place.shape}"
            )
        found[layer] = place
    total = sum(4 * place.shape[0] for place in found.values())
    ends = [place.start + 4 * place.shape[0] for place in found.values()]
    if not total or max(total, *ends) > size:
        raise InputFileError(
            path, f"its {len(found)} directions must lie within its {size} bytes, but do not"
        )
    return found

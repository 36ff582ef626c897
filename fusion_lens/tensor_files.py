"""A safetensors file or a JSON config beside it, checked before anything of it is used.

The header is compared with what is expected before a tensor is read; safetensors itself refuses a
header that does not fit the file's length, so no size in it is ever allocated on trust. safetensors
has no checksum: a flipped bit of a weight is found only where a file carries the SHA-256 of its
tensors. Knows nothing of what the tensors mean.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fusion_lens.errors import InputFileError
from fusion_lens.typed_json import parsed


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says it holds: a shape per tensor, and its metadata."""

    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]


def read_config(path: str | Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputFileError: if the file cannot be read or holds anything else.
    """
    try:
        # other programs write these, and NaN among what is not read
        content = parsed(Path(path).read_text("utf-8"), finite=False)
    except OSError as error:
        raise InputFileError(path, f"it must be readable, but: {error.strerror}") from error
    except ValueError as error:
        raise InputFileError(path, f"it must be JSON, but: {error}") from error
    if not isinstance(content, dict):
        raise InputFileError(path, f"it must be a JSON object, but got {type(content).__name__}")
    return content


def read_tensors(
    path: str | Path, expect: Callable[[Header], Mapping[str, tuple[int, ...]]], *, device: str
) -> tuple[Header, dict[str, Tensor]]:
    """The tensors of a file, floating ones in float32.

    `expect` gives the shape of each tensor there must be, after a look at the header; it may raise.
    Values are not checked here: a format may use NaN to say "none".

    Raises:
        InputFileError: if the file is no safetensors file or holds other tensors.
    """
    try:
        with safe_open(path, framework="pt", device=device) as file:
            header = header_of(path, file)
            _require(path, header, expect(header))
            tensors = {name: file.get_tensor(name) for name in header.shapes}
    except (OSError, SafetensorError) as error:
        raise InputFileError(path, f"it must be a whole safetensors file, but: {error}") from error
    return header, in_float32(tensors)


def header_of(path: str | Path, file: Any) -> Header:
    """What an opened safetensors file says it holds.

    Raises:
        InputFileError: if a tensor has no numbers: nothing binds its other sizes, which may be
            beyond all memory.
    """
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    for name, shape in shapes.items():
        if 0 in shape:
            raise InputFileError(path, f"{name} must hold numbers, but its shape is {shape}")
    return Header(shapes, file.metadata() or {})


def in_float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as `read_tensors` gives them."""
    return {
        name: tensor.to(torch.float32) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def require_finite(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Make sure that weights are floating numbers, none of them NaN or infinite.

    Raises:
        InputFileError: for the first that is not.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise InputFileError(path, f"{name} must be floating, but got {tensor.dtype}")
        if not bool(torch.isfinite(tensor).all()):
            raise InputFileError(path, f"{name} must be finite, but it holds NaN or infinity")


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file; the same content is the same bytes, whatever order safetensors draws for
    the metadata."""
    content = save(dict(tensors), metadata=dict(metadata))
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[end:]


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """A SHA-256 over names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu").contiguous().numpy().tobytes())
    return digest.hexdigest()


def _require(path: str | Path, header: Header, expected: Mapping[str, tuple[int, ...]]) -> None:
    missing, spare = (
        sorted(expected.keys() - header.shapes.keys()),
        sorted(header.shapes.keys() - expected.keys()),
    )
    if missing or spare:
        raise InputFileError(
            path,
            f"it must hold the tensors {', '.join(sorted(expected))}, but "
            f"misses {', '.join(missing) or 'none'} and has {', '.join(spare) or 'nothing'} beside",
        )
    for name, shape in expected.items():
        if header.shapes[name] != shape:
            raise InputFileError(
                path, f"{name} must have the shape {shape}, but got {header.shapes[name]}"
            )

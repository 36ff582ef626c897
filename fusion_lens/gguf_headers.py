"""The head of a gguf file -> its texts, and where its tensors lie; nothing of it is trusted.

gguf's own reader believes every count: 56 bytes that promise an array of two million numbers cost
it 2 GB and 18 s. Here a head ends within `LARGEST` bytes, as that of any control vector does, and
every count within the head; what it is to hold is compared with the file's size before a tensor is
read. Versions 2 and 3, little-endian. Knows nothing of what the tensors mean.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fusion_lens.errors import InputFileError

MAGIC = b"GGUF"
LARGEST = 2**20
"""Bytes of a head; a whole model's holds its vocabulary and is larger."""
F32 = 0
"""ggml's number for that type of tensor."""

_VERSIONS = (2, 3)
_TEXT, _ARRAY, _U32 = 8, 9, 4
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a number, by gguf's number for its type."""
_MOST_DIMENSIONS = 4
_ALIGNMENT = "general.alignment"


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """A tensor: its name, shape (the fastest dimension first), ggml type, and where it begins in
    the file."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a file says it holds. Of its metadata only texts are kept."""

    texts: Mapping[str, str]
    tensors: tuple[TensorPlace, ...]


def read_header(path: str | Path, head: bytes) -> GgufHeader:
    """The header of a file that begins with `head`, its first `LARGEST` bytes or all of it.

    Raises:
        InputFileError: if it is none, goes on beyond `head`, or names something twice.
    """
    at = _Cursor(path, head)
    if at.take(4) != MAGIC:
        raise InputFileError(path, "it must be a gguf file, but does not begin with GGUF")
    version = at.number("I")
    if version not in _VERSIONS:
        raise InputFileError(
            path, f"it must be little-endian gguf of version 2 or 3, but got {version}"
        )
    n_tensors, n_values = at.number("Q"), at.number("Q")
    texts: dict[str, str] = {}
    keys: set[str] = set()
    alignment = 32
    for _ in range(n_values):
        name = _new(path, at.text(), keys)
        value = _value(at)
        if name == _ALIGNMENT:
            alignment = value if isinstance(value, int) else 0
        elif isinstance(value, str):
            texts[name] = value
    if alignment < 1 or alignment & (alignment - 1):
        raise InputFileError(path, f"{_ALIGNMENT} must be a power of two, but got {alignment}")
    told = []
    names: set[str] = set()
    for _ in range(n_tensors):
        name = _new(path, at.text(), names)
        n_dimensions = at.number("I")
        if not 1 <= n_dimensions <= _MOST_DIMENSIONS:
            raise InputFileError(path, f"{name!r} must have 1 to 4 dimensions, not {n_dimensions}")
        shape = tuple(at.number("Q") for _ in range(n_dimensions))
        told.append((name, shape, at.number("I"), at.number("Q")))
    begin = -(-at.place // alignment) * alignment
    tensors = [TensorPlace(name, shape, kind, begin + start) for name, shape, kind, start in told]
    return GgufHeader(texts, tuple(tensors))


def _new(path: str | Path, name: str, names: set[str]) -> str:
    if name in names:
        raise InputFileError(path, f"names must be unique, but {name!r} stands there twice")
    names.add(name)
    return name


def _value(at: _Cursor) -> str | int | None:
    """The next value of the metadata; None for what is passed over."""
    kind = at.number("I")
    if kind == _TEXT:
        return at.text()
    if kind == _U32:
        return at.number("I")
    if kind != _ARRAY:
        at.take(at.width(kind))
        return None
    kind, count = at.number("I"), at.number("Q")
    if kind != _TEXT:
        at.take(at.width(kind) * count)
        return None
    for _ in range(count):
        at.take(at.number("Q"))
    return None


@dataclass(slots=True)
class _Cursor:
    """A place in the head that moves on as it is read, and never past the end."""

    path: str | Path
    head: bytes
    place: int = 0

    def take(self, size: int) -> bytes:
        stop = self.place + size
        if stop > len(self.head):
            raise InputFileError(
                self.path,
                f"its header must end within {len(self.head)} bytes, but at {self.place} it asks "
                f"for {size} more",
            )
        taken = self.head[self.place : stop]
        self.place = stop
        return taken

    def number(self, code: str) -> int:
        return int(struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0])

    def text(self) -> str:
        taken = self.take(self.number("Q"))
        try:
            return taken.decode()
        except UnicodeDecodeError as error:
            raise InputFileError(self.path, f"its texts must be UTF-8, but: {error}") from error

    def width(self, kind: int) -> int:
        if kind not in _WIDTHS:
            raise InputFileError(
                self.path, f"its metadata must be texts, numbers and lists of them, not {kind}"
            )
        return _WIDTHS[kind]

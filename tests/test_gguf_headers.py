from __future__ import annotations

import struct
import time

import pytest

from fusion_lens.errors import InputFileError
from fusion_lens.gguf_headers import GgufHeader, TensorPlace, read_header


def text(value: str | bytes) -> bytes:
    content = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(content)) + content


def value(name: str, kind: int, content: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + content


def tensor(name: str, *shape: int, kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def head(values: list[bytes], tensors: list[bytes], version: int = 3) -> bytes:
    counts = struct.pack("<IQQ", version, len(tensors), len(values))
    return b"GGUF" + counts + b"".join(values) + b"".join(tensors)


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + content


def test_texts_and_places_are_read_and_everything_else_passed_over() -> None:
    values = [
        value("general.architecture", 8, text("controlvector")),
        value("a.number", 4, struct.pack("<I", 7)),
        value("a.flag", 7, b"\1"),
        value("a.double", 12, struct.pack("<d", 0.5)),
        value("some.numbers", 9, array(5, 3, bytes(12))),
        value("some.texts", 9, array(8, 2, text("one") + text(b"\xff"))),
        value("ü", 8, text("é")),
    ]
    content = head(values, [tensor("x", 5), tensor("y", 2, 3, kind=8, offset=32)])
    begin = -(-len(content) // 32) * 32
    for version in (2, 3):
        content = head(values, [tensor("x", 5), tensor("y", 2, 3, kind=8, offset=32)], version)
        assert read_header("f", content + bytes(100)) == GgufHeader(
            {"general.architecture": "controlvector", "ü": "é"},
            (TensorPlace("x", (5,), 0, begin), TensorPlace("y", (2, 3), 8, begin + 32)),
        )


def test_tensors_begin_where_the_alignment_says() -> None:
    aligned = value("general.alignment", 4, struct.pack("<I", 256))
    (place,) = read_header("f", head([aligned], [tensor("x", 1)])).tensors
    assert place.start == 256


VALID = head([value("a", 8, text("b"))], [tensor("x", 5)])
REFUSED = {
    "nothing": (b"", "its header must end within 0 bytes, but at 0 it asks for 4 more"),
    "another kind": (b"PK\3\4" + bytes(99), "it must be a gguf file, but does not begin with GGUF"),
    "version 1": (head([], [], 1), "little-endian gguf of version 2 or 3, but got 1"),
    "big-endian": (head([], [], 3 << 24), "little-endian gguf of version 2 or 3, but got 50331648"),
    "cut": (VALID[:-1], f"must end within {len(VALID) - 1} bytes, but at {len(VALID) - 8} it asks"),
    "too many values": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2**64 - 1),
        "its header must end within 24 bytes, but at 24 it asks for 8 more",
    ),
    "too many tensors": (
        b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0),
        "its header must end within 24 bytes, but at 24 it asks for 8 more",
    ),
    "a long name": (
        head([struct.pack("<Q", 2**62)], []),
        "but at 32 it asks for 4611686018427387904 more",
    ),
    "a long list of numbers": (
        head([value("a", 9, array(10, 2**61))], []),
        "it asks for 18446744073709551616 more",
    ),
    "a long list of texts": (head([value("a", 9, array(8, 2**62))], []), "it asks for 8 more"),
    "lists in lists": (
        head([value("a", 9, array(9, 2, array(4, 1) * 2))], []),
        "its metadata must be texts, numbers and lists of them, not 9",
    ),
    "an unknown type": (
        head([value("a", 13, b"")], []),
        "texts, numbers and lists of them, not 13",
    ),
    "no UTF-8": (head([value("a", 8, text(b"\xff"))], []), "its texts must be UTF-8, but: 'utf-8'"),
    "a key twice": (
        head([value("a", 7, b"\0")] * 2, []),
        "must be unique, but 'a' stands there tw",
    ),
    "a tensor twice": (
        head([], [tensor("x", 1)] * 2),
        "must be unique, but 'x' stands there twice",
    ),
    "no dimensions": (head([], [tensor("x")]), "'x' must have 1 to 4 dimensions, not 0"),
    "many dimensions": (head([], [tensor("x", *[1] * 5)]), "must have 1 to 4 dimensions, not 5"),
    "alignment 0": (
        head([value("general.alignment", 4, bytes(4))], []),
        "general.alignment must be a power of two, but got 0",
    ),
    "alignment 3": (
        head([value("general.alignment", 4, struct.pack("<I", 3))], []),
        "general.alignment must be a power of two, but got 3",
    ),
    "an alignment in letters": (
        head([value("general.alignment", 8, text("32"))], []),
        "general.alignment must be a power of two, but got 0",
    ),
    "an alignment of another type": (
        head([value("general.alignment", 10, struct.pack("<Q", 32))], []),
        "general.alignment must be a power of two, but got 0",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_head_that_cannot_be_trusted_is_refused(kind: str) -> None:
    content, message = REFUSED[kind]
    began = time.monotonic()
    with pytest.raises(InputFileError) as refused:
        read_header("v.gguf", content)
    assert str(refused.value).startswith("v.gguf: ")
    assert message in str(refused.value)
    assert time.monotonic() - began < 1.0


@pytest.mark.parametrize("size", range(len(VALID)))
def test_a_head_cut_anywhere_is_refused(size: int) -> None:
    with pytest.raises(InputFileError, match="its header must end within"):
        read_header("v.gguf", VALID[:size])

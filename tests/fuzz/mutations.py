"""A file -> the same file with something changed, in its bytes or in what it means.

Most changes of bytes end at the first check: a checksum, a bracket. The others are made on what was
parsed, and checksums are made right again, so that what stands behind them is reached.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import io
import json
import math
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from safetensors.torch import load

from fusion_lens.tensor_files import in_float32, tensors_digest

Change = Callable[[bytes, Random, Sequence[bytes]], bytes]

MOST = 200_000
NEST = "\x1bnest "
"""Stands for so many brackets: what is nested as deeply as a parser allows cannot be dumped."""

_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 4, 2**31, 2**63, -(2**63) - 1, 2**64, 10**400),
    *(0.5, -0.0, 1e308, -1e308, 5e-324, math.nan, math.inf, -math.inf),
    *(
        "",
        " ",
        "0",
        "é",
        "\x00",
        "\ud800",
        "\u2028",
        "²",
        "../../x",
        "a" * 5000,
        "question",
        "full",
    ),
    *([], {}, [[]], [None], [0, 1], ["a", "a"], {"": ""}, {"a": {"b": []}}),
    *(f"{NEST}{depth}" for depth in (30, 200, 480, 900, 990, 20_000)),
)
_TEXTS = (
    *(b"\x00", b'"', b"'", b"\\", b"\r", b"\n", b"\r\n", b",", b"\t", b"\xff", b"\xef\xbb\xbf"),
    *(b"[" * 3000, b"{" * 40, b"1" * 5000, b"NaN", b"-", b"\\ud800", b"1e999", b"null"),
    *(b"true", b"\xe2\x80\xa8", b"\xc2\x85", b"{'a': ", b"(", b"0x", b"-" * 3000, b"lambda:"),
    *(b"\x1a", b";"),
)  # fmt: skip
_DTYPES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "C64": 8,
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F4": 0,
    "F6_E2M3": 0,
    "F6_E3M2": 0,
    "F128": 16,
    "": 1,
}
_SIZES = (0, 1, 2, 3, 4, 6, 7, 2**16, 2**31, 2**32 + 1, 2**40, 2**62, 2**63, 2**64 - 1, -1, 10**30)
_NUMBERS = (math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-45, 0.0, -1.0, 1e30)


def changed(content: bytes, kind: str, rng: Random, seeds: Sequence[bytes]) -> bytes:
    """One to four changes; what cannot be parsed is changed in its bytes."""
    for _ in range(rng.choice((1, 1, 1, 2, 2, 4))):
        change = _bytes if kind == "bytes" or rng.random() < 0.2 else _KINDS[kind]
        try:
            content = change(content, rng, seeds)
        except Exception:  # whatever a parser makes of what is no longer a file of its kind
            content = _bytes(content, rng, seeds)
    return content[:MOST]


def _bytes(content: bytes, rng: Random, seeds: Sequence[bytes]) -> bytes:
    start = rng.randint(0, len(content))
    stop = min(len(content), start + rng.choice((0, 1, 1, 4, 16, 200)))
    match rng.randrange(6):
        case 0 if content:
            at = rng.randrange(len(content))
            return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        case 1:
            return content[:start]
        case 2:
            return content[:start] + content[stop:]
        case 3:
            return content[:stop] + content[start:]
        case 4:
            other = rng.choice(seeds)
            return content[:start] + other[rng.randint(0, len(other)) :]
    return content[:start] + rng.choice(_TEXTS) + content[stop:]


def _json(content: bytes, rng: Random, seeds: Sequence[bytes]) -> bytes:
    return dumped(_altered(json.loads(content), rng), rng).encode()


def _lines(content: bytes, rng: Random, seeds: Sequence[bytes]) -> bytes:
    return _with_lines(content, rng, lambda line: _json(line, rng, seeds))


def _checked_lines(content: bytes, rng: Random, seeds: Sequence[bytes]) -> bytes:
    return _with_lines(content, rng, lambda line: _checked(line, rng))


def _with_lines(content: bytes, rng: Random, change: Callable[[bytes], bytes]) -> bytes:
    lines = content.split(b"\n")
    at = rng.randrange(max(1, len(lines) - 1))
    match rng.randrange(8):
        case 0:
            lines.insert(rng.randint(0, len(lines)), lines[at])
        case 1:
            rng.shuffle(lines)
        case _:
            lines[at] = change(lines[at])
    return b"\n".join(lines)


def _checked(line: bytes, rng: Random) -> bytes:
    record = json.loads(line)
    record.pop("crc32", None)
    text = dumped(_altered(record, rng), rng).encode()
    return text[:-1] + b', "crc32": "%08x"}' % zlib.crc32(text)


def dumped(value: Any, rng: Random) -> str:
    """JSON, with the brackets that `NEST` stands for."""
    ascii_only = rng.random() < 0.7
    text = json.dumps(value, ensure_ascii=ascii_only)
    if not ascii_only:
        text = text.encode("utf-8", "backslashreplace").decode()
    mark = json.dumps(NEST)[:-1]
    while mark in text:
        before, _, after = text.partition(mark)
        depth, _, after = after.partition('"')
        opening, closing = ("[", "]") if rng.random() < 0.5 else ('{"a":', "}")
        text = f"{before}{opening * int(depth)}1{closing * int(depth)}{after}"
    return text


def _altered(value: Any, rng: Random) -> Any:
    """The value with another value, key or length somewhere in it."""
    value = copy.deepcopy(value)
    places = _places(value)
    if not places:
        return rng.choice(_VALUES)
    parent, key = rng.choice(places)
    own = parent[key]
    match rng.randrange(10):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, dict):
            parent[rng.choice(("", "a", "id", "\ud800", "__class__", "x" * 300))] = own
        case 1:
            parent.insert(rng.randint(0, len(parent)), own)
        case 2:
            other, name = rng.choice(places)
            parent[key] = copy.deepcopy(other[name])
        case 3:
            parent[key] = rng.choice((str(own), [own], {"a": own}, [own, own]))
        case 4 if isinstance(own, str):
            at = rng.randint(0, len(own))
            parent[key] = own[:at] + rng.choice(("\x00", "²", "\ud800", "9", ".", "/")) + own[at:]
        case 4 if isinstance(own, int | float) and not isinstance(own, bool):
            parent[key] = rng.choice((-own, own + 1, own * 10**6, float(own), own / 3))
        case 5 if isinstance(own, list):
            parent[key] = own * rng.choice((0, 2, 50))
        case _:
            parent[key] = rng.choice(_VALUES)
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a value."""
    found, left = [], [value]
    while left:
        own = left.pop()
        keys = own.keys() if isinstance(own, dict) else range(len(own))
        for key in keys:
            found.append((own, key))
            if isinstance(own[key], dict | list):
                left.append(own[key])
    return found


def _table(content: bytes, rng: Random, seeds: Sequence[bytes]) -> bytes:
    text = content.decode()
    delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    row = rng.choice(rows)
    at = rng.randrange(len(row))
    match rng.randrange(7):
        case 0:
            del row[at]
        case 1:
            row.insert(at, row[at])
        case 2:
            rows.append(list(row))
        case 3:
            row[at] = rng.choice(_TEXTS).decode("utf-8", "replace")
        case 4:
            row[at] = "x" * 140_000
        case 5:
            row[at] = dumped(rng.choice(_VALUES), rng)
        case _:
            row[at] = dumped(_altered(json.loads(row[at].replace("'", '"')), rng), rng)
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter, lineterminator="\n").writerows(rows)
    return out.getvalue().encode()


def _tensors(content: bytes, rng: Random, seeds: Sequence[bytes]) -> bytes:
    header, data = unpacked(content)
    names = [name for name in header if name != "__metadata__"]
    if not names or rng.random() < 0.15:
        return packed(_altered(header, rng), data, rng)
    name = rng.choice(names)
    own = header[name]
    start, stop = own["data_offsets"]
    # a text times a number is a text, as long as that
    size = math.prod(int(n) for n in own["shape"])
    match rng.randrange(9):
        case 0 if size and stop > start:
            # of the same bytes, other numbers
            width = (stop - start) // size
            fitting = [d for d, n in _DTYPES.items() if n and (stop - start) % n == 0]
            own["dtype"] = rng.choice(fitting)
            if _DTYPES[own["dtype"]] != width:
                own["shape"] = [(stop - start) // _DTYPES[own["dtype"]]]
        case 1:
            # as many numbers, in another shape
            own["shape"] = rng.choice(
                ([size], own["shape"][::-1], [1, *own["shape"]], [*own["shape"], 1], [size, 1])
            )
        case 2:
            # no numbers, of any shape
            rest = data[:start] + data[stop:]
            own["shape"] = [*(rng.choice(_SIZES) for _ in own["shape"][1:]), 0]
            rng.shuffle(own["shape"])
            own["data_offsets"] = [start, start]
            for other in (header[each] for each in names if each != name):
                if other["data_offsets"][0] >= stop:
                    other["data_offsets"] = [n - stop + start for n in other["data_offsets"]]
            return packed(header, rest, rng)
        case 3 if own["shape"]:
            own["shape"][rng.randrange(len(own["shape"]))] = rng.choice(_SIZES)
        case 4:
            own["data_offsets"][rng.randrange(2)] = rng.choice(_SIZES)
        case 5:
            own["dtype"] = rng.choice([*_DTYPES, "f32", "Q4"])
        case 6:
            header[rng.choice(("", "extra", "a/b/c/d", name + "/0", "optimizer/x/0/exp"))] = {
                "dtype": own["dtype"],
                "shape": own["shape"],
                "data_offsets": [len(data), len(data) + stop - start],
            }
            return packed(header, data + data[start:stop], rng)
        case 7:
            header[rng.choice(("b", "steps.0.units", "k", "threshold"))] = header.pop(name)
        case _ if stop - start >= 4:
            at = start + 4 * rng.randrange((stop - start) // 4)
            data = data[:at] + struct.pack("<f", rng.choice(_NUMBERS)) + data[at + 4 :]
    return packed(header, data, rng)


def unpacked(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    (length,) = struct.unpack_from("<Q", content)
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def packed(header: Any, data: bytes, rng: Random) -> bytes:
    """A safetensors file of them, whether they fit or not."""
    text = dumped(header, rng).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def _told(content: bytes, rng: Random, key: str) -> bytes:
    """With the JSON under `key` of the metadata changed."""
    header, data = unpacked(content)
    metadata = header["__metadata__"]
    metadata[key] = dumped(_altered(json.loads(metadata[key]), rng), rng)
    return packed(header, data, rng)


def _plan(content: bytes, rng: Random, seeds: Sequence[bytes]) -> bytes:
    told = rng.random() < 0.6
    return sealed_plan(_told(content, rng, "plan") if told else _tensors(content, rng, seeds), rng)


def sealed_plan(content: bytes, rng: Random) -> bytes:
    """A plan's file with its two checksums made right."""
    header, data = unpacked(content)
    metadata = header["__metadata__"]
    told = metadata["plan"]
    try:
        digest = tensors_digest(load(content))
    except Exception:  # what cannot be loaded has no digest
        return packed(header, data, Random(0))
    told = re.sub('(?<="tensors_sha256": ")[^"]*', digest, told)
    metadata |= {"plan": told, "sha256": hashlib.sha256(told.encode()).hexdigest()}
    return packed(header, data, Random(0))


def _crosscoder(content: bytes, rng: Random, seeds: Sequence[bytes]) -> bytes:
    if rng.random() < 0.4:
        content = _told(content, rng, "fusion_lens")
    else:
        content = _tensors(content, rng, seeds)
    header, data = unpacked(content)
    metadata = header["__metadata__"]
    if rng.random() < 0.2:
        del header["__metadata__"]
        return packed(header, data, rng)
    digest = tensors_digest(in_float32(load(content)))
    text = f"{metadata['fusion_lens']}{digest}"
    metadata["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return packed(header, data, Random(0))


def _gguf(content: bytes, rng: Random, seeds: Sequence[bytes]) -> bytes:
    """A count, length, type or offset that lies, a name of another layer, or another number."""
    match rng.randrange(5):
        case 0:
            at = content.index(b"direction.") + len(b"direction.")
            return (
                content[:at]
                + rng.choice((b"0", b"2", b"3", b"9", b"x", b"\xff"))
                + content[at + 1 :]
            )
        case 1:
            at = len(content) - 4 * rng.randint(1, 16)
            return content[:at] + struct.pack("<f", rng.choice(_NUMBERS)) + content[at + 4 :]
        case 2:
            at, number = rng.choice((8, 16)), rng.choice(_SIZES) % 2**64
            return content[:at] + struct.pack("<Q", number) + content[at + 8 :]
    # lengths, types, sizes and offsets stand beside texts
    code, width = rng.choice((("<I", 4), ("<Q", 8)))
    ends = [at for at in range(24, len(content) - 8) if content[at : at + 3] == bytes(3)]
    at = max(0, rng.choice(ends) - rng.choice((1, 1, 2, 4)))
    number = rng.choice((*_SIZES, *range(14))) % 256**width
    return content[:at] + struct.pack(code, number) + content[at + width :]


_KINDS: dict[str, Change] = {
    "json": _json,
    "lines": _lines,
    "checked lines": _checked_lines,
    "table": _table,
    "tensors": _tensors,
    "plan": _plan,
    "gguf": _gguf,
    "crosscoder": _crosscoder,
}

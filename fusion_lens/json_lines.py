"""Dataclass values <-> the lines of a JSONL file that the package itself writes, a value a line.

A file grows at its end, so that what was written stays when the work breaks off. Every line ends
with the CRC-32 of what stands before it, so that a bit that was flipped or a line that was cut is
seen. Files that users make are read by `record_files`.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from fusion_lens.durable import append_to, replace_file
from fusion_lens.errors import InputFileError
from fusion_lens.typed_json import parsed

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")

# malformed, a number of thousands of digits, brackets nested too deeply
NOT_JSON = (ValueError, RecursionError)

_CHECKED = re.compile(rb'(\{.*), "crc32": "([0-9a-f]{8})"\}', re.DOTALL)


class Whole(NamedTuple):
    """What was read of a file that may have been cut, and how many bytes of it are whole."""

    values: tuple[Any, ...]
    size: int


def append_lines(path: Path, values: Iterable[DataclassInstance]) -> None:
    """Add a line for each value, all of them on the disk when this returns.

    Raises:
        OutputError: if the file cannot be written.
        ValueError: if a number is not finite.
    """
    content = b"".join(map(_line, values))
    if content:
        append_to(path, content)


def replace_lines(path: Path, values: Iterable[DataclassInstance]) -> None:
    """Make a file of these values alone, whole or not at all.

    Raises:
        OutputError: if the file cannot be written.
        ValueError: if a number is not finite.
    """
    replace_file(path, b"".join(map(_line, values)))


def read_lines(path: Path, make: Callable[[Any], T], *, noun: str) -> tuple[T, ...]:
    """What `make` makes of each line. `make` refuses with TypeError, KeyError or ValueError;
    `noun` is what a line must be.

    Raises:
        InputFileError: if the file cannot be read, or a line is cut, altered or refused; names the
            line.
    """
    read = _read(path, make)
    for number, line in enumerate(read, start=1):
        if line.fault is not None:
            raise InputFileError(path, f"must be {noun}: {line.fault}", number)
    return tuple(line.value for line in read)


def read_whole_lines(path: Path, make: Callable[[Any], T], *, noun: str) -> Whole:
    """The same of a file that was being written when the work broke off: without what is cut or
    altered at its very end.

    Raises:
        InputFileError: if the file cannot be read, or a line with a good one behind it is not
            whole; names the line.
    """
    read = _read(path, make)
    while read and read[-1].fault is not None:
        read.pop()
    for number, line in enumerate(read, start=1):
        if line.fault is not None:
            raise InputFileError(path, f"must be {noun}: {line.fault}", number)
    return Whole(tuple(line.value for line in read), read[-1].end if read else 0)


class _Line(NamedTuple):
    value: Any
    fault: str | None
    end: int


def _line(value: DataclassInstance) -> bytes:
    text = json.dumps(asdict(value), ensure_ascii=False, allow_nan=False).encode()
    return text[:-1] + b', "crc32": "%08x"}\n' % zlib.crc32(text)


def _read(path: Path, make: Callable[[Any], Any]) -> list[_Line]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputFileError(path, f"must be readable: {error.strerror or error}") from error
    # not splitlines: a text may hold a carriage return or U+2028
    *lines, rest = content.split(b"\n")
    read, end = [], 0
    for line in lines:
        end += len(line) + 1
        try:
            read.append(_Line(make(parsed(_checked(line))), None, end))
        except (*NOT_JSON, TypeError, KeyError) as error:
            read.append(_Line(None, str(error), end))
    if rest:
        read.append(_Line(None, "its end is cut off", end + len(rest)))
    return read


def _checked(line: bytes) -> bytes:
    """The line without its checksum, which it matches."""
    found = _CHECKED.fullmatch(line)
    if found is None:
        raise ValueError("it has no checksum")
    text = found[1] + b"}"
    if zlib.crc32(text) != int(found[2], 16):
        raise ValueError("it does not match its checksum; it was altered")
    return text

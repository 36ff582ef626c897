"""Dataclass values <-> the lines of a JSONL file that the package itself writes, a value a line.

A file grows at its end, so that what was written stays when the work breaks off. Files that users
make are read by `record_files`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fusion_lens.errors import InputFileError, OutputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")

# malformed, a number of thousands of digits, brackets nested too deeply
NOT_JSON = (ValueError, RecursionError)


def append_lines(path: Path, values: Iterable[DataclassInstance]) -> None:
    """Add a line for each value.

    Raises:
        OutputError: if the file cannot be written.
        ValueError: if a number is not finite.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            for value in values:
                file.write(json.dumps(asdict(value), ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        raise OutputError(path, error.strerror or str(error)) from error


def read_lines(path: Path, text: str, make: Callable[[Any], T], *, noun: str) -> tuple[T, ...]:
    """What `make` makes of each line of `text`, which `path` holds; empty lines are left out.
    `make` refuses with TypeError, KeyError or ValueError; `noun` is what a line must be.

    Raises:
        InputFileError: if a line is no JSON or is refused; names the line.
    """
    made = []
    # not splitlines: a text may hold U+2028 or U+0085, which JSON leaves as they are
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        if not line:
            continue
        try:
            made.append(make(json.loads(line)))
        except (*NOT_JSON, TypeError, KeyError) as error:
            raise InputFileError(path, f"must be {noun}: {error}", number) from error
    return tuple(made)

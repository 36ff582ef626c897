"""A JSONL, CSV or TSV file -> one checked value for each of its records, errors naming file and
line.

What a record means is the caller's: `make` turns one into a value with an `id`, `layout_of` tells
from a CSV's header how its cells are read. Knows nothing of questions or contrasts.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from fusion_lens.errors import FusionLensError, InputFileError
from fusion_lens.json_lines import NOT_JSON

Layout = Callable[[Mapping[str, str], int], dict[str, Any]]
"""(a row, its 1-based number among the rows) -> a record."""


@runtime_checkable
class Named(Protocol):
    """Anything with an id that is unique in its file."""

    @property
    def id(self) -> str:
        """The name."""
        ...


N = TypeVar("N", bound=Named)


def load_records(
    path: str | Path,
    make: Callable[[Path, int, Mapping[str, Any]], N],
    *,
    noun: str,
    layout_of: Callable[[Sequence[str]], Layout],
) -> list[N]:
    """What `make` makes of (path, line, record) for every record of a `.jsonl`, `.csv` or `.tsv`
    file; `noun` is what one is called.

    Raises:
        InputFileError: if the file cannot be read or is empty, a line is malformed or an id occurs
            twice; names the line.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".csv", ".tsv"):
        raise InputFileError(path, f"must end in .jsonl, .csv or .tsv, but got {path.suffix!r}")
    records = _jsonl_records(path) if path.suffix == ".jsonl" else _csv_records(path, layout_of)
    lines: dict[str, int] = {}
    made: list[N] = []
    try:
        for line, record in records:
            value = make(path, line, record)
            if value.id in lines:
                raise InputFileError(
                    path,
                    f"id {value.id!r} must be unique, but line {lines[value.id]} has it",
                    line,
                )
            lines[value.id] = line
            made.append(value)
    except OSError as error:
        raise InputFileError(path, f"cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputFileError(path, f"must be UTF-8 text: {error.reason}") from error
    if not made:
        raise InputFileError(path, f"must hold at least one {noun}, but holds none")
    return made


def text_field(path: Path, line: int, record: Mapping[str, Any], name: str) -> str | None:
    """The text under `name`; None where there is none.

    Raises:
        InputFileError: if something else stands there, or half a surrogate pair, which JSON can
            spell and no tokenizer takes.
    """
    value = record.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise InputFileError(path, f"{name!r} must be text, but got {value!r}", line)
    require_utf8(path, line, value)
    return value


def require_utf8(path: Path, line: int, text: str) -> None:
    """Refuse half a surrogate pair.

    Raises:
        InputFileError: if there is one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputFileError(path, f"must be UTF-8 text: {error.reason}", line) from error


def jsonl_line(record: Mapping[str, Any]) -> str:
    """One record as a line; fields that are None or () are left out."""
    kept = {key: value for key, value in record.items() if value not in (None, ())}
    return json.dumps(kept, ensure_ascii=False) + "\n"


def _jsonl_records(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except NOT_JSON as error:
                reason = getattr(error, "msg", error)
                raise InputFileError(path, f"must be JSON: {reason}", line) from error
            if not isinstance(record, dict):
                raise InputFileError(
                    path, f"must be a JSON object, but got {type(record).__name__}", line
                )
            yield line, record


def _csv_records(
    path: Path, layout_of: Callable[[Sequence[str]], Layout]
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    # spreadsheets begin their CSV with a byte order mark, which would hide the first column
    with path.open(encoding="utf-8-sig", newline="") as file:
        delimiter = "\t" if "\t" in file.readline() else ","
        file.seek(0)
        reader = csv.DictReader(file, strict=True, delimiter=delimiter)
        try:
            layout = layout_of(reader.fieldnames or ())
            for number, record in enumerate(reader, start=1):
                if None in record or None in record.values():
                    raise InputFileError(
                        path, "must have as many cells as the header has columns", reader.line_num
                    )
                try:
                    cells = layout(record, number)
                except FusionLensError as error:
                    raise InputFileError(path, str(error), reader.line_num) from error
                yield reader.line_num, cells
        except csv.Error as error:
            # DictReader's own line_num stays at the last row that could be read
            line = reader.reader.line_num
            raise InputFileError(path, f"must be CSV: {error}", line) from error

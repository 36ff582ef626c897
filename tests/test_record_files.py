from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fusion_lens.errors import InputFileError
from fusion_lens.record_files import jsonl_line, load_records, text_field


@dataclass(frozen=True)
class Note:
    id: str
    line: int


def make(path: Path, line: int, record: Mapping[str, Any]) -> Note:
    return Note(text_field(path, line, record, "id") or "none", line)


def notes(path: Path) -> list[Note]:
    return load_records(
        path, make, noun="note", layout_of=lambda header: lambda row, number: dict(row)
    )


def written(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8", newline="")
    return folder / name


@pytest.mark.parametrize(
    ("name", "text"),
    [("n.jsonl", '{"id": "a"}\n\n{"id": "b"}\n'), ("n.csv", 'id,x\na,"1\n2"\nb,\n')],
)
def test_a_record_is_made_with_the_line_it_ends_on(tmp_path: Path, name: str, text: str) -> None:
    assert [note.id for note in notes(written(tmp_path, name, text))] == ["a", "b"]
    assert [note.line for note in notes(tmp_path / name)][1] == 3 + name.endswith("csv")


def test_errors_call_a_record_by_its_noun_and_name_both_lines_of_an_id(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="must hold at least one note, but holds none"):
        notes(written(tmp_path, "n.csv", "id\n"))
    path = written(tmp_path, "n.jsonl", '{"id": "a"}\n{"id": "b"}\n{"id": "a"}\n')
    with pytest.raises(InputFileError) as caught:
        notes(path)
    assert str(caught.value) == f"{path}, line 3: id 'a' must be unique, but line 1 has it"


def test_a_field_must_be_text_that_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="line 1: 'id' must be text, but got 3"):
        notes(written(tmp_path, "n.jsonl", '{"id": 3}\n'))
    with pytest.raises(InputFileError, match="must be UTF-8 text: surrogates not allowed"):
        notes(written(tmp_path, "n.jsonl", '{"id": "\\ud800"}\n'))


def test_a_line_leaves_out_what_is_empty() -> None:
    line = jsonl_line({"id": "ä", "part": None, "more": (), "count": 0})
    assert line == '{"id": "ä", "count": 0}\n'

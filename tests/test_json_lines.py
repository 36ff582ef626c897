from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fusion_lens.errors import InputFileError, OutputError
from fusion_lens.json_lines import append_lines, read_lines


@dataclass(frozen=True)
class Note:
    text: str
    weight: float = 0.0


def note(content: Any) -> Note:
    return Note(content["text"], content["weight"])


def test_values_are_read_as_they_were_appended_in_one_go_or_more(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    written = (Note("\u2028a\x85"), Note("b\r\nü", 0.1), Note(""))
    append_lines(path, written[:1])
    append_lines(path, iter(written[1:]))
    text = path.read_bytes().decode()
    assert text.count("\n") == 3
    assert "ü" in text
    assert read_lines(path, text, note, noun="a note") == written


def test_no_text_has_no_line_and_an_empty_one_is_left_out() -> None:
    assert read_lines(Path("x"), "", note, noun="a note") == ()
    text = '\n{"text": "a", "weight": 1}\n\n'
    assert read_lines(Path("x"), text, note, noun="a note") == (Note("a", 1),)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "Expecting property name"),
        ("[" * 100_000, "maximum recursion depth exceeded"),
        ("[]", "list indices must be integers"),
        ('{"text": "a"}', "'weight'"),
    ],
)
def test_a_line_that_is_refused_is_named_with_the_reason(line: str, reason: str) -> None:
    with pytest.raises(InputFileError) as caught:
        read_lines(Path("x"), f'{{"text": "a", "weight": 1}}\n{line}\n', note, noun="a note")
    assert str(caught.value).startswith(f"x, line 2: must be a note: {reason}")


def test_a_number_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        append_lines(tmp_path / "n.jsonl", [Note("a", float("nan"))])
    assert (tmp_path / "n.jsonl").read_text() == ""


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="must be writable, but got: No such file or directory"):
        append_lines(tmp_path / "gone" / "n.jsonl", [Note("a")])

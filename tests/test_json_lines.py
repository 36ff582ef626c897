from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_lens.errors import InputFileError, OutputError
from fusion_lens.json_lines import append_lines, read_lines, read_whole_lines, replace_lines


@dataclass(frozen=True)
class Note:
    text: str
    weight: float = 0.0


def note(content: Any) -> Note:
    return Note(content["text"], content["weight"])


NOTES = (Note("\u2028a\x85"), Note('b\r\nü", "crc32": "00000000"}', 0.1), Note(""))


def written(folder: Path, notes: tuple[Note, ...] = NOTES) -> Path:
    path = folder / "notes.jsonl"
    replace_lines(path, notes)
    return path


def read(path: Path) -> tuple[Note, ...]:
    return read_lines(path, note, noun="a note")


def test_values_are_read_as_they_were_appended_in_one_go_or_more(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    append_lines(path, NOTES[:1])
    append_lines(path, iter(NOTES[1:]))
    append_lines(path, ())
    text = path.read_bytes().decode()
    assert text.count("\n") == 3
    assert "ü" in text
    assert read(path) == NOTES
    replace_lines(tmp_path / "at once", NOTES)
    assert (tmp_path / "at once").read_bytes() == path.read_bytes()


def test_a_line_is_json_that_ends_with_the_checksum_of_the_rest(tmp_path: Path) -> None:
    (line,) = written(tmp_path, NOTES[1:2]).read_bytes().splitlines()
    content = json.loads(line)
    checksum = content.pop("crc32")
    assert content == {"text": NOTES[1].text, "weight": 0.1}
    rest = json.dumps(content, ensure_ascii=False).encode()
    assert checksum == f"{zlib.crc32(rest):08x}"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "it has no checksum"),
        (b"", "it has no checksum"),
        (b'{"text": "a", "weight": 1}', "it has no checksum"),
        (b'{"text": "a", "weight": 1, "crc32": "00000000"}', "it does not match its checksum"),
    ],
)
def test_a_line_without_its_checksum_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    path = written(tmp_path)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], line, *lines[1:]]))
    for reader in (read_lines, read_whole_lines):
        with pytest.raises(InputFileError) as caught:
            reader(path, note, noun="a note")
        assert str(caught.value).startswith(f"{path}, line 2: must be a note: {reason}")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 100_000, "maximum recursion depth exceeded"),
        (b'{"weight": 1', "Expecting"),
        (b'{"weight": 1}', "'text'"),
        (b'{"text": "\xff"}', "'utf-8' codec can't decode"),
    ],
)
def test_a_line_that_is_refused_is_named_with_the_reason(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    """With a checksum of its own: somebody wrote it so."""
    path = written(tmp_path)
    if content.endswith(b"}"):
        line = content[:-1] + b', "crc32": "%08x"}\n' % zlib.crc32(content)
    else:
        line = b'{"a": ' + content
        line += b', "crc32": "%08x"}\n' % zlib.crc32(line + b"}")
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(InputFileError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}, line 4: must be a note: {reason}")


def test_a_file_cut_at_any_byte_gives_the_lines_that_are_whole(tmp_path: Path) -> None:
    path = written(tmp_path)
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        n = sum(end <= size for end in ends)
        found = read_whole_lines(path, note, noun="a note")
        assert found == (NOTES[:n], ends[n - 1] if n else 0)
        if size in (0, *ends):
            assert read(path) == NOTES[:n]
        else:
            with pytest.raises(InputFileError, match=rf"line {n + 1}: must be a note: its end is"):
                read(path)


def test_a_tail_that_was_never_written_is_left_out(tmp_path: Path) -> None:
    """After a power cut a file may be longer than what reached the disk."""
    path = written(tmp_path)
    whole = path.read_bytes()
    for tail in (b"\0" * 50, b"\0" * 20 + b'}\n{"te', b"\0\n\0\n"):
        path.write_bytes(whole + tail)
        assert read_whole_lines(path, note, noun="a note") == (NOTES, len(whole))


@given(place=st.integers(0, 10**6), change=st.integers(1, 255))
def test_a_changed_byte_is_always_seen(
    tmp_path_factory: pytest.TempPathFactory, place: int, change: int
) -> None:
    path = written(tmp_path_factory.mktemp("changed"))
    whole = bytearray(path.read_bytes())
    whole[place % len(whole)] ^= change
    path.write_bytes(whole)
    with pytest.raises(InputFileError):
        read(path)


def test_a_number_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        append_lines(tmp_path / "n.jsonl", [Note("b"), Note("a", float("nan"))])
    assert not (tmp_path / "n.jsonl").exists()


def test_a_place_that_cannot_be_written_or_read_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "gone" / "n.jsonl"
    for write in (append_lines, replace_lines):
        with pytest.raises(OutputError, match="must be writable, but got: No such file or direc"):
            write(gone, [Note("a")])
    with pytest.raises(InputFileError, match="must be readable: No such file or directory"):
        read(gone)

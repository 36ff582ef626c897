from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fusion_lens.durable import (
    append_to,
    cut,
    make_folder,
    replace_file,
    replace_text,
    sync_file,
)
from fusion_lens.errors import OutputError


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_file(path, b"one")
    replace_text(path, "two\r\nü")
    assert path.read_bytes() == b"two\r\n\xc3\xbc"
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_there_stays_where_the_new_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    replace_file(path, b"one")

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="must be writable, but got: No space left on device"):
        replace_file(path, b"two")
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is called that puts something on the disk."""
    done: list[str] = []
    real = {name: getattr(os, name) for name in ("fsync", "rename", "replace")}

    def watched(name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            what = ""
            if name == "fsync":
                opened = Path(f"/proc/self/fd/{args[0]}").resolve()
                what = f" {opened.name}" if opened != tmp_path else " folder"
            done.append(name + what)
            return real[name](*args, **options)

        return call

    for name in real:
        monkeypatch.setattr(os, name, watched(name))
    return done


def test_everything_is_on_the_disk_before_a_call_returns(tmp_path: Path, done: list[str]) -> None:
    path = tmp_path / "file"
    replace_file(path, b"one")
    assert done == ["fsync file.part", "replace", "fsync folder"]
    done.clear()
    append_to(path, b"two")
    append_to(tmp_path / "new", b"one")
    assert done == ["fsync file", "fsync new", "fsync folder"]
    done.clear()
    sync_file(path)
    assert done == ["fsync file"]


def test_a_folder_is_made_with_those_it_is_in_and_all_their_names_are_on_the_disk(
    tmp_path: Path, done: list[str]
) -> None:
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert done == ["fsync a", "fsync folder"]
    make_folder(tmp_path / "a" / "b")
    assert len(done) == 2


def test_a_file_grows_at_its_end_and_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "file"
    append_to(path, b"one")
    append_to(path, b"two")
    assert path.read_bytes() == b"onetwo"
    cut(path, 4)
    assert path.read_bytes() == b"onet"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file.part").mkdir()
    with pytest.raises(OutputError, match="Is a directory"):
        replace_file(tmp_path / "file", b"")
    for write in (replace_file, append_to, cut):
        content: Any = 0 if write is cut else b""
        with pytest.raises(OutputError, match="No such file or directory"):
            write(tmp_path / "gone" / "file", content)

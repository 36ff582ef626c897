"""Bytes -> the disk, so that a kill or a power cut at any moment leaves a file whole.

A file is replaced in one step, by one that was written beside it, or grows at its end; either is on
the disk, and not in a cache alone, before the call returns. What was cut off while it grew ends
without the line end that every record has (`json_lines`).
"""

from __future__ import annotations

import os
from pathlib import Path

from fusion_lens.errors import OutputError

PART = ".part"
"""What a file is called, after its own name, until it is whole."""


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OutputError: if it cannot be written; what was there before is still there.
    """
    part = path.with_name(path.name + PART)
    try:
        try:
            _write(part, content, os.O_TRUNC)
            part.replace(path)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise OutputError(path, error.strerror or str(error)) from error


def replace_text(path: str | Path, text: str) -> None:
    """Write a text file as UTF-8, with the line ends as they are, whole or not at all.

    Raises:
        OutputError: if it cannot be written; what was there before is still there.
    """
    replace_file(Path(path), text.encode())


def append_to(path: Path, content: bytes) -> None:
    """Add bytes at the end of a file.

    Raises:
        OutputError: if it cannot be written; some of them may be there.
    """
    existed = path.exists()
    try:
        _write(path, content, os.O_APPEND)
        if not existed:
            sync_folder(path.parent)
    except OSError as error:
        raise OutputError(path, error.strerror or str(error)) from error


def cut(path: Path, size: int) -> None:
    """Leave only the first `size` bytes of a file.

    Raises:
        OutputError: if it cannot be written.
    """
    try:
        with path.open("r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(path, error.strerror or str(error)) from error


def make_folder(path: Path) -> None:
    """Make a folder, and those it is in, where they are missing.

    Raises:
        OSError: if one cannot be made.
    """
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync_folder(each.parent)


def sync_file(path: Path) -> None:
    """Put on the disk what another process may have left in a cache.

    Raises:
        OSError: if the file cannot be opened.
    """
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder, what was moved there or taken away, last.

    Raises:
        OSError: if the folder cannot be opened.
    """
    if os.name != "posix":  # a folder cannot be opened there
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _write(path: Path, content: bytes, how: int) -> None:
    opened = os.open(path, os.O_WRONLY | os.O_CREAT | how, 0o666)
    with os.fdopen(opened, "wb", closefd=True) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())

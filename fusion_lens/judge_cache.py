"""Replies of a judge model, or of a site, by a key of what was asked: a JSONL file, or memory
alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import final

from fusion_lens.errors import InputFileError, OutputError
from fusion_lens.typed_json import parsed

_BEGINNING = b'{"key": "'


@final
class ReplyCache:
    """Replies by key, and their JSONL file; a line that a crash cut off is left out."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._replies: dict[str, str] = {}
        self._ragged = False
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            content = path.read_bytes()
        except OSError as error:
            raise OutputError(path, error.strerror or str(error)) from error
        self._ragged = not content.endswith(b"\n") and bool(content)
        for number, line in enumerate(content.split(b"\n"), start=1):
            if line:
                self._replies |= _cached(path, number, line)

    def get(self, key: str) -> str | None:
        return self._replies.get(key)

    def put(self, key: str, text: str) -> None:
        self._replies[key] = text
        if self._path is None:
            return
        line = json.dumps({"key": key, "reply": text}).encode() + b"\n"
        try:
            # unbuffered: a line goes out in one write, also beside another process
            with self._path.open("ab", buffering=0) as file:
                file.write(b"\n" + line if self._ragged else line)
        except OSError as error:
            raise OutputError(self._path, error.strerror or str(error)) from error
        self._ragged = False


def _cached(path: Path, number: int, line: bytes) -> dict[str, str]:
    try:
        record = parsed(line)
    except ValueError:
        if line.startswith(_BEGINNING[: len(line)]):
            return {}
        record = None
    match record:
        case {"key": str(key), "reply": str(reply)}:
            return {key: reply}
    raise InputFileError(path, "must be a line of a cache of replies; name another file", number)

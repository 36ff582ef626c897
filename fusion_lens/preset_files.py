"""A preset <-> one file: a line of JSON that ends with its checksum, as the lines of a run do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusion_lens.errors import InputFileError
from fusion_lens.json_lines import read_lines, replace_lines
from fusion_lens.presets import Preset
from fusion_lens.typed_json import typed


def save_preset(preset: Preset, path: str | Path) -> None:
    """Write a preset, whole or not at all.

    Raises:
        OutputError: if the file cannot be written.
    """
    replace_lines(Path(path), [preset])


def load_preset(path: str | Path) -> Preset:
    """Read a preset.

    Raises:
        InputFileError: if the file cannot be read, is no preset, or was changed.
    """
    path = Path(path)
    read = read_lines(path, _read, noun="a preset")
    if len(read) != 1:
        raise InputFileError(path, f"must hold one preset, but holds {len(read)}")
    return read[0]


def _read(content: Any) -> Preset:
    return typed(Preset, content)

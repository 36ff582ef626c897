from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_presets import PRESET

from fusion_lens.errors import InputFileError, OutputError
from fusion_lens.preset_files import load_preset, save_preset


def test_a_preset_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "preset.json"
    save_preset(PRESET, path)
    assert load_preset(path) == PRESET
    content = path.read_bytes()
    assert json.loads(content)["starts"] == [[1.0, 0.0, 0.0], [0.25, 0.5, 0.75]]
    save_preset(PRESET, path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text.replace("0.25", "0.35"), "must be a preset: "),
        (lambda text: text * 2, "must hold one preset, but holds 2"),
        (lambda text: "", "must hold one preset, but holds 0"),
        (lambda text: text[:-9], "must be a preset: "),
    ],
)
def test_what_was_changed_is_refused(tmp_path: Path, change, says: str) -> None:
    path = tmp_path / "preset.json"
    save_preset(PRESET, path)
    path.write_text(change(path.read_text()))
    with pytest.raises(InputFileError, match=says):
        load_preset(path)


def test_a_file_that_is_not_there_or_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="must be readable"):
        load_preset(tmp_path / "preset.json")
    with pytest.raises(OutputError, match="must be writable"):
        save_preset(PRESET, tmp_path / "none" / "preset.json")

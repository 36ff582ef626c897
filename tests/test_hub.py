from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from fusion_lens import hub
from fusion_lens.errors import ModelError, QuestionError
from fusion_lens.hub import find_checkpoint, find_table


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub in its own layout, and a hub that cannot be reached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "_unreachable", lambda: ConnectionError("offline"))
    return tmp_path


def cached(cache: Path, name: str, files: dict[str, str]) -> Path:
    """A repository in the cache; gives its snapshot."""
    folder = cache / name.replace("/", "--")
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for file, text in files.items():
        (snapshot / file).write_text(text)
    return snapshot


def test_a_cached_model_is_found_without_the_hub(cache: Path) -> None:
    snapshot = cached(cache, "models/someone/model", {"config.json": "{}"})
    assert Path(find_checkpoint("someone/model")) == snapshot
    with pytest.raises(ModelError, match="there is none, and the hub gave ConnectionError"):
        find_checkpoint("someone/other")


def test_a_folder_and_a_name_of_a_reachable_hub_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_unreachable", lambda: None)
    assert find_checkpoint("someone/model") == "someone/model"
    (tmp_path / "config.json").write_text("{}")
    assert find_checkpoint(str(tmp_path)) == str(tmp_path)


def test_the_table_of_a_cached_data_set_is_found_without_the_hub(cache: Path) -> None:
    snapshot = cached(
        cache, "datasets/someone/questions", {"README.md": "", "test_set.csv": "problem,answer\n"}
    )
    assert find_table("someone/questions") == snapshot / "test_set.csv"


def test_a_data_set_that_is_nowhere_or_has_several_tables_is_one_error(cache: Path) -> None:
    with pytest.raises(QuestionError, match="but there is none, and the hub gave ConnectionError"):
        find_table("someone/questions")
    cached(cache, "datasets/someone/two", {"a.csv": "", "b.csv": ""})
    with pytest.raises(QuestionError, match="must hold one CSV file, but holds 2"):
        find_table("someone/two")

"""The notebooks run from top to bottom, quickly, and show what this code makes of them."""

from __future__ import annotations

import importlib.util
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in PATHS]

_MOST_CELLS = 24
_MOST_LINES = 16
_MOST_BYTES = 3_000_000
_MACHINE = re.compile(r"/(?:work|home|root|tmp|Users|usr|var|opt|private)/|0x[0-9a-f]{6}")
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]\d+)?")

pytestmark = pytest.mark.pages


@pytest.fixture(scope="module")
def execute() -> Any:
    """The module that writes the stored outputs."""
    path = ROOT / "notebooks" / "execute.py"
    spec = importlib.util.spec_from_file_location("execute_notebooks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stored(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def told(notebook: Any) -> list[list[tuple[str, str]]]:
    """What every code cell says: texts, tables, and titles of figures."""
    cells = []
    for cell in code_cells(notebook):
        own = []
        for output in cell.outputs:
            if output.output_type == "stream":
                own.append((output.name, output.text))
                continue
            for kind, content in sorted(output.data.items()):
                if kind.startswith("text/"):
                    own.append((kind, content))
                elif kind.startswith("application/vnd.plotly"):
                    title = content["layout"]["title"]
                    subtitle = title.get("subtitle", {}).get("text", "")
                    own.append((kind, f"{title['text']}\n{subtitle}"))
        cells.append(own)
    return cells


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_it_runs_in_less_than_a_minute_and_says_what_is_stored(
    path: Path, execute: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    made, seconds = execute.executed(path)
    with capsys.disabled():
        print(f"\n{path.stem}: {seconds:.1f} s")
    for now, before in zip(told(made), told(stored(path)), strict=True):
        assert [kind for kind, _ in now] == [kind for kind, _ in before]
        for (_, text), (_, kept) in zip(now, before, strict=True):
            # words to the letter, numbers as far as another processor's rounding goes
            assert _NUMBER.sub("#", text) == _NUMBER.sub("#", kept)
            numbers, others = ([*map(float, _NUMBER.findall(each))] for each in (text, kept))
            assert numbers == pytest.approx(others, rel=0.02, abs=0.02)
    assert seconds < execute.MOST_SECONDS


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_prose_stands_before_every_short_cell(path: Path) -> None:
    cells = stored(path).cells
    assert len(cells) <= _MOST_CELLS
    assert cells[0].cell_type == "markdown"
    assert cells[0].source.startswith("# ")
    assert cells[-1].cell_type == "markdown"
    for before, cell in pairwise(cells):
        if cell.cell_type == "code":
            assert before.cell_type == "markdown"
            assert len(cell.source.splitlines()) <= _MOST_LINES
            assert "def " not in cell.source


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_what_is_stored_can_be_read_anywhere(path: Path, execute: Any) -> None:
    notebook = stored(path)
    nbformat.validate(notebook)
    assert path.stat().st_size < _MOST_BYTES
    assert [cell.execution_count for cell in code_cells(notebook)] == [
        *range(1, len(code_cells(notebook)) + 1)
    ]
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not [each for each in outputs if each.output_type == "error"]
    assert not [each for each in outputs if each.get("name") == "stderr"]
    assert notebook.metadata == execute.METADATA
    figures = list(execute.figures_of(notebook))
    assert figures
    for figure in figures:
        assert {execute.PLOTLY, execute.PNG} == figure.data.keys()
        assert figure.data[execute.PNG].startswith("iVBORw0KGgo")
    texts = [cell.source for cell in notebook.cells]
    texts += [text for cell in told(notebook) for _, text in cell]
    assert not [text for text in texts if _MACHINE.search(text)]


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_its_links_lead_somewhere(path: Path) -> None:
    text = "\n".join(cell.source for cell in stored(path).cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\((?!http|#)([^)#]+)", text)
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_the_readme_names_every_notebook() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if f"(notebooks/{name}.ipynb)" not in readme] == []

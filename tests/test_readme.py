"""The README is true: its code runs, its tables are those of the files beside the figures."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
from documents import in_a_process, run_blocks

from fusion_lens.atlas import CHECKPOINT
from fusion_lens.atlas.probes import hash_weights

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.pages
def test_every_code_block_runs_in_order(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = list(run_blocks(README, "README.md", in_a_process))
    assert [block.kind for block, _ in ran].count("python") >= 4
    printed = "".join(text for block, text in ran if block.kind == "python")
    assert "says now:" in printed
    assert "question_id" in printed


@pytest.fixture(scope="module")
def make_figures():
    spec = importlib.util.spec_from_file_location("make_figures", ROOT / "figures" / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_files_beside_the_figures(make_figures) -> None:
    summary = json.loads((ROOT / "figures" / "summary.json").read_text(encoding="utf-8"))
    probes = json.loads(make_figures.PROBES.read_text(encoding="utf-8"))
    blocks = make_figures.readme_blocks(summary, probes)
    assert make_figures.with_blocks(README, blocks) == README
    assert summary["arms"]["segmented"]["n"] >= 60


@pytest.mark.parametrize(
    "readme",
    ["no block", "<!-- a -->\nnever closed", 2 * "<!-- a -->\nold\n<!-- end -->\n"],
    ids=["none", "open", "twice"],
)
def test_a_readme_whose_block_is_not_there_exactly_once_is_left_alone(
    make_figures, readme: str
) -> None:
    with pytest.raises(AssertionError, match=r"^a$"):
        make_figures.with_blocks(readme, {"a": "new"})


def test_the_figures_were_made_with_the_atlas_that_ships() -> None:
    weights = hash_weights(CHECKPOINT)
    assert weights in README
    figures = json.loads((ROOT / "figures" / "summary.json").read_text(encoding="utf-8"))
    from fusion_lens.identity import identify
    from fusion_lens.models import load_model

    assert identify(load_model()).weights == figures["provenance"]["weights_sha256"]


def test_every_link_to_a_file_leads_somewhere() -> None:
    links = re.findall(r"\]\((?!http|#)([^)#]+)", README)
    assert len(links) >= 5
    assert [link for link in links if not (ROOT / link).exists()] == []

"""Every family at every stage; what a cell does is in `families`."""

from __future__ import annotations

import pytest
from families import EXPLAINED, FAMILIES, STAGES, TABLE, with_table

CELLS = [(name, stage) for name in FAMILIES for stage in STAGES]
MUST_PASS = ("gpt2", "gpt_neox", "llama", "qwen3", "gemma2", "gemma3")

seen: dict[tuple[str, str], str | None] = {}


@pytest.mark.parametrize(("name", "stage"), CELLS)
def test_a_family_passes_a_stage_or_says_why_not(name: str, stage: str) -> None:
    outcome = STAGES[stage](name)
    expected = EXPLAINED.get((name, stage))
    assert (outcome is None) == (expected is None), outcome
    assert (outcome or "").startswith(expected or "")
    seen[name, stage] = outcome


def test_the_families_that_must_pass_have_nothing_to_explain() -> None:
    assert {name for name, _ in EXPLAINED}.isdisjoint(MUST_PASS)
    assert {*MUST_PASS} <= FAMILIES.keys()


def test_the_table_of_the_page_is_what_the_cells_gave() -> None:
    if len(seen) < len(CELLS):
        pytest.skip("not every cell was run here")
    page = TABLE.read_text("utf-8")
    assert with_table(page, seen) == page

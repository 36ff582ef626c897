from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import prompts_of, strong_plan
from test_attribution import WRITTEN, linear

from fusion_lens.attribution import Attribution, attribute, effects_between
from fusion_lens.feature_report import (
    coding_table,
    compare_features,
    difference_table,
)
from fusion_lens.models import HookedModel
from fusion_lens.teacher_forcing import Text

DICTIONARIES = [linear((layer,), 32, 20, f"sae {layer}") for layer in (0, 1, 3)]


@pytest.fixture(scope="module")
def two(tiny: HookedModel) -> list[Attribution]:
    """Two plans of which the second is twice the first, on one text."""
    prompt = prompts_of(tiny)[0]
    plans = (strong_plan(tiny), strong_plan(tiny, 2.0))
    return attribute(tiny, DICTIONARIES, [Text(prompt, WRITTEN, plan) for plan in plans])


def test_the_table_holds_layer_feature_effect_share_and_label(two: list[Attribution]) -> None:
    first = two[0].top(1)[0]
    labels = {first.dictionary: {first.feature: "a river"}}
    table = two[0].table(2, labels)
    assert table.header == ("layer", "feature", "effect", "share", "label")
    assert first.share is not None
    assert table.rows[0] == (
        str(first.layer),
        str(first.feature),
        f"{first.effect:+.3f}",
        f"{first.share:+.1%}",
        "a river",
    )
    assert len(table.rows) == 2


def test_a_dictionary_of_several_layers_stands_for_all_of_them() -> None:
    x = torch.randn(2, 2, 32)
    effects = effects_between(linear((0, 3), 32, 4), x, x + 1.0)
    found = Attribution((effects,), ("a", "b"), (True, True), ())
    assert found.table(1).rows[0][0] == "all"


def test_a_change_of_nothing_has_no_share_in_the_table() -> None:
    x = torch.randn(2, 1, 32)
    found = Attribution((effects_between(DICTIONARIES[0], x, x),), ("a", "b"), (True, True), ())
    assert found.table(1).rows[0][3] == "-"


def test_lines_tell_what_each_dictionary_and_all_together_leave_out(
    two: list[Attribution],
) -> None:
    lines = two[0].left_out()
    assert len(lines) == 5
    error = two[0].effects[0].relative_error
    assert lines[0].startswith("sae 0: 20 features active; of a change of norm ")
    assert f"relative error {error:.2f}" in lines[0]
    assert lines[3].startswith(f"all: relative error {two[0].relative_error:.2f}")
    assert lines[4] == "not covered: layers 2"
    effects = two[0].effects[0]
    card = replace(effects.card, neuronpedia_id="tiny/1-res", notes=("a note",))
    named = replace(two[0], effects=(replace(effects, card=card),))
    assert named.left_out()[0].endswith(
        "; a note; its features' pages: https://www.neuronpedia.org/tiny/1-res/N"
    )


def test_two_plans_are_compared_feature_by_feature_the_largest_difference_first(
    two: list[Attribution],
) -> None:
    pairs = compare_features(*two)
    assert len(pairs) == 60
    for _, first, second in pairs:
        assert second == pytest.approx(2.0 * first, abs=2e-3)
    differences = [abs(second - first) for _, first, second in pairs]
    assert differences == sorted(differences, reverse=True)
    table = difference_table(*two, ("one", "other"), 3)
    assert table.header[2:5] == ("one", "other", "difference")
    assert table.rows[0][4] == f"{pairs[0][2] - pairs[0][1]:+.3f}"


def test_a_feature_that_only_one_plan_moves_has_no_effect_in_the_other(
    two: list[Attribution],
) -> None:
    effects = two[0].effects[0]
    fewer = replace(
        effects,
        features=effects.features[1:],
        token_effects=effects.token_effects[:, 1:],
        weights=effects.weights[1:],
        directions=effects.directions[1:],
    )
    other = replace(two[0], effects=(fewer, *two[0].effects[1:]))
    (lost,) = (pair for pair in compare_features(two[0], other) if pair[1] != pair[2])
    assert (lost[0].feature, lost[2]) == (effects.features[0], 0.0)


def test_coding_gives_the_change_back_as_directions(two: list[Attribution]) -> None:
    table = coding_table(two[0], DICTIONARIES, 2)
    assert table.header == ("layer", "feature", "weight", "error left", "label")
    assert [row[0] for row in table.rows] == ["0", "0", "1", "1", "3", "3"]
    # orthonormal directions: the largest effect is the first direction, and its own weight
    for n, effects in enumerate(two[0].effects):
        top = effects.top(1)[0]
        assert table.rows[2 * n][1] == str(top.feature)
        assert float(table.rows[2 * n][2]) == pytest.approx(top.effect, abs=2e-3)

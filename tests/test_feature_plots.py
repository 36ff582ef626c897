from __future__ import annotations

import pytest
import torch
from conftest import prompts_of, strong_plan
from test_attribution import WRITTEN, linear

from fusion_lens.attribution import Attribution, FeatureEffect, attribute
from fusion_lens.faithfulness import Faithfulness, Gain
from fusion_lens.feature_plots import (
    feature_name,
    plot_faithfulness,
    plot_layer_features,
    plot_token_features,
    plot_top_features,
    visible,
)
from fusion_lens.models import HookedModel
from fusion_lens.teacher_forcing import Text

TWO = linear((0, 3), 32, 40, "two")


@pytest.fixture(scope="module")
def saes(tiny: HookedModel) -> Attribution:
    dictionaries = [linear((layer,), 32, 20, f"sae {layer}") for layer in (0, 1, 3)]
    text = Text(prompts_of(tiny)[0], WRITTEN, strong_plan(tiny))
    return attribute(tiny, dictionaries, [text])[0]


@pytest.fixture(scope="module")
def crosscoder(tiny: HookedModel) -> Attribution:
    text = Text(prompts_of(tiny)[0], WRITTEN, strong_plan(tiny))
    return attribute(tiny, [TWO], [text])[0]


def test_bars_are_the_top_features_by_sign_and_the_error_below_them(saes: Attribution) -> None:
    figure = plot_top_features(saes, 5, {"sae 1": dict.fromkeys(range(20), "river")})
    (bars,) = figure.figure.data
    top = saes.top(5)
    assert list(bars.x[:5]) == [each.effect for each in top]
    error = torch.cat([each.error.flatten() for each in saes.effects]).norm()
    assert bars.x[5] == pytest.approx(float(error))
    colours = ["#0072b2" if each.effect > 0 else "#d55e00" for each in top]
    assert list(bars.marker.color) == [*colours, "#8c8c8c"]
    axis = figure.figure.layout.yaxis
    assert bars.y == axis.tickvals == (0, 1, 2, 3, 4, 5)
    assert axis.ticktext == bars.hovertext
    assert axis.ticktext[5] == "norm of the error, in no feature"
    for name, each in zip(axis.ticktext, top, strict=False):
        label = " river" if each.dictionary == "sae 1" else ""
        assert name == f"L{each.layer} #{each.feature}{label}"
    assert figure.title == "Features of the injected change, effect in residual units"
    assert figure.figure.layout.title.subtitle.text == (
        f"relative error {saes.relative_error:.2f}, cosine {saes.cosine:.2f}; means over "
        f"n = {sum(saes.counted)} tokens; layers without a dictionary: 2"
    )
    assert [row[2] for row in figure.rows] == [each.feature for each in top]


def test_a_layers_row_of_saes_are_its_own_largest_features_by_rank(saes: Attribution) -> None:
    figure = plot_layer_features(saes, 3).figure
    (grid,) = figure.data
    assert list(grid.y) == ["layer 0", "layer 1", "layer 3"]
    assert grid.x == figure.layout.xaxis.tickvals
    assert figure.layout.xaxis.ticktext == ("rank 1", "rank 2", "rank 3")
    for row, effects in zip(grid.z, saes.effects, strict=True):
        assert list(row) == [each.effect for each in effects.top(3)]
    # white is 0
    assert grid.zmin == -grid.zmax


def test_a_layers_row_of_a_crosscoder_is_each_features_part_there(crosscoder: Attribution) -> None:
    figure = plot_layer_features(crosscoder, 4).figure
    (grid,) = figure.data
    effects = crosscoder.effects[0]
    top = crosscoder.top(4)
    assert list(grid.y) == ["layer 0", "layer 3"]
    assert list(figure.layout.xaxis.ticktext) == [f"#{each.feature}" for each in top]
    for column, each in enumerate(top):
        part = effects.contributions[effects.place(each.feature)].norm(dim=-1)
        assert [abs(row[column]) for row in grid.z] == pytest.approx(part.tolist(), rel=1e-4)


def test_every_token_has_a_readable_tick_and_its_own_effects(crosscoder: Attribution) -> None:
    figure = plot_token_features(crosscoder, 3)
    (grid,) = figure.figure.data
    ticks = figure.figure.layout.yaxis.ticktext
    assert len(ticks) == len(crosscoder.str_tokens)
    assert ticks[0] == f"({visible(crosscoder.str_tokens[0])})"
    counted = [not tick.startswith("(") for tick in ticks]
    assert counted == list(crosscoder.counted)
    effects = crosscoder.effects[0]
    for column, each in zip(zip(*grid.z, strict=True), crosscoder.top(3), strict=True):
        assert list(column) == effects.token_effects[:, effects.place(each.feature)].tolist()


def test_tokens_show_white_space_and_are_no_html() -> None:
    assert visible(" a\n\t<b>&") == "·a⏎⇥&lt;b&gt;&amp;"
    assert visible("x" * 200) == f"{'x' * 16}…{'x' * 7}"


def test_a_long_label_is_cut() -> None:
    each = FeatureEffect("one", 3, 7, 1.0, 0.5, "x" * 60)
    assert feature_name(each) == f"L3 #7 {'x' * 43}…"
    assert feature_name(FeatureEffect("two", None, 7, 1.0, 0.5)) == "#7"
    assert feature_name(FeatureEffect("two", None, 7, 1.0, 0.5, "<b>")) == "#7 &lt;b&gt;"


def test_the_curve_has_a_point_per_k_with_its_interval_and_lines_for_the_parts() -> None:
    gains = [
        Gain(name, name, "question", part, k, value + extra)
        for name, extra in (("a", 0.0), ("b", 1.0), ("c", 2.0))
        for part, k, value in (
            ("full", 0, 8.0),
            ("error", 0, -1.0),
            ("without error", 0, 7.0),
            ("top", 1, 2.0),
            ("top", 10, 6.0),
            ("random", 1, 0.0),
            ("random", 10, 1.0),
        )
    ]
    figure = plot_faithfulness(Faithfulness(tuple(gains), {}, {}))
    top, by_chance, full, without, error = figure.figure.data
    assert (list(top.x), list(top.y)) == ([1, 10], pytest.approx([3.0, 7.0]))
    assert list(by_chance.y) == pytest.approx([1.0, 2.0])
    assert [list(line.y) for line in (full, without, error)] == [[9.0] * 2, [8.0] * 2, [0.0] * 2]
    assert all(reach > 0 for reach in (*top.error_y.array, *top.error_y.arrayminus))
    assert figure.title == "Log-probability of the gold answer after the question"
    subtitle = figure.figure.layout.title.subtitle.text
    assert subtitle == "n = 3 questions, 95 % cluster bootstrap"
    assert figure.rows[0][:3] == ("top", 1, pytest.approx(3.0))

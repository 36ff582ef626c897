"""What every figure of the package has to keep: readable, named, told apart, and safe to draw."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from html import unescape
from typing import Any

import pytest
import torch
from records import (
    LOVELACE,
    Toy,
    arm,
    comparison,
    deltas,
    detail,
    interval,
    make_results,
    searched,
    tuned,
)
from test_attribution import linear
from test_front_plots import bench_of, curve_of
from test_suggestion_plots import swept

import fusion_lens.plots as plots
from fusion_lens.attribution import Attribution, effects_between
from fusion_lens.deltas import Deltas
from fusion_lens.details import Marked, Trace
from fusion_lens.faithfulness import Faithfulness, Gain
from fusion_lens.logit_lens import Lens
from fusion_lens.pictures import PAPER, Figure
from fusion_lens.plots import (
    plot_coeffs,
    plot_delta_norms,
    plot_differences,
    plot_faithfulness,
    plot_front,
    plot_fronts,
    plot_gate,
    plot_generic_share,
    plot_importance,
    plot_layer_cosines,
    plot_layer_features,
    plot_logit_lens,
    plot_norm_map,
    plot_question_cosines,
    plot_reach,
    plot_scores,
    plot_search,
    plot_suggestion,
    plot_token_features,
    plot_token_shifts,
    plot_tokens,
    plot_top_features,
    plot_units,
    plot_units_curve,
    run_figures,
)
from fusion_lens.run_plots import ARM_COLOURS
from fusion_lens.units import consistent, unit_mask

HOSTILE = (
    "<script>alert(1)</script>",
    "<b>",
    '<a href="javascript:alert(1)">x</a>',
    "&lt;i&gt; $x$ $",
)
Make = Callable[[tuple[str, ...]], Figure]


def many_deltas(names: tuple[str, ...], layers: int = 3) -> dict[str, Deltas]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: deltas(
            torch.randn(layers, 8, generator=generator),
            base=torch.randn(layers, 8, generator=generator),
        )
        for name in names
    }


def attribution(names: tuple[str, ...], layers: tuple[tuple[int, ...], ...]) -> Attribution:
    """Of four tokens, in a dictionary for every group of layers."""
    generator = torch.Generator().manual_seed(0)
    effects = []
    for own in layers:
        dictionary = linear(own, 8, 5, f"dictionary {own[0]}")
        x = torch.randn(4, len(own), 8, generator=generator)
        y = torch.randn(4, len(own), 8, generator=generator)
        effects.append(effects_between(dictionary, x, y))
    return Attribution(tuple(effects), names[:4], (False, True, True, True), (9,))


def labelled(names: tuple[str, ...]) -> dict[str, dict[int, str]]:
    return {f"dictionary {layer}": dict(enumerate((*names, "x"))) for layer in range(4)}


def search(names: tuple[str, ...]) -> Any:
    return searched(
        lambda coeffs: Toy(
            round(-abs(next(iter(coeffs.values())) - 1), 6),
            round(sum(coeffs.values()) / 9, 6),
            1 + sum(coeffs.values()),
        ),
        names,
        trials=12,
    )


def lens(names: tuple[str, ...], shift: float) -> Lens:
    log_probs = -torch.arange(5.0, 0.0, -1.0)[:, None].repeat(1, len(names)) - shift
    return Lens(log_probs, (-log_probs * 10).long(), names)


def gains(place: str) -> Faithfulness:
    parts = (("full", 0), ("error", 0), ("without error", 0))
    parts += tuple((part, k) for part in ("top", "random") for k in (1, 3, 10))
    made = [
        Gain(question, question, place, part, k, 1.0 + k + n)
        for n, question in enumerate("abc")
        for part, k in parts
    ]
    return Faithfulness(tuple(made), {}, {})


def trace(names: tuple[str, ...], name: str) -> Trace:
    unsteered = tuple(-float(i) for i in range(len(names)))
    return Trace(name, names, (-1.0,) * len(names), unsteered)


def coefficients(names: tuple[str, ...]) -> Figure:
    records = [
        replace(tuned(f"q{i}", 0.0, 0.0), arm=name, coeffs={name: 0.5 * i, "late": 1.0})
        for name in names
        for i in range(3)
    ]
    arms = {name: {"zero_won": 0.25, "tied": 0.5} for name in names}
    return plot_coeffs(records, arms)


def units(names: tuple[str, ...], k: int, *, told: bool = True) -> Figure:
    found = consistent(list(many_deltas(names).values()))
    return plot_units(unit_mask(found.ranking, k, (3, 8)), found if told else None)


def gate(names: tuple[str, ...]) -> Figure:
    """Of three layers, one closed, with the first token left alone."""
    g = torch.linspace(0.0, 1.0, 3 * len(names)).view(3, len(names))
    g[:, 0] = g[1] = torch.nan
    return plot_gate(g, names, 2, title=names[-1])


ONE, CROSS = ((0,), (1,), (2,)), ((0, 1), (2, 3))
MAKERS: dict[str, Make] = {
    "delta_norms": lambda names: plot_delta_norms(many_deltas(names)),
    "delta_norms of one": lambda names: plot_delta_norms(many_deltas(names[:1])),
    "norm_map": lambda names: plot_norm_map(many_deltas(names)),
    "layer_cosines": lambda names: plot_layer_cosines(many_deltas(names)),
    "question_cosines": lambda names: plot_question_cosines(many_deltas(names)),
    "generic_share": lambda names: plot_generic_share(many_deltas(names)),
    "search": lambda names: plot_search(search(names)),
    "front": lambda names: plot_front(search(names)),
    "importance": lambda names: plot_importance(search(names)),
    "suggestion": lambda names: plot_suggestion(swept(names)),
    "tokens": lambda names: plot_tokens(Marked(names, (0,)), Marked(names[::-1], (1,))),
    "token_shifts": lambda names: plot_token_shifts([trace(names, name) for name in names]),
    "logit_lens": lambda names: plot_logit_lens([lens(names, 1.0)], [lens(names, 0.0)]),
    "logit_lens of two": lambda names: plot_logit_lens(
        [lens(names, 1.0), lens(names, 2.0)], [lens(names, 0.0), lens(names, 0.5)]
    ),
    "scores": lambda names: plot_scores({name: arm() for name in names}),
    "reach": lambda names: plot_reach({name: arm() for name in names}),
    "differences": lambda names: plot_differences(
        [comparison(name, "overlap", 0.125, a=names[0]) for name in names[1:]]
    ),
    "coeffs": coefficients,
    "top_features": lambda names: plot_top_features(attribution(names, ONE), 5, labelled(names)),
    "layer_features": lambda names: plot_layer_features(
        attribution(names, CROSS), 5, labelled(names)
    ),
    "layer_features of SAEs": lambda names: plot_layer_features(
        attribution(names, ONE), 5, labelled(names)
    ),
    "token_features": lambda names: plot_token_features(
        attribution(names, ONE), 5, labelled(names)
    ),
    "units": lambda names: units(names, 5),
    "units of all": lambda names: units(names, 24),
    "units without momenta": lambda names: units(names, 5, told=False),
    "gate": gate,
    "fronts": lambda names: plot_fronts(bench_of(names, ("", "dsas", "permuted", "constant"))),
    "fronts of one": lambda names: plot_fronts(bench_of(names[:1], ("",))),
    "fronts of twelve": lambda names: plot_fronts(
        bench_of([f"{name}{n}" for n in range(3) for name in names], ("", "dsas"))
    ),
    "units_curve": lambda names: plot_units_curve(curve_of(names), y=names[0]),
    "faithfulness_question": lambda _: plot_faithfulness(gains("question")),
}
SUMMARISING = {name for name in MAKERS if name not in ("tokens", "search")}
PLAIN = ("lovelace", "harris", "full", "segmented")


@pytest.fixture(scope="module")
def figures() -> dict[str, Figure]:
    return {name: make(PLAIN) for name, make in MAKERS.items()}


@pytest.fixture(scope="module")
def hostile() -> dict[str, Figure]:
    return {name: make(HOSTILE) for name, make in MAKERS.items()}


def spec(figure: Figure, look: str = "light") -> dict[str, Any]:
    """As plotly draws it."""
    return json.loads(figure.look(look).to_json())


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in it that is no container, with the keys that lead to it."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        at = f"{path}.{key}"
        if isinstance(inner, dict | list):
            yield from leaves(inner, at)
        else:
            yield at, inner


def test_every_figure_function_is_among_those_looked_at() -> None:
    made = {name.split(" ")[0] for name in MAKERS}
    functions = {name.removeprefix("plot_") for name in dir(plots) if name.startswith("plot_")}
    assert {name.removesuffix("_question") for name in made} == functions


def test_a_figure_is_named_after_its_function(figures: dict[str, Figure]) -> None:
    for name, figure in figures.items():
        assert figure.name == name.split(" ")[0]


@pytest.mark.parametrize("name", MAKERS)
def test_nothing_is_written_smaller_than_eleven_pixels(
    name: str, figures: dict[str, Figure], hostile: dict[str, Figure]
) -> None:
    for figure in (figures[name], hostile[name]):
        drawn = spec(figure)
        sizes = {
            at: value for at, value in leaves(drawn) if re.search(r"font\w*\.size$|font_size$", at)
        }
        assert {".layout.title.font.size", ".layout.font.size"} <= sizes.keys()
        if "subtitle" in drawn["layout"]["title"]:
            assert ".layout.title.subtitle.font.size" in sizes
        for number, _ in enumerate(drawn["layout"].get("annotations", ())):
            assert f".layout.annotations.{number}.font.size" in sizes
        assert min(sizes.values()) >= 11, sizes
        assert not [at for at, value in leaves(drawn) if re.search("<su[bp]", str(value))]
        # plotly writes these smaller than the layout's font where nothing is said
        minor = [
            axis
            for key, axis in drawn["layout"].items()
            if key[1:].startswith("axis") and axis.get("type") == "log"
        ]
        assert all("tickvals" in axis for axis in minor)


@pytest.mark.parametrize("name", MAKERS)
def test_title_subtitle_and_axes_say_what_is_shown(name: str, figures: dict[str, Figure]) -> None:
    figure = figures[name]
    layout = figure.figure.layout
    assert layout.width == 800
    assert 200 <= layout.height <= 800
    assert figure.title
    told = layout.title.subtitle.text
    headings = [note.text for note in layout.annotations]
    if name in SUMMARISING:
        assert re.search(r"\bn = \d", " ".join([told, *headings])), told
    if re.split("[_ ]", name)[0] in ("scores", "reach", "differences", "faithfulness", "fronts"):
        assert "95 % cluster bootstrap" in told
    for key in layout:
        axis = layout[key] if key[1:].startswith("axis") else None
        if axis is None or axis.visible is False or axis.showticklabels is False:
            continue
        own = [each for each in figure.figure.data if axis_of(each, key[0]) == key]
        # boxes may be given by their quantiles, without values
        given = [each[key[0]] for each in own if each[key[0]] is not None]
        values = [value for some in given for value in some if value is not None]
        named = axis.ticktext is not None and axis.type != "log"
        if any(isinstance(value, str) for value in values) or named:
            continue
        titled = axis.title.text or any(
            abs(note.x - sum(layout[key].domain) / 2) < 0.01 for note in layout.annotations
        )
        shared = key[0] == "y" and (axis.matches is not None or layout.annotations)
        assert titled or shared, key


def axis_of(trace: Any, letter: str) -> str:
    """The layout's key of the axis that a trace is drawn on."""
    return f"{letter}axis" + (trace[f"{letter}axis"] or letter).removeprefix(letter)


@pytest.mark.parametrize("name", MAKERS)
def test_hostile_text_is_escaped_wherever_plotly_would_read_it(
    name: str, hostile: dict[str, Figure]
) -> None:
    drawn = spec(hostile[name])
    found = ""
    for at, value in leaves(drawn):
        if not isinstance(value, str) or "template" in at:
            continue
        found += unescape(value)
        # of markup there is the line break between two names
        bare = value.replace("<br>", "")
        assert "<" not in bare, (at, value)
        assert ">" not in bare, (at, value)
        # no half an entity, and no dollars that MathJax would take for LaTeX
        assert re.search(r"&(?!(amp|lt|gt|#36);)", value) is None, (at, value)
        assert "$" not in value, (at, value)
    # escaped, not dropped; one line's ids are of no use where nobody is named
    if name == "units_curve" or re.split("[_ ]", name)[0] not in (
        "faithfulness",
        "layer",
        "generic",
        "front",
        "logit",
        "units",
    ):
        assert "<script>" in found.replace("·", " ")
    for axis in (value for key, value in drawn["layout"].items() if key[1:].startswith("axis")):
        categories = axis.get("categoryarray")
        if categories is not None:
            letter = "y"
            used = {value for each in drawn["data"] for value in each[letter]}
            assert used <= set(categories)
            assert set(axis.get("tickvals", categories)) == set(categories)


@pytest.mark.parametrize("name", MAKERS)
def test_a_look_changes_the_paper_and_no_data(name: str, figures: dict[str, Figure]) -> None:
    figure = figures[name].figure
    before = figure.to_json()
    dark = figures[name].look("dark")
    assert dark.data == figure.data
    assert dark.layout.paper_bgcolor == dark.layout.plot_bgcolor == "#16181d"
    assert dark.layout.title == figure.layout.title
    assert figure.to_json() == before


@pytest.mark.parametrize("name", MAKERS)
def test_data_and_figure_are_json_without_nan(
    name: str, figures: dict[str, Figure], hostile: dict[str, Figure]
) -> None:
    for figure in (figures[name], hostile[name]):
        content = json.loads(json.dumps(figure.to_dict(), allow_nan=False))
        assert content["columns"] == list(figure.columns)
        assert len(content["rows"]) == len(figure.rows) > 0
        assert {len(row) for row in content["rows"]} == {len(figure.columns)}
        json.dumps(json.loads(figure.figure.to_json()), allow_nan=False)


# colours


def rgb(colour: str) -> tuple[list[float], float]:
    """Red, green and blue in [0, 1], and how opaque."""
    if colour.startswith("#"):
        return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)], 1.0
    parts = [float(part) for part in re.findall(r"[\d.]+", colour)]
    return [part / 255 for part in parts[:3]], parts[3] if len(parts) > 3 else 1.0


def luminance(parts: list[float]) -> float:
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(share * p for share, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(colour: str, other: str, opacity: float = 1.0) -> float:
    """WCAG 2.1 of a colour, as see-through as it is, on another."""
    (top, alpha), (below, _) = rgb(colour), rgb(other)
    alpha *= opacity
    mixed = [alpha * a + (1 - alpha) * b for a, b in zip(top, below, strict=True)]
    dark, light = sorted((luminance(mixed), luminance(below)))
    return (light + 0.05) / (dark + 0.05)


def test_the_contrast_of_black_on_white_is_21() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


def colours_of(figure: Figure) -> Iterator[tuple[str, float]]:
    for each in spec(figure)["data"]:
        marker, line = each.get("marker", {}), each.get("line", {})
        own = marker.get("color", ())
        opacity = marker.get("opacity", 1.0) * each.get("opacity", 1.0)
        for colour in [own] if isinstance(own, str) else own:
            if isinstance(colour, str):
                yield colour, opacity
        # a faint line per question is a texture; what is read is the median over it
        faint = line.get("color", "").startswith("rgba(128,128,128,")
        band = each.get("hoverinfo") == "skip" and line.get("width") == 0
        texture = figure.name == "delta_norms" and (faint or band)
        if "lines" in each.get("mode", "") and not texture:
            yield line.get("color", marker.get("color")), each.get("opacity", 1.0)


@pytest.mark.parametrize("paper", PAPER.values())
def test_whatever_is_drawn_stands_out_from_both_papers(
    paper: str, figures: dict[str, Figure]
) -> None:
    used = {pair for figure in figures.values() for pair in colours_of(figure)}
    used |= {(colour, 1.0) for colour in ARM_COLOURS.values()}
    assert len(used) >= len(ARM_COLOURS)
    poor = {pair: contrast(pair[0], paper, pair[1]) for pair in used}
    assert {pair: value for pair, value in poor.items() if value < 3} == {}


def test_the_ink_of_a_tile_is_readable_on_every_colour_a_tile_has() -> None:
    moved = Trace("x", ("a",) * 41, (0.0,) * 41, tuple(i / 2 - 10 for i in range(41)))
    shown = plot_token_shifts([moved]).figure
    marks = plot_tokens(Marked(("a", "b"), (0,)), Marked(("a", "b"), (0,))).figure
    for figure in (shown, marks):
        ink = figure.data[0].textfont.color
        tiles = [shape.fillcolor for shape in figure.layout.shapes]
        assert min(contrast(ink, tile) for tile in tiles) >= 4.5
    assert len({shape.fillcolor for shape in shown.layout.shapes}) == 41


# sizes


def test_a_run_of_a_thousand_questions_stays_small() -> None:
    records = tuple(
        replace(tuned(f"q{i}", 0.0, 0.0), coeffs={f"layer_{n}": 0.5 for n in range(26)})
        for i in range(1000)
    )
    figure = plot_coeffs(records, make_results().summary["arms"])
    boxes = figure.figure.data
    assert {box.boxpoints for box in boxes} == {False}
    assert len(boxes) == 26
    assert figure.figure.layout.height == 190 + 26 * 26
    kept = tuple(detail(f"q{i}", (1.0,) * 26) for i in range(1000))
    results = replace(make_results(), details=kept)
    made = {figure.name: figure for figure in run_figures(results)}
    assert len(made["delta_norms"].figure.data) == 6
    assert len(made["norm_map"].figure.data) == 1
    assert len(made["generic_share"].figure.data) == 26
    assert all(figure.figure.layout.height <= 720 for figure in made.values())


@pytest.mark.parametrize("n", [1, 2])
def test_one_question_of_one_layer_is_drawn(n: int) -> None:
    few = many_deltas(PLAIN[:n], layers=1)
    for plot in (plot_delta_norms, plot_norm_map, plot_layer_cosines):
        assert len(plot(few).rows) in (1, n)
    (cell,) = plot_layer_cosines(few).rows
    assert cell == (0, 0, pytest.approx(1.0))


def test_equal_values_have_a_scale_and_axes_all_the_same() -> None:
    same = {name: deltas([[2.0, 0.0]] * 3, base=[[1.0, 0.0]] * 3) for name in PLAIN}
    (grid,) = plot_norm_map(same).figure.data
    assert list(grid.z) == [[2.0] * 3] * 4
    # a change of nothing: no share, no effect, and a scale all the same
    nothing = torch.zeros(2, 1, 8)
    effects = effects_between(linear((0,), 8, 5, "dictionary 0"), nothing, nothing)
    none = Attribution((effects,), ("a", "b"), (True, True), ())
    for plot in (plot_top_features, plot_layer_features, plot_token_features):
        json.dumps(plot(none).to_dict(), allow_nan=False)
    ones = torch.ones(2, 1, 8)
    still = replace(effects_between(linear((0,), 8, 5, "dictionary 0"), ones, ones))
    (grid,) = plot_token_features(Attribution((still,), ("a", "b"), (True, True), ())).figure.data
    assert (grid.zmin, grid.zmax) == (-1.0, 1.0)


def test_an_arm_or_a_segment_may_be_named_by_a_number() -> None:
    for figure in (
        plot_scores({"1": arm(), "20": arm()}),
        plot_differences([comparison("1", "overlap", 0.5), comparison("20", "overlap", 0.25)]),
        plot_importance(search(("1", "20"))),
        coefficients(("1", "20")),
    ):
        assert {axis.type for axis in figure.figure.select_yaxes()} == {"category"}


def test_features_of_one_number_in_two_dictionaries_keep_a_place_each() -> None:
    found = attribution(PLAIN, CROSS)
    assert {each.feature for each in found.top(10)} == {0, 1, 2, 3, 4}
    (bars,) = plot_top_features(found, 10).figure.data
    assert len(set(bars.y)) == len(bars.y) == 11
    (grid,) = plot_layer_features(found, 10).figure.data
    assert len(grid.x) == 10
    for column in zip(*grid.z, strict=True):
        assert [value is None for value in column] in (
            [False, False, True, True],
            [True, True, False, False],
        )


def test_a_perplexity_of_none_is_left_out_of_scores_and_axis() -> None:
    nothing = interval(None, None, None, 12)
    figure = plot_scores({"full": arm(perplexity=nothing), "random": arm()})
    assert [row[0] for row in figure.rows if row[1] == "perplexity"] == ["random"]
    alone = plot_scores({"full": arm(perplexity=nothing)})
    assert alone.figure.layout.xaxis4.type == "log"
    assert LOVELACE.perplexity == 20.0

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from fusion_lens.details import Marked, Trace
from fusion_lens.errors import ConfigError
from fusion_lens.logit_lens import Lens
from fusion_lens.pictures import Figure
from fusion_lens.token_plots import plot_logit_lens, plot_token_shifts, plot_tokens

TRACE = Trace(
    "segmented", ("Ada", " <b>", "\n", "</s>"), (-1.0, -2.0, -0.5, 0.0), (-3.0, -1.0, 0.0, 0.0)
)


def told(figure: Figure) -> str:
    return figure.figure.layout.title.subtitle.text


def headings(figure: Figure) -> list[str]:
    return [note.text for note in figure.figure.layout.annotations]


def colours(figure: Figure) -> list[str]:
    return [shape.fillcolor for shape in figure.figure.layout.shapes]


def lens(log_probs: list[list[float]], ranks: list[list[int]], *tokens: str) -> Lens:
    return Lens(torch.tensor(log_probs), torch.tensor(ranks), tokens or ("Ada", " L"))


def test_captured_and_steered_tokens_are_coloured_in_their_own_text() -> None:
    captured = Marked(("<s>", "Who", " Ada"), (2,))
    figure = plot_tokens(captured, Marked(("<s>", "Who"), (0, 1)))
    tiles = figure.figure.data[0]
    assert tiles.text == ("&lt;s&gt;", "Who", "·Ada", "&lt;s&gt;", "Who")
    assert colours(figure) == ["#f0f0f0", "#f0f0f0", "#9ecae9", "#fdbe85", "#fdbe85"]
    assert tiles.customdata[1:4] == (
        *("token 1: left alone", "token 2: captured", "token 0: steered"),
    )
    assert told(figure) == "1 token captured, 2 of the prompt steered"
    assert figure.rows == (
        ("captured", 0, "<s>", False),
        ("captured", 1, "Who", False),
        ("captured", 2, " Ada", True),
        ("steered", 0, "<s>", True),
        ("steered", 1, "Who", True),
    )


def test_a_tiles_colour_is_how_far_steering_moved_its_token() -> None:
    figure = plot_token_shifts([TRACE])
    # +2 of at most 2 nats, -1, -0.5, 0; three quarters of blue (0, 114, 178) and orange
    assert colours(figure) == [
        *("rgb(64,149,197)", "rgb(239,195,159)", "rgb(247,225,207)", "rgb(255,255,255)"),
    ]
    tiles, bar = figure.figure.data
    assert tiles.text == ("Ada", "·&lt;b&gt;", "⏎", "&lt;/s&gt;")
    assert tiles.customdata[0] == "steered -1.00, unsteered -3.00: +2.00 nats"
    assert headings(figure) == ["segmented: +0.5 nats over n = 4 tokens"]
    assert figure.rows[1] == ("segmented", 1, " <b>", -2.0, -1.0)
    # the bar shows the tiles' own colours
    assert bar.marker.colorscale == (
        *((0.0, "rgb(224,134,64)"), (0.5, "rgb(255,255,255)"), (1.0, "rgb(64,149,197)")),
    )
    assert (bar.marker.cmin, bar.marker.cmax) == (-2.0, 2.0)


def test_where_nothing_moved_all_tiles_are_white() -> None:
    figure = plot_token_shifts([Trace("full", ("a", "b"), (-1.0, -2.0), (-1.0, -2.0))])
    assert colours(figure) == ["rgb(255,255,255)"] * 2
    assert figure.figure.data[1].marker.cmax == 1.0
    empty = plot_token_shifts([Trace("full", (), (), ())])
    assert headings(empty) == ["full: +0.0 nats over n = 0 tokens"]


def test_no_trace_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        plot_token_shifts([])
    assert str(caught.value) == "there must be at least one trace to show, but got none."


def shown(*tokens: str) -> Figure:
    return plot_tokens(Marked(tokens, ()), Marked((), ()))


ODD = (
    "",
    " ",
    "\n",
    "\r",
    "\u00a0",
    "\u202e",
    "\u2028",
    "שלום",
    "e\u0301",
    "\u0301",
    "日本",
    "x" * 200,
)


def test_every_token_has_a_tile_and_nothing_invisible_in_it() -> None:
    tiles = shown(*ODD).figure.data[0]
    assert tiles.text[:11] == (
        *("", "·", "⏎", "\\r", "\\xa0", "\\u202e", "\\u2028", "שלום", "e\u0301", "\u0301", "日本"),
    )
    # the last goes on in the next lines
    assert "".join(tiles.text[11:]) == "x" * 200
    assert len(tiles.text) == 14
    assert len(set(tiles.y[11:])) == 3


def test_tiles_lie_in_their_lines_do_not_overlap_and_hold_their_tokens() -> None:
    figure = shown(*ODD, *("word", " and", " 日本語") * 50)
    columns = figure.figure.layout.xaxis.range[1]
    lines: dict[float, list[tuple[float, float]]] = {}
    for shape in figure.figure.layout.shapes:
        assert 0 <= shape.x0 < shape.x1 < columns
        lines.setdefault(shape.y1, []).append((shape.x0, shape.x1))
    for tiles in lines.values():
        assert all(a[1] < b[0] for a, b in pairwise(tiles))
    wide = {
        text: shape.x1 - shape.x0
        for text, shape in zip(figure.figure.data[0].text, figure.figure.layout.shapes, strict=True)
    }
    # a letter on either side, in letters; wide characters take two, a combining one none
    assert wide["word"] == 4 + 1.25
    assert wide["日本"] == 4 + 1.25
    assert wide["e\u0301"] == 1 + 1.25
    assert wide[""] == 1 + 1.25
    low, high = figure.figure.layout.yaxis.range
    assert all(low < y < high for y in figure.figure.data[0].y)


def test_a_figure_is_as_high_as_its_lines() -> None:
    one, many = shown("a"), shown(*["word"] * 400)
    n_lines = len({shape.y0 for shape in many.figure.layout.shapes})
    assert n_lines > 20
    assert many.figure.layout.height - one.figure.layout.height == (n_lines - 1) * 30


FLAT = [[-4.0, -2.0], [-1.0, -0.5]]


def test_the_lens_shows_medians_and_quartiles_of_log_p_and_rank() -> None:
    unsteered = [
        lens(FLAT, [[100, 10], [4, 2]]),
        lens([[-6.0, -6.0], [-3.0, -2.0]], [[30, 50], [1, 1]]),
    ]
    steered = [lens(FLAT, [[1, 1], [1, 1]])] * 2
    figure = plot_logit_lens(unsteered, steered)
    log_p, rank = figure.figure.data[:2]
    # per text -3 and -6, -0.75 and -2.5; then the median over the two
    assert (log_p.x, log_p.y) == ((0, 1), (-4.5, -1.625))
    assert log_p.error_y.array == pytest.approx((0.75, 0.4375))
    assert log_p.error_y.arrayminus == pytest.approx((0.75, 0.4375))
    # per text 55 and 40, 3 and 1
    assert (rank.y, rank.error_y.array) == ((47.5, 2.0), (3.75, 0.5))
    assert [trace.name for trace in figure.figure.data] == [
        *("unsteered", "unsteered", "steered", "steered")
    ]
    assert told(figure) == "n = 2 questions, median and quartiles"
    assert figure.columns == (
        *("run", "layer", "log_prob_low", "log_prob_median", "log_prob_high"),
        *("rank_low", "rank_median", "rank_high"),
    )
    assert figure.rows[0] == ("unsteered", 0, -5.25, -4.5, -3.75, 43.75, 47.5, 51.25)
    # from the likeliest down, and no rank below 1
    axis = figure.figure.layout.yaxis2
    assert (axis.type, axis.range) == ("log", (pytest.approx(math.log10(51.25) + 0.1), -0.1))


def test_one_text_has_no_error_bars_and_its_answer_is_named() -> None:
    one = [lens(FLAT, [[1, 1], [1, 1]], "Ada", " <i>")]
    figure = plot_logit_lens(one, one)
    assert not any(trace.error_y.visible for trace in figure.figure.data)
    assert told(figure) == "n = 1 question, its answer: Ada &lt;i&gt;"
    # equal ranks, all 1
    assert figure.figure.layout.yaxis2.range == (0.1, -0.1)
    assert 1.0 in figure.figure.layout.yaxis2.tickvals


def test_lenses_must_be_of_the_same_texts() -> None:
    one = lens(FLAT, [[1, 1], [1, 1]])
    other = lens(FLAT, [[1, 1], [1, 1]], "x", "y")
    for sides in (([], []), ([one], [other]), ([one], [one, one])):
        with pytest.raises(ConfigError) as caught:
            plot_logit_lens(*sides)
        assert str(caught.value) == (
            "the unsteered and the steered lenses must be of the same texts, at least one."
        )

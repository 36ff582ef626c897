from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import plotly.graph_objects as go
import pytest
from records import arm, make_results

from fusion_lens import pictures
from fusion_lens.errors import ConfigError, OutputError
from fusion_lens.pictures import (
    Figure,
    centred,
    error_bars,
    logarithmic,
    number_of,
    plain,
    shortened,
    visible,
    with_zero,
    write_figures,
)
from fusion_lens.run_plots import plot_scores, run_figures

NAMES = ("scores", "reach", "coeffs", "delta_norms", "norm_map", "generic_share")


@pytest.fixture
def no_chromium(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)


@pytest.mark.usefixtures("no_chromium")
def test_pages_share_one_plotly_and_open_offline(tmp_path: Path) -> None:
    write_figures(run_figures(make_results()), tmp_path / "a" / "figures")
    names = sorted(path.name for path in (tmp_path / "a" / "figures").iterdir())
    assert names == sorted([*(f"{name}.html" for name in NAMES), "plotly.min.js"])
    page = (tmp_path / "a" / "figures" / "scores.html").read_text(encoding="utf-8")
    assert 'src="plotly.min.js"' in page
    assert "cdn.plot.ly" not in page
    assert len(page) < 100_000


@pytest.mark.usefixtures("no_chromium")
def test_the_rows_shown_lie_beside_each_picture_on_request(tmp_path: Path) -> None:
    figures = run_figures(make_results())
    write_figures(figures, tmp_path, html=False, data=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{name}.json" for name in NAMES
    )
    for figure in figures:
        content = json.loads((tmp_path / f"{figure.name}.json").read_text(encoding="utf-8"))
        assert content["title"] == figure.title
        assert tuple(content["columns"]) == figure.columns
        assert tuple(map(tuple, content["rows"])) == figure.rows


@pytest.mark.usefixtures("no_chromium")
def test_without_a_chromium_the_reason_is_given_and_the_pages_are_written(tmp_path: Path) -> None:
    assert write_figures(run_figures(make_results()), tmp_path) == (
        "no PNG figures: no Chromium was found (Debian: apt-get install chromium)"
    )
    assert (tmp_path / "scores.html").is_file()
    assert not list(tmp_path.glob("*.png"))


def test_without_kaleido_the_reason_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    assert write_figures(run_figures(make_results()), tmp_path, html=False) == (
        "no PNG figures: kaleido is not installed (pip install 'fusion-lens[png]')"
    )


def test_pictures_are_written_where_a_chromium_is_found(tmp_path: Path) -> None:
    pytest.importorskip("kaleido")
    if not any(shutil.which(name) for name in pictures._CHROMIUM):
        pytest.skip("no Chromium")
    figure = plot_scores({"full": arm()})
    assert write_figures([figure], tmp_path, html=False) is None
    head = (tmp_path / "scores.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert figure.figure.layout.height == 180 + 34  # one arm
    # 800 px wide, at scale 2
    assert [int.from_bytes(head[i : i + 4]) for i in (16, 20)] == [1600, 2 * (180 + 34)]


def test_a_browser_that_does_not_start_is_a_reason_not_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("kaleido")
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/false")
    monkeypatch.setenv("BROWSER_PATH", "/bin/false")
    reason = write_figures(run_figures(make_results()), tmp_path)
    assert reason is not None
    assert reason.startswith("no PNG figures: the browser failed (BrowserFailedError: ")
    assert (tmp_path / "scores.html").is_file()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "figures"
    with pytest.raises(OutputError) as caught:
        write_figures(run_figures(make_results()), place)
    assert str(caught.value) == (
        f"{place} must be writable, but got: Not a directory; choose another place."
    )


def test_an_unknown_look_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        plot_scores({"full": arm()}).look("sepia")
    assert str(caught.value) == "look must be one of light, dark, but got 'sepia'."


def test_what_is_no_finite_number_is_null_in_the_data() -> None:
    rows = ((1, math.inf, "inf"), (2, math.nan, None), (3, -math.inf, True))
    figure = Figure("x", go.Figure(layout={"title": "A"}), ("n", "value", "more"), rows)
    assert figure.to_dict() == {
        "title": "A",
        "columns": ["n", "value", "more"],
        "rows": [[1, None, "inf"], [2, None, None], [3, None, True]],
    }


def test_plain_text_is_neither_markup_nor_mathematics() -> None:
    assert plain('<b title="x">$1 & $2</b>') == ('&lt;b title="x"&gt;&#36;1 &amp; &#36;2&lt;/b&gt;')


def test_white_space_has_signs_and_what_has_no_shape_is_escaped() -> None:
    assert visible(" a\n\t") == "·a⏎⇥"
    assert visible("\r\x00\xa0\u200b\u202e\ud800") == r"\r\x00\xa0\u200b\u202e\ud800"
    # joiners shape their neighbours, accents their letter
    assert visible("👩\u200d👧 e\u0301") == "👩\u200d👧·e\u0301"


@pytest.mark.parametrize("most", [2, 3, 10, 24])
def test_names_keep_both_their_ends(most: int) -> None:
    assert shortened("x" * most, most) == "x" * most
    cut = shortened("0123456789" * 9, most)
    assert len(cut) == most
    head, tail = cut.split("…")
    assert ("0123456789" * 9).startswith(head)
    assert ("0123456789" * 9).endswith(tail)


def test_one_is_no_plural() -> None:
    assert [number_of(n, "trial") for n in (0, 1, 2)] == ["0 trials", "1 trial", "2 trials"]


@pytest.mark.parametrize(
    ("values", "inside"),
    [
        ([5.0, 60.0], [5, 10, 20, 30, 50]),
        ([1.0, 30_000.0], [1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000]),
        ([1.0, 1e8], [10.0**n for n in range(9)]),
        ([100.0], [100]),
        ([7.0, 7.0], []),
    ],
    ids=str,
)
def test_a_logarithmic_axis_has_few_ticks_all_in_full(
    values: list[float], inside: list[float]
) -> None:
    axis = logarithmic(values, most=10)
    ticks = axis["tickvals"]
    assert [t for t in ticks if min(values) <= t <= max(values)] == pytest.approx(inside)
    if len(set(values)) == 1:  # plotly widens a range of one value to both sides
        assert min(ticks) < values[0] < max(ticks)
    assert axis["ticktext"] == [f"{tick:,.12g}" for tick in ticks]
    assert "e" not in "".join(axis["ticktext"])


def test_no_value_has_an_axis_all_the_same() -> None:
    axis = logarithmic([])
    assert [t for t in axis["tickvals"] if 1 <= t <= 10] == [1.0, 2.0, 3.0, 5.0, 10.0]


def test_an_axis_with_zero_holds_all_values_and_room() -> None:
    assert with_zero([1.0, 2.0], room=0.25) == [-0.5, 2.5]
    assert with_zero([-1.0], room=0.5) == [-1.5, 0.5]
    assert with_zero([], room=0.5) == with_zero([0.0], room=0.5) == [-1.0, 1.0]


def test_a_scale_is_white_at_zero_and_has_a_width() -> None:
    scale = centred([[1.0, -3.0], [None, 2.0]], "effect")
    assert (scale["zmin"], scale["zmax"]) == (-3.0, 3.0)
    assert scale["colorscale"][1] == [0.5, "#ffffff"]
    for nothing in ([], [[None]], [[0.0, 0.0]]):
        assert (centred(nothing, "x")["zmin"], centred(nothing, "x")["zmax"]) == (-1.0, 1.0)


def test_bars_reach_from_the_mean_to_both_ends() -> None:
    metrics = [
        {"mean": 1.0, "low": 0.5, "high": 3.0},
        {"mean": 1.0, "low": None, "high": None},
    ]
    assert error_bars(metrics) == {"type": "data", "array": [2.0, 0.0], "arrayminus": [0.5, 0.0]}

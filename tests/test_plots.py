from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from records import LOVELACE, arm, interval, make_results, summary, tuned

from fusion_lens import plots
from fusion_lens.errors import OutputError
from fusion_lens.plots import (
    ARM_COLOURS,
    Figure,
    plot_coeffs,
    plot_delta_norms,
    plot_reach,
    plot_scores,
    run_figures,
    write_figures,
)
from fusion_lens.results import Results, Summary


@pytest.fixture
def no_chromium(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)


def traces(figure: Figure, kind: str) -> list:
    return [trace for trace in figure.figure.data if trace.type == kind]


def test_delta_norms_are_a_line_per_question_and_a_box_per_layer() -> None:
    figure = plot_delta_norms({"lovelace": [1.0, 2.0], "harris": [3.0, 5.0]})
    lines, boxes = traces(figure, "scatter"), traces(figure, "box")
    assert {line.name: (list(line.x), list(line.y)) for line in lines} == {
        "lovelace": ([0, 1], [1.0, 2.0]),
        "harris": ([0, 1], [3.0, 5.0]),
    }
    assert [(list(box.x), list(box.y)) for box in boxes] == [
        ([0, 0], [1.0, 3.0]),
        ([1, 1], [2.0, 5.0]),
    ]
    assert figure.figure.layout.title.text == "Delta norm per layer, 2 questions"
    assert figure.columns == ("question_id", "layer", "norm")
    assert figure.rows == (
        ("lovelace", 0, 1.0),
        ("lovelace", 1, 2.0),
        ("harris", 0, 3.0),
        ("harris", 1, 5.0),
    )


def points(figure: Figure) -> dict[tuple[str, str], tuple[float, float, float]]:
    """Mean, and how far the error bar reaches up and down, by arm and axis."""
    return {
        (trace.y[0], trace.xaxis): (
            trace.x[0],
            trace.error_x.array[0],
            trace.error_x.arrayminus[0],
        )
        for trace in traces(figure, "scatter")
    }


def test_points_are_the_means_and_their_errors_reach_the_ends_of_the_intervals() -> None:
    figure = plot_scores({"full": arm()})
    assert points(figure) == {
        ("full", "x"): (0.25, 0.25, 0.25),
        ("full", "x2"): (0.5, 0.25, 0.25),
        ("full", "x3"): (0.3125, 0.1875, 0.375),  # -0.0625 to 0.5
        ("full", "x4"): (12.3, pytest.approx(67.8 - 12.3), pytest.approx(12.3 - 4.5)),
    }
    titles = [note.text for note in figure.figure.layout.annotations]
    assert titles == ["right (exact match)", "overlap with gold", "objective", "perplexity"]
    layout = figure.figure.layout
    assert (layout.xaxis3.type, layout.xaxis4.type) == (None, "log")


def test_the_reach_of_every_arm_is_a_figure_of_its_own() -> None:
    figure = plot_reach({"full": arm(), "random": arm(kl_unrelated=interval(None, None, None))})
    assert points(figure)["full", "x3"] == (0.0625, 0.0625, 0.03125)
    assert ("random", "x3") not in points(figure)
    assert figure.rows[0] == ("full", "transfer_exact_match", 0.125, 0.0, 0.25, 12)
    assert list(figure.figure.layout.yaxis.categoryarray) == ["random", "full"]


def test_each_arm_keeps_its_colour_in_every_figure() -> None:
    results = make_results()
    shown = plot_scores(results.summary["arms"]).figure.data
    colours = {(trace.name, trace.marker.color) for trace in shown}
    assert colours == {(name, ARM_COLOURS[name]) for name in ("baseline", "segmented")}
    boxes = traces(plot_coeffs([tuned("a", 1.0, 0.0)], results.summary["arms"]), "box")
    assert {box.marker.color for box in boxes} == {ARM_COLOURS["segmented"]}


def test_an_unscored_metric_is_not_shown_and_has_no_row() -> None:
    nothing = interval(None, None, None, 12)
    figure = plot_scores({"full": arm(overlap=nothing, perplexity=nothing)})
    assert set(points(figure)) == {("full", "x"), ("full", "x3")}
    assert [row[1] for row in figure.rows] == ["exact_match", "objective"]


def test_a_mean_without_an_interval_has_no_error_bar() -> None:
    shown = points(plot_scores({"full": arm(overlap=interval(0.5, None, None))}))
    assert shown["full", "x2"] == (0.5, 0.0, 0.0)


def test_score_rows_are_the_figures_of_the_summary() -> None:
    figure = plot_scores({"full": arm()})
    assert figure.columns == ("arm", "metric", "mean", "low", "high", "n")
    assert figure.rows == (
        ("full", "exact_match", 0.25, 0.0, 0.5, 12),
        ("full", "overlap", 0.5, 0.25, 0.75, 12),
        ("full", "objective", 0.3125, -0.0625, 0.5, 12),
        ("full", "perplexity", 12.3, 4.5, 67.8, 12),
    )
    assert figure.figure.layout.title.text == (
        "Scores per arm, n = 12 questions, 95 % cluster bootstrap"
    )


def test_boxes_hold_the_chosen_coefficient_of_every_question() -> None:
    results = make_results()
    full = replace(tuned("lovelace", 0.0, 0.0), arm="full", coeffs={"full": 0.5}, tied=True)
    arms = results.summary["arms"] | {"full": {"zero_won": 0.0, "tied": 1.0}}
    records = [*(record for record in results.records if record.coeffs), full]
    figure = plot_coeffs(records, arms)
    boxes = traces(figure, "box")
    assert [(set(box.y), list(box.x)) for box in boxes] == [
        ({"segmented: early"}, [1.5, 0.0]),
        ({"segmented: late"}, [0.5, 0.0]),
        ({"full"}, [0.5]),
    ]
    assert [box.name for box in boxes if box.showlegend] == [
        "segmented<br>zero plan won 50%, tied 0%",
        "full<br>zero plan won 0%, tied 100%",
    ]
    assert figure.columns == ("question_id", "arm", "segment", "coeff", "zero_won", "tied")
    assert figure.rows == (
        ("lovelace", "segmented", "early", 1.5, False, False),
        ("harris", "segmented", "early", 0.0, True, False),
        ("lovelace", "segmented", "late", 0.5, False, False),
        ("harris", "segmented", "late", 0.0, True, False),
        ("lovelace", "full", "full", 0.5, False, True),
    )


def test_a_run_has_the_figures_it_has_data_for() -> None:
    assert [f.name for f in run_figures(make_results())] == [
        "delta_norms",
        "scores",
        "reach",
        "coeffs",
    ]
    nothing = dict.fromkeys(
        ("transfer_exact_match", "neighbours_kept", "kl_unrelated"), interval(None, None, None, 12)
    )
    untuned = Results((LOVELACE,), Summary(summary(baseline=arm(**nothing)) | {"delta_norms": {}}))
    assert [figure.name for figure in run_figures(untuned)] == ["scores"]


@pytest.mark.usefixtures("no_chromium")
def test_pages_share_one_plotly_and_open_offline(tmp_path: Path) -> None:
    write_figures(run_figures(make_results()), tmp_path / "a" / "figures")
    names = sorted(path.name for path in (tmp_path / "a" / "figures").iterdir())
    assert names == [
        "coeffs.html",
        "delta_norms.html",
        "plotly.min.js",
        "reach.html",
        "scores.html",
    ]
    page = (tmp_path / "a" / "figures" / "scores.html").read_text(encoding="utf-8")
    assert 'src="plotly.min.js"' in page
    assert "cdn.plot.ly" not in page
    assert len(page) < 100_000


@pytest.mark.usefixtures("no_chromium")
def test_the_rows_shown_lie_beside_each_picture_on_request(tmp_path: Path) -> None:
    figures = run_figures(make_results())
    write_figures(figures, tmp_path, html=False, data=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("coeffs.csv", "delta_norms.csv", "reach.csv", "scores.csv")
    ]
    for figure in figures:
        with (tmp_path / f"{figure.name}.csv").open(encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
        assert tuple(header) == figure.columns
        assert rows == [[str(cell) for cell in row] for row in figure.rows]


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
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    assert write_figures(run_figures(make_results()), tmp_path, html=False) == (
        "no PNG figures: kaleido is not installed (pip install 'fusion-lens[png]')"
    )


def test_pictures_are_written_where_a_chromium_is_found(tmp_path: Path) -> None:
    pytest.importorskip("kaleido")
    if not any(shutil.which(name) for name in plots._CHROMIUM):
        pytest.skip("no Chromium")
    figure = plot_scores({"full": arm()})
    assert write_figures([figure], tmp_path, html=False) is None
    head = (tmp_path / "scores.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    # 900 x 480 at scale 2
    assert [int.from_bytes(head[i : i + 4]) for i in (16, 20)] == [1800, 960]


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

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from records import arm, make_results

from fusion_lens import pictures
from fusion_lens.errors import OutputError
from fusion_lens.pictures import write_figures
from fusion_lens.plots import plot_scores, run_figures

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

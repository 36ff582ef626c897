from __future__ import annotations

import importlib.util
import io
import re
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import tqdm.notebook
from asked import ASKED, OTHER, QUICK

from fusion_lens import progress
from fusion_lens.experiment import ExperimentConfig, run
from fusion_lens.preparation import TuningConfig
from fusion_lens.progress import bars, shown
from fusion_lens.search import SearchConfig
from fusion_lens.selection import select_failed
from fusion_lens.tuning import tune

Stream = TypeVar("Stream", bound=io.StringIO)
Stderr = Callable[[Stream], Stream]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        """What stands on its lines at the end, without control sequences; the last one is where
        the cursor is."""
        screen, row = [""], 0
        for part in re.findall(r"\n|\r|\x1b\[A|[^\n\r\x1b]+", self.getvalue()):
            if part == "\n":
                row += 1
                screen += [""] * (row + 1 - len(screen))
            elif part == "\x1b[A":
                row -= 1
            elif part != "\r":
                screen[row] = part + screen[row][len(part) :]
        assert row == len(screen) - 1
        return [line.rstrip() for line in screen]


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> Stderr:
    """Put a stream in stderr's place; to be called in the test, as pytest puts its own there
    before each."""

    def put(stream: Stream) -> Stream:
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return put


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A Jupyter kernel, and the widgets it shows."""
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    displayed: list[Any] = []
    monkeypatch.setattr(tqdm.notebook, "display", displayed.append)
    return displayed


def test_a_terminal_shows_a_line_per_stage_with_its_rows_done_and_in_all(
    stderr: Stderr,
) -> None:
    terminal = stderr(Terminal())
    with shown(True) as show:
        for done in (1, 2):
            show("preparing", done, 2)
        for done in (5, 40):
            show("trials", done, 40)
        first, second, last = terminal.lines
    assert first.startswith("preparing: 100%|")
    assert "| 2/2 [" in first
    assert second.startswith("trials: 100%|")
    assert "| 40/40 [" in second
    assert last == ""


def test_stages_that_take_turns_keep_their_lines(stderr: Stderr) -> None:
    terminal = stderr(Terminal())
    with shown(True) as show:
        for done in (1, 2, 3):
            show("trials", done, 3)
            show("measuring", done, 3)
    first, second, last = terminal.lines
    assert "trials: 100%" in first
    assert "measuring: 100%" in second
    assert last == ""


def test_a_stage_told_of_again_begins_another_bar(stderr: Stderr) -> None:
    terminal = stderr(Terminal())
    with shown(True) as show:
        show("trials", 4, 4)
        show("trials", 2, 2)
    assert [re.findall(r"\d/\d", line)[0] for line in terminal.lines[:2]] == ["4/4", "2/2"]


def test_a_stage_whose_total_changes_shows_the_new_one(stderr: Stderr) -> None:
    terminal = stderr(Terminal())
    with shown(True) as show:
        show("trials", 2, 8)
        show("trials", 3, 6)
    assert "trials:  50%" in terminal.lines[0]
    assert "| 3/6 [" in terminal.lines[0]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupt_or_error_leaves_whole_lines(
    stderr: Stderr, error: type[BaseException]
) -> None:
    terminal = stderr(Terminal())

    def work() -> None:
        with shown(True) as show:
            show("trials", 3, 8)
            show("measuring", 1, 8)
            raise error

    with pytest.raises(error):
        work()
    first, second, last = terminal.lines
    assert "| 3/8 [" in first
    assert "| 1/8 [" in second
    assert last == ""
    assert not tqdm.tqdm._instances


def test_nobody_watching_is_silence(stderr: Stderr) -> None:
    log = stderr(io.StringIO())
    with shown(True) as show:
        assert show is None
    assert log.getvalue() == ""


def test_false_is_silence_in_a_terminal_and_a_function_is_told_itself(stderr: Stderr) -> None:
    terminal = stderr(Terminal())
    with shown(False) as show:
        assert show is None
    seen = []
    with shown(lambda *told: seen.append(told)) as show:
        show("trials", 1, 2)
    assert seen == [("trials", 1, 2)]
    assert terminal.getvalue() == ""


def test_the_command_line_writes_a_first_and_a_last_line_to_a_log(stderr: Stderr) -> None:
    log = stderr(io.StringIO())
    with bars() as show:
        for done in range(1, 9):
            show("trials", done, 8)
    begun, ended = log.getvalue().strip().split("\r")
    assert begun.startswith("trials:   0%|")
    assert ended.startswith("trials: 100%|")
    assert log.getvalue().endswith("]\n")


def test_a_kernel_shows_a_widget_for_each_stage(kernel: list[Any], stderr: Stderr) -> None:
    log = stderr(io.StringIO())
    with shown(True) as show:
        show("preparing", 2, 2)
        show("trials", 3, 8)
    (name, bar, text), (stopped_name, stopped, stopped_text) = (box.children for box in kernel)
    assert name.value.split() == ["preparing:", "100%"]
    assert (bar.value, bar.max, bar.bar_style) == (2, 2, "success")
    assert "2/2" in text.value
    assert stopped_name.value.split() == ["trials:", "38%"]
    assert (stopped.value, stopped.max, stopped.bar_style) == (3, 8, "danger")
    assert "3/8" in stopped_text.value
    assert log.getvalue() == ""


def test_a_kernel_without_ipywidgets_shows_text_and_no_warning(
    kernel: list[Any], stderr: Stderr, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = stderr(io.StringIO())
    real = importlib.util.find_spec
    monkeypatch.setattr(
        progress, "find_spec", lambda name: None if name == "ipywidgets" else real(name)
    )
    with shown(True) as show:
        show("trials", 8, 8)
    assert kernel == []
    assert "| 8/8 [" in log.getvalue()


def test_ipython_in_a_terminal_is_no_kernel(
    monkeypatch: pytest.MonkeyPatch, stderr: Stderr
) -> None:
    terminal = stderr(Terminal())
    shell = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    with shown(True) as show:
        show("trials", 8, 8)
    assert "| 8/8 [" in terminal.lines[0]


CALLS: dict[str, tuple[Callable[..., object], list[str]]] = {
    "tune": (
        lambda model, **options: tune(model, ASKED, config=QUICK, **options),
        ["trials: 100%|8/8"],
    ),
    "run": (
        lambda model, **options: run(
            model,
            [ASKED, OTHER],
            ExperimentConfig(
                arms=("baseline", "full"),
                tuning=TuningConfig(
                    search=SearchConfig(trials=2, round_size=2),
                    generation=QUICK.generation,
                    explanation_tokens=0,
                ),
                reach=False,
            ),
            **options,
        ),
        ["preparing: 100%|2/2", "trials: 100%|4/4"],
    ),
    "select_failed": (
        lambda model, **options: select_failed(model, [ASKED, OTHER], QUICK, **options),
        ["selecting: 100%|2/2"],
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_long_call_shows_its_bars_unless_told_not_to(name: str, tiny, stderr) -> None:
    terminal = stderr(Terminal())
    call, expected = CALLS[name]
    call(tiny, progress=False)
    assert terminal.getvalue() == ""
    call(tiny)
    *lines, last = terminal.lines
    assert last == ""
    assert [re.sub(r"\|.*\| (\d+/\d+) \[.*", r"|\1", line) for line in lines] == expected
    before = terminal.getvalue()
    seen: list[tuple[str, int, int]] = []
    call(tiny, progress=lambda *told: seen.append(told))
    assert terminal.getvalue() == before
    stages = {stage: (done, total) for stage, done, total in seen}
    # a bar stands there before the first row is done
    assert seen[0][1] == 0
    assert [f"{stage}: 100%|{a}/{b}" for stage, (a, b) in stages.items()] == expected

"""How far long work has come -> bars: widgets in a notebook, lines in a terminal.

A bar is one stage of the work: its name, the rows done and the rows in all. `shown` decides, for
the calls that users make, whether bars are drawn; below them a `Progress` is a function or None.
Knows nothing of what is counted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from tqdm import tqdm

Progress = Callable[[str, int, int], None]
"""Called as (stage, done, total)."""


@contextmanager
def shown(progress: Progress | bool) -> Iterator[Progress | None]:
    """What a user's `progress=` asks for: True is bars where somebody watches, False is silence,
    and a function is called as (stage, done, total)."""
    if callable(progress):
        yield progress
    elif progress and watched():
        with bars() as show:
            yield show
    else:
        yield None


@contextmanager
def bars() -> Iterator[Progress]:
    """Bars whether or not somebody watches: in a log they are a line at their ends and every 15
    seconds. They are closed when all stages told of are done, and with the block, however it
    ends."""
    # a bar that closed above an open one would leave copies of that one on the screen
    open_bars: dict[str, Any] = {}
    pause = 0.1 if watched() else 15.0

    def show(stage: str, done: int, total: int) -> None:
        bar = open_bars.get(stage)
        if bar is None:
            bar = open_bars[stage] = _kind_of_bar()(
                desc=stage, total=total, unit="row", mininterval=pause, dynamic_ncols=True
            )
        if bar.total != total:
            bar.reset(total)
        bar.update(done - bar.n)
        if all(each.n >= each.total for each in open_bars.values()):
            close()

    def close() -> None:
        while open_bars:
            open_bars.pop(next(iter(open_bars))).close()

    try:
        yield show
    finally:
        close()


def watched() -> bool:
    """Whether somebody sees what is drawn: a Jupyter kernel, or a terminal behind stderr."""
    return _in_kernel() or sys.stderr.isatty()


def _kind_of_bar() -> type[Any]:
    kind: type[Any] = tqdm
    # not tqdm.auto: it warns where a kernel lacks ipywidgets, and takes a text bar all the same
    if _in_kernel() and find_spec("ipywidgets") is not None:
        from tqdm.notebook import tqdm_notebook

        kind = tqdm_notebook
    return kind


def _in_kernel() -> bool:
    # who runs in a kernel has imported IPython
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None

"""Run the notebooks in place and store what they show: `python notebooks/execute.py [NAME ...]`.

Every figure is stored twice, interactive and as a PNG, for pages that cannot draw it. What differs
from run to run is left out: times, versions, progress bars, the state of widgets, folders of this
machine. Anything on stderr is an error. Exit code 1: an error, or a notebook that took too long.
"""

from __future__ import annotations

import base64
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat
import plotly.graph_objects as go
import plotly.io
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from fusion_lens.pictures import WIDTH

FOLDER = Path(__file__).parent
MOST_SECONDS = 60.0
PLOTLY, PNG = "application/vnd.plotly.v1+json", "image/png"
_WIDGET = "application/vnd.jupyter.widget-view+json"
_SCALE = 1.5
_COUNTED = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def executed(path: Path) -> tuple[Any, float]:
    """The notebook as it is after a run in an empty folder, cleaned, its figures interactive only;
    and the seconds that took: by the clock, or of processor time where that is less, since on a
    busy machine the clock measures the others.

    Raises:
        CellExecutionError: if a cell fails.
        ValueError: if a cell writes to stderr.
    """
    notebook = nbformat.read(path, as_version=4)
    # figures as data alone: drawing them one by one in the kernel would start a browser for each
    settings = {"PLOTLY_RENDERER": "plotly_mimetype"}
    # one thread: numbers do not depend on the cores there are, and a busy machine does not make
    # the threads wait for each other
    settings |= {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=600,
            kernel_name="python3",
            record_timing=False,
            store_widget_state=False,
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
            resources={"metadata": {"path": folder}},
        )
        began, spent = time.perf_counter(), _spent()
        client.execute(env=os.environ | settings)
        seconds = min(time.perf_counter() - began, _spent() - spent)
        _clean(notebook, [folder, str(FOLDER.parent), sys.prefix, str(Path.home())])
    return notebook, seconds


def draw(notebooks: Sequence[Any]) -> None:
    """Put a PNG beside every interactive figure, all by one browser."""
    outputs = [each for notebook in notebooks for each in figures_of(notebook)]
    figures = [go.Figure({**each.data[PLOTLY], "config": None}) for each in outputs]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{n}.png" for n in range(len(figures))]
        plotly.io.write_images(
            figures,
            files,
            width=WIDTH,
            height=[figure.layout.height for figure in figures],
            scale=_SCALE,
        )
        for output, figure, file in zip(outputs, figures, files, strict=True):
            output.data[PNG] = base64.b64encode(file.read_bytes()).decode()
            size = {"width": figure.layout.width, "height": figure.layout.height}
            output.metadata[PNG] = size


def figures_of(notebook: Any) -> Iterator[Any]:
    """The outputs that are figures."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if PLOTLY in output.get("data", {}):
                yield output


def _spent() -> float:
    """Processor seconds of this process and those it started that have ended."""
    own, ended = (resource.getrusage(who) for who in _COUNTED)
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime


def _clean(notebook: Any, folders: Sequence[str]) -> None:
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type == "code":
            kept = [each for each in cell.outputs if _WIDGET not in each.get("data", {})]
            cell.outputs = _joined(kept)
            for output in cell.outputs:
                _clean_output(output, folders)


def _joined(outputs: Sequence[Any]) -> list[Any]:
    """A bar between two prints would leave them apart."""
    joined: list[Any] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if (
            last is not None
            and "stream" == output.output_type == last.output_type
            and output.name == last.name
        ):
            last.text += output.text
        else:
            joined.append(output)
    return joined


def _clean_output(output: Any, folders: Sequence[str]) -> None:
    if output.output_type == "stream":
        if output.name == "stderr":
            raise ValueError(f"a cell must not write to stderr, but wrote {output.text!r}")
        output.text = _without(output.text, folders)
        return
    output.metadata = nbformat.from_dict({})
    if len(output.data) > 1:  # the text of what is shown as a table or a picture is its repr
        output.data.pop("text/plain", None)
    for kind, content in output.data.items():
        if isinstance(content, str):
            output.data[kind] = _without(content, folders)


def _without(text: str, folders: Sequence[str]) -> str:
    for folder in folders:
        if len(Path(folder).parts) > 1:
            text = text.replace(folder, "...")
    return text


def main(names: Sequence[str]) -> int:
    """Run the named notebooks, or all; keep those that ran through."""
    paths = [FOLDER / f"{Path(name).stem}.ipynb" for name in names] or sorted(
        FOLDER.glob("*.ipynb")
    )
    done, failed = {}, False
    for path in paths:
        try:
            done[path], seconds = executed(path)
        except (CellExecutionError, ValueError) as error:
            print(f"{path.stem}: {error}", file=sys.stderr)
            failed = True
            continue
        slow = seconds > MOST_SECONDS
        failed = failed or slow
        print(f"{path.stem}: {seconds:.1f} s" + (f", over {MOST_SECONDS:.0f} s" if slow else ""))
    draw(list(done.values()))
    for path, notebook in done.items():
        nbformat.write(notebook, path)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

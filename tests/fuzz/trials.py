"""One trial of a reader: what came of it, within limits of time and memory."""

from __future__ import annotations

import resource
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from readers import Reader

from fusion_lens.errors import FusionLensError

MOST_MEMORY = 2**30
"""Bytes that reading a file may take beside what was there before."""
OWN = f"{Path('fusion_lens')}/"


@dataclass(frozen=True)
class Outcome:
    """`fault` is None where the file was read or refused as it should be. `place` tells outcomes
    apart: the error and where it was raised."""

    place: str
    fault: str | None = None


def tried(reader: Reader, content: bytes, folder: Path) -> Outcome:
    """What the reader makes of a file of these bytes."""
    reader.place(folder, content)
    try:
        with _limited(), warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            reader.read(folder)
    except FusionLensError as error:
        place = _place(error)
        if _wants_memory(error):
            return Outcome(place, f"it asks for more than {MOST_MEMORY} bytes: {error}")
        try:
            str(error).encode()
        except UnicodeEncodeError as unprintable:
            return Outcome(place, f"its message cannot be printed: {unprintable}")
        return Outcome(place)
    except Exception as error:
        return Outcome(_place(error), "".join(traceback.format_exception(error))[-6000:])
    return Outcome("read")


def _place(error: BaseException) -> str:
    """The error and the function of the package that raised it, then that of its cause."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if OWN in frame.filename] or frames
    told = f"{type(error).__name__} {Path(own[-1].filename).stem}.{own[-1].name}"
    if isinstance(error, FusionLensError):
        told += f" {own[-1].lineno}"
    return told if error.__cause__ is None else f"{told} < {_place(error.__cause__)}"


def _wants_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def _limited() -> Iterator[None]:
    """Let an allocation fail that goes too far. Linux tells how much there is; elsewhere no
    limit."""
    if sys.platform != "linux":
        yield
        return
    pages = int(Path("/proc/self/statm").read_text("utf-8").split()[0])
    before, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_MEMORY, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, most))

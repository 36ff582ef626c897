"""Freed memory -> back to the system, where the C library would keep it.

glibc hands out blocks of up to 32 MiB from one heap, and what lives long among them keeps the freed
rest from being returned: comparing methods on a CPU held 4.1 GB after 7 minutes, 1.4 GB of it in
use. Long work calls this between its parts.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache


def release_freed() -> None:
    """Return freed pages of every heap to the system; does nothing without glibc."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim

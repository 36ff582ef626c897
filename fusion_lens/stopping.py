"""Ctrl-C, or the signal a scheduler ends a job with -> a request to stop at the next good place.

The first one is a request, which long work looks at between its parts; the second interrupts at
once, as the first does without this.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether it was asked to stop."""

    asked = False

    def __call__(self) -> bool:
        return self.asked


@contextmanager
def stopping(says: str) -> Iterator[Stop]:
    """Inside, the first interrupt writes `says` to stderr and sets `asked`; another raises
    KeyboardInterrupt. In a thread that is not the main one signals go where they always do."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        sys.stderr.write(f"\n{says}\n")
        sys.stderr.flush()

    for number in _SIGNALS:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            # None: it was not set from Python, and cannot be set again from there
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

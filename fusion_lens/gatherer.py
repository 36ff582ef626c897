"""Single requests that come at their own times -> batches, made one after the other in a thread.

A batch begins with the first request that waits and takes what else arrives until `window` seconds
bring nothing new, or it has `most`. What arrives while a batch is made waits for the next. A
request that is cancelled before its batch is begun is left out. Of all gatherers in a process one
makes at a time, inside `one_at_a_time`. Knows neither models nor event loops.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar, final

from fusion_lens.errors import ConfigError

Asked = TypeVar("Asked")
Made = TypeVar("Made")

one_at_a_time = threading.Lock()
"""Held while a batch is made: torch's own threads and a device's memory are for one at a time."""


@final
class Gatherer(Generic[Asked, Made]):
    """`make` is given a batch and returns for each of it what was made, or the error of that one;
    what it raises is the error of all.

    Raises:
        ConfigError: if `most` is below 1 or `window` below 0.
    """

    def __init__(
        self,
        make: Callable[[Sequence[Asked]], Sequence[Made | Exception]],
        *,
        most: int,
        window: float = 0.05,
    ) -> None:
        if most < 1 or window < 0.0:
            raise ConfigError(
                f"most must be at least 1 and window at least 0, but got ({most=}, {window=})."
            )
        self._make = make
        self._most = most
        self._window = window
        self._waiting: SimpleQueue[tuple[Asked, Future[Made]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, asked: Asked) -> Future[Made]:
        """Ask for one; never blocks."""
        future: Future[Made] = Future()
        self._waiting.put((asked, future))
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="gatherer", daemon=True)
            self._thread.start()
        return future

    def close(self) -> None:
        """End the thread once what was asked before is made; `submit` begins anew."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._waiting.put(None)
            thread.join()

    def _work(self) -> None:
        going = True
        while going:
            batch, going = self._next_batch()
            with one_at_a_time:
                self._answer([each for each in batch if each[1].set_running_or_notify_cancel()])

    def _next_batch(self) -> tuple[list[tuple[Asked, Future[Made]]], bool]:
        """The next batch, and whether another may follow."""
        batch: list[tuple[Asked, Future[Made]]] = []
        while len(batch) < self._most:
            try:
                each = self._waiting.get(timeout=self._window if batch else None)
            except Empty:
                break
            if each is None:
                return batch, False
            batch.append(each)
        return batch, True

    def _answer(self, batch: Sequence[tuple[Asked, Future[Made]]]) -> None:
        made: Sequence[Made | Exception]
        try:
            made = self._make([asked for asked, _ in batch]) if batch else []
        except Exception as error:
            made = [error] * len(batch)
        for (_, future), each in zip(batch, made, strict=True):
            if isinstance(each, Exception):
                future.set_exception(each)
            else:
                future.set_result(each)

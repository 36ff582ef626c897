from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager

import pytest

from fusion_lens.errors import ConfigError
from fusion_lens.gatherer import Gatherer, one_at_a_time

SECONDS = 10.0


class Halver:
    """Halves even numbers and finds fault with odd ones; a batch with 0 fails as a whole. Keeps the
    batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __call__(self, batch: Sequence[int]) -> list[int | Exception]:
        self.batches.append(list(batch))
        if 0 in batch:
            raise LookupError("zero")
        return [ValueError(f"{n} is odd") if n % 2 else n // 2 for n in batch]


@contextmanager
def gathering(halver: Halver, **options: object) -> Iterator[Gatherer[int, int]]:
    gatherer: Gatherer[int, int] = Gatherer(halver, **{"most": 8, **options})  # type: ignore[arg-type]
    try:
        yield gatherer
    finally:
        gatherer.close()


def test_what_comes_together_is_one_batch_and_each_gets_its_own() -> None:
    halver = Halver()
    with gathering(halver, most=3, window=SECONDS) as gatherer:
        futures = [gatherer.submit(n) for n in (2, 4, 6)]
        assert [future.result(SECONDS) for future in futures] == [1, 2, 3]
    assert halver.batches == [[2, 4, 6]]


def test_a_batch_has_at_most_so_many() -> None:
    halver = Halver()
    with gathering(halver, most=2, window=SECONDS) as gatherer:
        futures = [gatherer.submit(n) for n in (2, 4, 6, 8)]
        assert [future.result(SECONDS) for future in futures] == [1, 2, 3, 4]
    assert halver.batches == [[2, 4], [6, 8]]


def test_one_that_fails_takes_no_other_with_it() -> None:
    with gathering(Halver()) as gatherer:
        right, wrong, other = (gatherer.submit(n) for n in (2, 3, 4))
        assert (right.result(SECONDS), other.result(SECONDS)) == (1, 2)
        with pytest.raises(ValueError, match="3 is odd"):
            wrong.result(SECONDS)


def test_what_is_raised_is_the_error_of_all_and_the_thread_goes_on() -> None:
    with gathering(Halver()) as gatherer:
        zero = gatherer.submit(0)
        with pytest.raises(LookupError, match="zero"):
            zero.result(SECONDS)
        assert gatherer.submit(2).result(SECONDS) == 1


def test_a_request_that_is_cancelled_while_it_waits_is_never_made() -> None:
    halver = Halver()
    with gathering(halver, most=2, window=SECONDS) as gatherer:
        with one_at_a_time:
            dropped, kept = gatherer.submit(2), gatherer.submit(4)
            assert dropped.cancel()
        assert kept.result(SECONDS) == 2
        with pytest.raises(CancelledError):
            dropped.result(SECONDS)
    assert halver.batches == [[4]]


def test_of_two_gatherers_one_makes_at_a_time() -> None:
    making, most_at_once = [], []
    lock = threading.Lock()

    def make(batch: Sequence[int]) -> list[int | Exception]:
        with lock:
            making.append(1)
            most_at_once.append(len(making))
        threading.Event().wait(0.02)
        with lock:
            making.pop()
        return list(batch)

    gatherers: list[Gatherer[int, int]] = [Gatherer(make, most=1) for _ in range(2)]
    futures = [gatherer.submit(n) for n in range(4) for gatherer in gatherers]
    assert [future.result(SECONDS) for future in futures] == [0, 0, 1, 1, 2, 2, 3, 3]
    for gatherer in gatherers:
        gatherer.close()
    assert most_at_once == [1] * 8


def test_what_was_asked_before_the_end_is_made_and_asking_begins_anew() -> None:
    gatherer: Gatherer[int, int] = Gatherer(Halver(), most=8)
    before = gatherer.submit(2)
    gatherer.close()
    assert before.done()
    assert before.result() == 1
    assert gatherer.submit(4).result(SECONDS) == 2
    gatherer.close()
    gatherer.close()


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"most must be at least 1 and window at least 0"):
        Gatherer(Halver(), most=0)
    with pytest.raises(ConfigError, match=r"window=-1\.0"):
        Gatherer(Halver(), most=1, window=-1.0)

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from fusion_lens.engine_log import EngineLog
from fusion_lens.errors import DeviceError
from fusion_lens.isolation import Tried, isolated
from fusion_lens.preparation import Failure


def blame(number: int, error: Exception) -> Failure:
    return Failure.of(str(number), error)


def squares_but(bad: set[int], error: Exception, seen: list[Sequence[int]]):
    def attempt(numbers: Sequence[int]) -> Tried[int]:
        seen.append(list(numbers))
        if bad & set(numbers):
            raise error
        return [number**2 for number in numbers], []

    return attempt


def test_what_goes_well_is_tried_once() -> None:
    seen: list[Sequence[int]] = []
    made = isolated(squares_but(set(), ValueError(), seen), [1, 2, 3], blame, EngineLog())
    assert made == ([1, 4, 9], [])
    assert seen == [[1, 2, 3]]


def test_items_that_fail_alone_are_found_by_halving_and_the_rest_is_made_in_order() -> None:
    seen: list[Sequence[int]] = []
    attempt = squares_but({2, 5}, ValueError("too large"), seen)
    made, failed = isolated(attempt, [0, 1, 2, 3, 4, 5], blame, EngineLog())
    assert made == [0, 1, 9, 16]
    assert [(own.question_id, own.error, own.message) for own in failed] == [
        ("2", "ValueError", "too large"),
        ("5", "ValueError", "too large"),
    ]
    assert seen[:3] == [[0, 1, 2, 3, 4, 5], [0, 1, 2], [0]]


def test_nothing_is_tried_of_nothing() -> None:
    assert isolated(squares_but({1}, ValueError(), []), [], blame, EngineLog()) == ([], [])


def test_memory_that_a_failing_item_had_too_little_of_is_not_taken_from_the_others() -> None:
    log = EngineLog(halvings=1)
    seen: list[int] = []

    def attempt(numbers: Sequence[int]) -> Tried[int]:
        seen.append(log.halvings)
        log.halvings += 3
        if 7 in numbers:
            raise MemoryError
        log.halvings -= 3
        return list(numbers), []

    assert isolated(attempt, [7, 8], blame, log)[0] == [8]
    assert seen == [1, 1, 1]
    assert log.halvings == 1


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered\nmore"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    ],
)
def test_a_broken_device_is_nobodys_fault(error: Exception) -> None:
    with pytest.raises(DeviceError, match=r"says: CUDA error: an illegal memory access") as caught:
        isolated(squares_but({1}, error, []), [0, 1], blame, EngineLog())
    assert caught.value.__cause__ is error

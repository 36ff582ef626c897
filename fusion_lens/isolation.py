"""A step over many items at once -> what was made, and which item is to blame where it fails.

What fails is halved, down to the items that fail alone; the rest goes on. A device that is broken
is nobody's fault.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from fusion_lens.engine_log import EngineLog, out_of_memory
from fusion_lens.errors import DeviceError
from fusion_lens.preparation import Failure

T = TypeVar("T")
M = TypeVar("M")
Tried = tuple[list[M], list[Failure]]
"""What was made, and what could not be."""


def isolated(
    attempt: Callable[[Sequence[T]], Tried[M]],
    items: Sequence[T],
    blame: Callable[[T, Exception], Failure],
    log: EngineLog,
) -> Tried[M]:
    """What an attempt makes of all items; where it raises, of each half, and so on: the items that
    fail alone are failures. Memory that one item had too little of is not taken from the others.

    Raises:
        DeviceError: if nothing that is done after this would succeed; no item is to blame.
    """
    if not items:
        return [], []
    halvings = log.halvings
    try:
        return attempt(items)
    except Exception as error:
        if _broken(error):
            raise DeviceError(
                "the device must be able to go on, but says: "
                f"{str(error).strip().splitlines()[0]}; start again, and go on with the run."
            ) from error
        if len(items) == 1:
            log.halvings = halvings
            return [], [blame(items[0], error)]
    log.halvings = halvings
    middle = len(items) // 2
    halves = [isolated(attempt, part, blame, log) for part in (items[:middle], items[middle:])]
    return [one for made, _ in halves for one in made], [one for _, own in halves for one in own]


def _broken(error: Exception) -> bool:
    """Whether the device, and not what was done on it, is at fault."""
    told = isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and "CUDA error" in str(error)
    )
    return told and not out_of_memory(error)

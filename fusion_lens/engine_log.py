"""What the engine did in a run: which executor ran how many rows, and what memory did not suffice
for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(slots=True)
class EngineLog:
    """Rows of generation by executor, why hook points were used, and how often the memory did not
    suffice for a batch. Batches and slots are halved that often from then on."""

    rows: dict[str, int] = field(default_factory=lambda: {"lean": 0, "hooks": 0})
    reasons: list[str] = field(default_factory=list)
    halvings: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For a summary."""
        return asdict(self)

    def add(self, other: EngineLog) -> None:
        """Count in what another did."""
        for executor, n in other.rows.items():
            self.rows[executor] += n
        for reason in other.reasons:
            self.fell_back(reason)
        self.halvings = max(self.halvings, other.halvings)

    def fell_back(self, reason: str | None) -> None:
        """Note why hook points are used, once; None: they are not, or were asked for."""
        if reason is not None and reason not in self.reasons:
            self.reasons.append(reason)

    def halving(self, n_rows: int, attempt: Callable[[int], T]) -> T:
        """`attempt` with `n_rows` rows at once, or half as many as often as memory runs out."""
        while True:
            affordable = max(1, n_rows >> self.halvings)
            try:
                return attempt(affordable)
            except RuntimeError as error:
                if affordable == 1 or not out_of_memory(error):
                    raise
                self.halvings += 1


def out_of_memory(error: Exception) -> bool:
    """Whether this is PyTorch's way to say so, on a device or on a CPU."""
    # the CPU allocator has no exception of its own
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)

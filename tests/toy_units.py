"""Four pairs that differ in a few units only, by hand."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

TOY = {
    (3, 7): [1.0, 2.0, 3.0, 4.0],  # always up
    (1, 5): [-9.0, -9.0, -9.0, -9.0],  # always down
    (1, 2): [1.0, 1.0, 1.0, 1.0],  # always up
    (0, 0): [1.0, 0.0, -1.0, 1.0],  # twice up, once down
    (2, 9): [-1.0, -1.0, 8.0, 0.0],  # twice down, once up; up in the mean
    (2, 3): [1.0, -1.0, 1.0, -1.0],  # as often up as down
}
"""Of each unit, layer and dimension, what its pairs differ by."""


def differences_of(units: Mapping[tuple[int, int], list[float]]) -> Tensor:
    """ "pair layer width", in four layers of 32."""
    values = torch.zeros(4, 4, 32)
    for (layer, unit), own in units.items():
        values[:, layer, unit] = torch.tensor(own)
    return values

"""Where searches start: coefficients layer by layer -> those of a search's segments.

What was found with one division of the layers serves another: the coefficient of a segment is the
mean over its layers, which for the same division is what it was. Knows neither model nor search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fusion_lens.errors import ConfigError
from fusion_lens.segments import Segment, coeffs_by_layer

LayerCoeffs = tuple[float, ...]
"""A coefficient for every layer of a model."""


@dataclass(frozen=True, slots=True)
class Starts:
    """What searches try first, behind the zero plan: a question's `own`, by its id, what is
    `shared` by all, and points along the gradient of the answer's log-probability, of these
    `lengths` (`gradient_starts`). The first of each kind come before the second of any."""

    own: tuple[tuple[str, tuple[LayerCoeffs, ...]], ...] = ()
    shared: tuple[LayerCoeffs, ...] = ()
    lengths: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        given = [*self.shared, *(start for _, starts in self.own for start in starts)]
        if len({len(start) for start in given}) > 1:
            raise ConfigError("all starts must be of as many layers, but some have more.")
        if not all(math.isfinite(coeff) for start in given for coeff in start):
            raise ConfigError("the coefficients of a start must be finite, but one is not.")
        if not all(0.0 < length < math.inf for length in self.lengths):
            raise ConfigError(
                f"lengths along a gradient must be above 0 and finite, but got {self.lengths}."
            )

    def of(self, question_id: str) -> tuple[LayerCoeffs, ...]:
        """A question's own."""
        return next((starts for name, starts in self.own if name == question_id), ())


def in_segments(start: LayerCoeffs, segments: Sequence[Segment]) -> dict[str, float]:
    """The mean coefficient over the layers of every segment, by its name.

    Raises:
        ConfigError: if a segment reaches beyond the layers there are.
    """
    coeffs = {}
    for segment in segments:
        own = start[segment.start : segment.stop]
        if len(own) < segment.stop - segment.start:
            raise ConfigError(
                f"a start must have a coefficient for every layer, but has {len(start)} and "
                f"segment {segment.name!r} ends with layer {segment.stop - 1}."
            )
        # the mean of equal numbers may round to another
        coeffs[segment.name] = own[0] if len({*own}) == 1 else math.fsum(own) / len(own)
    return coeffs


def by_layer(segments: Sequence[Segment], coeffs: Sequence[float], n_layers: int) -> LayerCoeffs:
    """A coefficient per segment as one per layer; 0 where no segment is."""
    return tuple(coeffs_by_layer(segments, coeffs, n_layers, torch.float64).tolist())

"""A division of the layers, and one coefficient for each part.

The paper's early, middle and late are `thirds`. Knows nothing of what is injected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fusion_lens.errors import PlanError


@dataclass(frozen=True, slots=True)
class Segment:
    """The layers `start <= l < stop`, under one name."""

    name: str
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise PlanError(
                f"0 <= start < stop must hold for segment {self.name!r}, "
                f"but got (start={self.start}, stop={self.stop})."
            )


def full(n_layers: int) -> tuple[Segment, ...]:
    """One segment over all layers."""
    return (Segment("full", 0, n_layers),)


def thirds(n_layers: int) -> tuple[Segment, ...]:
    """The paper's early, middle and late; as even as possible, the longer ones first (26: 9, 9,
    8)."""
    parts = even_segments(n_layers, 3)
    names = ("early", "middle", "late")
    return tuple(replace(part, name=name) for part, name in zip(parts, names, strict=True))


def per_layer(n_layers: int) -> tuple[Segment, ...]:
    """Every layer by itself."""
    return even_segments(n_layers, n_layers)


def one_layer(layer: int, n_layers: int) -> tuple[Segment, ...]:
    """One layer alone.

    Raises:
        PlanError: if the model has no such layer.
    """
    if not 0 <= layer < n_layers:
        raise PlanError(f"0 <= layer < n_layers must hold, but got ({layer=}, {n_layers=}).")
    return (Segment(f"layer_{layer}", layer, layer + 1),)


def even_segments(n_layers: int, n_segments: int) -> tuple[Segment, ...]:
    """Any number of segments, as even as possible, the longer ones first.

    Raises:
        PlanError: if there are fewer layers than segments.
    """
    if not 1 <= n_segments <= n_layers:
        raise PlanError(
            f"1 <= segments <= layers must hold, but got ({n_segments=}, {n_layers=}); "
            "use fewer segments."
        )
    short, longer = divmod(n_layers, n_segments)
    stops = [short * i + min(i, longer) for i in range(n_segments + 1)]
    return tuple(
        Segment(f"segment_{i}", start, stop) for i, (start, stop) in enumerate(pairwise(stops))
    )


def check_segments(segments: Sequence[Segment], coeffs: Sequence[float], n_layers: int) -> None:
    """Make sure that segments and coefficients fit each other and a model of `n_layers`.

    Raises:
        PlanError: if a coefficient is missing, too many or too large, or if a segment lies outside
            the model or over another.
    """
    if len(coeffs) != len(segments):
        raise PlanError(
            "every segment must have one coefficient, but got "
            f"{len(segments)} segments and {len(coeffs)} coefficients; "
            "give segments=, such as per_layer(n_layers)."
        )
    if not all(-1e6 < coeff < 1e6 for coeff in coeffs):
        raise PlanError(f"coefficients must be finite and below 1e6, but got {tuple(coeffs)}.")
    names = [segment.name for segment in segments]
    if len(set(names)) != len(names):
        raise PlanError(f"segment names must be unique, but got {', '.join(names)}.")
    taken: dict[int, str] = {}
    for segment in segments:
        if segment.stop > n_layers:
            raise PlanError(
                f"segment {segment.name!r} must lie within the model's {n_layers} layers, "
                f"but got layers {segment.start} to {segment.stop - 1}."
            )
        for layer in range(segment.start, segment.stop):
            if layer in taken:
                raise PlanError(
                    f"segments must not overlap, but {taken[layer]!r} and {segment.name!r} "
                    f"both hold layer {layer}."
                )
            taken[layer] = segment.name


def coeffs_by_layer(
    segments: Sequence[Segment], coeffs: Sequence[float], n_layers: int, dtype: torch.dtype
) -> Float[Tensor, " layer"]:
    """The coefficient of every layer; 0 where no segment is."""
    by_layer = torch.zeros(n_layers, dtype=dtype)
    for segment, coeff in zip(segments, coeffs, strict=True):
        by_layer[segment.start : segment.stop] = coeff
    return by_layer


def covered_layers(segments: Sequence[Segment], n_layers: int) -> Bool[Tensor, " layer"]:
    """Which layers a segment covers."""
    covered = torch.zeros(n_layers, dtype=torch.bool)
    for segment in segments:
        covered[segment.start : segment.stop] = True
    return covered

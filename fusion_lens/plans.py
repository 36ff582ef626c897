"""What to do where, and how strongly: data only.

A plan is an ordered list of steps; a step is one question's deltas, a division of the layers into
segments, a coefficient per segment, and at which positions. With `mean="question"` a step adds
`shift[l] = coeff[segment(l)] * (h[l] - mu[l])`, a constant; with `mean="sequence"` it is the hook
of Fusion Steering's authors, `coeff * (h[l] - m[l])` with `m` the mean over the sequence as it
stands (arXiv 2505.22572, docs/method.md). The authors' (alpha, gamma) act only through their
product: that product is the coefficient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fusion_lens.deltas import Deltas
from fusion_lens.errors import PlanError, one_of
from fusion_lens.models import ModelIdentity
from fusion_lens.prompts import Layout
from fusion_lens.tables import Section, Shows

MEANS = ("question", "sequence")
POSITIONS = ("all", "prompt", "completion")


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


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One injection.

    `positions`: "prompt" is everything before the last prompt token, "completion" the last prompt
    token and all after it (the positions whose logits write the completion), "all" both. Special
    tokens of the prompt are left alone unless `steer_special`; with `mean="sequence"` they then
    enter the running mean too, as in the authors' hook.
    """

    deltas: Deltas
    segments: tuple[Segment, ...]
    coeffs: tuple[float, ...]
    mean: str = "question"
    positions: str = "all"
    steer_special: bool = False

    def __post_init__(self) -> None:
        one_of("mean", self.mean, MEANS)
        one_of("positions", self.positions, POSITIONS)
        if len(self.coeffs) != len(self.segments):
            raise PlanError(
                "every segment must have one coefficient, but got "
                f"{len(self.segments)} segments and {len(self.coeffs)} coefficients; "
                "give segments=, such as per_layer(n_layers)."
            )
        if not all(-1e6 < coeff < 1e6 for coeff in self.coeffs):
            raise PlanError(f"coefficients must be finite and below 1e6, but got {self.coeffs}.")
        _check_segments(self.segments, self.deltas.model.n_layers)
        if not bool(torch.isfinite(self.shift).all()):
            raise PlanError("a step's shift must be finite, but coefficient * delta overflows.")

    @property
    def layer_coeffs(self) -> Float[Tensor, " layer"]:
        """The coefficient of every layer; 0 where no segment is."""
        coeffs = torch.zeros(self.deltas.model.n_layers, dtype=self.deltas.base.dtype)
        for segment, coeff in zip(self.segments, self.coeffs, strict=True):
            coeffs[segment.start : segment.stop] = coeff
        return coeffs

    @property
    def layers(self) -> Bool[Tensor, " layer"]:
        """Which layers a segment covers."""
        covered = torch.zeros(self.deltas.model.n_layers, dtype=torch.bool)
        for segment in self.segments:
            covered[segment.start : segment.stop] = True
        return covered

    @property
    def shift(self) -> Float[Tensor, "layer d_model"]:
        """`coeff * (h - mu)` per layer: what a step with `mean="question"` adds."""
        return self.layer_coeffs[:, None] * self.deltas.vectors


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Plan(Shows):
    """Steps to run in order on one model."""

    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        if not self.steps:
            raise PlanError("a plan must hold at least one step, but got none.")
        for step in self.steps[1:]:
            reason = step.deltas.model.mismatch(self.model)
            if reason is not None:
                raise PlanError(f"all steps of a plan must belong to one model, but {reason}.")

    @property
    def model(self) -> ModelIdentity:
        """The model the plan was made on."""
        return self.steps[0].deltas.model

    @property
    def coeffs(self) -> dict[str, float]:
        """Coefficient by segment name; a later step's segments are numbered, as `late#2`."""
        return {
            segment.name if n == 1 else f"{segment.name}#{n}": coeff
            for n, step in enumerate(self.steps, start=1)
            for segment, coeff in zip(step.segments, step.coeffs, strict=True)
        }

    @property
    def injected_norm(self) -> float:
        """sqrt(sum over layers of ||shift[l]||^2), in residual units, where it is largest.

        Steps at the same positions add up; of prompt and completion the larger counts. With
        `mean="sequence"` it is nominal: the question's mean stands in for the running one.
        """
        return max(self._norm_at("prompt"), self._norm_at("completion"))

    def shift_at(self, position: str, *, special: bool = False) -> Float[Tensor, "layer d_model"]:
        """The sum of all steps' shifts at a "prompt" or "completion" position, special or not."""
        total = torch.zeros_like(self.steps[0].deltas.base)
        for step in self.steps:
            if step.positions in ("all", position) and (step.steer_special or not special):
                total = total + step.shift
        return total

    def _norm_at(self, position: str) -> float:
        return float(self.shift_at(position).norm())

    def steered_positions(self, layout: Layout) -> tuple[int, ...]:
        """The positions of a prompt at which a step injects; those after it are steered unless all
        steps are for the prompt alone."""
        last = layout.length - 1
        return tuple(
            t
            for t in range(layout.length)
            if any(
                step.positions in ("all", "prompt" if t < last else "completion")
                and (step.steer_special or t not in layout.special)
                for step in self.steps
            )
        )

    @property
    def needs_sequence(self) -> bool:
        """Whether a step recomputes its mean on the whole sequence, so that no KV cache may be
        used."""
        return any(step.mean == "sequence" for step in self.steps)

    def table(self) -> Section:
        """Where it injects, and how strongly."""
        rows = tuple(
            (
                str(n),
                segment.name,
                f"{segment.start} to {segment.stop - 1}",
                f"{coeff:.3f}",
                step.mean,
                step.positions + (", special tokens too" if step.steer_special else ""),
            )
            for n, step in enumerate(self.steps, start=1)
            for segment, coeff in zip(step.segments, step.coeffs, strict=True)
        )
        header = ("step", "segment", "layers", "coefficient", "mean", "positions")
        title = f"plan for {self.model.name}; injected norm {self.injected_norm:.2f}"
        return Section(title, header, rows)

    def __repr__(self) -> str:
        coeffs = ", ".join(f"{name} {coeff:.3g}" for name, coeff in self.coeffs.items())
        return f"Plan({self.model.name}, {coeffs}, injected norm {self.injected_norm:.3g})"

    def __mul__(self, factor: float | int) -> Plan:
        return Plan(
            tuple(
                replace(step, coeffs=tuple(coeff * factor for coeff in step.coeffs))
                for step in self.steps
            )
        )

    __rmul__ = __mul__

    def __add__(self, other: Plan) -> Plan:
        return Plan(self.steps + other.steps)

    def check(self, model: ModelIdentity) -> None:
        """Make sure the plan belongs to `model`.

        Raises:
            PlanError: if width, depth, processing or weights differ.
        """
        reason = self.model.mismatch(model)
        if reason is not None:
            raise PlanError(f"a plan must be used on the model it was made on, but {reason}.")


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


def make_plan(
    deltas: Deltas,
    coeffs: float | Sequence[float] | Mapping[str, float] | np.ndarray | np.generic | Tensor,
    segments: Sequence[Segment] | None = None,
    *,
    mean: str = "question",
    positions: str = "all",
    steer_special: bool = False,
) -> Plan:
    """A plan of one step. Without `segments`: one for a number, `thirds` for three names or values.

    Raises:
        PlanError: if a segment is unknown, lies outside the model or lacks a coefficient.
    """
    n_layers = deltas.model.n_layers
    if isinstance(coeffs, (np.ndarray, np.generic, Tensor)):
        coeffs = coeffs.tolist()
    if not isinstance(coeffs, (Sequence, Mapping)):
        segments = tuple(segments or full(n_layers))
        values: tuple[float, ...] = (float(coeffs),) * len(segments)
    else:
        segments = tuple(segments or (thirds if len(coeffs) == 3 else full)(n_layers))
        if isinstance(coeffs, Mapping):
            names = [segment.name for segment in segments]
            unknown = sorted(set(coeffs) - set(names))
            if unknown:
                raise PlanError(
                    f"segments must be among {', '.join(names)}, but got {unknown[0]!r}."
                )
            missing = [name for name in names if name not in coeffs]
            if missing:
                raise PlanError(f"segment {missing[0]!r} must have a coefficient, but has none.")
            values = tuple(float(coeffs[name]) for name in names)
        else:
            values = tuple(float(coeff) for coeff in coeffs)
    return Plan(
        (
            Step(
                deltas=deltas,
                segments=segments,
                coeffs=values,
                mean=mean,
                positions=positions,
                steer_special=steer_special,
            ),
        )
    )


def _check_segments(segments: Sequence[Segment], n_layers: int) -> None:
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

"""What to do where, and how strongly: data only.

A plan is an ordered list of steps (`steps`); each acts at one site, with a division of the layers
into segments (`segments`), a coefficient per segment, and at which positions. A `Step` with
`mean="question"` adds `shift[l] = coeff[segment(l)] * (h[l] - mu[l])`, a constant; with
`mean="sequence"` it is the hook of Fusion Steering's authors, `coeff * (h[l] - m[l])` with `m` the
mean over the sequence as it stands (arXiv 2505.22572, docs/method.md). The authors' (alpha, gamma)
act only through their product: that product is the coefficient. An `Affine` step also scales.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fusion_lens.deltas import Deltas
from fusion_lens.errors import PlanError
from fusion_lens.identity import ModelIdentity
from fusion_lens.prompts import Layout
from fusion_lens.segments import Segment as Segment
from fusion_lens.segments import even_segments as even_segments
from fusion_lens.segments import full as full
from fusion_lens.segments import one_layer as one_layer
from fusion_lens.segments import per_layer as per_layer
from fusion_lens.segments import thirds as thirds
from fusion_lens.steps import MEANS as MEANS
from fusion_lens.steps import POSITIONS as POSITIONS
from fusion_lens.steps import Affine as Affine
from fusion_lens.steps import AnyStep, steered_mask
from fusion_lens.steps import Gate as Gate
from fusion_lens.steps import Step as Step
from fusion_lens.tables import Section, Shows


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Plan(Shows):
    """Steps to run in order on one model."""

    steps: tuple[AnyStep, ...]

    def __post_init__(self) -> None:
        if not self.steps:
            raise PlanError("a plan must hold at least one step, but got none.")
        for step in self.steps[1:]:
            reason = step.model.mismatch(self.model)
            if reason is not None:
                raise PlanError(f"all steps of a plan must belong to one model, but {reason}.")

    @property
    def model(self) -> ModelIdentity:
        """The model the plan was made on."""
        return self.steps[0].model

    @property
    def layout(self) -> Layout:
        """Of the prompt the plan was made for."""
        return self.steps[0].layout

    @property
    def sites(self) -> frozenset[str]:
        """Where its steps act."""
        return frozenset(step.site for step in self.steps)

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

        Steps at the same positions add up; of the prompt, each of its tokens that a step names by
        number, and the completion the largest counts. It is nominal where a step depends on its
        input. With `mean="sequence"` the question's mean stands in for the running one. A gate
        counts as 1 on its open layers. An affine step counts apart, as the square root of
        `||coeff*scale[l]||^2 + ||coeff*shift[l]||^2` summed over layers: the root mean square of
        what it would add to independent units of mean 0 and variance 1. That is no residual norm,
        but it is 0 for a step that does nothing and grows with the coefficient.
        """
        tokens = {step.positions for step in self.steps if isinstance(step.positions, int)}
        return max(
            self._norm_at("completion"),
            self._norm_at("prompt"),
            *(self._norm_at("prompt", t) for t in tokens),
        )

    def shift_at(self, position: str, *, special: bool = False) -> Float[Tensor, "layer d_model"]:
        """The sum of all steps' shifts at a "prompt" or "completion" position, special or not; with
        `mean="sequence"` it is nominal.

        Raises:
            PlanError: if a step is gated, affine, or for one token of the prompt: what it adds is
                not the same for every token.
        """
        for n, step in enumerate(self.steps, start=1):
            same = step.is_constant or step.needs_sequence
            if not same or isinstance(step.positions, int):
                raise PlanError(
                    "a plan must add the same to every token to have a shift, "
                    f"but its step {n} is {step.told} (positions: {_positions_told(step)})."
                )
        return self._added_at(position, special=special)

    def _added_at(self, *positions: str | int, special: bool) -> Float[Tensor, "layer d_model"]:
        total = torch.zeros((self.model.n_layers, self.model.d_model))
        for step in self.steps:
            acts = step.positions in ("all", *positions) and (step.steer_special or not special)
            if isinstance(step, Step) and acts:
                total = total + step.shift
        return total

    def _norm_at(self, *positions: str | int) -> float:
        added = float(self._added_at(*positions, special=False).norm())
        moves = [
            step.move
            for step in self.steps
            if isinstance(step, Affine) and step.positions in ("all", *positions)
        ]
        if not moves:
            return added
        squares = [added**2]
        for move in moves:
            for part in (move.scale, move.shift):
                if part is not None:
                    squares.append(float(part[move.active].double().square().sum()))
        return math.sqrt(math.fsum(squares))

    def steered_positions(self, layout: Layout) -> tuple[int, ...]:
        """The positions of a prompt at which a step injects; those after it are steered unless all
        steps are for the prompt or single tokens of it."""
        places = torch.arange(layout.length)
        steered = torch.zeros(layout.length, dtype=torch.bool)
        for step in self.steps:
            steered |= steered_mask(step.positions, step.steer_special, layout, places)
        return tuple(places[steered].tolist())

    @property
    def needs_sequence(self) -> bool:
        """Whether a step recomputes its mean on the whole sequence, so that no KV cache may be
        used."""
        return any(step.needs_sequence for step in self.steps)

    @property
    def is_constant(self) -> bool:
        """Whether all steps add the same to every token's residual stream, so that they are one
        shift per layer and kind of position."""
        return all(step.is_constant for step in self.steps)

    def table(self) -> Section:
        """Where it injects, and how strongly."""
        rows = tuple(
            (
                str(n),
                segment.name,
                f"{segment.start} to {segment.stop - 1}",
                f"{coeff:.3f}",
                step.told,
                _positions_told(step),
            )
            for n, step in enumerate(self.steps, start=1)
            for segment, coeff in zip(step.segments, step.coeffs, strict=True)
        )
        header = ("step", "segment", "layers", "coefficient", "what", "positions")
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


def make_plan(
    deltas: Deltas,
    coeffs: float | Sequence[float] | Mapping[str, float] | np.ndarray | np.generic | Tensor,
    segments: Sequence[Segment] | None = None,
    *,
    mean: str = "question",
    positions: str | int = "all",
    steer_special: bool = False,
    units: Bool[Tensor, "layer d_model"] | None = None,
    gate: Gate | None = None,
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
                units=units,
                gate=gate,
            ),
        )
    )


def _positions_told(step: AnyStep) -> str:
    where = step.positions if isinstance(step.positions, str) else f"token {step.positions}"
    return where + (", special tokens too" if step.steer_special else "")

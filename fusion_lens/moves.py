"""The steps of many plans -> tensors with a row for each plan, and how they change a site.

Steps that stand at the same place of their plans and act alike are one group, so that a batch in
which every row has its own plan takes one operation for a group, site and layer. A row without a
step in a group passes it unchanged, bit for bit: what a row gets does not depend on the others.

Which positions are meant is the caller's to say, as a mask.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fusion_lens.errors import PlanError
from fusion_lens.models import SITES, Place
from fusion_lens.operators import affine, gate_value, mean_shift
from fusion_lens.plans import Plan
from fusion_lens.steps import AnyStep, Move, Step

_NAMED = {"resid_post": "a residual", "attn_z": "heads' outputs", "mlp_out": "an MLP's output"}


@dataclass(frozen=True, slots=True)
class Kind:
    """What steps have in common that are done in one operation. `number` is their place in their
    plans, `names` and `dtypes` are of the tensors they need."""

    number: int
    site: str
    positions: str | int
    steer_special: bool
    gate: str | None
    names: tuple[str, ...]
    width: int
    dtypes: tuple[torch.dtype, ...]

    @property
    def needs_sequence(self) -> bool:
        """Whether a running mean is taken."""
        return "reference" in self.names


@dataclass(slots=True, eq=False)
class Group:
    """Steps of one kind, of some rows: tensors "row layer width" or "row layer". `active` tells
    where a row's step acts, `seated` the same on the CPU, for the rows that have one."""

    kind: Kind
    tensors: dict[str, Float[Tensor, "..."]]
    active: Bool[Tensor, "row layer"]
    seated: dict[int, Bool[Tensor, " layer"]] = field(default_factory=dict)

    def seat(
        self, row: int, active: Bool[Tensor, " layer"], tensors: dict[str, Float[Tensor, "..."]]
    ) -> None:
        """Give a row its step."""
        for name, tensor in tensors.items():
            self.tensors[name][row] = tensor.to(self.active.device)
        self.active[row] = active.to(self.active.device)
        self.seated[row] = active

    def clear(self, row: int) -> None:
        """Take a row's step away, if it has one."""
        if self.seated.pop(row, None) is not None:
            self.active[row] = False

    def steer(
        self,
        layer: int,
        x: Float[Tensor, "row pos width"],
        mask: Bool[Tensor, "#row pos"],
        present: Bool[Tensor, "#row pos"] | None = None,
    ) -> Float[Tensor, "row pos width"]:
        """`x` with every row's step done where the mask holds. `present` are the positions that
        enter a running mean.

        Raises:
            PlanError: if the steps have another width.
        """
        if self.kind.width != x.shape[-1]:
            raise PlanError(
                f"a plan must have the width of the model, but got {self.kind.width} "
                f"for {_NAMED[self.kind.site]} of {x.shape[-1]}."
            )
        if self.active.device != x.device:
            self.active = self.active.to(x.device)
            self.tensors = {name: own.to(x.device) for name, own in self.tensors.items()}
        own = {name: tensor[:, layer] for name, tensor in self.tensors.items()}
        mask = mask & self.active[:, layer, None]
        if present is not None:
            return mean_shift(x, own["reference"], own["coeffs"], present, mask)
        gate = None
        if self.kind.gate is not None:
            gate = gate_value(x, own["theta"], own["bias"], self.kind.gate)
        bounds = (own["low"], own["high"]) if "low" in own else None
        return affine(x, own.get("scale"), own["shift"], mask, gate=gate, bounds=bounds)


class Moves:
    """What is done to every row of a batch, changed in place as rows come and go."""

    def __init__(self, n_rows: int, n_layers: int, device: torch.device) -> None:
        self.groups: list[Group] = []
        """In the order of their steps; all of one number are of different rows."""
        self._shape = (n_rows, n_layers)
        self._device = device

    def seat(self, row: int, plan: Plan | None) -> None:
        """Give a row its plan, in place of the one it had; None: nothing is done to it."""
        for group in self.groups:
            group.clear(row)
        for number, step in enumerate(() if plan is None else plan.steps):
            move = step.move
            tensors = _tensors(step, move)
            kind = Kind(
                number=number,
                site=step.site,
                positions=step.positions,
                steer_special=step.steer_special,
                gate=None if move.gate is None else move.gate.kind,
                names=tuple(tensors),
                width=move.shift.shape[-1],
                dtypes=tuple(tensor.dtype for tensor in tensors.values()),
            )
            self._group(kind, tensors).seat(row, move.active, tensors)
        self.groups = sorted(
            (group for group in self.groups if group.seated), key=lambda group: group.kind.number
        )

    @property
    def places(self) -> list[Place]:
        """Where something is done, site by site."""
        layers: dict[str, Tensor] = {}
        for group in self.groups:
            covered = torch.stack([*group.seated.values()]).any(dim=0)
            layers[group.kind.site] = covered | layers.get(group.kind.site, covered)
        return [
            (site, layer)
            for site in SITES
            if site in layers
            for layer in layers[site].nonzero()[:, 0].tolist()
        ]

    def _group(self, kind: Kind, example: dict[str, Tensor]) -> Group:
        for group in self.groups:
            if group.kind == kind:
                return group
        n_rows, n_layers = self._shape
        group = Group(
            kind=kind,
            tensors={
                name: torch.zeros((n_rows, *own.shape), dtype=own.dtype, device=self._device)
                for name, own in example.items()
            },
            active=torch.zeros((n_rows, n_layers), dtype=torch.bool, device=self._device),
        )
        self.groups.append(group)
        return group


def _tensors(step: AnyStep, move: Move) -> dict[str, Float[Tensor, "..."]]:
    """What the operation needs of a step, by name."""
    if isinstance(step, Step) and step.needs_sequence:
        return {"reference": step.deltas.reference, "coeffs": step.layer_coeffs}
    gate = move.gate
    named = {
        "shift": move.shift,
        "scale": move.scale,
        "low": move.low,
        "high": move.high,
        "theta": None if gate is None else gate.theta,
        "bias": None if gate is None else gate.bias,
    }
    return {name: tensor for name, tensor in named.items() if tensor is not None}

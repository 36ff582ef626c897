"""One step of a plan: at which site, what is done to the activation there, how strongly, and when.

At a site with the activation x of one token, every kind but a running mean is one formula,

    x <- x + c[segment(l)] * g(x) * (scale[l] * x + shift[l])      where low[l] <= x <= high[l]

unit by unit, with g = 1 where there is no gate. `Step` adds a question's deltas to the residual
stream (scale 0, shift = h - mu; arXiv 2505.22572); `Affine` is the rest, at any site: AUSteer's
x + s*x (arXiv 2602.04428), ITI's addition to the heads' outputs (arXiv 2306.03341), Linear-AcT's
map inside its source's range (arXiv 2410.23054). `Gate` is DSAS' g (arXiv 2512.03661). Knows
nothing of models: data and their checks only (docs/method.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fusion_lens.deltas import Deltas
from fusion_lens.errors import ConfigError, PlanError, one_of
from fusion_lens.identity import ModelIdentity
from fusion_lens.models import SITES
from fusion_lens.prompts import Layout
from fusion_lens.segments import Segment, check_segments, coeffs_by_layer, covered_layers

MEANS = ("question", "sequence")
POSITIONS = ("all", "prompt", "completion")
AFTER_PROMPT = ("all", "completion")
"""Of these, the ones that hold for what follows the prompt."""
GATES = ("sigmoid", "relu")


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """How much of a step a token gets: `g[l](x) = sigmoid(theta[l].x + bias[l])`, or relu of it.

    x is the activation as it enters the step, changed by whatever came before, and `width` that of
    the step's site. A layer that is not `open` gets nothing.
    """

    theta: Float[Tensor, "layer width"]
    bias: Float[Tensor, " layer"]
    open: Bool[Tensor, " layer"]
    kind: str = "sigmoid"

    def __post_init__(self) -> None:
        one_of("a gate's kind", self.kind, GATES)
        _check_tensor("a gate's theta", self.theta, tuple(self.theta.shape))
        _check_tensor("a gate's bias", self.bias, tuple(self.theta.shape[:1]), self.theta.dtype)
        _check_mask("a gate's open", self.open, tuple(self.theta.shape[:1]))


@dataclass(frozen=True, slots=True, eq=False)
class Move:
    """What a step does at its site with its coefficients multiplied in:
    `x + g(x) * (scale * x + shift)`, on the layers that are `active`.

    None: a scale of 0, no bounds, a gate of 1. Where `low` is above `high` a unit is left alone.
    """

    shift: Float[Tensor, "layer width"]
    active: Bool[Tensor, " layer"]
    scale: Float[Tensor, "layer width"] | None = None
    low: Float[Tensor, "layer width"] | None = None
    high: Float[Tensor, "layer width"] | None = None
    gate: Gate | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One injection of a question's deltas into the residual stream.

    `positions`: "prompt" is everything before the last prompt token, "completion" the last prompt
    token and all after it (the positions whose logits write the completion), "all" both. A number t
    is the prompt's token at place t alone, counted from 0, BOS included; a prompt that is not so
    long is not steered. Special tokens of the prompt are left alone unless `steer_special`; with
    `mean="sequence"` they then enter the running mean too, as in the authors' hook.

    `units` are the dimensions that are injected, of each layer; None: all. `gate` weighs the
    injection token by token. Both are for `mean="question"` alone.
    """

    deltas: Deltas
    segments: tuple[Segment, ...]
    coeffs: tuple[float, ...]
    mean: str = "question"
    positions: str | int = "all"
    steer_special: bool = False
    units: Bool[Tensor, "layer d_model"] | None = None
    gate: Gate | None = None

    def __post_init__(self) -> None:
        one_of("mean", self.mean, MEANS)
        _check_positions(self.positions)
        check_segments(self.segments, self.coeffs, self.model.n_layers)
        shape = (self.model.n_layers, self.model.d_model)
        for name in ("units", "gate"):
            if self.mean == "sequence" and getattr(self, name) is not None:
                raise PlanError(
                    f'a step with {name} must have mean="question", but got "sequence", whose '
                    "shift is another in every pass."
                )
        if self.units is not None:
            _check_mask("units", self.units, shape)
        _check_gate(self.gate, shape)
        if not bool(torch.isfinite(self.shift).all()):
            raise PlanError("a step's shift must be finite, but coefficient * delta overflows.")

    @property
    def site(self) -> str:
        """The residual stream after a block."""
        return "resid_post"

    @property
    def model(self) -> ModelIdentity:
        """The model the deltas were made on."""
        return self.deltas.model

    @property
    def layout(self) -> Layout:
        """Of the prompt the deltas were made for."""
        return self.deltas.layout

    @property
    def is_constant(self) -> bool:
        """Whether it adds the same to every token's residual stream, of a kind of positions."""
        return self.mean == "question" and self.gate is None and not isinstance(self.positions, int)

    @property
    def needs_sequence(self) -> bool:
        """Whether it recomputes its mean on the whole sequence."""
        return self.mean == "sequence"

    @property
    def layer_coeffs(self) -> Float[Tensor, " layer"]:
        """The coefficient of every layer; 0 where no segment is."""
        return coeffs_by_layer(
            self.segments, self.coeffs, self.model.n_layers, self.deltas.base.dtype
        )

    @property
    def layers(self) -> Bool[Tensor, " layer"]:
        """Which layers a segment covers."""
        return covered_layers(self.segments, self.model.n_layers)

    @property
    def shift(self) -> Float[Tensor, "layer d_model"]:
        """`coeff * (h - mu)` per layer, what a step with `mean="question"` adds; 0 outside `units`
        and where its gate is not open, and with a gate what a token gets whose gate is 1."""
        shift = self.layer_coeffs[:, None] * self.deltas.vectors
        if self.units is not None:
            shift = torch.where(self.units, shift, 0.0)
        return shift if self.gate is None else torch.where(self.gate.open[:, None], shift, 0.0)

    @property
    def move(self) -> Move:
        """What it does where `mean="question"`."""
        low, high = (None, None) if self.units is None else _bounds(self.units, self.shift.dtype)
        return Move(self.shift, _active(self.layers, self.gate), None, low, high, self.gate)

    @property
    def told(self) -> str:
        """What it does, in a few words."""
        chosen = "" if self.units is None else f", {int(self.units.sum())} units"
        return self.mean + chosen + _gate_told(self.gate)


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """An affine map of every unit of a site, or a part of the way to one.

    `scale` and `shift` are of the change, not of the map: `T(x) = omega*x + b` at strength lambda
    is `scale=omega - 1, shift=b` with lambda as the coefficient. `width` is `d_model`, or at
    "attn_z" all heads' outputs in a row. With `low` and `high` (infinite: no bound) only units
    between them move. Positions and special tokens are as in `Step`; `layout` is the steered
    prompt's.
    """

    site: str
    scale: Float[Tensor, "layer width"]
    shift: Float[Tensor, "layer width"]
    segments: tuple[Segment, ...]
    coeffs: tuple[float, ...]
    model: ModelIdentity
    layout: Layout
    low: Float[Tensor, "layer width"] | None = None
    high: Float[Tensor, "layer width"] | None = None
    gate: Gate | None = None
    positions: str | int = "all"
    steer_special: bool = False

    def __post_init__(self) -> None:
        one_of("site", self.site, SITES)
        _check_positions(self.positions)
        widths = self.shift.shape[-1:] if self.site == "attn_z" else (self.model.d_model,)
        shape = (self.model.n_layers, *widths)
        _check_tensor("an affine step's shift", self.shift, shape)
        _check_tensor("an affine step's scale", self.scale, shape, self.shift.dtype)
        for name in ("low", "high"):
            bound = getattr(self, name)
            if bound is not None:
                _check_tensor(f"an affine step's {name}", bound, shape, self.shift.dtype, "NaN")
        _check_gate(self.gate, shape)
        check_segments(self.segments, self.coeffs, self.model.n_layers)
        coeffs = self._layer_coeffs
        for name in ("scale", "shift"):
            if not bool(torch.isfinite(coeffs * getattr(self, name)).all()):
                raise PlanError(
                    f"a step's {name} must be finite, but coefficient * {name} overflows."
                )

    @property
    def is_constant(self) -> bool:
        """Whether it adds the same to every token's residual stream: not by its kind."""
        return False

    @property
    def needs_sequence(self) -> bool:
        """Whether it needs more than one token at a time: it does not."""
        return False

    @property
    def move(self) -> Move:
        """What it does."""
        scale, shift = self._layer_coeffs * self.scale, self._layer_coeffs * self.shift
        low, high = _bounds((scale != 0) | (shift != 0), shift.dtype)
        if self.low is not None:
            low = torch.maximum(low, self.low)
        if self.high is not None:
            high = torch.minimum(high, self.high)
        return Move(
            shift=shift,
            active=_active(covered_layers(self.segments, self.model.n_layers), self.gate),
            scale=scale if bool(scale.any()) else None,
            low=low,
            high=high,
            gate=self.gate,
        )

    @property
    def told(self) -> str:
        """What it does, in a few words."""
        within = "" if self.low is None and self.high is None else ", within bounds"
        return f"affine at {self.site}{within}{_gate_told(self.gate)}"

    @property
    def _layer_coeffs(self) -> Float[Tensor, "layer 1"]:
        n_layers, dtype = self.model.n_layers, self.shift.dtype
        return coeffs_by_layer(self.segments, self.coeffs, n_layers, dtype)[:, None]


AnyStep = Step | Affine


def steered_mask(
    positions: str | int, steer_special: bool, layout: Layout, at: Int[Tensor, " pos"]
) -> Bool[Tensor, " pos"]:
    """Which of the places `at` are steered, counted from a prompt's first token: those below 0 are
    padding, those from its length on follow it."""
    mask = at >= 0
    if not steer_special:
        mask &= ~torch.isin(at, torch.tensor(layout.special, dtype=torch.long))
    last = layout.length - 1
    if isinstance(positions, int):
        mask &= (at == positions) & (at <= last)
    elif positions == "prompt":
        mask &= at < last
    elif positions == "completion":
        mask &= at >= last
    return mask


def _active(layers: Bool[Tensor, " layer"], gate: Gate | None) -> Bool[Tensor, " layer"]:
    return layers if gate is None else layers & gate.open


def _bounds(
    units: Bool[Tensor, "layer width"], dtype: torch.dtype
) -> tuple[Float[Tensor, "layer width"], Float[Tensor, "layer width"]]:
    """No bound on these units; on the others bounds that nothing lies between."""
    high = torch.where(units, torch.inf, -torch.inf).to(dtype)
    return -high, high


def _gate_told(gate: Gate | None) -> str:
    return "" if gate is None else f", {gate.kind} gate on {int(gate.open.sum())} layers"


def _check_positions(positions: str | int) -> None:
    number = isinstance(positions, int) and not isinstance(positions, bool) and positions >= 0
    if not number and positions not in POSITIONS:
        raise ConfigError(
            f"positions must be one of {', '.join(POSITIONS)}, or the place of a token of the "
            f"prompt (0 is the first), but got {positions!r}."
        )


def _check_gate(gate: Gate | None, shape: tuple[int, ...]) -> None:
    if gate is not None:
        _check_tensor("a gate's theta", gate.theta, shape)


def _check_mask(name: str, mask: Tensor, shape: tuple[int, ...]) -> None:
    if mask.dtype != torch.bool or mask.device.type != "cpu" or tuple(mask.shape) != shape:
        raise PlanError(
            f"{name} must be truth values of the shape {shape} on the CPU, "
            f"but got {mask.dtype} of {tuple(mask.shape)} on {mask.device}."
        )


def _check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype | None = None,
    refused: str = "NaN or infinity",
) -> None:
    if tuple(tensor.shape) != shape:
        raise PlanError(f"{name} must have the shape {shape}, but got {tuple(tensor.shape)}.")
    dtypes = (torch.float32, torch.float64) if dtype is None else (dtype,)
    if tensor.device.type != "cpu" or tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise PlanError(
            f"{name} must be on the CPU in {names}, but got {tensor.dtype} on {tensor.device}."
        )
    bad = torch.isnan(tensor) if refused == "NaN" else ~torch.isfinite(tensor)
    if bool(bad.any()):
        raise PlanError(f"{name} must hold no {refused}, but it does.")

"""A plan -> one vector per layer, added to every token; or why it is none. And back.

    x <- x + v[l],    v[l] = sum over steps of coeff[segment(l)] * shift[l]

after block l (`blocks.l.hook_resid_post`), at every position, special tokens included: all that a
control vector of llama.cpp (arXiv 2310.01405 as repeng's files hold it) or a bare forward hook can
do. Coefficients and masks of units are multiplied in. What depends on the token or on its place is
refused, or on request replaced by what comes nearest to it, and told.

The vectors of a plan made on weights that TransformerLens processed are those of the checkpoint:
what is folded is read from the stream and not written to it, and the mean over d_model that is
taken out of every write is what LayerNorm does not see.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fusion_lens.deltas import Deltas
from fusion_lens.errors import PlanError
from fusion_lens.identity import ModelIdentity
from fusion_lens.models import RESID_POST
from fusion_lens.plan_files import plan_digest
from fusion_lens.plans import Affine, Plan, Step, make_plan
from fusion_lens.prompts import NO_PROMPT
from fusion_lens.steps import AnyStep

_LAYER = re.compile("0|[1-9][0-9]{0,8}", re.ASCII)


@dataclass(frozen=True, slots=True, eq=False)
class Vectors:
    """What is added after each block that has a vector, in residual units.

    `told` is what goes with them into a file, as text: `to_vectors` names the model, its weights,
    the plan's digest, the coefficients that are multiplied in, and what was approximated.
    """

    by_layer: Mapping[int, Float[Tensor, " d_model"]]
    told: Mapping[str, str]

    def __post_init__(self) -> None:
        if not self.by_layer or min(self.by_layer) < 0:
            raise PlanError(
                "there must be a vector of at least one layer, counted from 0, but got the layers "
                f"{sorted(self.by_layer)}."
            )
        for layer, vector in self.by_layer.items():
            if tuple(vector.shape) != (self.d_model,) or not self.d_model:
                raise PlanError(
                    f"all vectors must have the shape ({self.d_model},), and some width, "
                    f"but that of layer {layer} has {tuple(vector.shape)}."
                )
            if vector.device.type != "cpu" or vector.dtype != torch.float32:
                raise PlanError(
                    f"the vector of layer {layer} must be on the CPU in float32, "
                    f"but got {vector.dtype} on {vector.device}."
                )
            if not bool(torch.isfinite(vector).all()):
                raise PlanError(
                    f"the vector of layer {layer} must be finite, but it holds NaN or infinity."
                )

    @property
    def d_model(self) -> int:
        """The width of every vector."""
        return int(next(iter(self.by_layer.values())).shape[0])

    def __str__(self) -> str:
        norms = [float(vector.norm()) for vector in self.by_layer.values()]
        return (
            f"vectors of {len(norms)} layers, {min(self.by_layer)} to {max(self.by_layer)} "
            f"(norms {min(norms):.2f} to {max(norms):.2f})"
        )


def to_vectors(plan: Plan, *, first_layer: int = 0, approximate: bool = False) -> Vectors:
    """What a plan adds to every token; layers to which it adds nothing have no vector.

    With `approximate` a running mean becomes the question's, a gate counts as 1 where it is open,
    steps for the prompt or the completion are for both, special tokens are steered too, and layers
    before `first_layer` are left out; `told["approximated"]` says which of it was done.

    Raises:
        PlanError: if a step is not of that kind: scaling, bounded, at another site than
            "resid_post", for a single token; if something would have to be approximated and
            `approximate` is False; or if nothing is added on any layer that is left.
    """
    acting = [(n, step) for n, step in enumerate(plan.steps, start=1) if any(step.coeffs)]
    refused = [f"step {n} {why}" for n, step in acting if (why := _refusal(step))]
    if refused:
        raise PlanError(
            "a plan must add vectors to the residual stream after blocks to be exported, "
            f"but its {'; its '.join(refused)}; nothing stands in for that."
        )
    total = torch.zeros((plan.model.n_layers, plan.model.d_model), dtype=torch.float64)
    for _, step in acting:
        total += _shift(step).double()
    replaced = [(f"step {n} {why}", f"step {n} {now}") for n, s in acting for why, now in _gaps(s)]
    by_layer = {layer: row.float() for layer, row in enumerate(total) if bool(row.any())}
    for layer in sorted(by_layer):
        if layer < first_layer:
            why = f"layer {layer} is steered, which has no vector"
            replaced.append((why, f"layer {layer} is left out"))
            del by_layer[layer]
    if replaced and not approximate:
        raise PlanError(
            "a plan must add the same to every token to be exported, but "
            f"{'; '.join(why for why, _ in replaced)}; approximate it (--approximate), which is "
            "told in the file, or remake it."
        )
    if not by_layer:
        raise PlanError(
            f"a plan must add something from layer {first_layer} on to be exported, but this one "
            "adds nothing; take another plan."
        )
    told = {
        "model": plan.model.name,
        "weights_sha256": plan.model.weights,
        "plan_sha256": plan_digest(plan),
        "hook": RESID_POST,
        "coefficients": ", ".join(
            f"{name} {float(coeff)!r}" for name, coeff in plan.coeffs.items()
        ),
        "approximated": "; ".join(now for _, now in replaced) or "nothing",
    }
    return Vectors(by_layer, told)


def from_vectors(vectors: Vectors, model: ModelIdentity) -> Plan:
    """A plan of one step that adds them on `model`, to every token, special ones too, with a
    coefficient of 1.

    Raises:
        PlanError: if their width or a layer is not the model's.
    """
    if vectors.d_model != model.d_model:
        raise PlanError(
            f"vectors must be as wide as the model, {model.d_model}, but got {vectors.d_model}; "
            "they are of another model."
        )
    last = max(vectors.by_layer)
    if last >= model.n_layers:
        raise PlanError(
            f"the layers of vectors must lie below the model's {model.n_layers}, but got {last}; "
            "they are of another model."
        )
    shift = torch.zeros((model.n_layers, model.d_model))
    for layer, vector in vectors.by_layer.items():
        shift[layer] = vector
    deltas = Deltas(shift, torch.zeros_like(shift), NO_PROMPT, model)
    return make_plan(deltas, 1.0, steer_special=True)


def layer_named(name: str, prefix: str) -> int | None:
    """The layer of a tensor in a file, as 3 of "layer.3"; None if it is named otherwise."""
    begin, _, number = name.partition(".")
    return int(number) if begin == prefix and _LAYER.fullmatch(number) else None


def _refusal(step: AnyStep) -> str | None:
    """What no vector comes near."""
    if step.site != "resid_post":
        return f"acts at {step.site}"
    if isinstance(step.positions, int):
        return f"acts on token {step.positions} of the prompt alone"
    if isinstance(step, Affine):
        if step.move.scale is not None:
            return "scales what it finds"
        if _is_bounded(step):
            return "moves units within bounds alone"
    return None


def _gaps(step: AnyStep) -> list[tuple[str, str]]:
    """What differs from token to token, and what a vector has in its place."""
    gaps = []
    if step.needs_sequence:
        gaps.append(("takes its mean over the sequence as it stands", "takes its question's mean"))
    if step.gate is not None and bool(step.gate.theta.any()):
        gaps.append(("has a gate", "counts its gate as 1 on its open layers"))
    if step.positions != "all":
        gaps.append((f"acts on the {step.positions} alone", "acts on all tokens"))
    if not step.steer_special:
        gaps.append(("spares special tokens", "steers special tokens too"))
    return gaps


def _shift(step: AnyStep) -> Float[Tensor, "layer d_model"]:
    """What is added where the gate is 1, or what it always is."""
    shift = step.shift if isinstance(step, Step) else step.move.shift
    gate = step.gate
    if gate is None:
        return shift
    if not bool(gate.theta.any()):
        always = gate.bias.sigmoid() if gate.kind == "sigmoid" else gate.bias.relu()
        shift = shift * always[:, None]
    return torch.where(gate.open[:, None], shift, 0.0)


def _is_bounded(step: Affine) -> bool:
    moved = step.move.shift != 0
    below = step.low is not None and bool((step.low[moved] > -torch.inf).any())
    return below or (step.high is not None and bool((step.high[moved] < torch.inf).any()))

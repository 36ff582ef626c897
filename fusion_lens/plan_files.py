"""A plan <-> one safetensors file: tensors in float32 or wider (masks as truth values), everything
else as JSON metadata. Version 1, which knew one kind of step, is read too.

safetensors has no checksum (flipped bits load silently), so the metadata carries a SHA-256 over the
tensors, and a second one over the JSON itself. A file is on the disk whole or not at all, and equal
plans are equal files, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NotRequired

from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import TypedDict

from fusion_lens.deltas import Deltas
from fusion_lens.durable import replace_file
from fusion_lens.errors import FusionLensError, InputFileError, PlanError, one_of
from fusion_lens.identity import ModelIdentity
from fusion_lens.plans import Affine, Gate, Plan, Segment, Step
from fusion_lens.prompts import Layout
from fusion_lens.tensor_files import header_of, tensor_bytes, tensors_digest
from fusion_lens.typed_json import parsed, typed

SCHEMA_VERSION = 2


def save_plan(plan: Plan, path: str | Path) -> None:
    """Write `plan`; `load_plan` gives it back bit for bit.

    Raises:
        OutputError: if the place cannot be written.
    """
    replace_file(Path(path), _plan_bytes(plan))


def plan_digest(plan: Plan) -> str:
    """The SHA-256 of the file that `save_plan` writes."""
    return hashlib.sha256(_plan_bytes(plan)).hexdigest()


def load_plan(path: str | Path) -> Plan:
    """Read a plan and check everything about it that can be checked without its model.

    Raises:
        PlanError: if the file cannot be read, is no plan, or has been altered.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = header_of(path, file)
            tensors = {name: file.get_tensor(name) for name in header.shapes}
    except (OSError, SafetensorError, InputFileError) as error:
        raise PlanError(f"{path} must be a readable plan file, but: {error}.") from error
    try:
        return _plan_from(header.metadata, tensors)
    except FusionLensError as error:
        raise PlanError(f"{path} must hold a valid plan, but: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PlanError(
            f"{path} must hold a plan as save_plan writes it, but: {type(error).__name__} {error}."
        ) from error


def _plan_bytes(plan: Plan) -> bytes:
    tensors: dict[str, Tensor] = {}
    steps = []
    for n, step in enumerate(plan.steps):
        told, own = _of_step(step) if isinstance(step, Step) else _of_affine(step)
        if step.gate is not None:
            told["gate"] = step.gate.kind
            own |= {f"gate.{name}": getattr(step.gate, name) for name in _GATE}
        for name, tensor in own.items():
            tensors[f"steps.{n}.{name}"] = tensor.contiguous().clone()
        steps.append(
            {
                **told,
                "segments": [asdict(segment) for segment in step.segments],
                "coeffs": list(step.coeffs),
                "positions": step.positions,
                "steer_special": step.steer_special,
                "layout": asdict(step.layout),
            }
        )
    content = json.dumps(
        {
            "schema_version": SCHEMA_VERSION,
            "model": asdict(plan.model),
            "steps": steps,
            "tensors_sha256": tensors_digest(tensors),
        },
        sort_keys=True,
    )
    metadata = {"plan": content, "sha256": hashlib.sha256(content.encode()).hexdigest()}
    return tensor_bytes(tensors, metadata)


def _plan_from(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Plan:
    if "plan" not in metadata:
        raise PlanError("it has no plan in its metadata; was it written by save_plan?")
    if hashlib.sha256(metadata["plan"].encode()).hexdigest() != metadata.get("sha256"):
        raise PlanError("its metadata does not match their checksum; the file was altered.")
    content: dict[str, Any] = parsed(metadata["plan"])
    version = content["schema_version"]
    if version not in (1, SCHEMA_VERSION):
        raise PlanError(f"schema_version must be 1 or {SCHEMA_VERSION}, but got {version}.")
    if tensors_digest(tensors) != content["tensors_sha256"]:
        raise PlanError("its tensors do not match their checksum; the file is damaged.")
    model = typed(ModelIdentity, content["model"])
    steps = []
    for n, each in enumerate(content["steps"]):
        told = typed(_Told, each)
        begin = f"steps.{n}."
        own = {
            name.removeprefix(begin): tensor
            for name, tensor in tensors.items()
            if name.startswith(begin)
        }
        # version 1 knows one kind
        kind = "deltas" if version == 1 else told["kind"]
        read = _KINDS[one_of("a step's kind", kind, tuple(_KINDS))]
        steps.append(read(told, own, model))
    return Plan(tuple(steps))


def _of_step(step: Step) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors = {"reference": step.deltas.reference, "base": step.deltas.base}
    if step.units is not None:
        tensors["units"] = step.units
    return {"kind": "deltas", "mean": step.mean}, tensors


def _of_affine(step: Affine) -> tuple[dict[str, Any], dict[str, Tensor]]:
    named = {"scale": step.scale, "shift": step.shift, "low": step.low, "high": step.high}
    tensors = {name: tensor for name, tensor in named.items() if tensor is not None}
    return {"kind": "affine", "site": step.site}, tensors


def _step_from(told: _Told, tensors: Mapping[str, Tensor], model: ModelIdentity) -> Step:
    deltas = Deltas(
        reference=tensors["reference"], base=tensors["base"], layout=_layout(told), model=model
    )
    return Step(
        deltas=deltas, mean=told["mean"], units=tensors.get("units"), **_shared(told, tensors)
    )


def _affine_from(told: _Told, tensors: Mapping[str, Tensor], model: ModelIdentity) -> Affine:
    return Affine(
        site=told["site"],
        scale=tensors["scale"],
        shift=tensors["shift"],
        low=tensors.get("low"),
        high=tensors.get("high"),
        model=model,
        layout=_layout(told),
        **_shared(told, tensors),
    )


def _shared(told: _Told, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    gate = None
    kind = told.get("gate")
    if kind is not None:
        gate = Gate(kind=kind, **{name: tensors[f"gate.{name}"] for name in _GATE})
    return {
        "segments": tuple(told["segments"]),
        "coeffs": tuple(told["coeffs"]),
        "positions": told["positions"],
        "steer_special": told["steer_special"],
        "gate": gate,
    }


def _layout(told: _Told) -> Layout:
    layout = told["layout"]
    if not all(0 <= number < _LONGEST for number in (layout.length, *layout.special)):
        raise PlanError(
            f"a prompt's length and positions must lie in [0, {_LONGEST}), but got {layout}."
        )
    return layout


class _Told(TypedDict):
    """A step as its file tells it; what is not required is of some kinds of step."""

    segments: list[Segment]
    coeffs: list[float]
    positions: str | int
    steer_special: bool
    layout: Layout
    kind: NotRequired[str]
    mean: NotRequired[str]
    site: NotRequired[str]
    gate: NotRequired[str | None]


_LONGEST = 2**24
"""Tokens. A prompt's length is used for tensors, and nothing else in the file bounds it."""


_GATE = ("theta", "bias", "open")
_KINDS: dict[str, Callable[..., Step | Affine]] = {"deltas": _step_from, "affine": _affine_from}

"""A plan <-> one safetensors file: tensors in float32 or wider, everything else as JSON metadata.

safetensors has no checksum (flipped bits load silently), so the metadata carries a SHA-256 over the
tensors, and a second one over the JSON itself. A file is written beside its place and moved there,
never half.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fusion_lens.deltas import Deltas
from fusion_lens.errors import FusionLensError, OutputError, PlanError
from fusion_lens.models import ModelIdentity
from fusion_lens.plans import Plan, Segment, Step
from fusion_lens.prompts import Layout
from fusion_lens.tensor_files import tensors_digest

SCHEMA_VERSION = 1


def save_plan(plan: Plan, path: str | Path) -> None:
    """Write `plan`; `load_plan` gives it back bit for bit.

    Raises:
        OutputError: if the place cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    steps = []
    for n, step in enumerate(plan.steps):
        tensors[f"steps.{n}.reference"] = step.deltas.reference.contiguous().clone()
        tensors[f"steps.{n}.base"] = step.deltas.base.contiguous().clone()
        steps.append(
            {
                "segments": [asdict(segment) for segment in step.segments],
                "coeffs": list(step.coeffs),
                "mean": step.mean,
                "positions": step.positions,
                "steer_special": step.steer_special,
                "layout": asdict(step.deltas.layout),
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
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(save(tensors, metadata=metadata))
        part.replace(path)
    except OSError as error:
        raise OutputError(path, error.strerror or str(error)) from error


def load_plan(path: str | Path) -> Plan:
    """Read a plan and check everything about it that can be checked without its model.

    Raises:
        PlanError: if the file cannot be read, is no plan, or has been altered.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise PlanError(f"{path} must be a readable plan file, but: {error}.") from error
    try:
        return _plan_from(metadata, tensors)
    except FusionLensError as error:
        raise PlanError(f"{path} must hold a valid plan, but: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PlanError(
            f"{path} must hold a plan as save_plan writes it, but: {type(error).__name__} {error}."
        ) from error


def _plan_from(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Plan:
    if "plan" not in metadata:
        raise PlanError("it has no plan in its metadata; was it written by save_plan?")
    if hashlib.sha256(metadata["plan"].encode()).hexdigest() != metadata.get("sha256"):
        raise PlanError("its metadata does not match their checksum; the file was altered.")
    content: dict[str, Any] = json.loads(metadata["plan"])
    if content["schema_version"] != SCHEMA_VERSION:
        raise PlanError(
            f"schema_version must be {SCHEMA_VERSION}, but got {content['schema_version']}."
        )
    if tensors_digest(tensors) != content["tensors_sha256"]:
        raise PlanError("its tensors do not match their checksum; the file is damaged.")
    model = ModelIdentity(**content["model"])
    return Plan(
        tuple(
            Step(
                deltas=Deltas(
                    reference=tensors[f"steps.{n}.reference"],
                    base=tensors[f"steps.{n}.base"],
                    layout=Layout(step["layout"]["length"], tuple(step["layout"]["special"])),
                    model=model,
                ),
                segments=tuple(Segment(**segment) for segment in step["segments"]),
                coeffs=tuple(step["coeffs"]),
                mean=step["mean"],
                positions=step["positions"],
                steer_special=step["steer_special"],
            )
            for n, step in enumerate(content["steps"])
        )
    )

"""Gated plans on given texts -> the value of every gate, layer by layer and token by token.

`g[l, t]` is what the gate says to x as it enters its step in the steered run: changed by everything
below, and by the plan's earlier steps at the same place (DSAS, arXiv 2512.03661). Where nothing is
steered there is no value: NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fusion_lens.activations import at_least_float32
from fusion_lens.engine_log import EngineLog
from fusion_lens.errors import PlanError
from fusion_lens.executors import Executor
from fusion_lens.hooks import Cursor, batch_steering
from fusion_lens.models import SITES, HookedModel, token_texts
from fusion_lens.operators import gate_value
from fusion_lens.plans import Plan
from fusion_lens.steps import AFTER_PROMPT, AnyStep
from fusion_lens.teacher_forcing import Batch, Text, in_batches, passed

_ROWS = 8


@dataclass(frozen=True, slots=True, eq=False)
class GateValues:
    """What one gated step's gate says to every token of a text, on the CPU, in float32 or the
    model's wider dtype.

    NaN on layers that the step leaves alone (closed, or in no segment) and on tokens that it leaves
    alone (special ones, or of other positions). `step` counts from 1.
    """

    step: int
    site: str
    values: Float[Tensor, "layer token"]
    str_tokens: tuple[str, ...]


def gate_values(
    model: HookedModel,
    texts: Sequence[Text],
    *,
    executor: str = "auto",
    log: EngineLog | None = None,
) -> list[tuple[GateValues, ...]]:
    """The values of each gated step of each text's plan, in the order of the steps; none where a
    text has no plan, or its plan no gate. Prompt and written tokens are both read.

    Raises:
        PlanError: if a plan belongs to another model, or recomputes its mean.
    """
    n_layers = int(model.cfg.n_layers)

    def read(run: Executor, batch: Batch) -> list[dict[int, Float[Tensor, "layer token"]]]:
        found: list[dict[int, Tensor]] = [{} for _ in batch.rows]
        gates = [_gated_steps(text.plan) for text in batch.rows]
        for site in SITES:
            if any(step.site == site for own in gates for step in own.values()):
                entering, _ = passed(run, batch, site, n_layers)
                for row, own in enumerate(gates):
                    for n, step in own.items():
                        if step.site == site:
                            found[row][n] = _values(batch, row, n, entering)
        return found

    read_texts = in_batches(model, texts, read, _ROWS, executor, log)
    return [
        tuple(
            GateValues(n, step.site, values[n], token_texts(model, text.tokens))
            for n, step in _gated_steps(text.plan).items()
        )
        for text, values in zip(texts, read_texts, strict=True)
    ]


def mean_gate(values: Sequence[GateValues]) -> Float[Tensor, " layer"]:
    """The mean over all steered tokens of one or more texts; NaN on layers that are left alone.

    Raises:
        PlanError: if there is nothing to average, or values of different sites.
    """
    sites = {own.site for own in values}
    if len(sites) != 1:
        raise PlanError(
            "the mean must be over gates of one site, but got "
            f"{', '.join(sorted(sites)) or 'none'}."
        )
    return torch.cat([own.values for own in values], dim=1).nanmean(dim=1)


def _gated_steps(plan: Plan | None) -> dict[int, AnyStep]:
    """By their place in the plan, from 1."""
    steps = () if plan is None else plan.steps
    return {n: step for n, step in enumerate(steps, start=1) if step.gate is not None}


def _values(
    batch: Batch, row: int, number: int, entering: Sequence[Float[Tensor, "batch pos width"]]
) -> Float[Tensor, "layer token"]:
    text, place = batch.rows[row], batch.places[row]
    assert text.plan is not None
    step = text.plan.steps[number - 1]
    gate, layout = step.gate, text.prompt.layout
    assert gate is not None
    before = tuple(own for own in text.plan.steps[: number - 1] if own.site == step.site)
    width = batch.tokens.shape[1] - batch.n_written
    earlier = batch_steering([Plan(before) if before else None], [layout], Cursor(0, width))
    steered = list(Plan((step,)).steered_positions(layout))
    if step.positions in AFTER_PROMPT:
        steered += range(layout.length, len(text.tokens))
    dtype = torch.promote_types(entering[0].dtype, torch.float32)
    values = torch.full((len(entering), len(text.tokens)), torch.nan, dtype=dtype)
    for layer in step.move.active.nonzero()[:, 0].tolist():
        x = entering[layer][row : row + 1]
        change = earlier.get((step.site, layer))
        if change is not None:
            x = change(x)
        theta, bias = (own[layer, None].to(x.device) for own in (gate.theta, gate.bias))
        seen = gate_value(x, theta, bias, gate.kind)[0, place]
        values[layer, steered] = at_least_float32(seen).cpu()[steered].to(dtype)
    return values

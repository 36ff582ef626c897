"""The answer's log-probability -> coefficients to start a search from.

One pass over prompt and gold answer with every layer's coefficient c at 0, and one back, give

    g[l] = d/dc[l] log p(answer | prompt, plan(c)),    g[s] = the sum of g[l] over l in segment s,

and the starts are `length * g / max_s g[s]`, clipped to what the search draws from: of the positive
components the largest gets the length, a segment whose shift makes the answer less likely gets the
least there is. The gold answer is what the search's objective is told by as well (docs/method.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fusion_lens.activations import at_least_float32
from fusion_lens.errors import PlanError
from fusion_lens.executors import executor_of
from fusion_lens.identity import identify
from fusion_lens.models import HookedModel, differentiating
from fusion_lens.operators import affine, gate_value
from fusion_lens.plans import Plan, Segment, Step
from fusion_lens.steps import Move, steered_mask
from fusion_lens.teacher_forcing import Text, require_written

LENGTHS = (0.5, 0.75, 1.0)
"""What the largest coefficient of a start is; chosen on dev questions of Atlas."""


def answer_gradient(model: HookedModel, text: Text) -> Float[Tensor, " layer"]:
    """The derivative of log p(written | prompt), in nats, by a factor on what the text's plan does
    at each layer, where all factors are 0.

    The plan must be of one `Step` with `mean="question"`. The model is run by its hook points, on
    this text alone, and given back as it was.

    Raises:
        PlanError: if there is no such plan, or it belongs to another model.
        SpanError: if the text has nothing written.
    """
    require_written([text])
    move = _move_of(text)
    assert text.plan is not None
    text.plan.check(identify(model))
    run, _ = executor_of(model, "hooks")
    tokens = torch.tensor([text.tokens], device=run.device)
    steered = _steered(text.plan, text).to(run.device)
    places = move.active.nonzero()[:, 0].tolist()
    with differentiating(model):
        factors = torch.zeros_like(move.shift[:, 0], device=run.device, requires_grad=True)
        at = {layer: partial(_weighed, move, factors, steered, layer) for layer in places}
        with run.at_blocks(at):
            logits = run.forward(tokens, torch.ones_like(tokens), last=len(text.written) + 1)
        logs = at_least_float32(logits[0, :-1]).log_softmax(dim=-1)
        written = torch.tensor(text.written, device=logs.device)
        total = logs.gather(1, written[:, None]).sum()
        (gradient,) = torch.autograd.grad(total, factors)
    return gradient.cpu()


def along_gradient(
    gradient: Float[Tensor, " layer"],
    segments: Sequence[Segment],
    lengths: Sequence[float],
    bounds: tuple[float, float],
) -> list[dict[str, float]]:
    """A start for every length, with a coefficient per segment within the bounds; none where no
    segment makes the answer likelier, or the gradient is not finite."""
    sums = [float(gradient[own.start : own.stop].double().sum()) for own in segments]
    most = max(sums)
    if not bool(torch.isfinite(gradient).all()) or most <= 0:
        return []
    low, high = bounds
    return [
        {
            own.name: min(max(length * total / most, low), high)
            for own, total in zip(segments, sums, strict=True)
        }
        for length in lengths
    ]


def _move_of(text: Text) -> Move:
    """What the plan does to the residual stream at a factor of 1."""
    steps = () if text.plan is None else text.plan.steps
    if len(steps) != 1 or not isinstance(steps[0], Step) or steps[0].needs_sequence:
        raise PlanError(
            'a gradient needs a plan of one step of deltas with mean="question", but got '
            f"{' and '.join(step.told for step in steps) or 'none'}."
        )
    return steps[0].move


def _steered(plan: Plan, text: Text) -> Bool[Tensor, "1 pos"]:
    step = plan.steps[0]
    places = torch.arange(len(text.tokens))
    return steered_mask(step.positions, step.steer_special, text.prompt.layout, places)[None]


def _weighed(
    move: Move,
    factors: Float[Tensor, " layer"],
    steered: Bool[Tensor, "1 pos"],
    layer: int,
    x: Float[Tensor, "1 pos d_model"],
) -> Float[Tensor, "1 pos d_model"]:
    def here(own: Tensor) -> Tensor:
        return own[layer, None].to(x.device)

    gate = None
    if move.gate is not None:
        gate = gate_value(x, here(move.gate.theta), here(move.gate.bias), move.gate.kind)
    return affine(x, None, factors[layer].to(x.device) * here(move.shift), steered, gate=gate)

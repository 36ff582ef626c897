"""When and how to steer, learned together through the model (DSAS, the end-to-end variant).

Ferrando et al. 2025, arXiv 2512.03661, after LinEAS (Rodriguez et al. 2025, arXiv 2503.10679).
Every layer has a gate g and an affine map omega*x + beta of each unit; a token's x becomes

    x + g(x) * ((omega - 1)*x + beta),   g(x) = sigmoid(theta.x + b), or relu of it,

and what training makes small is the sum over layers of

    mean over units of W1(steered source, unsteered target) + weight * damage,
    damage = sum ||steered - unsteered||^2 / sum ||unsteered||^2 over the tokens of control texts.

W1 is the Wasserstein-1 distance between texts' means over their tokens; everything is read behind
the layer's own step, in a run that is steered below. The paper publishes neither weight nor
optimiser: the defaults were chosen on Atlas (docs/method.md, docs/negative_results.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fusion_lens.activations import at_least_float32, weighted_mean
from fusion_lens.errors import ActivationError, ConfigError, PlanError, one_of
from fusion_lens.executors import Executor, executor_of
from fusion_lens.identity import ModelIdentity, identify
from fusion_lens.methods.dsas import FittedGate
from fusion_lens.methods.wasserstein import wasserstein
from fusion_lens.models import SITES, HookedModel, Place, differentiating
from fusion_lens.operators import affine, gate_value
from fusion_lens.plans import Affine, Gate, Plan, full
from fusion_lens.progress import Progress, shown
from fusion_lens.prompts import NO_PROMPT
from fusion_lens.site_activations import read_positions, record_at
from fusion_lens.steps import GATES
from fusion_lens.tables import Section, Shows
from fusion_lens.teacher_forcing import Text

_ROWS_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Training:
    """How gate and map are trained: by Adam, in each of `steps` on `batch_size` source texts and as
    many control texts, drawn by `seed`, and on all target texts.

    `rate` is about how far a step moves each parameter; that of beta is in units of the
    activations, so that a model whose activations are large needs a larger rate or more steps.
    """

    site: str = "resid_post"
    kind: str = "sigmoid"
    weight: float = 10.0
    steps: int = 200
    rate: float = 0.03
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("site", self.site, SITES)
        one_of("a gate's kind", self.kind, GATES)
        for name, least in (("steps", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"{name} must be at least {least}, but got {getattr(self, name)}."
                )
        if not 0.0 <= self.weight < math.inf:
            raise ConfigError(f"0 <= weight must hold and be finite, but got {self.weight=}.")
        if not 0.0 < self.rate < math.inf:
            raise ConfigError(f"0 < rate must hold and be finite, but got {self.rate=}.")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Trained(Shows):
    """What training ended with, and both parts of the loss before each of its steps, summed over
    layers: `transport` in units of the activations, `damage` as a share, not yet weighted."""

    plan: Plan
    transport: tuple[float, ...]
    damage: tuple[float, ...]
    config: Training

    @property
    def losses(self) -> tuple[float, ...]:
        """What was made small."""
        return tuple(
            transport + self.config.weight * damage
            for transport, damage in zip(self.transport, self.damage, strict=True)
        )

    def table(self) -> Section:
        """The loss over the course of training."""
        last = len(self.losses) - 1
        places = sorted({round(last * n / _ROWS_SHOWN) for n in range(_ROWS_SHOWN + 1)})
        rows = tuple(
            (str(n), *(f"{own[n]:.5f}" for own in (self.losses, self.transport, self.damage)))
            for n in places
        )
        config = self.config
        return Section(
            f"{config.kind} gate and affine map at {config.site} of {self.plan.model.name}, "
            f"trained for {config.steps} steps",
            ("step", "loss", "transport", "damage"),
            rows,
            (f"loss = transport + {config.weight:g} * damage",),
        )

    def __repr__(self) -> str:
        losses = f"loss {self.losses[0]:.4g} to {self.losses[-1]:.4g}"
        return f"Trained({self.plan.model.name}, {self.config.site}, {losses})"


def train(
    model: HookedModel,
    source: Sequence[Text],
    target: Sequence[Text],
    control: Sequence[Text],
    config: Training | None = None,
    *,
    start: FittedGate | None = None,
    progress: Progress | bool = True,
) -> Trained:
    """Train on teacher-forced texts, from omega 1 and beta 0, where nothing is changed.

    The gate begins as `start`, whose closed layers are left alone for good; None: as 0.5 for every
    token of every layer. The model is run by its hook points and given back as it was. `progress`
    is as in `tune`.

    Raises:
        ActivationError: if a side has no text, or the loss is no longer finite.
        SpanError: if a text has only special tokens.
        PlanError: if a text has a plan, or `start` is of another model, site or kind.
    """
    config = config or Training()
    _check_texts(source, target, control)
    run, _ = executor_of(model, "hooks", (config.site,))
    goal = record_at(model, target, config.site, tokens="mean", executor="hooks").values
    goal = goal.to(run.device)
    identity = identify(model)
    learned = _started(identity, config, goal, start)
    generator = torch.Generator().manual_seed(config.seed)
    optimiser = torch.optim.Adam(learned.parameters, lr=config.rate)
    history = []
    with shown(progress) as show, differentiating(model):
        for n in range(config.steps):
            drawn = _drawn(source, config.batch_size, generator)
            transport = _transport(run, learned, _Rows.of(drawn, run.device), goal)
            drawn = _drawn(control, config.batch_size, generator)
            damage = _damage(run, learned, _Rows.of(drawn, run.device))
            loss = transport + config.weight * damage
            if not bool(loss.isfinite()):
                raise ActivationError(
                    f"the loss must stay finite, but is {loss.item()} after {n} steps; "
                    f"lower the rate, which is {config.rate:g}."
                )
            history.append((transport.item(), damage.item()))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if show is not None:
                show("training steps", n + 1, config.steps)
    transports, damages = zip(*history, strict=True)
    return Trained(learned.plan(identity), transports, damages, config)


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """Texts in one shape, padded on the right; `weights` average each over its own tokens."""

    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    weights: Float[Tensor, "batch pos"]

    @staticmethod
    def of(texts: Sequence[Text], device: torch.device) -> _Rows:
        columns = []
        for text in texts:
            tokens = torch.tensor(text.tokens)
            weights = torch.zeros(len(tokens))
            kept = list(read_positions(text, "mean"))
            weights[kept] = 1.0 / len(kept)
            columns.append((tokens, torch.ones_like(tokens), weights))
        padded = (pad_sequence(list(own), batch_first=True) for own in zip(*columns, strict=True))
        return _Rows(*(own.to(device) for own in padded))

    @property
    def steered(self) -> Bool[Tensor, "batch pos"]:
        return self.weights > 0


@dataclass(frozen=True, slots=True, eq=False)
class _Learned:
    """The parameters of every layer, on the model's device; only those of open layers are used."""

    config: Training
    theta: Float[Tensor, "layer width"]
    bias: Float[Tensor, " layer"]
    scale: Float[Tensor, "layer width"]
    shift: Float[Tensor, "layer width"]
    open: Bool[Tensor, " layer"]

    @property
    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return [self.theta, self.bias, self.scale, self.shift]

    @property
    def places(self) -> list[Place]:
        """The site of every layer."""
        return [(self.config.site, layer) for layer in range(len(self.open))]

    def changed(
        self, layer: int, x: Float[Tensor, "batch pos width"], steered: Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos width"]:
        """`x` behind the layer's step."""
        if not bool(self.open[layer]):
            return x
        theta, bias, scale, shift = (own[layer, None] for own in self.parameters)
        gate = gate_value(x, theta, bias, self.config.kind)
        return affine(x, scale, shift, steered, gate=gate)

    def plan(self, model: ModelIdentity) -> Plan:
        """A plan of one step, of no prompt of its own."""
        theta, bias, scale, shift = (own.detach().cpu().clone() for own in self.parameters)
        return Plan(
            (
                Affine(
                    site=self.config.site,
                    scale=scale,
                    shift=shift,
                    segments=full(model.n_layers),
                    coeffs=(1.0,),
                    model=model,
                    layout=NO_PROMPT,
                    gate=Gate(theta, bias, self.open, self.config.kind),
                ),
            )
        )


def _started(
    model: ModelIdentity,
    config: Training,
    goal: Float[Tensor, "text layer width"],
    start: FittedGate | None,
) -> _Learned:
    nothing = torch.zeros_like(goal[0])
    if start is None:
        half = 0.5 if config.kind == "relu" else 0.0
        bias = torch.full_like(nothing[:, 0], half)
        gate = Gate(nothing.cpu(), bias.cpu(), torch.ones(len(nothing), dtype=torch.bool))
    else:
        _check_start(start, model, config)
        gate = start.gate
    theta, bias, scale, shift = (
        own.to(goal).clone().requires_grad_() for own in (gate.theta, gate.bias, nothing, nothing)
    )
    return _Learned(config, theta, bias, scale, shift, gate.open)


def _transport(
    run: Executor, learned: _Learned, source: _Rows, goal: Float[Tensor, "text layer width"]
) -> Float[Tensor, ""]:
    pooled = [weighted_mean(x, source.weights) for x in _behind(run, source, learned)]
    distances = [wasserstein(x, goal[:, layer]).mean() for layer, x in enumerate(pooled)]
    return torch.stack(distances).sum()


def _damage(run: Executor, learned: _Learned, control: _Rows) -> Float[Tensor, ""]:
    after = _behind(run, control, learned)
    with torch.no_grad():
        before = _behind(run, control, learned, steered=False)
    shares = []
    for x, y in zip(before, after, strict=True):
        plain, steered = (at_least_float32(own[control.steered]) for own in (x, y))
        shares.append((steered - plain).square().sum() / plain.square().sum())
    return torch.stack(shares).sum()


def _behind(
    run: Executor, rows: _Rows, learned: _Learned, *, steered: bool = True
) -> list[Float[Tensor, "batch pos width"]]:
    """One pass: the activation of every layer behind its step, or where that would stand."""
    behind: dict[int, Tensor] = {}

    def at(layer: int, x: Float[Tensor, "batch pos width"]) -> Tensor:
        behind[layer] = learned.changed(layer, x, rows.steered) if steered else x
        return behind[layer]

    with run.at_sites({place: partial(at, place[1]) for place in learned.places}):
        run.forward(rows.tokens, rows.mask, last=1)
    return [behind[layer] for _, layer in learned.places]


def _drawn(texts: Sequence[Text], size: int, generator: torch.Generator) -> list[Text]:
    order = torch.randperm(len(texts), generator=generator)[:size]
    return [texts[i] for i in order.tolist()]


def _check_texts(*sides: Sequence[Text]) -> None:
    if not all(sides):
        counts = [len(texts) for texts in sides]
        raise ActivationError(
            "there must be source, target and control texts, but got "
            f"{counts[0]}, {counts[1]} and {counts[2]}."
        )
    for text in (text for texts in sides for text in texts):
        if text.plan is not None:
            raise PlanError(
                f"texts must be given without a plan, but that of {text.prompt.text!r} has one."
            )


def _check_start(start: FittedGate, model: ModelIdentity, config: Training) -> None:
    if not bool(start.gate.open.any()):
        raise PlanError(
            "the gate to start from must be open on some layer, but is on none; "
            "fit it on texts that can be told apart, or start without one."
        )
    reason = start.model.mismatch(model)
    if reason is not None:
        raise PlanError(f"the gate to start from must be of the model, but {reason}.")
    if (start.site, start.gate.kind) != (config.site, config.kind):
        raise PlanError(
            f"the gate to start from must be a {config.kind} gate at {config.site}, "
            f"but got a {start.gate.kind} gate at {start.site}."
        )

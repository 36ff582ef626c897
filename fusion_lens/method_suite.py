"""Every method, fitted on the same texts, as ways of steering over a sweep of its strengths.

What a method leaves open (which layer, which site, how many units) is a variant of it: `lines`
gives all of them, and which one is used is chosen on texts of another part. All methods have
equally many strengths. Fusion Steering alone is told the target text of the very prompt it steers;
its `generic` form has the mean delta of the texts that are fitted on, as the others do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusion_lens.behaviours import Way
from fusion_lens.contrast_texts import example_texts
from fusion_lens.contrasts import KINDS, Example, of_kind
from fusion_lens.deltas import Deltas
from fusion_lens.engine_log import EngineLog
from fusion_lens.errors import ConfigError, ContrastError, one_of
from fusion_lens.gate_values import gate_values, mean_gate
from fusion_lens.identity import identify
from fusion_lens.methods.act_add import act_add
from fusion_lens.methods.austeer import austeer, momenta
from fusion_lens.methods.caa import caa
from fusion_lens.methods.control_vectors import control_vectors
from fusion_lens.methods.dsas import N_FOLDS, FittedGate, constant_gate, fit_gate, gated
from fusion_lens.methods.dsas_end_to_end import Training, train
from fusion_lens.methods.iti import LEAST_PAIRS as ITI_PAIRS
from fusion_lens.methods.iti import iti
from fusion_lens.methods.linear_act import linear_act
from fusion_lens.methods.prompting import demonstrations
from fusion_lens.models import SITES, HookedModel
from fusion_lens.plans import Affine, Plan, make_plan
from fusion_lens.prompts import NO_PROMPT
from fusion_lens.site_activations import SiteActivations, record_at
from fusion_lens.teacher_forcing import Text
from fusion_lens.units import Momenta, consistent, unit_mask

T = TypeVar("T")

GATES = ("dsas", "permuted", "constant")
_SHARES_OF_HEADS = (16, 8, 4, 2)
FRACTIONS = (0.1, 0.2, 0.4, 0.7, 1.0, 1.5)
LAMBDAS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
ONE_LAYER = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
STRENGTHS = {
    "prompting": (1, 2, 3, 4, 6, 8),
    "fusion": FRACTIONS,
    "generic": FRACTIONS,
    "fusion_masked": FRACTIONS,
    "generic_masked": FRACTIONS,
    "caa": ONE_LAYER,
    "act_add": ONE_LAYER,
    "control_mean": FRACTIONS,
    "control_pca": FRACTIONS,
    "iti": (0.5, 1.0, 3.0, 7.0, 15.0, 30.0),
    "linear_act": LAMBDAS,
    "dsas_end_to_end": LAMBDAS,
    "austeer": (0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
}
METHODS = tuple(STRENGTHS)
FROM_PAIRS = ("caa", "act_add", "control_mean", "control_pca", "iti", "austeer")
"""Those that learn from a right and a wrong text of the same prompt."""
PER_PROMPT = ("fusion", "fusion_masked")
"""Those whose plans belong to the prompts they were made for."""


@dataclass(frozen=True, slots=True)
class Line:
    """One variant of a method over its strengths. `gate` names what weighs it, if anything does;
    `n_scalars` are the numbers it holds, `seconds` what it took to fit."""

    method: str
    variant: str
    strengths: tuple[float | int, ...]
    ways: tuple[Way, ...]
    n_scalars: int
    seconds: float
    gate: str = ""

    @property
    def name(self) -> str:
        """Method and gate."""
        return line_name(self.method, self.gate)


def line_name(method: str, gate: str) -> str:
    """What a method with a gate is called; without one, its own name."""
    return f"{method} + {gate} gate" if gate else method


Fitted = Sequence[Plan] | Sequence[str]
"""Plans of strength 1, one for all prompts or one for each source; or a prefix per strength."""


class Suite:
    """The texts of one part that everything is fitted on, with what the model does on them.

    `units` are the numbers of units that AUSteer and masks are tried with. A target that has its
    source's prompt makes a pair with it: methods that learn from pairs need them.

    Raises:
        ContrastError: if there is no source, target or control.
    """

    def __init__(
        self,
        model: HookedModel,
        examples: Sequence[Example],
        *,
        units: Sequence[int] = (1, 10, 100),
        seed: int = 0,
        log: EngineLog | None = None,
    ) -> None:
        self.model = model
        self.units = tuple(units)
        self.seed = seed
        self.log = log or EngineLog()
        self.examples = {kind: of_kind(examples, kind) for kind in KINDS}
        for kind, own in self.examples.items():
            if not own:
                raise ContrastError(
                    f"methods must be fitted on sources, targets and controls, but no {kind} is "
                    "there."
                )
        self.texts = {kind: example_texts(model, own) for kind, own in self.examples.items()}
        self.pairs = _pairs(self.examples)
        self._known: dict[tuple[Any, ...], tuple[Any, float]] = {}
        self._skipped = 0.0

    def require(self, methods: Sequence[str], *, gated: bool) -> None:
        """Refuse, before anything is fitted, what cannot be fitted on these texts.

        Raises:
            ConfigError: if there are fewer units than asked for.
            ContrastError: if there are too few pairs for a method, or too few subjects for a gate.
        """
        cfg = self.model.cfg
        n_units = int(cfg.n_layers * min(cfg.d_model, cfg.n_heads * cfg.d_head))
        for k in self.units:
            if not 1 <= k <= n_units:
                raise ConfigError(f"1 <= units <= {n_units} must hold, but got {k}.")
        for method in methods:
            least = ITI_PAIRS if method == "iti" else 2
            if method in FROM_PAIRS and len(self.pairs) < least:
                raise ContrastError(
                    f"{method} must have at least {least} targets with the prompts of sources to "
                    f"be fitted on, but got {len(self.pairs)}; add some, or leave it out."
                )
        for kind in ("source", "control") if gated else ():
            subjects = {each.subject or each.id for each in self.examples[kind]}
            if len(subjects) < N_FOLDS:
                raise ContrastError(
                    f"a gate must be fitted on {kind}s about at least {N_FOLDS} subjects, but got "
                    f"{len(subjects)}; add some, or compare without gates."
                )

    def lines(
        self, method: str, asked: Sequence[Example], *, variant: str | None = None
    ) -> list[Line]:
        """All variants of a method, or one of them, to steer the sources and controls of `asked`.
        AUSteer is a method of its own for every number of units, "austeer_10".

        Raises:
            ConfigError: if there is no such method.
            ContrastError: if it cannot be fitted on these texts.
        """
        one_of("method", method, METHODS)
        lines = []
        for name, own, fit in self._variants(method, asked):
            if variant in (None, own):
                fitted, seconds = self._timed(fit)
                lines.append(_line(name, own, STRENGTHS[method], fitted, seconds))
        return lines

    def gate(self, site: str, *, permuted: bool = False) -> FittedGate:
        """The gate of a site; with `permuted` that of permuted labels, on the same layers."""

        def fit() -> FittedGate:
            sides = [self._record(kind, site, "mean") for kind in ("source", "control")]
            subjects = [
                [each.subject or each.id for each in self.examples[kind]]
                for kind in ("source", "control")
            ]
            return fit_gate(
                *sides,
                groups=(subjects[0], subjects[1]),
                seed=self.seed,
                permute=self.seed if permuted else None,
                open=self.gate(site).gate.open if permuted else None,
            )

        return self._once(("gate", site, permuted), fit)

    def gated_line(self, line: Line, kind: str) -> Line | None:
        """The line with a gate on its plans: "dsas", or one of its controls, "permuted" labels and
        a "constant" of the same mean over the tokens of the fitted texts. None where there is no
        plan, it has a gate of its own, or no layer is told apart well enough to be open.

        Raises:
            ConfigError: if there is no such gate.
        """
        one_of("gate", kind, GATES)
        plans = [plan for way in line.ways for plan in way.plans]
        if not plans or any(step.gate is not None for step in plans[0].steps):
            return None
        gate, seconds = self._timed(lambda: self._gate_of(plans[0], kind))
        if not bool(gate.gate.open.any()):
            return None
        ways = tuple(
            replace(way, plans=tuple(gated(plan, gate) for plan in way.plans)) for way in line.ways
        )
        n_scalars = count_scalars(ways[0].plans[0])
        return replace(
            line, ways=ways, gate=kind, n_scalars=n_scalars, seconds=line.seconds + seconds
        )

    def _gate_of(self, plan: Plan, kind: str) -> FittedGate:
        (site,) = plan.sites
        gate = self.gate(site, permuted=kind == "permuted")
        if kind == "constant" and bool(gate.gate.open.any()):
            return constant_gate(gate, self._mean_gate(gate, plan))
        return gate

    def _mean_gate(self, gate: FittedGate, plan: Plan) -> Float[Tensor, " layer"]:
        """Over all tokens that are steered, of sources and controls, unsteered."""
        idle = gated(plan * 0.0, gate)
        texts = [replace(t, plan=idle) for kind in ("source", "control") for t in self.texts[kind]]
        read = gate_values(self.model, texts, log=self.log)
        means = mean_gate([own for text in read for own in text])
        # a layer that the plan leaves alone has no mean, and needs none
        return means.nan_to_num(0.5)

    def _variants(
        self, method: str, asked: Sequence[Example]
    ) -> Iterator[tuple[str, str, Callable[[], Fitted]]]:
        """Name, variant, and what fits it."""
        layers = range(int(self.model.cfg.n_layers))
        if method == "prompting":
            yield method, "", self._demonstrations
        elif method in ("fusion", "generic"):
            yield method, "", partial(self._fusion, method, asked)
        elif method in ("fusion_masked", "generic_masked"):
            for k in self.units:
                base = method.removesuffix("_masked")
                yield method, f"{k} units", partial(self._fusion, base, asked, k)
        elif method in ("caa", "act_add"):
            fit = self._caa if method == "caa" else self._act_add
            for layer in layers:
                yield method, f"layer {layer}", partial(fit, layer)
        elif method in ("control_mean", "control_pca"):
            yield method, "", partial(self._control_vectors, method.removeprefix("control_"))
        elif method == "iti":
            n_heads = len(layers) * int(self.model.cfg.n_heads)
            for n_kept in sorted({max(1, n_heads // share) for share in _SHARES_OF_HEADS}):
                yield method, f"{n_kept} heads", partial(self._iti, n_kept)
        elif method == "dsas_end_to_end":
            for site in SITES:
                yield method, site, partial(self._end_to_end, site)
        elif method == "linear_act":
            for site in SITES:
                yield method, site, partial(self._linear_act, site)
        else:
            for site in SITES:
                for k in self.units:
                    yield f"austeer_{k}", site, partial(self.austeer, site, k)

    def _demonstrations(self) -> list[str]:
        counts = [int(n) for n in STRENGTHS["prompting"]]
        return [demonstrations(self.examples["target"], n, seed=self.seed) for n in counts]

    def _fusion(self, method: str, asked: Sequence[Example], k: int | None = None) -> list[Plan]:
        def others() -> list[Deltas]:
            return self._once(("deltas",), lambda: self._deltas(self.examples["target"]))

        found = self._deltas(_targets(asked)) if method == "fusion" else [mean_deltas(others())]
        units = None
        if k is not None:
            shape = (found[0].model.n_layers, found[0].model.d_model)
            units = unit_mask(consistent(others()).ranking, k, shape)
        return [make_plan(own, 1.0, units=units) for own in found]

    def _deltas(self, targets: Sequence[Example]) -> list[Deltas]:
        """Of each text against its prompt: reference minus question, as of a question."""
        texts = example_texts(self.model, targets)
        reference = record_at(self.model, texts, tokens="written", log=self.log)
        prompts = [Text(text.prompt) for text in texts]
        base = record_at(self.model, prompts, tokens="mean", log=self.log)
        identity = identify(self.model)
        return [
            Deltas(h, mu, NO_PROMPT, identity)
            for h, mu in zip(reference.values, base.values, strict=True)
        ]

    def _caa(self, layer: int) -> list[Plan]:
        return [caa(*self._paired("resid_post"), layer)]

    def _act_add(self, layer: int) -> list[Plan]:
        right, wrong = self._require_pairs()[0]
        return [act_add(self.model, right.text, wrong.text, layer)]

    def _control_vectors(self, how: str) -> list[Plan]:
        right, wrong = self._paired("resid_post")
        # a direction has no length: one as long as the mean difference has strength 1
        unit = float((right.values - wrong.values).mean(dim=0).norm(dim=-1).mean())
        return [control_vectors(right, wrong, how=how) * (1.0 if how == "mean" else unit)]

    def _iti(self, n_kept: int) -> list[Plan]:
        n_heads = int(self.model.cfg.n_heads)
        sides = self._paired("attn_z")
        groups = [source.subject or source.id for _, source in self.pairs]
        return [iti(*sides, n_heads, n_kept=n_kept, groups=groups, seed=self.seed).plan]

    def _linear_act(self, site: str) -> list[Plan]:
        sides = self.texts["source"], self.texts["target"]
        return [linear_act(self.model, *sides, site=site, progress=False)]

    def _end_to_end(self, site: str) -> list[Plan]:
        source, target, control = (self.texts[kind] for kind in KINDS)
        config = Training(site=site, seed=self.seed)
        return [train(self.model, source, target, control, config, progress=False).plan]

    def austeer(
        self, site: str, k: int, ranking: Callable[[Momenta], Int[Tensor, "unit 2"]] | None = None
    ) -> list[Plan]:
        """AUSteer at a site, or what it does on the first `k` units of another ranking."""
        found = self.momenta(site)
        order = found.ranking if ranking is None else ranking(found)
        return [austeer(found, k, ranking=order)]

    def momenta(self, site: str) -> Momenta:
        """Of the pairs, at a site."""
        return momenta(*self._paired(site))

    def _paired(self, site: str) -> tuple[SiteActivations, SiteActivations]:
        self._require_pairs()
        right, wrong = (self._record(side, site, "last") for side in ("right", "wrong"))
        return right, wrong

    def _require_pairs(self) -> list[tuple[Example, Example]]:
        if not self.pairs:
            raise ContrastError(
                "a method that learns from pairs must have targets with the prompts of sources, "
                "but no two prompts are the same."
            )
        return self.pairs

    def _timed(self, fit: Callable[[], T]) -> tuple[T, float]:
        """What it gives, in how many seconds: those of what is known count for all who use it."""
        began = self._now()
        found = fit()
        return found, self._now() - began

    def _now(self) -> float:
        """Seconds, as if all that is known had been made anew whenever it was used."""
        return time.perf_counter() + self._skipped

    def _once(self, key: tuple[Any, ...], fit: Callable[[], T]) -> T:
        """What it gives; it is made once for each key."""
        if key in self._known:
            self._skipped += self._known[key][1]
        else:
            self._known[key] = self._timed(fit)
        found: T = self._known[key][0]
        return found

    def _record(self, what: str, site: str, tokens: str) -> SiteActivations:
        def read() -> SiteActivations:
            sides = {"right": 0, "wrong": 1}
            if what in sides:
                texts = example_texts(self.model, [pair[sides[what]] for pair in self.pairs])
            else:
                texts = self.texts[what]
            return record_at(self.model, texts, site, tokens=tokens, log=self.log)

        return self._once((what, site, tokens), read)


def mean_deltas(deltas: Sequence[Deltas]) -> Deltas:
    """The mean of several questions' deltas."""
    reference = torch.stack([own.reference for own in deltas]).mean(dim=0)
    base = torch.stack([own.base for own in deltas]).mean(dim=0)
    return Deltas(reference, base, NO_PROMPT, deltas[0].model)


def count_scalars(plan: Plan) -> int:
    """How many numbers a plan holds: what it adds and scales by, its bounds, and its gates."""
    total = 0
    for step in plan.steps:
        move = step.move
        parts = [move.shift] if move.scale is None else [move.shift, move.scale]
        total += sum(int((part[move.active] != 0).sum()) for part in parts)
        if isinstance(step, Affine):
            bounds = [own for own in (step.low, step.high) if own is not None]
            total += sum(int(own[move.active].isfinite().sum()) for own in bounds)
        if move.gate is not None:
            total += int((move.gate.theta[move.active] != 0).sum()) + int(move.active.sum())
    return total


def _line(
    method: str,
    variant: str,
    strengths: tuple[float | int, ...],
    fitted: Fitted,
    seconds: float,
) -> Line:
    plans = [own for own in fitted if isinstance(own, Plan)]
    if plans:
        ways = [Way(tuple(plan * strength for plan in plans)) for strength in strengths]
    else:
        ways = [Way(prefix=own) for own in fitted if isinstance(own, str)]
    n_scalars = count_scalars(plans[0]) if plans else 0
    return Line(method, variant, strengths, tuple(ways), n_scalars, seconds)


def _pairs(examples: Mapping[str, Sequence[Example]]) -> list[tuple[Example, Example]]:
    targets = {each.prompt: each for each in examples["target"] if each.prompt}
    return [
        (targets[source.prompt], source)
        for source in examples["source"]
        if source.prompt in targets
    ]


def _targets(asked: Sequence[Example]) -> list[Example]:
    """The target of each source, in the order of the sources."""
    targets = {each.prompt: each for each in of_kind(asked, "target")}
    sources = of_kind(asked, "source")
    missing = [each.id for each in sources if each.prompt not in targets]
    if missing:
        raise ContrastError(
            "Fusion Steering must be told a target for every source's prompt, but "
            f"{len(missing)} of {len(sources)} have none, {missing[0]!r} first; leave it out."
        )
    return [targets[each.prompt] for each in sources]

"""Methods on the same texts: fitted on one part, their variants and strengths chosen on another,
reported on a third.

Effect is the share of source prompts whose behaviour is gone, specificity the share of control
prompts that are written word for word as without steering. A method's variant and strength are
those of the largest harmonic mean of the two on the part "choose", which is 0 for what does nothing
and for what breaks everything; the part "report" is read once, over all
strengths, so that methods can be compared where their effects are equal (`fronts`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusion_lens.behaviours import UNSTEERED, Behaviour, Observed
from fusion_lens.contrasts import Example, require_parts
from fusion_lens.divergence import kl_unrelated
from fusion_lens.durable import replace_text
from fusion_lens.errors import ConfigError, one_of
from fusion_lens.fronts import Matched, Sweep, matched
from fusion_lens.method_suite import GATES, METHODS, PER_PROMPT, Line, Suite, line_name
from fusion_lens.models import HookedModel
from fusion_lens.plans import Plan
from fusion_lens.progress import Progress, shown
from fusion_lens.prompts import Prompt
from fusion_lens.statistics import cluster_bootstrap
from fusion_lens.steps import AFTER_PROMPT
from fusion_lens.tables import Section, Shows

LEAST = 10
LEVELS = (0.25, 0.5, 0.75)


@dataclass(frozen=True, slots=True)
class Point:
    """One method at one strength on the part "report". Shares are of texts, `nll` in nats per
    token of what is written on source prompts, `kl` in nats per token of unrelated text; None is
    unscored. `low` and `high` bound the effect's 95 % interval over `n` sources, those of the
    specificity its own. `seconds` were spent to fit the method and to write these texts. `chosen`:
    at the strength that was chosen for it."""

    method: str
    gate: str
    variant: str
    strength: float | int
    chosen: bool
    effect: float | None
    low: float | None
    high: float | None
    n: int
    wanted: float | None
    transfer: float | None
    specificity: float | None
    specificity_low: float | None
    specificity_high: float | None
    marked: float | None
    nll: float | None
    kl: float | None
    n_scalars: int
    seconds: float

    @property
    def name(self) -> str:
        """Method and gate."""
        return line_name(self.method, self.gate)


@dataclass(frozen=True, slots=True)
class Reported:
    """One line on the part "report", with what it did at each strength, text by text, in so many
    seconds; `chosen` is the place of the strength that was chosen for it."""

    line: Line
    chosen: int
    observed: tuple[Observed, ...]
    seconds: float

    @property
    def sweep(self) -> Sweep:
        """Effect and what is kept, over the strengths."""
        return Sweep(
            tuple(own.effect for own in self.observed), tuple(own.kept for own in self.observed)
        )


@dataclass(frozen=True, slots=True)
class MethodBench(Shows):
    """What was measured. `of_sources` and `of_controls` are the subjects of the texts."""

    points: tuple[Point, ...]
    reported: tuple[Reported, ...]
    of_sources: tuple[str, ...]
    of_controls: tuple[str, ...]
    seed: int

    def line(self, name: str) -> Reported:
        """That of a method's name, `+ <gate> gate` included.

        Raises:
            ConfigError: if there is none.
        """
        for own in self.reported:
            if own.line.name == name:
                return own
        names = ", ".join(own.line.name for own in self.reported)
        raise ConfigError(f"a line must be one of {names}, but got {name!r}.")

    def matched(self, a: str, b: str, levels: Sequence[float] = LEVELS) -> list[Matched]:
        """What `a` keeps more than `b` at equal effect."""
        sweeps = self.line(a).sweep, self.line(b).sweep
        return matched(*sweeps, self.of_sources, self.of_controls, levels, seed=self.seed)

    def gate_tables(self) -> list[Section]:
        """For every gate, what it keeps more than nothing, and than its controls, at equal
        effect."""
        names = [own.line.name for own in self.reported]
        sections = []
        for own in self.reported:
            if own.line.gate != "dsas":
                continue
            base = own.line.method
            others = [line_name(base, gate) for gate in ("", *GATES[1:])]
            rows = tuple(
                (other, f"{100 * at.level:.0f}", _percent(at.a), _percent(at.b), _difference(at))
                for other in others
                if other in names
                for at in self.matched(own.line.name, other)
            )
            header = ("against", "effect, %", "kept, gated, %", "kept, %", "difference, points")
            sections.append(Section(f"{own.line.name}, at equal effect", header, rows))
        return sections

    def to_json(self) -> list[dict[str, Any]]:
        """A record per method and strength."""
        return [asdict(point) for point in self.points]

    def write(self, path: str | Path) -> None:
        """Write them as JSON.

        Raises:
            OutputError: if the file cannot be written.
        """
        replace_text(Path(path), json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")

    def table(self) -> Section:
        """Every method at the strength that was chosen for it."""
        rows = tuple(
            (
                _told(point),
                _with_interval(point.effect, point.low, point.high),
                _percent(point.wanted),
                _percent(point.transfer),
                _with_interval(point.specificity, point.specificity_low, point.specificity_high),
                "-" if point.nll is None else f"{point.nll:.2f}",
                "-" if point.kl is None else f"{point.kl:.2f}",
                f"{point.n_scalars:,}",
            )
            for point in self.points
            if point.chosen
        )
        shares = ("effect, %", "wanted, %", "transfer, %", "kept, %")
        notes = (
            f"effect: the behaviour is gone on {len(self.of_sources)} source prompts; wanted: the "
            "target's marker is there; transfer: gone on paraphrases; kept (specificity): written "
            f"as without steering on {len(self.of_controls)} control prompts; nll: nats per token "
            "of what is written on source prompts; KL: nats per token of unrelated text.",
            "95 % intervals, cluster bootstrap over subjects. Variant and strength, behind the "
            "method's name, were chosen on other texts.",
        )
        header = ("method", *shares, "nll", "KL", "scalars")
        return Section("methods on the part report", header, rows, notes)


def compare_methods(
    model: HookedModel,
    examples: Sequence[Example],
    *,
    methods: Sequence[str] = METHODS,
    gates: Sequence[str] = ("dsas",),
    units: Sequence[int] = (1, 10, 100),
    unrelated: Sequence[Prompt] = (),
    max_new_tokens: int = 48,
    all_transfer: bool = True,
    seed: int = 0,
    progress: Progress | bool = True,
) -> MethodBench:
    """Fit, choose and report every method, alone and with every gate of `gates`. Transfer is read
    at every strength, or without `all_transfer` at the chosen ones.

    Raises:
        ConfigError: if there is no such method or gate.
        ContrastError: if a part or kind has fewer than 10 texts, parts share a subject, or the
            unsteered model does not show the behaviour.
    """
    for method in methods:
        one_of("method", method, METHODS)
    for gate in gates:
        one_of("gate", gate, GATES)
    parts = require_parts(examples, least=LEAST)
    suite = Suite(model, parts["fit"], units=units, seed=seed)
    suite.require(methods, gated=bool(gates))
    choose, report = (
        Behaviour(model, parts[name], max_new_tokens=max_new_tokens)
        for name in ("choose", "report")
    )
    reported = [_read(report, Line("unsteered", "", (0,), (UNSTEERED,), 0, 0.0), 0)]
    with shown(progress) as show:
        for done, method in enumerate(methods):
            if show is not None:
                show("methods", done, len(methods))
            for tried, at in _best_variants(suite, choose, method, parts["choose"]):
                line = tried
                if method in PER_PROMPT:
                    (line,) = suite.lines(method, parts["report"], variant=tried.variant)
                reported.append(_read(report, line, at, all_transfer=all_transfer))
                for gate in gates:
                    judged = suite.gated_line(tried, gate)
                    own = judged if line is tried else suite.gated_line(line, gate)
                    if judged is not None and own is not None:
                        at, _ = _best_strength(choose, judged)
                        reported.append(_read(report, own, at, all_transfer=all_transfer))
        if show is not None:
            show("methods", len(methods), len(methods))
    of_sources, of_controls = (
        tuple(each.subject or each.id for each in side)
        for side in (report.sources, report.controls)
    )
    points = [
        point
        for own in reported
        for point in _points(model, own, of_sources, of_controls, unrelated, seed)
    ]
    return MethodBench(tuple(points), tuple(reported), of_sources, of_controls, seed)


def _best_variants(
    suite: Suite, choose: Behaviour, method: str, asked: Sequence[Example]
) -> list[tuple[Line, int]]:
    """Of each name the variant with the best strength, and which strength that is."""
    best: dict[str, tuple[float, Line, int]] = {}
    for line in suite.lines(method, asked):
        at, score = _best_strength(choose, line)
        if line.method not in best or score > best[line.method][0]:
            best[line.method] = score, line, at
    return [(line, at) for _, line, at in best.values()]


def _best_strength(choose: Behaviour, line: Line) -> tuple[int, float]:
    """The place of the best strength, the weaker of two that are equal, and its score."""
    observed = choose.observe(line.ways, paraphrased=False, likelihood=False)
    scores = [balance(own) for own in observed]
    return scores.index(max(scores)), max(scores)


def balance(observed: Observed) -> float:
    """The harmonic mean of effect and of what is kept."""
    effect, kept = (_mean(values) or 0.0 for values in (observed.effect, observed.kept))
    return 2 * effect * kept / (effect + kept) if effect + kept else 0.0


def _read(report: Behaviour, line: Line, chosen: int, *, all_transfer: bool = True) -> Reported:
    began = time.perf_counter()
    observed = report.observe(line.ways, paraphrased=all_transfer)
    if not all_transfer:
        (observed[chosen],) = report.observe([line.ways[chosen]])
    return Reported(line, chosen, tuple(observed), time.perf_counter() - began)


def _points(
    model: HookedModel,
    own: Reported,
    of_sources: Sequence[str],
    of_controls: Sequence[str],
    unrelated: Sequence[Prompt],
    seed: int,
) -> list[Point]:
    line = own.line
    kls: list[float | None] = [None] * len(line.ways)
    # a plan per prompt has no one divergence, a prefix is no part of unrelated text, and what acts
    # on a prompt alone is not read on it
    if unrelated and all(len(way.plans) == 1 and _writes(way.plans[0]) for way in line.ways):
        kls = kl_unrelated(model, unrelated, [way.plans[0] for way in line.ways])
    points = []
    for n, (strength, seen, kl) in enumerate(zip(line.strengths, own.observed, kls, strict=True)):
        effect = cluster_bootstrap(seen.effect, of_sources, seed=seed, share=True)
        kept = cluster_bootstrap(seen.kept, of_controls, seed=seed, share=True)
        points.append(
            Point(
                method=line.method,
                gate=line.gate,
                variant=line.variant,
                strength=strength,
                chosen=n == own.chosen,
                effect=effect.mean,
                low=effect.low,
                high=effect.high,
                n=effect.n,
                wanted=_mean(seen.wanted),
                transfer=_mean(seen.transfer),
                specificity=kept.mean,
                specificity_low=kept.low,
                specificity_high=kept.high,
                marked=_mean(seen.marked),
                nll=_mean(seen.nll),
                kl=kl,
                n_scalars=line.n_scalars,
                seconds=round(line.seconds + own.seconds / len(line.ways), 3),
            )
        )
    return points


def _writes(plan: Plan) -> bool:
    return any(step.positions in AFTER_PROMPT for step in plan.steps)


def _mean(values: Sequence[float | None]) -> float | None:
    scored = [value for value in values if value is not None]
    return sum(scored) / len(scored) if scored else None


def _told(point: Point) -> str:
    variant = f", {point.variant}" if point.variant else ""
    return f"{point.name}{variant}, {point.strength:g}" if point.strength else point.name


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}"


def _difference(at: Matched) -> str:
    if at.diff is None:
        return "not reached"
    if at.low is None or at.high is None:
        return f"{100 * at.diff:+.0f}"
    return f"{100 * at.diff:+.0f} [{100 * at.low:+.0f}, {100 * at.high:+.0f}]"


def _with_interval(value: float | None, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return _percent(value)
    return f"{_percent(value)} [{100 * low:.0f}, {100 * high:.0f}]"

"""Coefficients -> scores, guided by Optuna; knows no model.

Trials are asked in rounds: `Search.ask` gives the coefficients of one round, `Search.tell` takes
their outcomes in the order asked, and many searches can share one batch of generation between the
two. The zero plan is trial 1 of the n unless told otherwise, and after it come the coefficients
that a search is told to start from. Objectives arrive rounded
(`scores.objective`), because ties are the rule and 1e-7 of noise on a tie changes what TPE proposes
next.

The objective is `w*overlap - (1-w)*min(PPL/100, 1)`, or its two terms kept apart.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import optuna

from fusion_lens.errors import ConfigError, SearchError, one_of
from fusion_lens.scores import clipped
from fusion_lens.tables import Section, Shows

PARAMETRISATIONS = ("coeff", "alpha_gamma")
OBJECTIVES = ("weighted", "pareto")

_SHOWN = 8
_PART = (0.01, 1.0)
"""The range of alpha and of gamma."""
Coeffs = dict[str, float]
Values = dict[str, float | int]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A number that is sought beside the coefficients, within [low, high]; with `log` evenly in its
    logarithm, a whole number with `whole`. The zero plan's trial has it at `high`."""

    name: str
    low: float | int
    high: float | int
    log: bool = False
    whole: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise ConfigError(
                f"low <= high must hold for {self.name!r}, but got ({self.low=}, {self.high=})."
            )
        if self.log and self.low <= 0:
            raise ConfigError(f"{self.name!r} must be above 0 to be drawn by its logarithm.")
        if self.whole and not (float(self.low).is_integer() and float(self.high).is_integer()):
            raise ConfigError(f"{self.name!r} must lie between whole numbers to be one.")

    def draw(self, trial: optuna.trial.Trial) -> float | int:
        """Its value in a trial."""
        if self.whole:
            return trial.suggest_int(self.name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, log=self.log)


@dataclass(frozen=True, slots=True)
class SearchConfig:
    """How to search.

    `parametrisation="coeff"` draws one coefficient per segment from [low, high]; "alpha_gamma"
    draws the paper's pair per segment from [0.01, 1] and uses the product. `objectives="pareto"`
    keeps overlap and clipped perplexity apart. `zero_first` makes the zero plan the first trial.
    `sampler` makes any Optuna sampler from a seed; None is TPE with the parameters taken jointly.
    """

    trials: int = 30
    round_size: int = 5
    seed: int = 0
    low: float = 0.0
    high: float = 1.5
    parametrisation: str = "coeff"
    objectives: str = "weighted"
    weight: float = 0.7
    zero_first: bool = True
    sampler: Callable[[int], optuna.samplers.BaseSampler] | None = None

    def __post_init__(self) -> None:
        for name, least in (("trials", 1), ("round_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"{name} must be at least {least}, but got {getattr(self, name)}."
                )
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ConfigError(f"low < high must hold, but got ({self.low=}, {self.high=}).")
        if not 0.0 <= self.weight <= 1.0:
            raise ConfigError(f"0 <= weight <= 1 must hold, but got {self.weight=}.")
        one_of("parametrisation", self.parametrisation, PARAMETRISATIONS)
        one_of("objectives", self.objectives, OBJECTIVES)

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the largest coefficient that can be drawn."""
        if self.parametrisation == "coeff":
            return self.low, self.high
        return _PART[0] ** 2, _PART[1] ** 2


@runtime_checkable
class Outcome(Protocol):
    """What a search has to know of a trial; the rest of the value travels along untouched."""

    @property
    def objective(self) -> float: ...

    @property
    def overlap(self) -> float | None: ...

    @property
    def perplexity(self) -> float | None: ...


T = TypeVar("T", bound=Outcome)


@dataclass(frozen=True, slots=True)
class Trial(Generic[T]):
    """One finished trial; `number` counts from 1, `extra` are the parameters beside the
    coefficients."""

    number: int
    coeffs: Coeffs
    params: dict[str, float]
    injected_norm: float
    outcome: T
    extra: Values = field(default_factory=dict)

    @property
    def values(self) -> Values:
        """Coefficients and all else that was sought."""
        return self.coeffs | self.extra


@dataclass(frozen=True, slots=True)
class Tuned(Shows, Generic[T]):
    """A search that ended, or was interrupted: its trials, the best of them, and the Pareto front.

    `study` lacks the zero plan where that lies outside the sampled range: a trial without
    parameters would keep Optuna's samplers from learning about parameters jointly.
    """

    trials: tuple[Trial[T], ...]
    best: Trial[T]
    front: tuple[Trial[T], ...]
    study: optuna.Study = field(repr=False)
    interrupted: bool = False

    @property
    def unsteered(self) -> Trial[T] | None:
        """The zero plan's trial; None where the search did not begin with it."""
        first = self.trials[0]
        return None if any(first.coeffs.values()) else first

    @property
    def zero_won(self) -> bool | None:
        """Whether nothing beat the unsteered model; None where it was no trial."""
        return None if self.unsteered is None else self.best is self.unsteered

    def importances(self) -> dict[str, float]:
        """Optuna's importance of every parameter for being among the trials of the best objectives
        (PED-ANOVA; they sum to 1), the largest first; empty where the trials tell nothing: fewer
        than two, or all alike.

        Watanabe et al. 2023, arXiv 2304.10255.
        """
        # in the order of the study, which has no trial without parameters
        objectives = [trial.outcome.objective for trial in self.trials if trial.params]
        if len(set(objectives)) < 2:
            return {}
        with _quiet(), warnings.catch_warnings():
            # PED-ANOVA takes low targets for good ones, and warns of it
            warnings.simplefilter("ignore", UserWarning)
            found = optuna.importance.get_param_importances(
                self.study, target=lambda frozen: -objectives[frozen.number]
            )
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def table(self) -> Section:
        """The best trials, the chosen one first."""
        ranked = sorted(self.trials, key=lambda t: (t is not self.best, -t.outcome.objective))
        rows = tuple(
            (
                str(trial.number),
                *(f"{value:.3f}" for value in trial.coeffs.values()),
                *(f"{value:g}" for value in trial.extra.values()),
                f"{trial.outcome.objective:+.3f}",
                *(_score(value) for value in (trial.outcome.overlap, trial.outcome.perplexity)),
                f"{trial.injected_norm:.2f}",
            )
            for trial in ranked[:_SHOWN]
        )
        scores = ("objective", "overlap", "perplexity", "injected norm")
        notes = ["interrupted"] if self.interrupted else []
        notes += ["nothing beat the zero plan"] if self.zero_won else []
        notes += (
            ["trials of other coefficients reached the best objective too"] if self.tied else []
        )
        return Section(
            f"the best of {len(self.trials)} trials, the chosen one first",
            ("trial", *self.best.values, *scores),
            rows,
            tuple(notes),
        )

    @property
    def tied(self) -> bool:
        """Whether a trial of other coefficients reached the best objective too."""
        best = self.best
        return any(
            trial.outcome.objective == best.outcome.objective and trial.values != best.values
            for trial in self.trials
        )


@dataclass(frozen=True, slots=True)
class _Asked:
    """What was asked for; `trial` is None for a zero plan that the study does not know."""

    trial: optuna.trial.Trial | None
    coeffs: Coeffs
    extra: Values


class Search(Generic[T]):
    """One search, driven from outside, for a coefficient of every segment and what else there is
    to be sought.

    `norm` tells the injected norm of what is asked: ties go to the smaller one, then to the earlier
    trial. `starts` are coefficients that are tried first, in their order, behind the zero plan and
    within the number of trials; what else is sought is then at its highest. One that is zero, or
    was there before, is left out.

    Raises:
        SearchError: if nothing is sought, two things have one name, or a start lacks a segment,
            names another, or lies outside the range that is searched.
    """

    def __init__(
        self,
        segments: Sequence[str],
        config: SearchConfig,
        norm: Callable[[Values], float],
        extra: Sequence[Parameter] = (),
        starts: Sequence[Mapping[str, float]] = (),
    ) -> None:
        if not segments:
            raise SearchError("a search must have at least one segment, but got none.")
        names = [*segments, *(parameter.name for parameter in extra)]
        if len(set(names)) != len(names):
            raise SearchError(f"what is sought must have different names, but got {names}.")
        self._segments = tuple(segments)
        self._extra = tuple(extra)
        self._config = config
        self._starts = checked_starts(starts, segments, config)
        self._norm = norm
        self._trials: list[Trial[T]] = []
        self._asked: list[_Asked] = []
        self._exhausted = False
        make_sampler = config.sampler or _tpe
        up, down = optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE
        with _quiet():
            self._study = optuna.create_study(
                directions=[up] if config.objectives == "weighted" else [up, down],
                sampler=make_sampler(config.seed),
            )

    @property
    def done(self) -> bool:
        """Whether all trials have been told, or the sampler's grid is used up."""
        return self._exhausted or len(self._trials) >= self._config.trials

    @property
    def started(self) -> bool:
        """Whether at least one trial has been told."""
        return bool(self._trials)

    def ask(self) -> list[Values]:
        """The coefficients of the next round, with what else is sought; empty when the search is
        done.

        Raises:
            SearchError: if the last round has not been told.
        """
        if self._asked:
            raise SearchError("a round must be told before the next is asked; call tell first.")
        left = 0 if self.done else self._config.trials - len(self._trials)
        for _ in range(min(self._config.round_size, left)):
            place = len(self._trials) + len(self._asked) - self._config.zero_first
            if place < 0:
                self._asked.append(self._zero())
            elif place < len(self._starts):
                self._asked.append(self._start(self._starts[place]))
            else:
                self._asked.append(self._draw())
        return [asked.coeffs | asked.extra for asked in self._asked]

    def tell(self, outcomes: Sequence[T]) -> None:
        """The outcomes of the round, in the order asked.

        Raises:
            SearchError: if their number is not that of the round.
        """
        if len(outcomes) != len(self._asked):
            raise SearchError(
                "every trial of the round must be told, "
                f"but got {len(outcomes)} outcomes for {len(self._asked)}."
            )
        for asked, outcome in zip(self._asked, outcomes, strict=True):
            trial = asked.trial
            if trial is not None:
                self._tell_study(trial, _values(outcome, self._study))
            self._trials.append(
                Trial(
                    number=len(self._trials) + 1,
                    coeffs=asked.coeffs,
                    params=dict(trial.params) if trial is not None else {},
                    injected_norm=self._norm(asked.coeffs | asked.extra),
                    outcome=outcome,
                    extra=asked.extra,
                )
            )
        self._asked = []

    def result(self, *, interrupted: bool = False) -> Tuned[T]:
        """What has been found so far.

        Raises:
            SearchError: if no trial has been told.
        """
        if not self._trials:
            raise SearchError("a search must have a finished trial to give a result, but has none.")
        best = min(self._trials, key=lambda t: (-t.outcome.objective, t.injected_norm, t.number))
        front = tuple(
            trial
            for trial in self._trials
            if not any(_dominates(other.outcome, trial.outcome) for other in self._trials)
        )
        return Tuned(tuple(self._trials), best, front, self._study, interrupted)

    def _zero(self) -> _Asked:
        zero = dict.fromkeys(self._segments, 0.0)
        extra = {each.name: each.high for each in self._extra}
        if self._config.parametrisation == "coeff" and self._config.low <= 0 <= self._config.high:
            self._study.enqueue_trial(zero | extra)
            return self._draw()
        return _Asked(None, zero, extra)

    def _start(self, coeffs: Coeffs) -> _Asked:
        params = dict(coeffs)
        if self._config.parametrisation == "alpha_gamma":
            params = {
                f"{name}.{part}": math.sqrt(coeff)
                for name, coeff in coeffs.items()
                for part in ("alpha", "gamma")
            }
        self._study.enqueue_trial(params | {each.name: each.high for each in self._extra})
        return self._draw()

    def _draw(self) -> _Asked:
        trial = self._study.ask()
        coeffs = self._draw_coeffs(trial)
        return _Asked(trial, coeffs, {each.name: each.draw(trial) for each in self._extra})

    def _draw_coeffs(self, trial: optuna.trial.Trial) -> Coeffs:
        if self._config.parametrisation == "coeff":
            low, high = self._config.low, self._config.high
            return {name: trial.suggest_float(name, low, high) for name in self._segments}
        pairs = {
            name: (
                trial.suggest_float(f"{name}.alpha", *_PART),
                trial.suggest_float(f"{name}.gamma", *_PART),
            )
            for name in self._segments
        }
        return {name: alpha * gamma for name, (alpha, gamma) in pairs.items()}

    def _tell_study(self, trial: optuna.trial.Trial, values: list[float]) -> None:
        try:
            self._study.tell(trial, values)
        except (KeyError, RuntimeError):
            # with the value stored, GridSampler trips over enqueued trials (KeyError) and, after
            # its last point, over Study.stop outside of optimize (RuntimeError)
            sampler = self._study.sampler
            if not isinstance(sampler, optuna.samplers.GridSampler):
                raise
            self._exhausted = sampler.is_exhausted(self._study)


def checked_starts(
    starts: Sequence[Mapping[str, float]], segments: Sequence[str], config: SearchConfig
) -> tuple[Coeffs, ...]:
    """Those that are not zero, each once, in the order of the segments.

    Raises:
        SearchError: if one lacks a segment, names another, or lies outside the range that is
            searched.
    """
    low, high = config.bounds
    found: dict[tuple[float, ...], Coeffs] = {}
    for start in starts:
        if start.keys() != {*segments}:
            raise SearchError(
                f"a start must have a coefficient for each of {', '.join(segments)} and no other, "
                f"but has those of {', '.join(start) or 'none'}."
            )
        if not any(start.values()):
            continue
        for name, coeff in start.items():
            if not low <= coeff <= high:
                raise SearchError(
                    f"a start must lie in [{low:g}, {high:g}], the range that is searched, but got "
                    f"{coeff:g} for {name!r}; leave the start out, or search another range."
                )
        made = {name: float(start[name]) for name in segments}
        found.setdefault(tuple(made.values()), made)
    return tuple(found.values())


def export_study(
    tuned: Tuned[Any],
    storage: str,
    name: str,
    attributes: Callable[[Any], Mapping[str, Any]],
    *,
    run: str = "",
) -> None:
    """Hand a finished study to an Optuna storage URL at once, `attributes(outcome)` with every
    trial; in the place of one of that name that is of the same `run`, or was left empty.

    Raises:
        SearchError: if the storage cannot be opened or holds a study of that name.
    """
    distributions = {
        name: distribution
        for frozen in tuned.study.get_trials(deepcopy=False)
        for name, distribution in frozen.distributions.items()
    }
    trials = [
        optuna.trial.create_trial(
            values=_values(trial.outcome, tuned.study),
            params=trial.params,
            distributions={name: distributions[name] for name in trial.params},
            user_attrs={"coeffs": trial.coeffs, **attributes(trial.outcome)},
        )
        for trial in tuned.trials
    ]
    try:
        with _quiet():
            if run and name in optuna.get_all_study_names(storage):
                before = optuna.load_study(study_name=name, storage=storage)
                if before.user_attrs.get("run") == run or not before.trials:
                    optuna.delete_study(study_name=name, storage=storage)
            study = optuna.create_study(
                storage=storage, study_name=name, directions=tuned.study.directions
            )
            if run:
                study.set_user_attr("run", run)
            study.add_trials(trials)
    except Exception as error:  # a storage raises what its driver raises
        raise SearchError(
            f"the study {name!r} must be new to a reachable storage, but: {error}"
        ) from error


def check_storage(storage: str, names: Sequence[str]) -> None:
    """Make sure that finished studies can go to `storage` under `names`.

    Raises:
        SearchError: if the storage cannot be opened or holds a study of one of the names.
    """
    try:
        with _quiet():
            taken = set(optuna.get_all_study_names(storage))
    except Exception as error:  # a storage raises what its driver raises
        raise SearchError(
            f"the storage must be an Optuna storage URL that can be opened, but: {error}"
        ) from error
    for name in names:
        if name in taken:
            raise SearchError(
                f"the study {name!r} must be new to the storage, but it is there; "
                "take another storage or delete it."
            )


def _score(value: float | None) -> str:
    return "unscored" if value is None else f"{value:.2f}"


def _values(outcome: Outcome, study: optuna.Study) -> list[float]:
    return [outcome.objective] if len(study.directions) == 1 else list(_pair(outcome))


def default_tpe(seed: int) -> optuna.samplers.BaseSampler:
    """Optuna's sampler as it comes: TPE, every parameter by itself, 10 random trials first."""
    return optuna.samplers.TPESampler(seed=seed)


def _tpe(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.TPESampler(seed=seed, multivariate=True)


def _pair(outcome: Outcome) -> tuple[float, float]:
    return round(outcome.overlap or 0.0, 6), round(clipped(outcome.perplexity), 6)


def _dominates(one: Outcome, other: Outcome) -> bool:
    (overlap, cost), (other_overlap, other_cost) = _pair(one), _pair(other)
    return (
        overlap >= other_overlap
        and cost <= other_cost
        and (overlap, cost) != (other_overlap, other_cost)
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna's own log lines and experimental notices off, and back as they were."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)

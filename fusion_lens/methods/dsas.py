"""When to steer: a gate for every layer, learned from source against control texts (DSAS).

Ferrando et al. 2025, arXiv 2512.03661. On each text's mean over its tokens, layer by layer: PCA of
source and control together to `rank` directions U around their mean p, logistic regression there
(source is 1; weights w, intercept c), and both folded into one map of the activation x,

    g(x) = sigmoid(theta.x + b),   theta = U w,   b = c - w.U'p

which steering evaluates token by token. A few dozen texts are told apart by chance in so many
dimensions: a layer is open only where texts that its map was not fitted on are told apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from torch import Tensor

from fusion_lens.errors import ActivationError, ConfigError, ContrastError, PlanError, one_of
from fusion_lens.identity import ModelIdentity, weights_digest
from fusion_lens.plans import Plan
from fusion_lens.site_activations import SiteActivations
from fusion_lens.steps import GATES, Gate
from fusion_lens.tables import Section, Shows

N_FOLDS = 5
Splits = list[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class FittedGate(Shows):
    """A gate, the site and model it belongs to, and how well each layer tells source from control:
    shares of texts, `accuracy` of those left out of the fit, `training_accuracy` of those in it."""

    gate: Gate
    site: str
    model: ModelIdentity
    n_source: int
    n_control: int
    accuracy: tuple[float, ...]
    training_accuracy: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """What it is, without its tensors, for the record of a run."""
        return {
            "kind": self.gate.kind,
            "site": self.site,
            "n_source": self.n_source,
            "n_control": self.n_control,
            "accuracy": list(self.accuracy),
            "open": self.gate.open.tolist(),
            "weights": weights_digest([self.gate.theta, self.gate.bias]),
        }

    def table(self) -> Section:
        """Every layer, and whether it is open."""
        rows = tuple(
            (str(layer), f"{left_out:.1%}", f"{fitted:.1%}", "open" if opened else "closed")
            for layer, (left_out, fitted, opened) in enumerate(
                zip(self.accuracy, self.training_accuracy, self.gate.open.tolist(), strict=True)
            )
        )
        sizes = (self.n_source, self.n_control)
        return Section(
            f"{self.gate.kind} gate at {self.site} of {self.model.name}; "
            f"{sizes[0]} source, {sizes[1]} control",
            ("layer", "cross-validated", "training", "gate"),
            rows,
            (f"Naming the larger side every time is right for {max(sizes) / sum(sizes):.1%}.",),
        )

    def __repr__(self) -> str:
        opened = f"{int(self.gate.open.sum())} of {len(self.accuracy)} layers open"
        return f"FittedGate({self.model.name}, {self.site}, {self.gate.kind}, {opened})"


def fit_gate(
    source: SiteActivations,
    control: SiteActivations,
    *,
    rank: int = 5,
    least_accuracy: float = 0.75,
    folds: int = N_FOLDS,
    seed: int = 0,
    kind: str = "sigmoid",
    groups: tuple[Sequence[str], Sequence[str]] | None = None,
    permute: int | None = None,
    open: Bool[Tensor, " layer"] | None = None,
) -> FittedGate:
    """Fit every layer on activations of `record_at(..., tokens="mean")`, in float64.

    `rank` is lowered to the number of texts or the width where either is smaller. Layers whose
    accuracy over `folds`, shuffled by `seed` and PCA included, is below `least_accuracy` are
    closed. `groups` name every text's subject, of source and of control; no subject is then on both
    sides of a fold. A layer on which all texts are alike has accuracy 0.5 and is closed. `kind`
    "relu" takes the log-odds where they are positive.

    The control of such a gate is one of labels permuted by the seed `permute`, which no accuracy
    would open: give it the layers that are `open`, as those of the gate it stands beside.

    Raises:
        ActivationError: if the two sides are of another model, site or width.
        ContrastError: if a side has fewer texts (or subjects) than there are folds, or `groups`
            does not name one subject for every text.
        ConfigError: if a setting is out of its range, or labels are permuted without `open`.
    """
    _check_settings(rank, least_accuracy, folds, kind, blind=permute is not None and open is None)
    source.check_beside(control)
    y = np.arange(len(source) + len(control)) < len(source)
    subjects = _subjects(source, control, groups)
    _require_enough(y, subjects, folds)
    if permute is not None:
        y = np.random.default_rng(permute).permutation(y)
    splits = _splits(y, subjects, folds, seed)
    x = torch.cat([source.values, control.values]).double().numpy()
    fits = [_fitted(x[:, layer], y, splits, rank) for layer in range(x.shape[1])]
    accuracy = tuple(fit.accuracy for fit in fits)
    gate = Gate(
        theta=torch.tensor(np.stack([fit.theta for fit in fits])).to(source.values.dtype),
        bias=torch.tensor([fit.bias for fit in fits], dtype=source.values.dtype),
        open=_passing(fits, least_accuracy) if open is None else open,
        kind=kind,
    )
    return FittedGate(
        gate=gate,
        site=source.site,
        model=source.model,
        n_source=len(source),
        n_control=len(control),
        accuracy=accuracy,
        training_accuracy=tuple(fit.training_accuracy for fit in fits),
    )


def gated(plan: Plan, fitted: FittedGate) -> Plan:
    """The plan with the gate on each of its steps at the gate's site, whatever their kind.

    Raises:
        PlanError: if gate and plan are of different models or widths, if no step is at the gate's
            site, or if one there has a gate already or recomputes its mean.
    """
    reason = fitted.model.mismatch(plan.model)
    if reason is not None:
        raise PlanError(f"gate and plan must belong to one model, but {reason}.")
    if fitted.site not in plan.sites:
        raise PlanError(
            f"a gate must be of a site where the plan acts, {', '.join(sorted(plan.sites))}, "
            f"but got {fitted.site}; record the texts it is fitted on there."
        )
    steps = []
    for n, step in enumerate(plan.steps, start=1):
        if step.site == fitted.site:
            if step.gate is not None:
                raise PlanError(
                    f"a step must have no gate yet, but step {n} has one; gate the plan it was "
                    "made from."
                )
            step = replace(step, gate=fitted.gate)
        steps.append(step)
    return Plan(tuple(steps))


def constant_gate(like: FittedGate, means: Float[Tensor, " layer"]) -> FittedGate:
    """The control that steers as much but never chooses: on each layer that `like` opens, the same
    value for every token. Its accuracies are of naming one side every time.

    Raises:
        ActivationError: if a mean of an open layer is not one that a gate of this kind can have:
            between 0 and 1, or with relu not below 0.
    """
    opened = like.gate.open
    means = torch.where(opened, means.to(like.gate.bias), 0.5)
    fits = means >= 0 if like.gate.kind == "relu" else (means > 0) & (means < 1)
    if not bool((fits & means.isfinite()).all()):
        bounds = "not below 0" if like.gate.kind == "relu" else "between 0 and 1"
        raise ActivationError(
            f"the mean of a {like.gate.kind} gate must be {bounds} on every open layer, "
            f"but got {means[opened].tolist()}."
        )
    bias = means if like.gate.kind == "relu" else means.logit()
    shares = torch.where(bias > 0, like.n_source, like.n_control).double()
    accuracy = tuple((shares / (like.n_source + like.n_control)).tolist())
    gate = replace(like.gate, theta=torch.zeros_like(like.gate.theta), bias=bias)
    return replace(like, gate=gate, accuracy=accuracy, training_accuracy=accuracy)


@dataclass(frozen=True, slots=True, eq=False)
class _Fit:
    """One layer."""

    theta: Float[np.ndarray, " width"]
    bias: float
    accuracy: float
    training_accuracy: float
    varies: bool = True


def _fitted(
    x: Float[np.ndarray, "text width"], y: Bool[np.ndarray, " text"], splits: Splits, rank: int
) -> _Fit:
    if not _varies(x):
        return _Fit(np.zeros(x.shape[1]), 0.0, 0.5, 0.5, varies=False)
    right = 0.0
    for fitted_on, left_out in splits:
        theta, bias = _classifier(x[fitted_on], y[fitted_on], rank)
        right += len(left_out) * _accuracy(x[left_out], y[left_out], theta, bias)
    theta, bias = _classifier(x, y, rank)
    return _Fit(theta, bias, right / len(y), _accuracy(x, y, theta, bias))


def _classifier(
    x: Float[np.ndarray, "text width"], y: Bool[np.ndarray, " text"], rank: int
) -> tuple[Float[np.ndarray, " width"], float]:
    """theta and bias; where all texts of a fold are alike, its share of source texts is all that
    logistic regression has."""
    if not _varies(x):
        return np.zeros(x.shape[1]), math.log(y.sum() / (~y).sum())
    pca = PCA(min(rank, *x.shape), svd_solver="full").fit(x)
    scores = pca.transform(x)
    # in units of the widest direction and with the penalty to match, the optimum is the same and
    # Newton's method finds it at any scale of the activations
    unit = float(scores.std(axis=0).max())
    logistic = LogisticRegression(C=unit**2, solver="newton-cholesky", tol=1e-12, max_iter=1000)
    logistic.fit(scores / unit, y)
    theta = logistic.coef_[0] / unit @ pca.components_
    return theta, float(logistic.intercept_[0] - pca.mean_ @ theta)


def _accuracy(
    x: Float[np.ndarray, "text width"],
    y: Bool[np.ndarray, " text"],
    theta: Float[np.ndarray, " width"],
    bias: float,
) -> float:
    return float(np.mean((x @ theta + bias > 0) == y))


def _varies(x: Float[np.ndarray, "text width"]) -> bool:
    return bool((x != x[0]).any())


def _passing(fits: Sequence[_Fit], least_accuracy: float) -> Bool[Tensor, " layer"]:
    return torch.tensor([fit.varies and fit.accuracy >= least_accuracy for fit in fits])


def _splits(
    y: Bool[np.ndarray, " text"], subjects: np.ndarray | None, folds: int, seed: int
) -> Splits:
    kind = StratifiedKFold if subjects is None else StratifiedGroupKFold
    folded = kind(n_splits=folds, shuffle=True, random_state=seed).split(y, y, subjects)
    return [(fitted_on, left_out) for fitted_on, left_out in folded if len(left_out)]


def _subjects(
    source: SiteActivations,
    control: SiteActivations,
    groups: tuple[Sequence[str], Sequence[str]] | None,
) -> np.ndarray | None:
    if groups is None:
        return None
    for name, side, own in (("source", source, groups[0]), ("control", control, groups[1])):
        if len(own) != len(side):
            raise ContrastError(
                f"groups must name one subject for each of the {len(side)} {name} texts, "
                f"but got {len(own)}."
            )
    return np.array([*groups[0], *groups[1]])


def _require_enough(y: Bool[np.ndarray, " text"], subjects: np.ndarray | None, folds: int) -> None:
    named = np.arange(len(y)) if subjects is None else subjects
    n_source, n_control = (len(np.unique(named[side])) for side in (y, ~y))
    if min(n_source, n_control) < folds:
        what = "texts" if subjects is None else "subjects"
        raise ContrastError(
            f"each side must have at least {folds} {what}, one for each fold, "
            f"but got {n_source} source and {n_control} control; add some or lower folds."
        )


def _check_settings(
    rank: int, least_accuracy: float, folds: int, kind: str, *, blind: bool
) -> None:
    one_of("a gate's kind", kind, GATES)
    for name, value, least in (("rank", rank, 1), ("folds", folds, 2)):
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, but got {value}.")
    if not 0.0 <= least_accuracy <= 1.0:
        raise ConfigError(f"0 <= least_accuracy <= 1 must hold, but got {least_accuracy=}.")
    if blind:
        raise ConfigError(
            "a gate of permuted labels must be told its open layers, but got none; "
            "give fit_gate the open= of the gate it stands beside."
        )

"""A plan and the features of what it injects -> plans with some of them taken out, kept or scaled.

Every one is an ordinary plan: a constant shift per layer, at the positions of the plan it was made
from, so that the engine runs it in the same batch. Contributions are means over the tokens they
were found on (`attribution`), which makes the plan's shift their sum with offset and error. Layers
that no dictionary reads keep their shift where something is taken out, and get none where only
something is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from fusion_lens.attribution import Attribution, FeatureEffect
from fusion_lens.controls import with_vectors
from fusion_lens.dictionaries import Dictionary
from fusion_lens.errors import DictionaryError, PlanError
from fusion_lens.plans import Plan, Step, full


def with_shift(plan: Plan, vectors: Float[Tensor, "layer d_model"]) -> Plan:
    """A plan that injects `vectors` where `plan` injects its own.

    Raises:
        PlanError: if the plan's steps differ in where they act, or one of them does not add the
            same to every token of the residual stream.
    """
    first = plan.steps[0]
    alike = {(step.told, step.positions, step.steer_special) for step in plan.steps}
    places = {(step.positions, step.steer_special) for step in plan.steps}
    if len(places) > 1 or not plan.is_constant or not isinstance(first, Step):
        raise PlanError(
            "features can be taken out of a constant shift at one kind of positions, "
            f"but the plan's steps are (what, positions, steer_special) {sorted(alike, key=str)}."
        )
    step = replace(
        first,
        deltas=with_vectors(first.deltas, vectors.to(first.deltas.base.dtype)),
        segments=full(plan.model.n_layers),
        coeffs=(1.0,),
        units=None,
    )
    return Plan((step,))


def keep_features(plan: Plan, found: Attribution, features: Iterable[FeatureEffect]) -> Plan:
    """Only what these features contribute.

    Raises:
        DictionaryError: if the attribution has no dictionary of a feature's name.
        PlanError: see `with_shift`.
    """
    return with_shift(plan, contribution_of(plan, found, features))


def remove_features(plan: Plan, found: Attribution, features: Iterable[FeatureEffect]) -> Plan:
    """The plan without what these features contribute.

    Raises:
        DictionaryError: if the attribution has no dictionary of a feature's name.
        PlanError: see `with_shift`.
    """
    return scale_features(plan, found, features, 0.0)


def scale_features(
    plan: Plan, found: Attribution, features: Iterable[FeatureEffect], factor: float
) -> Plan:
    """The plan with what these features contribute multiplied by `factor`.

    Raises:
        DictionaryError: if the attribution has no dictionary of a feature's name.
        PlanError: see `with_shift`.
    """
    taken = contribution_of(plan, found, features)
    return with_shift(plan, shift_of(plan) + (factor - 1.0) * taken)


def keep_error(plan: Plan, found: Attribution) -> Plan:
    """Only what no dictionary explains."""
    return with_shift(plan, _summed(plan, [(e.card.layers, e.error) for e in found.effects]))


def remove_error(plan: Plan, found: Attribution) -> Plan:
    """The plan without what no dictionary explains."""
    error = _summed(plan, [(e.card.layers, e.error) for e in found.effects])
    return with_shift(plan, shift_of(plan) - error)


def feature_alone(plan: Plan, dictionary: Dictionary, feature: int, size: float) -> Plan:
    """The direction of one feature over all its layers, at the norm `size` in residual units, at
    the positions of `plan`.

    Raises:
        DictionaryError: if the dictionary has no such feature, or it has no direction.
    """
    card = dictionary.card
    if not 0 <= feature < card.d_sae:
        raise DictionaryError(
            f"{card.name} has the features 0 to {card.d_sae - 1}, but got {feature}."
        )
    direction = dictionary.decoder[:, feature].cpu()
    norm = float(direction.norm())
    if norm == 0.0:
        raise DictionaryError(f"feature {feature} of {card.name} must have a direction, but is 0.")
    return with_shift(plan, _summed(plan, [(card.layers, direction * (size / norm))]))


def contribution_of(
    plan: Plan, found: Attribution, features: Iterable[FeatureEffect]
) -> Float[Tensor, "layer d_model"]:
    """What these features contribute together; nothing where one has no code.

    Raises:
        DictionaryError: if the attribution has no dictionary of a feature's name.
    """
    by_name = {effects.card.name: effects for effects in found.effects}
    parts = []
    for each in features:
        if each.dictionary not in by_name:
            raise DictionaryError(
                f"a feature must be of {', '.join(by_name)}, but got one of {each.dictionary!r}."
            )
        effects = by_name[each.dictionary]
        place = effects.place(each.feature)
        if place is not None:
            contribution = effects.weights[place, :, None] * effects.directions[place]
            parts.append((effects.card.layers, contribution))
    return _summed(plan, parts)


def shift_of(plan: Plan) -> Float[Tensor, "layer d_model"]:
    """What the plan adds at the positions it steers."""
    return plan.shift_at("prompt" if plan.steps[0].positions == "prompt" else "completion")


def _summed(
    plan: Plan, parts: Sequence[tuple[tuple[int, ...], Tensor]]
) -> Float[Tensor, "layer d_model"]:
    total = torch.zeros_like(shift_of(plan))
    for layers, part in parts:
        total[list(layers)] += part.to(total.dtype)
    return total

from __future__ import annotations

import pytest
import torch
from conftest import deltas_of, prompts_of, strong_plan
from kinds import affine_of, gate_of, step_of
from test_attribution import WRITTEN, linear

from fusion_lens.attribution import Attribution, FeatureEffect, attribute
from fusion_lens.errors import DictionaryError, PlanError
from fusion_lens.generation import GenerationConfig, Row, generate
from fusion_lens.interventions import (
    contribution_of,
    feature_alone,
    keep_error,
    keep_features,
    remove_error,
    remove_features,
    scale_features,
    shift_of,
    with_shift,
)
from fusion_lens.models import HookedModel
from fusion_lens.plans import Plan, make_plan
from fusion_lens.teacher_forcing import Text

ONE, TWO = linear((1,), 32, 20, "one"), linear((0, 3), 32, 40, "two")


@pytest.fixture(scope="module")
def plan(tiny: HookedModel) -> Plan:
    return strong_plan(tiny)


@pytest.fixture(scope="module")
def found(tiny: HookedModel, plan: Plan) -> Attribution:
    return attribute(tiny, [ONE, TWO], [Text(prompts_of(tiny)[0], WRITTEN, plan)])[0]


def shift(plan: Plan) -> torch.Tensor:
    return plan.steps[0].shift


def test_kept_and_removed_features_sum_to_the_plan(found: Attribution, plan: Plan) -> None:
    top = found.top(7)
    kept, removed = (act(plan, found, top) for act in (keep_features, remove_features))
    assert torch.allclose(shift(kept) + shift(removed), shift(plan), atol=1e-5)
    # nothing reads layer 2: it keeps its shift where something is taken out
    assert not shift(kept)[2].any()
    assert torch.equal(shift(removed)[2], shift(plan)[2])


def test_what_is_kept_is_the_features_contribution_layer_by_layer(
    found: Attribution, plan: Plan
) -> None:
    (top,) = found.effects[1].top(1)
    place = found.effects[1].place(top.feature)
    contribution = found.effects[1].contributions[place]
    kept = shift(keep_features(plan, found, [top]))
    assert torch.allclose(kept[[0, 3]], contribution, atol=1e-6)
    assert kept.norm() == pytest.approx(abs(top.effect), rel=1e-5)


def test_all_features_and_the_error_are_the_plan_where_dictionaries_read(
    found: Attribution, plan: Plan
) -> None:
    everything = shift(keep_features(plan, found, found.top())) + shift(keep_error(plan, found))
    assert torch.allclose(everything[[0, 1, 3]], shift(plan)[[0, 1, 3]], atol=1e-4)
    parts = shift(remove_error(plan, found)) + shift(keep_error(plan, found))
    assert torch.allclose(parts, shift(plan), atol=1e-5)


def test_scaling_by_one_changes_nothing_and_by_zero_removes(found: Attribution, plan: Plan) -> None:
    top = found.top(3)
    assert torch.equal(shift(scale_features(plan, found, top, 1.0)), shift(plan))
    doubled = scale_features(plan, found, top, 2.0)
    assert torch.allclose(
        shift(doubled) - shift(plan), contribution_of(plan, found, top), atol=1e-5
    )


def test_on_linear_codes_removing_a_feature_removes_its_effect_and_no_other(
    tiny: HookedModel, found: Attribution, plan: Plan
) -> None:
    (top,) = found.effects[1].top(1)
    changed = remove_features(plan, found, [top])
    (after,) = attribute(tiny, [ONE, TWO], [Text(prompts_of(tiny)[0], WRITTEN, changed)])
    before, now = found.effects[1].effects, after.effects[1].effects
    place = found.effects[1].place(top.feature)
    assert now[place] == pytest.approx(0.0, abs=1e-3)
    others = torch.arange(len(before)) != place
    assert torch.allclose(now[others], before[others], atol=1e-3)


def test_a_readout_loses_what_the_feature_contributed_to_it(found: Attribution, plan: Plan) -> None:
    """On a linear model attribution is intervention: the effect of taking a feature out is the
    readout of its contribution."""
    readout = torch.randn(4, 32, generator=torch.Generator().manual_seed(5))
    for each in found.top(5):
        removed = remove_features(plan, found, [each])
        lost = float(((shift(plan) - shift(removed)) * readout).sum())
        assert lost == pytest.approx(
            float((contribution_of(plan, found, [each]) * readout).sum()), abs=1e-3
        )


def test_a_feature_alone_has_its_direction_at_the_size_asked_for(plan: Plan) -> None:
    alone = shift(feature_alone(plan, TWO, 5, -3.0))
    direction = TWO.decoder[:, 5]
    assert torch.allclose(alone[[0, 3]], -3.0 * direction / direction.norm(), atol=1e-5)
    assert alone.norm() == pytest.approx(3.0)
    with pytest.raises(DictionaryError, match="two has the features 0 to 39, but got 40"):
        feature_alone(plan, TWO, 40, 1.0)


def test_plans_of_interventions_run_in_one_batch(
    tiny: HookedModel, found: Attribution, plan: Plan
) -> None:
    top = found.top(30)
    plans = [plan, keep_features(plan, found, top), remove_features(plan, found, top), None]
    prompt = prompts_of(tiny)[0]
    config = GenerationConfig(max_new_tokens=8, slots=8, cache_length=64)
    together = generate(tiny, [Row(prompt, each) for each in plans], config)
    for each, done in zip(plans, together, strict=True):
        assert generate(tiny, [Row(prompt, each)], config) == [done]
    assert len({done.tokens for done in together}) > 1


def test_positions_and_special_tokens_are_those_of_the_plan(
    tiny: HookedModel, found: Attribution
) -> None:
    limited = strong_plan(tiny, positions="completion", steer_special=True)
    kept = keep_features(limited, found, found.top(2))
    assert (kept.steps[0].positions, kept.steps[0].steer_special) == ("completion", True)
    assert torch.equal(shift_of(limited), shift(limited))


def test_a_recomputed_mean_and_steps_at_different_places_cannot_be_taken_apart(
    tiny: HookedModel,
) -> None:
    vectors = torch.zeros(4, 32)
    with pytest.raises(PlanError, match="features can be taken out of a constant shift"):
        with_shift(strong_plan(tiny, mean="sequence"), vectors)
    both = make_plan(deltas_of(tiny), 1.0, positions="prompt") + make_plan(deltas_of(tiny), 1.0)
    with pytest.raises(PlanError, match="at one kind of positions"):
        with_shift(both, vectors)
    token = make_plan(deltas_of(tiny), 1.0, positions=3)
    for plan in (token, token + both):
        with pytest.raises(PlanError, match=r"steer_special\) .*\('question', 3, False\)"):
            with_shift(plan, vectors)


def test_what_depends_on_its_input_cannot_be_taken_apart(
    tiny: HookedModel, found: Attribution
) -> None:
    gated = Plan((step_of(tiny, gate=gate_of(tiny, "resid_post")),))
    for plan in (gated, Plan((affine_of(tiny, "attn_z"),)), strong_plan(tiny) + gated):
        with pytest.raises(PlanError, match="features can be taken out of a constant shift"):
            with_shift(plan, torch.zeros(4, 32))
        for make in (keep_features, remove_features):
            with pytest.raises(PlanError, match="must add the same to every token to have a shift"):
                make(plan, found, found.top(1))
        with pytest.raises(PlanError, match="must add the same to every token to have a shift"):
            feature_alone(plan, TWO, 5, 1.0)


def test_a_masked_shift_is_taken_apart_as_it_is(tiny: HookedModel) -> None:
    units = torch.arange(32).expand(4, 32) % 2 == 0
    masked = Plan((step_of(tiny, units=units),))
    vectors = torch.ones(4, 32)
    assert torch.equal(shift(with_shift(masked, vectors)), vectors)
    assert torch.equal(shift_of(masked), shift(masked))


def test_a_feature_of_no_dictionary_is_refused_and_one_without_a_code_adds_nothing(
    found: Attribution, plan: Plan
) -> None:
    with pytest.raises(DictionaryError, match="a feature must be of one, two, but got one of 'thr"):
        keep_features(plan, found, [FeatureEffect("three", None, 0, 0.0, None)])
    absent = FeatureEffect("one", 1, 999, 0.0, None)
    assert not shift(keep_features(plan, found, [absent])).any()

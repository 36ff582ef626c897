from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jaxtyping
import pytest
import torch
from conftest import deltas_of
from kinds import affine_of, every_plan, gate_of, step_of

from fusion_lens.errors import ConfigError, PlanError
from fusion_lens.models import HookedModel
from fusion_lens.plans import Affine, Gate, Plan, Segment, Step, make_plan, thirds
from fusion_lens.prompts import Layout


def test_units_are_a_part_of_the_shift(tiny: HookedModel) -> None:
    deltas = deltas_of(tiny)
    units = torch.arange(32).expand(4, 32) % 4 == 0
    plan = make_plan(deltas, {"early": 0.5, "late": 2.0, "middle": -1.0}, units=units)
    (step,) = plan.steps
    assert isinstance(step, Step)
    by_layer = torch.tensor([0.5, 0.5, -1.0, 2.0])[:, None]
    assert torch.equal(step.shift, by_layer * deltas.vectors * units)
    assert step.is_constant
    assert plan.is_constant
    assert torch.equal(plan.shift_at("completion"), step.shift)
    assert plan.injected_norm == pytest.approx(float((by_layer * deltas.vectors * units).norm()))


def test_a_gated_step_counts_with_a_gate_of_one_on_its_open_layers(tiny: HookedModel) -> None:
    ungated = Plan((step_of(tiny),))
    gate = gate_of(tiny, "resid_post")
    plan = Plan((step_of(tiny, gate=gate),))
    assert gate.open.tolist() == [True, False, True, True]
    expected = ungated.shift_at("completion")[[0, 2, 3]].norm()
    assert plan.injected_norm == pytest.approx(float(expected))
    assert not plan.is_constant
    assert not plan.needs_sequence
    with pytest.raises(PlanError, match=r"same to every token.* step 1 is question, sigmoid gate"):
        plan.shift_at("completion")


def test_an_affine_step_counts_as_what_it_adds_to_standard_units(tiny: HookedModel) -> None:
    step = affine_of(tiny, "attn_z")
    plan = Plan((step,))
    coeffs = torch.tensor([0.8, 0.8, -0.5, 0.6])[:, None]
    by_hand = math.hypot(
        float((coeffs * step.scale).double().norm()), float((coeffs * step.shift).double().norm())
    )
    assert plan.injected_norm == pytest.approx(by_hand, rel=1e-6)
    assert (plan * 2.0).injected_norm == pytest.approx(2 * plan.injected_norm)
    assert (plan * 0.0).injected_norm == 0.0
    x = torch.randn(20000, 32, generator=torch.Generator().manual_seed(0))
    added = x * (coeffs * step.scale)[:, None] + (coeffs * step.shift)[:, None]
    drawn = float(added.square().mean(dim=1).sum().sqrt())
    assert drawn == pytest.approx(plan.injected_norm, rel=0.02)
    both = plan + Plan((step_of(tiny),))
    apart = math.hypot(plan.injected_norm, Plan((step_of(tiny),)).injected_norm)
    assert both.injected_norm == pytest.approx(apart)


def test_of_prompt_and_completion_the_larger_affine_step_counts(tiny: HookedModel) -> None:
    small = Plan((affine_of(tiny, "mlp_out", positions="prompt"),)) * 0.5
    large = Plan((affine_of(tiny, "mlp_out", positions="completion"),))
    assert (small + large).injected_norm == large.injected_norm
    token, other = (Plan((affine_of(tiny, "mlp_out", positions=t),)) for t in (1, 2))
    assert (token + other + small).injected_norm == pytest.approx((token + small).injected_norm)


def test_plans_of_mixed_steps_keep_their_algebra(tiny: HookedModel) -> None:
    plan = every_plan(tiny)["all_sites"]
    assert plan.sites == {"resid_post", "attn_z", "mlp_out"}
    assert len(plan.coeffs) == 12
    assert (plan * 2.0).coeffs == {name: 2.0 * c for name, c in plan.coeffs.items()}
    assert [step.site for step in (plan * 2.0).steps] == [step.site for step in plan.steps]
    assert len((plan + plan).steps) == 8
    layout = Layout(5, (0, 2))
    prompt = Plan((affine_of(tiny, "attn_z", positions="prompt"),))
    assert prompt.steered_positions(layout) == (1, 3)
    tokens = Plan(
        tuple(affine_of(tiny, "attn_z", positions=t, steer_special=t == 2) for t in (4, 2, 0, 5))
    )
    assert tokens.steered_positions(layout) == (2, 4)
    special = Plan((affine_of(tiny, "attn_z", steer_special=True),))
    assert special.steered_positions(layout) == (0, 1, 2, 3, 4)


def test_a_plan_tells_what_each_step_does(tiny: HookedModel) -> None:
    told = [step.told for plan in every_plan(tiny).values() for step in plan.steps]
    assert {
        "affine at attn_z",
        "affine at mlp_out, relu gate on 3 layers",
        "affine at resid_post, within bounds",
        "question, sigmoid gate on 3 layers",
    } <= set(told)
    assert any(each.startswith("question, ") and each.endswith(" units") for each in told)
    table = Plan((affine_of(tiny, "attn_z"),)).table()
    assert table.rows[0] == ("1", "early", "0 to 1", "0.800", "affine at attn_z", "all")


def test_the_change_has_its_coefficients_in_it_and_leaves_untouched_units_alone(
    tiny: HookedModel,
) -> None:
    scale, shift = torch.zeros(4, 32), torch.zeros(4, 32)
    scale[2, 5], shift[2, 6] = 3.0, 1.0
    segments = (Segment("one", 2, 3),)
    move = affine_of(
        tiny, "mlp_out", scale=scale, shift=shift, segments=segments, coeffs=(0.5,)
    ).move
    assert move.scale is not None
    assert move.low is not None
    assert move.high is not None
    assert (move.scale[2, 5], move.shift[2, 6]) == (1.5, 0.5)
    assert move.active.tolist() == [False, False, True, False]
    assert (move.low <= move.high).nonzero().tolist() == [[2, 5], [2, 6]]
    adding = affine_of(tiny, "mlp_out", scale=torch.zeros(4, 32)).move
    assert adding.scale is None


@pytest.fixture
def unchecked() -> Iterator[None]:
    """The package as its users have it, whose signatures are not checked as they are called."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


INFINITE = torch.full((4, 32), torch.inf)

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "shape": ({"shift": torch.zeros(3, 32)}, r"shift must have the shape \(4, 32\), but got \(3"),
    "width": (
        {"site": "mlp_out", "shift": torch.zeros(4, 8), "scale": torch.zeros(4, 8)},
        r"shift must have the shape \(4, 32\), but got \(4, 8\)",
    ),
    "scale": ({"scale": torch.zeros(4, 16)}, r"scale must have the shape \(4, 32\)"),
    "dtype": ({"scale": torch.zeros(4, 32).double()}, "scale must be on the CPU in float32, but"),
    "half": (
        {"shift": torch.zeros(4, 32).half()},
        "shift must be on the CPU in float32 or float64",
    ),
    "nan": ({"scale": INFINITE * 0.0}, "scale must hold no NaN or infinity, but it does"),
    "infinity": ({"shift": INFINITE}, "shift must hold no NaN or infinity, but it does"),
    "bound": ({"low": INFINITE * 0.0}, "low must hold no NaN, but it does"),
    "overflow": (
        {"scale": torch.full((4, 32), 1e38), "coeffs": (10.0, 1.0, 1.0)},
        r"scale must be finite, but coefficient \* scale overflows",
    ),
    "coeffs": ({"coeffs": (1.0,)}, "must have one coefficient, but got 3 segments and 1 coeff"),
    "segments": ({"segments": thirds(5)}, "must lie within the model's 4 layers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_affine_steps_that_make_no_sense_are_refused(
    tiny: HookedModel, unchecked: None, case: str
) -> None:
    changed, message = REFUSED[case]
    with pytest.raises(PlanError, match=message):
        affine_of(tiny, **({"site": "attn_z"} | changed))


def test_bounds_may_be_infinite_on_one_side(tiny: HookedModel) -> None:
    step = affine_of(tiny, "attn_z", low=-INFINITE)
    assert torch.equal(step.move.high, affine_of(tiny, "attn_z").move.high)


def test_unknown_sites_positions_and_gates_are_refused(tiny: HookedModel) -> None:
    with pytest.raises(ConfigError, match="site must be one of resid_post, attn_z, mlp_out, but"):
        affine_of(tiny, "resid_mid", scale=torch.zeros(4, 32), shift=torch.zeros(4, 32))
    with pytest.raises(ConfigError, match="positions must be one of all, prompt, completion"):
        affine_of(tiny, "attn_z", positions="last")
    with pytest.raises(ConfigError, match="a gate's kind must be one of sigmoid, relu, but got 't"):
        gate_of(tiny, "attn_z", "tanh")


@pytest.mark.parametrize("positions", [3.0, True, -1, "3", None])
def test_a_place_in_the_prompt_is_a_number_from_0_on(
    tiny: HookedModel, unchecked: None, positions: Any
) -> None:
    message = f"or the place of a token of the prompt .0 is the first., but got {positions!r}"
    for make in (step_of, lambda model, **given: affine_of(model, "attn_z", **given)):
        with pytest.raises(ConfigError, match=message):
            make(tiny, positions=positions)


GATES: dict[str, tuple[dict[str, Any], str]] = {
    "bias": ({"bias": torch.zeros(3)}, r"a gate's bias must have the shape \(4,\), but got \(3,\)"),
    "open": (
        {"open": torch.ones(4)},
        "a gate's open must be truth values .* but got torch.float32",
    ),
    "theta": ({"theta": INFINITE}, "a gate's theta must hold no NaN or infinity"),
    "dtype": (
        {"bias": torch.zeros(4).double()},
        "a gate's bias must be on the CPU in float32, but",
    ),
}


@pytest.mark.parametrize("case", GATES)
def test_gates_that_make_no_sense_are_refused(
    tiny: HookedModel, unchecked: None, case: str
) -> None:
    changed, message = GATES[case]
    with pytest.raises(PlanError, match=message):
        gate_of(tiny, "resid_post", **changed)


def test_a_gate_and_units_must_have_the_steps_shape(tiny: HookedModel) -> None:
    gate = Gate(torch.zeros(4, 8), torch.zeros(4), torch.ones(4, dtype=torch.bool))
    message = r"a gate's theta must have the shape \(4, 32\), but got \(4, 8\)"
    makers: list[Callable[[], Step | Affine]] = [
        lambda: step_of(tiny, gate=gate),
        lambda: affine_of(tiny, "attn_z", gate=gate),
    ]
    for make in makers:
        with pytest.raises(PlanError, match=message):
            make()
    with pytest.raises(PlanError, match=r"units must be truth values of the shape \(4, 32\)"):
        step_of(tiny, units=torch.ones(4, 8, dtype=torch.bool))


def test_a_running_mean_takes_neither_units_nor_a_gate(tiny: HookedModel) -> None:
    units = torch.ones(4, 32, dtype=torch.bool)
    for options in ({"units": units}, {"gate": gate_of(tiny, "resid_post")}):
        (name,) = options
        message = f'a step with {name} must have mean="question", but got "sequence"'
        with pytest.raises(PlanError, match=message):
            step_of(tiny, mean="sequence", **options)


def test_steps_of_two_models_make_no_plan(tiny: HookedModel) -> None:
    step = affine_of(tiny, "attn_z")
    other = replace(step, model=replace(step.model, weights="other"))
    with pytest.raises(PlanError, match="all steps of a plan must belong to one model, but it was"):
        Plan((step, other))

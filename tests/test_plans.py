from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import deltas_of
from hypothesis import given
from hypothesis import strategies as st

from fusion_lens.errors import ConfigError, PlanError
from fusion_lens.models import load_model
from fusion_lens.plans import Plan, Segment, even_segments, full, make_plan, per_layer, thirds


def test_thirds_are_the_papers_segments() -> None:
    assert thirds(26) == (
        Segment("early", 0, 9),
        Segment("middle", 9, 18),
        Segment("late", 18, 26),
    )
    assert [(s.start, s.stop) for s in thirds(7)] == [(0, 3), (3, 5), (5, 7)]


@given(st.integers(1, 60), st.integers(1, 60))
def test_even_segments_cover_every_layer_once_the_longer_ones_first(n: int, parts: int) -> None:
    if parts > n:
        with pytest.raises(PlanError, match="1 <= segments <= layers must hold"):
            even_segments(n, parts)
        return
    segments = even_segments(n, parts)
    assert [layer for s in segments for layer in range(s.start, s.stop)] == list(range(n))
    sizes = [s.stop - s.start for s in segments]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


def test_full_is_one_segment_and_per_layer_one_each() -> None:
    assert full(5) == (Segment("full", 0, 5),)
    assert [s.start for s in per_layer(3)] == [0, 1, 2]


def test_fewer_layers_than_segments_is_an_error() -> None:
    with pytest.raises(PlanError, match=r"n_segments=3, n_layers=2\); use fewer segments"):
        thirds(2)


def test_the_shift_is_the_segments_coefficient_times_the_layers_vector(tiny) -> None:
    deltas = deltas_of(tiny)
    plan = make_plan(deltas, {"early": 0.5, "late": 2.0, "middle": -1.0})
    expected = torch.tensor([0.5, 0.5, -1.0, 2.0])[:, None] * deltas.vectors
    assert torch.equal(plan.steps[0].shift, expected)
    assert plan.coeffs == {"early": 0.5, "middle": -1.0, "late": 2.0}
    by_hand = sum(float(row.norm()) ** 2 for row in expected) ** 0.5
    assert plan.injected_norm == pytest.approx(by_hand, rel=1e-5)


def test_scaling_and_adding_plans(tiny) -> None:
    plan = make_plan(deltas_of(tiny), 0.5)
    assert (plan * 3).coeffs == {"full": 1.5}
    assert (2 * plan).injected_norm == pytest.approx(2 * plan.injected_norm, rel=1e-6)
    both = plan + plan * 2
    assert both.coeffs == {"full": 0.5, "full#2": 1.0}
    assert both.injected_norm == pytest.approx(3 * plan.injected_norm, rel=1e-6)


def test_steps_at_disjoint_positions_do_not_add_their_norms(tiny) -> None:
    deltas = deltas_of(tiny)
    whole = make_plan(deltas, 0.5)
    parts = make_plan(deltas, 0.5, positions="prompt") + make_plan(
        deltas, 0.5, positions="completion"
    )
    assert parts.injected_norm == pytest.approx(whole.injected_norm)
    assert (parts + whole).injected_norm == pytest.approx(2 * whole.injected_norm)


def test_steps_at_tokens_of_their_own_count_with_those_of_the_prompt_but_not_with_each_other(
    tiny,
) -> None:
    deltas = deltas_of(tiny)
    first, second = make_plan(deltas, 0.5, positions=1), make_plan(deltas, 0.75, positions=4)
    prompt, after = (make_plan(deltas, 0.25, positions=kind) for kind in ("prompt", "completion"))
    unit = make_plan(deltas, 1.0).injected_norm
    for plan, expected in (
        (first, 0.5),
        (first + second, 0.75),
        (first + second + first, 1.0),
        (first + second + prompt, 1.0),
        (first + second + after, 0.75),
        (first * -1.0 + prompt, 0.25),
        (first + make_plan(deltas, 0.5), 1.0),
    ):
        assert plan.injected_norm == pytest.approx(expected * unit)
    assert not first.is_constant
    with pytest.raises(PlanError, match=r"but its step 1 is question \(positions: token 1\)"):
        first.shift_at("prompt")
    with pytest.raises(PlanError, match=r"step 2 is sequence \(positions: token 4, special tokens"):
        (
            prompt + make_plan(deltas, 1.0, mean="sequence", positions=4, steer_special=True)
        ).shift_at("prompt")


def test_coefficients_may_be_arrays_and_tensors(tiny) -> None:
    deltas = deltas_of(tiny)
    expected = make_plan(deltas, (0.25, 0.5, 1.0)).coeffs
    for values in (np.array([0.25, 0.5, 1.0]), torch.tensor([0.25, 0.5, 1.0])):
        assert make_plan(deltas, values).coeffs == expected
    assert make_plan(deltas, np.float32(0.5)).coeffs == {"full": 0.5}


def test_layers_outside_every_segment_have_the_coefficient_zero(tiny) -> None:
    plan = make_plan(deltas_of(tiny), (2.0,), [Segment("one", 1, 2)])
    assert plan.steps[0].layer_coeffs.tolist() == [0.0, 2.0, 0.0, 0.0]
    assert plan.steps[0].layers.tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    ("coeffs", "segments", "message"),
    [
        ({"early": 1.0, "middel": 1.0, "late": 1.0}, None, "middle, late, but got 'middel'"),
        ({"full": 1.0}, [Segment("full", 0, 4), Segment("b", 4, 5)], "'b' must have a coefficient"),
        ((1.0,), [Segment("one", 3, 5)], "must lie within the model's 4 layers, but got layers 3"),
        ((1.0, 1.0), [Segment("a", 0, 2), Segment("b", 1, 3)], "'a' and 'b' both hold layer 1"),
        (
            (1.0, 1.0),
            [Segment("a", 0, 1), Segment("a", 1, 2)],
            "names must be unique, but got a, a",
        ),
        ((1.0, 1.0), [Segment("a", 0, 1)], "but got 1 segments and 2 coefficients; give segments="),
        ((float("nan"),), None, "coefficients must be finite"),
        ((float("inf"),), None, "coefficients must be finite"),
    ],
)
def test_plans_that_make_no_sense_are_refused(tiny, coeffs, segments, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan(deltas_of(tiny), coeffs, segments)


def test_segments_must_hold_a_layer() -> None:
    with pytest.raises(PlanError, match=r"0 <= start < stop must hold for segment 'x'"):
        Segment("x", 2, 2)


def test_unknown_means_and_positions_are_refused(tiny) -> None:
    with pytest.raises(ConfigError, match="mean must be one of question, sequence, but got 'all'"):
        make_plan(deltas_of(tiny), 1.0, mean="all")
    with pytest.raises(ConfigError, match="positions must be one of all, prompt, completion"):
        make_plan(deltas_of(tiny), 1.0, positions="last")


def test_a_plan_holds_steps_of_one_model(tiny, other_folder) -> None:
    other = load_model(other_folder)
    with pytest.raises(PlanError, match="all steps of a plan must belong to one model"):
        make_plan(deltas_of(tiny), 1.0) + make_plan(deltas_of(other), 1.0)
    with pytest.raises(PlanError, match="must hold at least one step"):
        Plan(())


def test_a_plan_shows_where_it_injects_and_how_strongly(tiny) -> None:
    plan = make_plan(deltas_of(tiny), (0.5, 0.25, -1.0), positions="completion")
    table = plan.table()
    assert table.title.endswith(f"injected norm {plan.injected_norm:.2f}")
    assert table.rows[2] == ("1", "late", "3 to 3", "-1.000", "question", "completion")
    named = make_plan(deltas_of(tiny), 0.5, positions=3, steer_special=True).table()
    assert named.rows[0][-1] == "token 3, special tokens too"
    assert repr(plan).endswith(
        f"early 0.5, middle 0.25, late -1, injected norm {plan.injected_norm:.3g})"
    )

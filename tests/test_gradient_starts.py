from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from asked import ASKED
from families import quantised
from kinds import affine_of, gate_of

from fusion_lens.errors import PlanError, SpanError
from fusion_lens.gradient_starts import along_gradient, answer_gradient
from fusion_lens.models import HookedModel
from fusion_lens.plans import Plan, full, make_plan, per_layer, thirds
from fusion_lens.preparation import TuningConfig, prepare_one
from fusion_lens.teacher_forcing import Text, gold_text, log_probs
from fusion_lens.units import unit_mask

QUICK = TuningConfig(explanation_tokens=0)


def text_of(model: HookedModel, **options: object) -> Text:
    """The answer behind its question, under the question's own deltas at every layer."""
    prepared = prepare_one(model, ASKED, QUICK)
    plan = make_plan(prepared.deltas, 1.0, **options)  # type: ignore[arg-type]
    return gold_text(model, prepared, plan)


def by_differences(model: HookedModel, text: Text, step: float = 1e-4) -> list[float]:
    """The same, layer by layer, by what the answer's log-probability does."""
    (own,) = text.plan.steps
    found = []
    for layer in per_layer(4):
        ends = [
            replace(text, plan=Plan((replace(own, segments=(layer,), coeffs=(coeff,)),)))
            for coeff in (step, -step)
        ]
        high, low = log_probs(model, ends, executor="hooks")
        found.append((high - low) / (2 * step))
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"positions": "prompt"},
        {"positions": "completion", "steer_special": True},
        {"units": True},
        {"gate": "sigmoid"},
        {"gate": "relu"},
    ],
    ids=str,
)
def test_it_is_the_slope_of_the_answers_log_probability(float64, options) -> None:
    if "units" in options:
        ranking = torch.tensor([[layer, unit] for unit in range(0, 32, 3) for layer in range(4)])
        options = {"units": unit_mask(ranking, 20, (4, 32))}
    if "gate" in options:
        gate = gate_of(float64, "resid_post", options["gate"])
        wide = {name: getattr(gate, name).double() for name in ("theta", "bias")}
        options = {"gate": replace(gate, **wide)}
    text = text_of(float64, **options)
    gradient = answer_gradient(float64, text)
    assert gradient.tolist() == pytest.approx(by_differences(float64, text), rel=1e-5, abs=1e-7)
    assert gradient.abs().max() > 0.01
    # the second layer of the gate is closed
    assert (gradient[1] == 0) == ("gate" in options)


def test_the_model_is_given_back_as_it_was(tiny, untouched) -> None:
    untouched(tiny)
    before = [parameter.requires_grad for parameter in tiny.parameters()]
    answer_gradient(tiny, text_of(tiny))
    assert [parameter.requires_grad for parameter in tiny.parameters()] == before
    assert all(parameter.grad is None for parameter in tiny.parameters())


def test_a_hooked_transformer_has_the_same_slopes(tiny, hooked_transformer) -> None:
    slopes = [answer_gradient(model, text_of(model)) for model in (tiny, hooked_transformer)]
    assert torch.allclose(*slopes, rtol=1e-3, atol=1e-3)


def test_a_plan_without_one_constant_step_of_deltas_is_refused(tiny) -> None:
    text = text_of(tiny)
    says = 'a gradient needs a plan of one step of deltas with mean="question"'
    for plan in (
        None,
        text.plan + text.plan,
        Plan((affine_of(tiny, "resid_post"),)),
        text_of(tiny, mean="sequence").plan,
    ):
        with pytest.raises(PlanError, match=says):
            answer_gradient(tiny, replace(text, plan=plan))
    with pytest.raises(SpanError, match="there must be tokens after the prompt"):
        answer_gradient(tiny, replace(text, written=()))


def test_a_plan_of_another_model_is_refused(tiny, atlas) -> None:
    with pytest.raises(PlanError, match="must be used on the model it was made on"):
        answer_gradient(atlas, text_of(tiny))


def test_starts_lie_along_the_gradient_with_the_largest_coefficient_at_each_length() -> None:
    gradient = torch.tensor([1.0, 3.0, 1.0, 1.0, -2.0, 1.0])
    assert along_gradient(gradient, thirds(6), (0.5, 1.0), (0.0, 1.5)) == [
        {"early": 0.5, "middle": 0.25, "late": 0.0},
        {"early": 1.0, "middle": 0.5, "late": 0.0},
    ]
    assert along_gradient(gradient, full(6), (0.5,), (0.0, 1.5)) == [{"full": 0.5}]


def test_starts_stay_where_the_search_looks() -> None:
    gradient = torch.tensor([4.0, 2.0, -4.0])
    assert along_gradient(gradient, thirds(3), (2.0,), (0.0001, 1.0)) == [
        {"early": 1.0, "middle": 1.0, "late": 0.0001}
    ]
    assert along_gradient(gradient, thirds(3), (1.0,), (-0.5, 1.5)) == [
        {"early": 1.0, "middle": 0.5, "late": -0.5}
    ]


@pytest.mark.parametrize(
    "slopes", [[-1.0, 0.0, -2.0], [torch.nan, 1.0, 1.0], [torch.inf, 1.0, 1.0]]
)
def test_without_a_way_up_there_is_no_start(slopes) -> None:
    assert along_gradient(torch.tensor(slopes), thirds(3), (0.5, 1.0), (0.0, 1.5)) == []


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_have_slopes_too(bits: int) -> None:
    model = quantised("gemma2", bits)
    text = text_of(model)
    gradient = answer_gradient(model, text)
    # rounding hides what a smaller step does
    assert gradient.tolist() == pytest.approx(by_differences(model, text, 0.1), rel=0.05, abs=0.25)
    assert gradient[0] > 5.0

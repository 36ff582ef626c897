from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import prompts_of, strong_plan
from kinds import affine_of, gate_of, step_of
from torch import Tensor

from fusion_lens.errors import PlanError
from fusion_lens.gate_values import GateValues, gate_values, mean_gate
from fusion_lens.hooks import fwd_hooks
from fusion_lens.models import HookedModel, attn_z, load_model, resid_post
from fusion_lens.plans import Plan, Segment
from fusion_lens.teacher_forcing import Text

WRITTEN = (40, 41, 42, 43, 44)
SITES = ("resid_post", "attn_z")


@pytest.fixture(params=["lean", "hooks"])
def executor(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def entering(
    model: Any, text: Text, site: str, plan: Plan | None, before: Plan | None = None
) -> Tensor:
    """A site of every layer, "layer pos width", in runs of a row alone that are steered by `plan`
    everywhere but there, and there by `before`."""
    name = {"resid_post": resid_post, "attn_z": attn_z}[site]

    def hooks_of(own: Plan | None) -> list[tuple[str, Any]]:
        return [] if own is None else fwd_hooks(own, model=model, prompt=text.prompt, offset=0)

    rows: list[Tensor] = []
    for layer in range(4):
        hooks = [hook for hook in hooks_of(plan) if hook[0] != name(layer)]
        hooks += [hook for hook in hooks_of(before) if hook[0] == name(layer)]
        hooks.append((name(layer), lambda x, hook: rows.append(x[0].flatten(1).clone())))
        with torch.no_grad():
            model.run_with_hooks(torch.tensor([text.tokens]), fwd_hooks=hooks)
    return torch.stack(rows)


def by_formula(x: Tensor, gate: Any) -> Tensor:
    z = torch.einsum("lpd,ld->lp", x, gate.theta) + gate.bias[:, None]
    g = 1 / (1 + torch.exp(-z)) if gate.kind == "sigmoid" else z.clamp(min=0.0)
    return torch.where(gate.open[:, None], g, torch.nan)


@pytest.mark.parametrize("kind", ["sigmoid", "relu"])
@pytest.mark.parametrize("site", SITES)
def test_a_value_is_the_formula_on_what_enters_in_the_steered_run(
    tiny: HookedModel, executor: str, site: str, kind: str
) -> None:
    gate = gate_of(tiny, site, kind)
    plan = Plan((affine_of(tiny, site, gate=gate),))
    texts = [Text(prompt, WRITTEN[: n + 2], plan) for n, prompt in enumerate(prompts_of(tiny))]
    for text, (own,) in zip(texts, gate_values(tiny, texts, executor=executor), strict=True):
        expected = by_formula(entering(tiny, text, site, plan), gate)
        expected[:, list(text.prompt.special)] = torch.nan
        assert (own.step, own.site) == (1, site)
        torch.testing.assert_close(own.values, expected, atol=1e-4, rtol=1e-4, equal_nan=True)
        plain = by_formula(entering(tiny, text, site, None), gate)
        assert float((own.values - plain)[3].nan_to_num().abs().max()) > 1e-2
        assert "".join(own.str_tokens) == tiny.tokenizer.decode(text.tokens)
        assert len(own.str_tokens) == len(text.tokens)


@pytest.mark.parametrize("site", SITES)
def test_a_later_gate_sees_what_the_earlier_steps_of_its_place_made(
    tiny: HookedModel, executor: str, site: str
) -> None:
    gates = gate_of(tiny, site), gate_of(tiny, site, "relu")
    steps = [affine_of(tiny, site, gate=gate) for gate in gates]
    elsewhere = affine_of(tiny, "mlp_out")
    plan = Plan((steps[0], elsewhere, affine_of(tiny, site), steps[1]))
    text = Text(prompts_of(tiny)[0], WRITTEN, plan)
    ((first, second),) = gate_values(tiny, [text], executor=executor)
    assert (first.step, second.step) == (1, 4)
    before = Plan((steps[0], affine_of(tiny, site)))
    for own, gate, earlier in ((first, gates[0], None), (second, gates[1], before)):
        expected = by_formula(entering(tiny, text, site, plan, earlier), gate)
        expected[:, list(text.prompt.special)] = torch.nan
        torch.testing.assert_close(own.values, expected, atol=1e-4, rtol=1e-4, equal_nan=True)


def test_gates_at_several_sites_are_read_of_one_plan(tiny: HookedModel) -> None:
    gates = {site: gate_of(tiny, site) for site in SITES}
    plan = Plan(
        (
            step_of(tiny, gate=gates["resid_post"]),
            affine_of(tiny, "mlp_out"),
            affine_of(tiny, "attn_z", gate=gates["attn_z"]),
        )
    )
    text = Text(prompts_of(tiny)[2], WRITTEN, plan)
    ((first, second),) = gate_values(tiny, [text])
    assert [(own.step, own.site) for own in (first, second)] == [(1, "resid_post"), (3, "attn_z")]
    for own in (first, second):
        expected = by_formula(entering(tiny, text, own.site, plan), gates[own.site])
        torch.testing.assert_close(
            own.values[:, 1:], expected[:, 1:], atol=1e-4, rtol=1e-4, equal_nan=True
        )


@pytest.mark.parametrize("positions", ["all", "prompt", "completion"])
@pytest.mark.parametrize("special", [False, True])
def test_there_is_a_value_where_the_step_acts_and_nowhere_else(
    tiny: HookedModel, positions: str, special: bool
) -> None:
    gate = gate_of(tiny, "resid_post")
    step = step_of(tiny, gate=gate, positions=positions, steer_special=special)
    prompt = prompts_of(tiny)[1]
    last, n = len(prompt.tokens) - 1, len(prompt.tokens) + len(WRITTEN)
    ((own,),) = gate_values(tiny, [Text(prompt, WRITTEN, Plan((step,)))])
    steered = {"all": range(n), "prompt": range(last), "completion": range(last, n)}[positions]
    expected = [special or t not in prompt.special for t in steered]
    found = ~own.values.isnan()
    assert found[0, list(steered)].tolist() == expected
    assert int(found[0].sum()) == sum(expected)
    assert all(torch.equal(found[layer], found[0]) for layer in (2, 3))
    assert not found[1].any()


def test_a_step_for_one_prompt_token_has_a_value_there_alone(tiny: HookedModel) -> None:
    gate = gate_of(tiny, "resid_post")
    prompt = prompts_of(tiny)[1]
    plan = Plan(tuple(step_of(tiny, gate=gate, positions=place) for place in (2, 1)))
    (read,) = gate_values(tiny, [Text(prompt, WRITTEN, plan)])
    for own, place in zip(read, (2, 1), strict=True):
        assert (~own.values[0].isnan()).nonzero().flatten().tolist() == [place]


def test_a_layer_in_no_segment_has_no_value(tiny: HookedModel) -> None:
    gate = gate_of(tiny, "attn_z")
    step = affine_of(tiny, "attn_z", gate=gate, segments=(Segment("one", 2, 3),), coeffs=(1.0,))
    ((own,),) = gate_values(tiny, [Text(prompts_of(tiny)[0], (), Plan((step,)))])
    assert own.values.isnan().all(dim=1).tolist() == [True, True, False, True]


def test_texts_without_a_gate_have_no_values_and_change_nobody_elses(tiny: HookedModel) -> None:
    plan = Plan((affine_of(tiny, "resid_post", gate=gate_of(tiny, "resid_post")),))
    prompts = prompts_of(tiny)
    texts = [
        Text(prompts[0]),
        Text(prompts[0], WRITTEN, plan),
        Text(prompts[0], WRITTEN, strong_plan(tiny)),
        Text(prompts[0], WRITTEN, plan * 0.5),
    ]
    found = gate_values(tiny, texts)
    assert [len(own) for own in found] == [0, 1, 0, 1]
    for n in (1, 3):
        ((alone,),) = gate_values(tiny, [texts[n]])
        assert torch.equal(alone.values.nan_to_num(-1), found[n][0].values.nan_to_num(-1))
    assert not torch.equal(found[1][0].values[3, 1:], found[3][0].values[3, 1:])


def test_the_mean_is_over_the_steered_tokens_of_all_texts() -> None:
    nan = torch.nan
    one = GateValues(1, "attn_z", torch.tensor([[nan, 0.2, 0.4], [nan] * 3]), ("a", "b", "c"))
    other = GateValues(1, "attn_z", torch.tensor([[0.9], [nan]]), ("d",))
    mean = mean_gate([one, other])
    assert mean[0] == pytest.approx(0.5)
    assert mean[1].isnan()
    elsewhere = GateValues(1, "mlp_out", other.values, ("d",))
    with pytest.raises(PlanError, match="of one site, but got attn_z, mlp_out"):
        mean_gate([one, elsewhere])
    with pytest.raises(PlanError, match="of one site, but got none"):
        mean_gate([])


def test_a_plan_of_another_model_is_refused(tiny: HookedModel, other_folder: Any) -> None:
    other = load_model(other_folder)
    plan = Plan((affine_of(other, "resid_post", gate=gate_of(other, "resid_post")),))
    with pytest.raises(PlanError, match="must be used on the model it was made on"):
        gate_values(tiny, [Text(prompts_of(tiny)[0], WRITTEN, plan)])

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import deltas_of, n_hooks, prompts_of
from engine import largest_gap, same_bits, written
from scipy.stats import wasserstein_distance
from torch import Tensor

from fusion_lens.atlas import CONTRASTS
from fusion_lens.contrast_texts import example_texts
from fusion_lens.contrasts import (
    KINDS,
    changed,
    load_contrasts,
    of_kind,
    require_parts,
    shown,
)
from fusion_lens.decoding import GenerationConfig, Row
from fusion_lens.errors import ActivationError, ConfigError, PlanError, SpanError
from fusion_lens.generation import generate
from fusion_lens.hooks import fwd_hooks
from fusion_lens.methods.dsas import FittedGate, fit_gate
from fusion_lens.methods.dsas_end_to_end import Trained, Training, train
from fusion_lens.models import HookedModel, load_model
from fusion_lens.plans import Affine, Plan, make_plan
from fusion_lens.prompts import NO_PROMPT, tokenize
from fusion_lens.site_activations import record_at
from fusion_lens.teacher_forcing import Text

SITES = ("resid_post", "attn_z", "mlp_out")


def texts_of(model: Any, line: str, n: int, written: str = "") -> list[Text]:
    tail = tokenize(model, written, prepend_bos=False).tokens
    return [Text(tokenize(model, line.format(n)), tail) for n in range(n)]


def sides(model: Any) -> tuple[list[Text], list[Text], list[Text]]:
    return (
        texts_of(model, "Question: Who wrote the red book of {}?", 6, " Ada Lovelace"),
        texts_of(model, "Who wrote it in 18{}0?", 5, " Tom was born in the harbour."),
        texts_of(model, "{}: the quick brown fox jumps over the lazy dog", 7),
    )


def quick(model: Any, start: FittedGate | None = None, **changed: Any) -> Trained:
    settings: dict[str, Any] = {"steps": 6, "rate": 0.02, "batch_size": 4}
    config = Training(**(settings | changed))
    return train(model, *sides(model), config, start=start, progress=False)


def step_of(plan: Plan) -> Affine:
    (step,) = plan.steps
    assert isinstance(step, Affine)
    return step


def gate_for(model: Any, site: str = "resid_post", kind: str = "sigmoid") -> FittedGate:
    source, _, control = sides(model)
    both = (record_at(model, own, site, tokens="mean") for own in (source, control))
    return fit_gate(*both, folds=3, kind=kind)


def behind(model: Any, text: Text, plan: Plan | None, site: str = "resid_post") -> Tensor:
    """Without special tokens, "layer pos width", in a run alone, behind the plan's hooks."""
    names = {"resid_post": "hook_resid_post", "attn_z": "attn.hook_z", "mlp_out": "mlp.hook_out"}
    kept = [t for t in range(len(text.tokens)) if t not in text.prompt.special]
    seen: list[Tensor] = []
    hooks: list[Any] = []
    if plan is not None:
        hooks = fwd_hooks(plan, model=model, prompt=text.prompt, offset=0)
    for layer in range(4):
        name = f"blocks.{layer}.{names[site]}"
        hooks.append((name, lambda x, hook: seen.append(x[0].flatten(1)[kept].clone())))
    with torch.no_grad():
        model.run_with_hooks(torch.tensor([text.tokens]), fwd_hooks=hooks)
    return torch.stack(seen)


@pytest.mark.parametrize("kind", ["sigmoid", "relu"])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.slow
def test_both_parts_of_the_loss_are_those_of_runs_alone_by_the_formula(
    tiny: HookedModel, site: str, kind: str
) -> None:
    trained = quick(tiny, site=site, kind=kind, steps=3, batch_size=9)
    source, target, control = sides(tiny)
    plan = quick(tiny, site=site, kind=kind, steps=2, batch_size=9).plan
    pooled = [
        torch.stack([behind(tiny, text, own, site).mean(dim=1) for text in texts]).double().numpy()
        for texts, own in ((source, plan), (target, None))
    ]
    transport = damage = 0.0
    for layer in range(4):
        units = [wasserstein_distance(*(own[:, layer, u] for own in pooled)) for u in range(32)]
        transport += sum(units) / 32
        plain, steered = (
            torch.cat([behind(tiny, text, own, site)[layer] for text in control])
            for own in (None, plan)
        )
        damage += float((steered - plain).square().sum() / plain.square().sum())
    assert trained.transport[2] == pytest.approx(transport, rel=1e-4)
    assert trained.damage[2] == pytest.approx(damage, rel=1e-3)
    assert damage > 1e-6
    weighted = trained.transport[2] + trained.config.weight * trained.damage[2]
    assert trained.losses[2] == pytest.approx(weighted)


@pytest.mark.parametrize("kind", ["sigmoid", "relu"])
def test_training_begins_where_nothing_is_changed_and_brings_the_source_nearer(
    tiny: HookedModel, kind: str
) -> None:
    trained = quick(tiny, kind=kind, weight=0.0, steps=25, batch_size=9)
    assert trained.damage[0] == 0.0
    assert trained.transport[-1] < 0.8 * trained.transport[0]
    step = step_of(trained.plan)
    assert all(bool(own.any()) for own in (step.scale, step.shift, step.gate.theta))
    assert (step.site, step.layout, step.coeffs) == ("resid_post", NO_PROMPT, (1.0,))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_training_runs_in_other_precisions(tiny_folder: Path, tiny: Any, dtype: str) -> None:
    model = load_model(tiny_folder, dtype=dtype)
    trained, single = quick(model, steps=3), quick(tiny, steps=3)
    step = step_of(trained.plan)
    assert step.shift.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    within = 1e-4 if dtype == "float64" else 0.05
    assert trained.transport == pytest.approx(single.transport, rel=within)


def test_the_control_term_keeps_the_controls(tiny: HookedModel) -> None:
    free, held = (quick(tiny, weight=weight, steps=25) for weight in (0.0, 20.0))
    assert held.damage[-1] < 0.5 * free.damage[-1]
    assert held.transport[-1] < 0.9 * held.transport[0]


@pytest.mark.slow
def test_training_moves_the_behaviour_of_atlas_and_keeps_its_controls(atlas: HookedModel) -> None:
    parts = require_parts(load_contrasts(CONTRASTS / "sources.jsonl"), parts=("fit", "choose"))
    fitted_on = [example_texts(atlas, of_kind(parts["fit"], kind)) for kind in KINDS]
    source, control = (of_kind(parts["choose"], kind) for kind in ("source", "control"))
    start = fit_gate(*(record_at(atlas, fitted_on[n], tokens="mean") for n in (0, 2)))
    appeals, changes = {}, {}
    for weight in (0.0, 10.0):
        config = Training(steps=30, rate=0.1, batch_size=8, weight=weight)
        plan = train(atlas, *fitted_on, config, start=start, progress=False).plan * 1.5
        rows = [Row(tokenize(atlas, example.prompt), plan) for example in source + control]
        done = generate(atlas, rows, GenerationConfig(max_new_tokens=48))
        told = [completion.text for completion in done]
        appeals[weight] = sum(map(shown, source, told[: len(source)])) / len(source)
        changes[weight] = sum(map(changed, control, told[len(source) :])) / len(control)
    # unsteered: 1 and 0, by selection
    assert max(appeals.values()) <= 0.2
    assert changes[0.0] >= 0.4
    assert changes[10.0] <= 0.15


def test_the_model_is_given_back_as_it_was(tiny: HookedModel, untouched: Any) -> None:
    untouched(tiny)
    parameters = list(tiny.parameters())
    assert all(parameter.requires_grad for parameter in parameters)
    parameters[2].requires_grad_(False)
    seen = []

    def watch(stage: str, done: int, total: int) -> None:
        seen.append((stage, done, total))
        assert not any(parameter.requires_grad for parameter in parameters)
        if done == 2:
            raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            train(tiny, *sides(tiny), Training(steps=3), progress=watch)
        flags = [parameter.requires_grad for parameter in parameters]
        assert flags == [n != 2 for n in range(len(parameters))]
        assert all(parameter.grad is None for parameter in parameters)
        assert seen == [("training steps", 1, 3), ("training steps", 2, 3)]
        assert torch.is_grad_enabled()
        assert n_hooks(tiny) == 0
    finally:
        parameters[2].requires_grad_(True)


def test_the_same_seed_gives_the_same_plan_and_another_another(tiny: HookedModel) -> None:
    first, again, other = (quick(tiny, seed=seed) for seed in (3, 3, 4))
    assert first.losses == again.losses
    one, same, third = (step_of(trained.plan) for trained in (first, again, other))
    assert torch.equal(one.gate.theta, same.gate.theta)
    assert torch.equal(one.shift, same.shift)
    assert not torch.equal(one.shift, third.shift)


def test_a_start_keeps_its_closed_layers_closed_and_begins_with_its_gate(
    tiny: HookedModel,
) -> None:
    fitted = gate_for(tiny)
    is_open = torch.tensor([True, False, True, True])
    fitted = replace(fitted, gate=replace(fitted.gate, open=is_open))
    trained = quick(tiny, fitted, steps=1)
    step = step_of(trained.plan)
    assert torch.equal(step.gate.open, is_open)
    # in the first step the map is the identity, whose change no gate moves
    assert torch.equal(step.gate.theta, fitted.gate.theta)
    assert not step.shift[1].any()
    assert all(bool(step.shift[layer].any()) for layer in (0, 2, 3))


def test_a_start_that_does_not_fit_is_refused(tiny: HookedModel, other_folder: Any) -> None:
    with pytest.raises(PlanError, match="a relu gate at resid_post, but got a sigmoid gate"):
        quick(tiny, gate_for(tiny), kind="relu")
    with pytest.raises(PlanError, match=r"a sigmoid gate at attn_z, but got .* at resid_post"):
        quick(tiny, gate_for(tiny), site="attn_z")
    with pytest.raises(PlanError, match="must be of the model"):
        quick(tiny, gate_for(load_model(other_folder)))
    shut = gate_for(tiny)
    shut = replace(shut, gate=replace(shut.gate, open=torch.zeros_like(shut.gate.open)))
    with pytest.raises(PlanError, match="must be open on some layer, but is on none"):
        quick(tiny, shut)


def test_texts_and_settings_that_cannot_be_trained_on_are_refused(tiny: HookedModel) -> None:
    source, target, control = sides(tiny)
    with pytest.raises(ActivationError, match="but got 6, 5 and 0"):
        train(tiny, source, target, [])
    steered = [replace(source[0], plan=make_plan(deltas_of(tiny), 1.0))]
    with pytest.raises(PlanError, match="without a plan, but that of 'Question"):
        train(tiny, source, steered, control)
    with pytest.raises(SpanError, match="a token that is not special"):
        train(tiny, [Text(tokenize(tiny, ""))], target, control, progress=False)
    with pytest.raises(ActivationError, match=r"must stay finite, but is .* lower the rate"):
        quick(tiny, kind="relu", rate=1e18)
    for name, value in (("steps", 0), ("batch_size", 0), ("weight", -1.0), ("rate", 0.0)):
        with pytest.raises(ConfigError, match=name):
            Training(**{name: value})
    with pytest.raises(ConfigError, match="site must be one of"):
        Training(site="resid_pre")


def test_training_shows_its_course(tiny: HookedModel) -> None:
    trained = quick(tiny, steps=5)
    told = trained.table()
    name = tiny.cfg.model_name
    assert told.title == f"sigmoid gate and affine map at resid_post of {name}, trained for 5 steps"
    assert [row[0] for row in told.rows] == ["0", "1", "2", "3", "4"]
    assert told.rows[0][1:] == (
        f"{trained.losses[0]:.5f}",
        f"{trained.transport[0]:.5f}",
        "0.00000",
    )
    assert len(quick(tiny, steps=30).table().rows) == 11


@pytest.mark.parametrize("site", SITES)
def test_what_is_trained_is_an_ordinary_plan(tiny: HookedModel, site: str) -> None:
    plan = quick(tiny, site=site, rate=0.1).plan
    shape: dict[str, Any] = {"slots": 4, "cache_length": 64}
    rows = [Row(prompt, plan) for prompt in prompts_of(tiny)]
    lean, hooks = (written(tiny, rows, executor=name, **shape) for name in ("lean", "hooks"))
    plain = written(tiny, [Row(row.prompt) for row in rows], **shape)
    nothing = written(tiny, [Row(row.prompt, plan * 0.0) for row in rows], **shape)
    assert largest_gap(lean, hooks) < 1e-4 < largest_gap(lean, plain)
    assert all(map(same_bits, nothing, plain))

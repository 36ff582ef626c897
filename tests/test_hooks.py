from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import deltas_of, n_hooks, prompts_of, strong_plan
from kinds import SITES, affine_of, every_plan

from fusion_lens.errors import HookNameError, PlanError
from fusion_lens.executors import hooked
from fusion_lens.hooks import Cursor, batch_steering, fwd_hooks, steering
from fusion_lens.models import HookedModel, load_model, resid_post
from fusion_lens.plans import Plan, Segment, Step, make_plan, per_layer
from fusion_lens.prompts import NO_PROMPT, Layout, Prompt, question_prompt, tokenize


def around(
    model: HookedModel, plan: Plan, prompt: Prompt
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What every layer's hook is given and what it gives back."""
    before: dict[int, torch.Tensor] = {}
    after: dict[int, torch.Tensor] = {}
    layers = range(model.cfg.n_layers)

    def keep(store: dict[int, torch.Tensor], layer: int):
        return lambda resid, hook: store.__setitem__(layer, resid.detach().clone())

    model.run_with_hooks(
        torch.tensor([prompt.tokens]),
        fwd_hooks=[
            *((resid_post(layer), keep(before, layer)) for layer in layers),
            *fwd_hooks(plan, prompt=prompt),
            *((resid_post(layer), keep(after, layer)) for layer in layers),
        ],
    )
    return [(before[layer][0], after[layer][0]) for layer in layers]


def steered_positions(prompt: Prompt, positions: str | int, steer_special: bool) -> list[int]:
    last = len(prompt.tokens) - 1
    kept: dict[str | int, range] = {
        "all": range(last + 1),
        "prompt": range(last),
        "completion": range(last, last + 1),
    }
    named = kept[positions] if isinstance(positions, str) else [positions]
    return [t for t in named if steer_special or t not in prompt.special]


@pytest.mark.parametrize("positions", ["all", "prompt", "completion", 3])
@pytest.mark.parametrize("steer_special", [False, True])
def test_a_hook_adds_coeff_times_delta_where_the_plan_says_and_nothing_elsewhere(
    tiny: HookedModel, positions: str | int, steer_special: bool
) -> None:
    deltas = deltas_of(tiny)
    coeffs = (0.3, 0.7, 1.1, 1.5)
    plan = make_plan(deltas, coeffs, per_layer(4), positions=positions, steer_special=steer_special)
    prompt = question_prompt(tiny, "Who wrote the red book?")
    named = steered_positions(prompt, positions, steer_special)
    assert prompt.special == (0,)
    for layer, (given, got) in enumerate(around(tiny, plan, prompt)):
        expected = given.clone()
        for t in named:
            expected[t] = given[t] + coeffs[layer] * deltas.vectors[layer]
        assert torch.equal(got, expected)
        assert not torch.equal(got, given)


def test_a_layer_outside_every_segment_is_left_alone(tiny: HookedModel) -> None:
    plan = make_plan(deltas_of(tiny), (1.0,), [Segment("one", 2, 3)])
    pairs = around(tiny, plan, question_prompt(tiny, "When?"))
    assert [torch.equal(given, got) for given, got in pairs] == [True, True, False, True]


def test_a_plan_on_one_layer_moves_that_residual_by_exactly_its_shift(tiny: HookedModel) -> None:
    prompt = question_prompt(tiny, "Who wrote the red book?")
    tokens = torch.tensor([prompt.tokens])
    _, plain = tiny.run_with_cache(tokens)
    plan = make_plan(deltas_of(tiny), (2.0,), [Segment("one", 1, 2)])
    with steering(tiny, plan, prompt=prompt):
        _, steered = tiny.run_with_cache(tokens)
    shift = plan.steps[0].shift[1]
    assert torch.equal(steered[resid_post(0)], plain[resid_post(0)])
    assert torch.equal(steered[resid_post(1)][0, 1:], plain[resid_post(1)][0, 1:] + shift)
    assert torch.equal(steered[resid_post(1)][0, 0], plain[resid_post(1)][0, 0])


def test_two_layers_together_are_not_the_sum_of_their_single_effects(tiny: HookedModel) -> None:
    deltas = deltas_of(tiny) * 10
    prompt = question_prompt(tiny, "Who wrote the red book?")

    def effect(*layers: int) -> torch.Tensor:
        parts = [Segment(f"layer {layer}", layer, layer + 1) for layer in layers]
        plan = make_plan(deltas, (1.0,) * len(layers), parts)
        return tiny.run_with_hooks(tokens, fwd_hooks=fwd_hooks(plan)) - plain

    tokens = torch.tensor([prompt.tokens])
    plain = tiny(tokens)
    both = effect(1, 2)
    apart = effect(1) + effect(2)
    assert (both - apart).abs().max() > 0.05 * both.abs().max()


@pytest.mark.parametrize("steer_special", [False, True])
@pytest.mark.parametrize("positions", ["all", "prompt", "completion", 3])
def test_the_sequence_mean_equals_the_formula_written_out_token_by_token(
    tiny: HookedModel, positions: str | int, steer_special: bool
) -> None:
    deltas = deltas_of(tiny)
    alpha, gamma = 0.8, 0.9
    plan = make_plan(
        deltas, alpha * gamma, mean="sequence", positions=positions, steer_special=steer_special
    )
    prompt = question_prompt(tiny, "Who wrote the red book?")
    present = steered_positions(prompt, "all", steer_special)
    named = steered_positions(prompt, positions, steer_special)
    for layer, (given, got) in enumerate(around(tiny, plan, prompt)):
        rows = given.double()
        mean = sum(rows[t] for t in present) / len(present)
        h = deltas.reference[layer].double()
        for t in range(len(prompt.tokens)):
            a = rows[t]
            if t in named:
                expected = alpha * (a + gamma * (h - mean)) + (1 - alpha) * a
                assert torch.allclose(got[t].double(), expected, atol=1e-5)
            else:
                assert torch.equal(got[t], given[t])


@pytest.mark.parametrize("positions", ["all", "prompt", "completion", 3])
def test_a_loop_of_the_users_own_with_a_cache_equals_one_pass_when_the_offset_is_given(
    tiny: HookedModel, positions: str | int
) -> None:
    plan = strong_plan(tiny, positions=positions)
    prompt = question_prompt(tiny, "Who wrote the red book?")
    tokens = torch.tensor([(*prompt.tokens, 40, 41, 42)])
    whole = tiny.run_with_hooks(tokens, fwd_hooks=fwd_hooks(plan))
    cache, steps, offset = None, [], 0
    for part in (tokens[:, : len(prompt.tokens)], *tokens[:, len(prompt.tokens) :].split(1, dim=1)):
        logits, cache = tiny.run_with_hooks(
            part,
            return_type="logits_and_cache",
            use_cache=True,
            past_key_values=cache,
            fwd_hooks=fwd_hooks(plan, offset=offset),
        )
        offset += part.shape[1]
        steps.append(logits)
    assert torch.allclose(torch.cat(steps, dim=1), whole, atol=5e-5)
    assert (whole - tiny(tokens)).abs().max() > 0.1


@pytest.mark.parametrize("positions", ["prompt", "completion", 3])
def test_a_position_limited_plan_without_an_offset_refuses_a_cached_step(
    tiny: HookedModel, positions: str | int
) -> None:
    plan = strong_plan(tiny, positions=positions)
    with pytest.raises(PlanError, match="needs the offset of a pass of 1 tokens, shorter than its"):
        tiny.run_with_hooks(torch.tensor([[40]]), fwd_hooks=fwd_hooks(plan))
    assert n_hooks(tiny) == 0


def test_a_chunk_of_a_prompt_without_an_offset_is_refused_where_bos_matters(tiny) -> None:
    plan = strong_plan(tiny)
    with pytest.raises(PlanError, match="needs the offset of a pass of 3 tokens, shorter than its"):
        tiny.run_with_hooks(torch.tensor([[40, 41, 42]]), fwd_hooks=fwd_hooks(plan))
    everywhere = strong_plan(tiny, steer_special=True)
    tokens = torch.tensor([[40, 41, 42]])
    moved = tiny.run_with_hooks(tokens, fwd_hooks=fwd_hooks(everywhere)) - tiny(tokens)
    assert (moved.abs().amax(dim=-1) > 0.01).all()


def test_with_the_model_at_hand_a_plan_is_checked_before_it_silently_does_nothing(
    tiny, stories_folder
) -> None:
    with pytest.raises(PlanError, match="d_model must be 32, but the model has 64"):
        fwd_hooks(strong_plan(tiny), model=load_model(stories_folder))
    assert len(fwd_hooks(strong_plan(tiny), model=tiny)) == 4


def test_a_sequence_mean_refuses_a_cached_step(tiny: HookedModel) -> None:
    plan = strong_plan(tiny, mean="sequence")
    for offset in (9, None):
        with pytest.raises(
            PlanError, match=r"the whole sequence in every pass.*without a KV cache"
        ):
            tiny.run_with_hooks(torch.tensor([[40]]), fwd_hooks=fwd_hooks(plan, offset=offset))


def test_a_plan_for_every_position_steers_the_bridges_own_cached_generation(
    tiny: HookedModel,
) -> None:
    plan = strong_plan(tiny)
    prompt = question_prompt(tiny, "Who wrote the red book?")
    tokens = torch.tensor([prompt.tokens])
    options = {"max_new_tokens": 8, "do_sample": False, "verbose": False, "stop_at_eos": False}
    with tiny.hooks(fwd_hooks=fwd_hooks(plan)):
        cached = tiny.generate(tokens, use_past_kv_cache=True, **options)
        uncached = tiny.generate(tokens, use_past_kv_cache=False, **options)
    assert torch.equal(cached, uncached)
    assert not torch.equal(cached, tiny.generate(tokens, **options))


def test_a_batch_row_without_a_plan_is_untouched_beside_rows_with_one(tiny: HookedModel) -> None:
    prompts = prompts_of(tiny)
    at = batch_steering([None, strong_plan(tiny), None], [p.layout for p in prompts], Cursor(0))
    assert list(at) == [("resid_post", layer) for layer in range(4)]
    resid = torch.randn(3, max(len(p.tokens) for p in prompts), 32)
    for act in at.values():
        out = act(resid)
        assert torch.equal(out[[0, 2]], resid[[0, 2]])
        assert not torch.equal(out[1], resid[1])


@pytest.mark.parametrize("wider", [0, 3])
def test_left_padding_is_never_steered(tiny: HookedModel, wider: int) -> None:
    prompts = prompts_of(tiny)
    width = max(len(p.tokens) for p in prompts) + wider
    plans = [strong_plan(tiny, steer_special=True)] * 3
    resid = torch.zeros(3, width, 32)
    # without a width of its own, a batch is as wide as its longest prompt
    cursor = Cursor(0, width if wider else None)
    for act in batch_steering(plans, [p.layout for p in prompts], cursor).values():
        moved = act(resid).abs().sum(dim=-1) > 0
        assert moved.tolist() == [
            [t >= width - len(p.tokens) for t in range(width)] for p in prompts
        ]


def test_the_users_own_hooks_stay_when_steering_ends(tiny: HookedModel) -> None:
    seen: list[int] = []
    plan = strong_plan(tiny)
    tiny.add_hook(resid_post(0), lambda resid, hook: seen.append(resid.shape[1]))
    try:
        prompt = tokenize(tiny, "Who?")
        with steering(tiny, plan, prompt=prompt):
            tiny(prompt.to_tensor())
        tiny(torch.tensor([[1, 40]]))
        assert seen == [len(prompt.tokens), 2]
    finally:
        tiny.reset_hooks()


def failing(model, kind: type[BaseException], seen: list[int], resid, hook) -> None:
    seen.append(n_hooks(model))
    raise kind


def test_hooks_are_gone_after_an_exception_and_after_an_interrupt(tiny: HookedModel) -> None:
    for kind in (RuntimeError, KeyboardInterrupt):
        plan = strong_plan(tiny)
        seen: list[int] = []
        tokens = question_prompt(tiny, "Who wrote the red book?").to_tensor()
        fail = partial(failing, tiny, kind, seen)

        with pytest.raises(kind):
            tiny.run_with_hooks(tokens, fwd_hooks=[*fwd_hooks(plan), (resid_post(3), fail)])
        with pytest.raises(kind), steering(tiny, plan), tiny.hooks([(resid_post(3), fail)]):
            tiny(tokens)
        assert seen == [5, 5]
        assert n_hooks(tiny) == 0


def test_an_unknown_hook_fails_instead_of_running_unsteered(tiny: HookedModel) -> None:
    with pytest.raises(HookNameError, match=r"but got 'blocks\.9\.hook_resid_post'") as caught:
        with hooked(tiny, [("blocks.9.hook_resid_post", lambda resid, hook: resid)]):
            pass
    assert "blocks.3.hook_resid_post" in caught.value.close


def test_steering_refuses_a_plan_of_another_model(tiny: HookedModel, other_folder) -> None:
    other = load_model(other_folder)
    with pytest.raises(PlanError, match="must be used on the model it was made on"):
        with steering(other, strong_plan(tiny)):
            pass


def test_a_plan_of_another_width_is_refused_by_the_hook_itself(tiny: HookedModel) -> None:
    (_, hook), *_ = fwd_hooks(strong_plan(tiny))
    with pytest.raises(PlanError, match="got 32 for a residual of 8"):
        hook(torch.zeros(1, 60, 8))


def test_a_plan_that_acts_at_the_mlps_output_needs_the_model_to_name_its_hook(
    tiny: HookedModel, hooked_transformer: HookedModel
) -> None:
    plan = Plan((affine_of(tiny, "mlp_out"),))
    with pytest.raises(PlanError, match=r"at mlp_out must be given the model .* fwd_hooks its mod"):
        fwd_hooks(plan)
    for model, name in ((tiny, "mlp.hook_out"), (hooked_transformer, "hook_mlp_out")):
        names = [name for name, _ in fwd_hooks(plan, model=model)]
        assert names == [f"blocks.{layer}.{name}" for layer in range(4)]
    names = [name for name, _ in fwd_hooks(Plan((affine_of(tiny, "attn_z"),)))]
    assert names == [f"blocks.{layer}.attn.hook_z" for layer in range(4)]


def test_a_hook_the_model_does_not_have_is_found_where_the_model_is_given(
    tiny: HookedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusion_lens.models.attn_z", lambda layer: f"blocks.{layer}.attn.hook_zz")
    with pytest.raises(HookNameError, match=r"got 'blocks\.0\.attn\.hook_zz'"):
        fwd_hooks(Plan((affine_of(tiny, "attn_z"),)), model=tiny)


def test_a_plan_of_no_prompt_of_its_own_must_be_told_the_prompt(tiny: HookedModel) -> None:
    (step,) = make_plan(deltas_of(tiny), 2.0).steps
    assert isinstance(step, Step)
    fitted = Plan((replace(step, deltas=replace(step.deltas, layout=NO_PROMPT)),))
    prompt = question_prompt(tiny, "Who wrote the red book?")
    with pytest.raises(PlanError, match=r"fitted on many texts .* give .* its prompt="):
        fwd_hooks(fitted)
    with steering(tiny, fitted, prompt=prompt):
        told = tiny(prompt.to_tensor())
    with steering(tiny, Plan((step,)), prompt=prompt):
        assert torch.equal(told, tiny(prompt.to_tensor()))


@pytest.mark.parametrize("site", SITES)
def test_every_kind_of_step_continues_in_a_users_own_cached_loop(
    tiny: HookedModel, site: str
) -> None:
    prompt = question_prompt(tiny, "Who wrote the red book?")
    tokens = torch.tensor([(*prompt.tokens, 40, 41)])
    parts = (tokens[:, : len(prompt.tokens)], *tokens[:, len(prompt.tokens) :].split(1, dim=1))
    for plan in every_plan(tiny).values():
        if site not in plan.sites:
            continue
        whole = tiny.run_with_hooks(tokens, fwd_hooks=fwd_hooks(plan, model=tiny))
        cache, steps, offset = None, [], 0
        for part in parts:
            logits, cache = tiny.run_with_hooks(
                part,
                return_type="logits_and_cache",
                use_cache=True,
                past_key_values=cache,
                fwd_hooks=fwd_hooks(plan, model=tiny, offset=offset),
            )
            offset += part.shape[1]
            steps.append(logits)
        assert torch.allclose(torch.cat(steps, dim=1), whole, atol=5e-5)


def test_an_affine_step_for_the_prompt_alone_refuses_a_cached_step_without_an_offset(
    tiny: HookedModel,
) -> None:
    limited = Plan((affine_of(tiny, "attn_z", positions="prompt"),))
    with pytest.raises(PlanError, match="needs the offset of a pass of 1 tokens, shorter than its"):
        tiny.run_with_hooks(torch.tensor([[40]]), fwd_hooks=fwd_hooks(limited))
    everywhere = Plan((affine_of(tiny, "attn_z"),))
    plain = tiny(torch.tensor([[40]]))
    moved = tiny.run_with_hooks(torch.tensor([[40]]), fwd_hooks=fwd_hooks(everywhere))
    assert (moved - plain).abs().max() > 0.01
    assert n_hooks(tiny) == 0


def test_steering_runs_every_kind_of_step_and_leaves_nothing_behind(tiny: HookedModel) -> None:
    prompt = question_prompt(tiny, "Who wrote the red book?")
    tokens = prompt.to_tensor()
    plain = tiny(tokens)
    for plan in every_plan(tiny).values():
        with steering(tiny, plan, prompt=prompt):
            assert not torch.equal(tiny(tokens), plain)
        assert torch.equal(tiny(tokens), plain)
        assert n_hooks(tiny) == 0


def test_what_steers_a_layer_goes_to_the_device_of_that_layer(tiny: HookedModel) -> None:
    """The later half of the blocks on a device that holds no numbers."""
    layouts = [Layout(5, (0,))] * 2
    for name, plan in every_plan(tiny).items():
        acts = batch_steering([plan, None], layouts, Cursor(0, 5))
        for (_, layer), act in sorted(acts.items(), key=lambda own: own[0][1]):
            device = "meta" if layer >= 2 else "cpu"
            changed = act(torch.zeros((2, 5, int(tiny.cfg.d_model)), device=device))
            assert changed is not None, name
            assert changed.device.type == device, name

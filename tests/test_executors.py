from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from conftest import deltas_of, make_hooked_transformer, n_hooks, prompts_of, strong_plan
from engine import (
    all_prompts,
    family,
    hand_prompt,
    largest_gap,
    logits_of,
    save_family,
    slow_logits,
    written,
)
from kinds import affine_of, by_hand, every_plan

from fusion_lens.activations import record
from fusion_lens.decoding import Completion
from fusion_lens.deltas import Deltas, make_deltas
from fusion_lens.engine_log import EngineLog
from fusion_lens.errors import ConfigError, HookNameError, ModelError, UnfitModelError
from fusion_lens.executors import (
    HookPoints,
    LeanModule,
    close,
    executor_of,
    hooked,
    lean_of,
    probe_tokens,
)
from fusion_lens.generation import GenerationConfig, Row, generate
from fusion_lens.likelihood import completion_nll
from fusion_lens.models import HookedModel, KeyValues, evaluating, load_model, resid_post, site_hook
from fusion_lens.plans import Plan, full, make_plan, per_layer
from fusion_lens.slots import slots_fit


def strong(deltas: Deltas, scale: float = 1.0, **options: Any) -> Plan:
    return make_plan(deltas, (4.0 * scale, -8.0 * scale, 6.0 * scale), **options)


def two_steps(deltas: Deltas, **options: Any) -> Plan:
    before = strong(deltas, 0.8, positions="prompt", steer_special=True)
    return before + strong(deltas, -0.6, positions="completion", **options)


FEATURES: dict[str, Callable[[Deltas], Plan | None]] = {
    "nothing": lambda deltas: None,
    "all": strong,
    "prompt": lambda deltas: strong(deltas, positions="prompt"),
    "completion": lambda deltas: strong(deltas, positions="completion"),
    "token": lambda deltas: strong(deltas, positions=3),
    "all_special": lambda deltas: strong(deltas, steer_special=True),
    "prompt_special": lambda deltas: strong(deltas, positions="prompt", steer_special=True),
    "completion_special": lambda deltas: strong(deltas, positions="completion", steer_special=True),
    "two_steps": two_steps,
    "two_steps_special": lambda deltas: two_steps(deltas, steer_special=True),
    "sequence": lambda deltas: strong(deltas, 0.1, mean="sequence"),
    "sequence_special": lambda deltas: strong(deltas, 0.1, mean="sequence", steer_special=True),
    "sequence_and_question": lambda deltas: (
        strong(deltas, 0.1, mean="sequence", positions="completion")
        + strong(deltas, positions="prompt")
    ),
    "sequence_token": lambda deltas: strong(deltas, 0.1, mean="sequence", positions=3),
    "negative": lambda deltas: strong(deltas, -1.0),
    "fraction": lambda deltas: strong(deltas, 0.37),
    "full": lambda deltas: make_plan(deltas, 6.0, full(4)),
    "per_layer": lambda deltas: make_plan(deltas, (4.0, -8.0, 0.0, 12.0), per_layer(4)),
}

Rows = dict[str, list[Row]]
Runs = dict[str, list[Completion]]


def feature_rows(model: HookedModel) -> Rows:
    """Every kind of prompt with every plan, and beside them an unsteered neighbour."""
    prompts, deltas = all_prompts(model), deltas_of(model)
    made = {}
    for feature, plan_of in FEATURES.items():
        plan = plan_of(deltas)
        made[feature] = [*(Row(prompt, plan) for prompt in prompts), Row(prompts[1])]
    return made


def feature_runs(model: HookedModel, rows: Rows, **options: Any) -> Runs:
    """What all features write, all of them neighbours in one run."""
    done = iter(written(model, [row for some in rows.values() for row in some], **options))
    return {feature: [next(done) for _ in some] for feature, some in rows.items()}


@pytest.fixture(scope="module")
def rows(tiny: HookedModel) -> Rows:
    return feature_rows(tiny)


@pytest.fixture(scope="module")
def runs(tiny: HookedModel, rows: Rows) -> dict[str, Runs]:
    """The features' completions by executor: few slots, so that these are filled again."""
    return {name: feature_runs(tiny, rows, executor=name, slots=16) for name in ("lean", "hooks")}


@pytest.mark.parametrize("feature", FEATURES)
def test_both_executors_give_the_same_logits_in_float32(
    runs: dict[str, Runs], feature: str
) -> None:
    lean, hooks = runs["lean"][feature], runs["hooks"][feature]
    assert largest_gap(lean, hooks) < 1e-4
    assert [c.tokens for c in lean] == [c.tokens for c in hooks]
    assert [len(c.tokens) for c in lean] == [4] * 7


@pytest.mark.parametrize("feature", FEATURES)
def test_the_lean_executor_gives_the_logits_of_transformer_lens_own_passes(
    tiny: HookedModel, rows: Rows, runs: dict[str, Runs], feature: str
) -> None:
    for row, completion in zip(rows[feature], runs["lean"][feature], strict=True):
        slow = slow_logits(tiny, row, completion)
        assert (logits_of(completion) - slow).abs().max() < 1e-4


def test_both_executors_give_the_same_logits_in_float64(float64: HookedModel) -> None:
    rows = feature_rows(float64)
    lean = feature_runs(float64, rows, executor="lean", slots=16)
    hooks = feature_runs(float64, rows, executor="hooks", slots=16)
    assert logits_of(lean["all"][0]).dtype == torch.float64
    gaps = {feature: largest_gap(lean[feature], hooks[feature]) for feature in FEATURES}
    assert {feature: gap for feature, gap in gaps.items() if gap >= 1e-9} == {}


@pytest.mark.parametrize("feature", [feature for feature in FEATURES if feature != "nothing"])
@pytest.mark.parametrize("executor", ["lean", "hooks"])
def test_every_feature_moves_the_logits_of_every_usual_prompt_and_of_no_unsteered_row(
    runs: dict[str, Runs], feature: str, executor: str
) -> None:
    steered, plain = runs[executor][feature], runs[executor]["nothing"]
    moved = [
        float((logits_of(one)[0] - logits_of(other)[0]).abs().max())
        for one, other in zip(steered, plain, strict=True)
    ]
    assert min(moved[:2]) > 0.05
    assert moved[-1] == 0.0


@pytest.mark.parametrize("steer_special", [False, True])
def test_a_last_prompt_token_that_is_special_is_steered_only_where_the_plan_says_so(
    tiny: HookedModel, steer_special: bool
) -> None:
    prompt = hand_prompt((1, 60, 61, 2), special=(0, 3))
    plan = strong_plan(tiny, positions="completion", steer_special=steer_special)
    for executor in ("lean", "hooks"):
        steered, plain = written(tiny, [Row(prompt, plan), Row(prompt)], executor=executor)
        first = float((logits_of(steered)[0] - logits_of(plain)[0]).abs().max())
        assert (first > 0.05) is steer_special
        if not steer_special:
            assert first == 0.0
            # the first token it writes is steered all the same
            assert steered.tokens[0] == plain.tokens[0]
            assert (logits_of(steered)[1] - logits_of(plain)[1]).abs().max() > 0.05


def test_both_executors_draw_the_same_samples(tiny: HookedModel) -> None:
    plan = strong_plan(tiny)
    rows = [Row(p, plan if s % 2 else None, s) for s, p in enumerate(all_prompts(tiny) * 3)]
    drawn = {
        executor: [
            c.tokens for c in written(tiny, rows, executor=executor, slots=4, temperature=1.5)
        ]
        for executor in ("lean", "hooks")
    }
    assert drawn["lean"] == drawn["hooks"]
    greedy = [c.tokens for c in written(tiny, rows, executor="lean", slots=4)]
    assert sum(one != other for one, other in zip(drawn["lean"], greedy, strict=True)) > 15


def test_both_executors_agree_without_a_cache(
    tiny: HookedModel, rows: Rows, runs: dict[str, Runs]
) -> None:
    for executor in ("lean", "hooks"):
        log = EngineLog()
        bare = written(tiny, rows["two_steps"], log, executor=executor, slots=8, use_cache=False)
        assert largest_gap(bare, runs["hooks"]["two_steps"]) < 1e-4
        assert log.rows[executor] == 7


FAMILIES = (
    "gpt2",
    "gpt_neox",
    "opt",
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_windows",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "olmo",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_run_lean_and_give_the_hook_points_logits(name: str) -> None:
    model = family(name)
    assert slots_fit(model, lean_of(model))
    plan = strong_plan(model, 0.5)
    prompts = prompts_of(model)
    rows = [Row(prompts[0], plan), Row(prompts[1], plan), Row(prompts[0]), Row(prompts[1])]
    assert min(len(prompt.tokens) for prompt in prompts) > 3 * 4
    log = EngineLog()
    lean = written(model, rows, log, slots=2)
    assert log.to_dict() == {"rows": {"lean": 4, "hooks": 0}, "reasons": [], "halvings": 0}
    assert largest_gap(lean, written(model, rows, slots=2, executor="hooks")) < 1e-4
    for steered, plain in zip(lean[:2], lean[2:], strict=True):
        assert (logits_of(steered)[0] - logits_of(plain)[0]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["gptj", "gpt_neo"])
def test_a_module_with_an_attention_of_its_own_runs_lean_in_batches(name: str) -> None:
    # GPT-Neo cuts its local window, here of 12 tokens, from the end of the keys: a slot cache's
    # end is no row's own
    model = family(name)
    assert not slots_fit(model, lean_of(model))
    prompts = prompts_of(model)
    rows = [Row(prompts[0], strong_plan(model, 0.5)), Row(prompts[1])]
    log = EngineLog()
    lean = written(model, rows, log, slots=2, cache_length=48, max_new_tokens=8)
    assert log.rows == {"lean": 2, "hooks": 0}
    for row, completion in zip(rows, lean, strict=True):
        assert (logits_of(completion) - slow_logits(model, row, completion)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["llama4", "phi3_long"])
def test_a_module_whose_attention_depends_on_the_length_is_not_run_lean_wrongly(name: str) -> None:
    # Llama 4 has chunks, here of 10 tokens; longrope's frequencies depend on the longest row
    # of a pass
    model = family(name)
    prompts = prompts_of(model)
    rows = [Row(prompts[0]), Row(prompts[1])]
    lean = written(model, rows, slots=2, cache_length=48, max_new_tokens=8)
    for row, completion in zip(rows, lean, strict=True):
        assert (logits_of(completion) - slow_logits(model, row, completion)).abs().max() < 1e-4


def test_an_unknown_executor_is_refused(tiny: HookedModel) -> None:
    with pytest.raises(ConfigError, match="executor must be one of auto, lean, hooks, but got 'x'"):
        executor_of(tiny, "x")


@pytest.mark.parametrize(
    ("wanted", "name"), [("auto", "lean"), ("lean", "lean"), ("hooks", "hooks")]
)
def test_a_bridge_gets_the_executor_that_was_asked_for(
    tiny: HookedModel, wanted: str, name: str
) -> None:
    executor, reason = executor_of(tiny, wanted)
    assert (executor.name, reason) == (name, None)
    assert executor.device == torch.device("cpu")


USERS_HOOKS = "the model has hooks of its user's, which only hook points run"


def double_on_a_point(model: Any) -> Callable[[], int]:
    model.add_hook(resid_post(1), lambda resid, hook: 2.0 * resid)
    return lambda: len(model.hook_dict[resid_post(1)].fwd_hooks)


def double_on_a_module(model: Any) -> Callable[[], int]:
    module = next(
        module
        for module in model.modules()
        if type(module) is torch.nn.Linear and module.out_features == 48
    )
    module.register_forward_hook(lambda module, inputs, output: 2.0 * output)
    return lambda: len(module._forward_hooks)


def double_before_a_module(model: Any) -> Callable[[], int]:
    module = next(
        module
        for module in model.modules()
        if type(module) is torch.nn.Linear and module.in_features == 48
    )
    module.register_forward_pre_hook(lambda module, inputs: (2.0 * inputs[0],))
    return lambda: len(module._forward_pre_hooks)


@pytest.mark.parametrize(
    "put", [double_on_a_point, double_on_a_module, double_before_a_module], ids=lambda f: f.__name__
)
def test_hooks_of_the_users_act_stay_and_are_run_by_hook_points(
    tiny_folder: Path, put: Callable[[Any], Callable[[], int]]
) -> None:
    model = load_model(tiny_folder)
    row = Row(prompts_of(model)[0], strong_plan(model))
    before = written(model, [row])[0]
    n_users = put(model)
    log = EngineLog()
    after = written(model, [row], log)[0]
    assert log.to_dict() == {
        "rows": {"lean": 0, "hooks": 1},
        "reasons": [USERS_HOOKS],
        "halvings": 0,
    }
    assert (logits_of(after) - logits_of(before)).abs().max() > 0.05
    assert (logits_of(after) - slow_logits(model, row, after)).abs().max() < 1e-4
    assert n_users() == 1
    with pytest.raises(UnfitModelError, match="but the model has hooks of its user's") as caught:
        generate(model, [row], GenerationConfig(executor="lean"))
    assert caught.value.reason == USERS_HOOKS
    assert n_users() == 1


def test_a_model_whose_user_took_the_hooks_away_runs_lean_again(tiny_folder: Path) -> None:
    model: Any = load_model(tiny_folder)
    row = Row(prompts_of(model)[0])
    before = written(model, [row])[0]
    with model.hooks(fwd_hooks=[(resid_post(2), lambda resid, hook: 2.0 * resid)]):
        inside = written(model, [row])[0]
    log = EngineLog()
    after = written(model, [row], log)[0]
    assert log.rows == {"lean": 1, "hooks": 0}
    assert torch.equal(logits_of(after), logits_of(before))
    assert (logits_of(inside) - logits_of(before)).abs().max() > 0.05


def test_a_hooked_transformer_is_run_by_its_hook_points(hooked_transformer: HookedModel) -> None:
    log = EngineLog()
    rows = [Row(prompt) for prompt in prompts_of(hooked_transformer)]
    completions = written(hooked_transformer, rows, log)
    reason = "HookedTransformer has no Hugging Face module to share"
    assert log.reasons == [reason]
    assert log.rows == {"lean": 0, "hooks": 3}
    for row, completion in zip(rows, completions, strict=True):
        slow = slow_logits(hooked_transformer, row, completion)
        assert (logits_of(completion) - slow).abs().max() < 1e-4
    for _ in range(2):
        with pytest.raises(UnfitModelError, match=reason):
            executor_of(hooked_transformer, "lean")


@pytest.mark.parametrize("lean_before", [False, True])
def test_a_bridge_of_centred_weights_is_run_by_its_hook_points(
    tmp_path: Path, lean_before: bool
) -> None:
    model: Any = load_model(save_family("gpt2", tmp_path))
    if lean_before:
        lean_of(model)
    model.enable_compatibility_mode(disable_warnings=True)
    row = Row(prompts_of(model)[0], strong_plan(model))
    log = EngineLog()
    auto = written(model, [row], log)[0]
    assert log.reasons == ["its module computes something else than its hook points"]
    assert log.rows == {"lean": 0, "hooks": 1}
    assert (logits_of(auto) - slow_logits(model, row, auto)).abs().max() < 1e-4
    with pytest.raises(UnfitModelError, match="computes something else"):
        executor_of(model, "lean")


@pytest.mark.parametrize("lean_before", [False, True])
def test_a_bridge_of_folded_weights_runs_as_its_hook_points_do(
    tiny_folder: Path, lean_before: bool
) -> None:
    model: Any = load_model(tiny_folder)
    if lean_before:
        lean_of(model)
    model.enable_compatibility_mode(disable_warnings=True)
    rows = [Row(prompt, strong_plan(model)) for prompt in prompts_of(model)]
    assert largest_gap(written(model, rows), written(model, rows, executor="hooks")) < 1e-4


def with_another_activation(model: Any) -> None:
    """A change of what the bridge computes that is neither a hook nor a weight."""
    for module in model.modules():
        if type(module).__name__ == "LlamaMLP":
            module.act_fn = torch.nn.Identity()


def test_a_module_that_computes_something_else_is_refused_with_the_reason(
    tiny_folder: Path,
) -> None:
    model = load_model(tiny_folder)
    with_another_activation(model)
    reason = "its module computes something else than its hook points"
    for _ in range(2):
        with pytest.raises(UnfitModelError, match="must be able to share the model's module") as e:
            lean_of(model)
        assert e.value.reason == reason
    log = EngineLog()
    row = Row(prompts_of(model)[0])
    auto = written(model, [row], log)[0]
    assert log.to_dict()["reasons"] == [reason]
    assert (logits_of(auto) - slow_logits(model, row, auto)).abs().max() < 1e-4


def test_a_part_that_was_replaced_after_the_lean_module_was_made_acts(tiny_folder: Path) -> None:
    model = load_model(tiny_folder)
    row = Row(prompts_of(model)[0])
    before = written(model, [row])[0]
    with_another_activation(model)
    after = written(model, [row])[0]
    assert (logits_of(after) - logits_of(before)).abs().max() > 0.05
    assert (logits_of(after) - slow_logits(model, row, after)).abs().max() < 1e-4


def test_a_module_that_cannot_be_made_again_is_refused_with_what_it_raised(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = load_model(tiny_folder)
    kind = type(model.original_model)

    def failing(self: Any, config: Any) -> None:
        raise KeyError("no such thing\nand more")

    monkeypatch.setattr(kind, "__init__", failing)
    executor, reason = executor_of(model)
    assert executor == HookPoints(model)
    assert reason == "its module gave KeyError: 'no such thing\\nand more'"


def test_an_exception_without_a_message_is_a_reason_too(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = load_model(tiny_folder)

    def failing(self: Any, config: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(type(model.original_model), "__init__", failing)
    executor, reason = executor_of(model)
    assert executor.name == "hooks"
    assert reason == "its module gave NotImplementedError: nothing more"


def test_the_lean_module_is_made_once(tiny: HookedModel) -> None:
    assert lean_of(tiny) is lean_of(tiny)


def test_weights_changed_in_place_are_seen_by_the_lean_module(tiny_folder: Path) -> None:
    model: Any = load_model(tiny_folder)
    row = Row(prompts_of(model)[0])
    before, lean = written(model, [row], executor="lean")[0], lean_of(model)
    with torch.no_grad():
        model.blocks[2].mlp.out.weight.mul_(-1.0)
    after = written(model, [row], executor="lean")[0]
    assert lean_of(model) is lean
    assert (logits_of(after) - logits_of(before)).abs().max() > 0.05
    assert (logits_of(after) - slow_logits(model, row, after)).abs().max() < 1e-4


def test_a_parameter_that_was_replaced_leads_to_a_new_lean_module(tiny_folder: Path) -> None:
    model: Any = load_model(tiny_folder)
    row = Row(prompts_of(model)[0])
    before, lean = written(model, [row], executor="lean")[0], lean_of(model)
    linear = next(
        module
        for module in model.modules()
        if type(module) is torch.nn.Linear and module.in_features == 48
    )
    linear.weight = torch.nn.Parameter(-linear.weight.detach().clone())
    after = written(model, [row], executor="lean")[0]
    assert lean_of(model) is not lean
    assert (logits_of(after) - logits_of(before)).abs().max() > 0.05
    assert (logits_of(after) - slow_logits(model, row, after)).abs().max() < 1e-4


def test_a_buffer_that_was_replaced_leads_to_a_new_lean_module(tiny_folder: Path) -> None:
    model: Any = load_model(tiny_folder)
    lean_of(model)
    model.to(torch.bfloat16)
    buffers = dict(lean_of(model).module.named_buffers())
    theirs = {id(buffer) for buffer in model.buffers()}
    assert len(buffers) == 2
    assert [name for name, buffer in buffers.items() if id(buffer) not in theirs] == []


def test_a_model_with_a_lean_module_is_freed_when_its_user_drops_it(tiny_folder: Path) -> None:
    model = load_model(tiny_folder)
    assert executor_of(model)[0].name == "lean"
    watched = weakref.ref(model)
    del model
    gc.collect()
    assert watched() is None


def test_a_model_without_a_lean_module_is_freed_when_its_user_drops_it(tiny_folder: Path) -> None:
    model = make_hooked_transformer(tiny_folder)
    assert executor_of(model)[0].name == "hooks"
    watched = weakref.ref(model)
    del model
    gc.collect()
    assert watched() is None


@pytest.mark.parametrize("executor", ["lean", "hooks"])
def test_a_model_in_float64_gives_finite_numbers_for_texts_of_any_length(
    tiny_folder: Path, executor: str
) -> None:
    # without the fixture's exact softmax: the bridge's own makes NaN of padding
    model = load_model(tiny_folder, dtype="float64")
    prompts = prompts_of(model)
    assert {len(prompt.tokens) % 8 for prompt in prompts} - {0}
    plan = make_plan(make_deltas(*record(model, prompts[:2], executor=executor)), 2.0)
    rows = [Row(prompts[0]), Row(prompts[1], plan), Row(prompts[2], plan)]
    completions = written(model, rows, executor=executor, slots=4)
    for row, completion in zip(rows, completions, strict=True):
        assert completion.finite
        assert (logits_of(completion) - slow_logits(model, row, completion)).abs().max() < 1e-4
    texts = list(zip(prompts, completions, strict=True))
    values = completion_nll(model, texts, executor=executor)
    in_float32 = completion_nll(load_model(tiny_folder), texts)
    assert values == pytest.approx(in_float32, abs=1e-4)


def test_one_pass_of_both_executors_gives_the_same_logits_at_padded_rows(
    tiny: HookedModel,
) -> None:
    tokens = torch.tensor([[0, 0, 1, 50, 60], [1, 70, 80, 90, 100]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with evaluating(tiny):
        whole = [
            executor.forward(tokens, mask)
            for executor in (HookPoints(tiny), LeanModule(lean_of(tiny)))
        ]
        alone = LeanModule(lean_of(tiny)).forward(tokens[:1, 2:], mask[:1, 2:])
        last = LeanModule(lean_of(tiny)).forward(tokens, mask, last=2)
    assert whole[0].shape == whole[1].shape == (2, 5, 320)
    assert (whole[0] - whole[1])[mask == 1].abs().max() < 1e-5
    assert (whole[1][0, 2:] - alone[0]).abs().max() < 1e-5
    assert torch.allclose(last, whole[1][:, -2:], atol=1e-5)


def test_what_is_done_at_a_block_is_done_while_the_context_lasts_and_by_both_executors(
    tiny: HookedModel,
) -> None:
    tokens = torch.tensor([[1, 50, 60]])
    mask = torch.ones_like(tokens)
    shift = torch.linspace(-1.0, 1.0, 32)
    seen: dict[str, list[torch.Tensor]] = {}
    for executor in (HookPoints(tiny), LeanModule(lean_of(tiny))):
        streams: list[torch.Tensor] = []
        with evaluating(tiny):
            before = executor.forward(tokens, mask)
            with executor.at_blocks({1: lambda resid: resid + shift, 2: streams.append}):
                inside = executor.forward(tokens, mask)
            after = executor.forward(tokens, mask)
        assert torch.equal(before, after)
        seen[executor.name] = [inside, *streams]
        assert len(streams) == 1
    assert torch.allclose(seen["lean"][0], seen["hooks"][0], atol=1e-5)
    assert torch.allclose(seen["lean"][1], seen["hooks"][1], atol=1e-5)
    assert (seen["lean"][0] - before).abs().max() > 0.05


@pytest.mark.parametrize("site", ["attn_z", "mlp_out"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_done_inside_a_block_is_done_by_both_executors(name: str, site: str) -> None:
    model: Any = family(name)
    lean, reason = executor_of(model, sites=[site])
    assert (lean.name, reason) == ("lean", None)
    tokens = torch.tensor([[0, 0, 1, 50, 60], [1, 70, 80, 90, 100]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    seen: dict[str, list[torch.Tensor]] = {}
    for executor in (HookPoints(model), lean):
        streams: list[torch.Tensor] = []
        at: Any = {(site, 1): lambda x: x + 0.5 * x.roll(1, dims=-1), (site, 2): streams.append}
        with evaluating(model):
            before = executor.forward(tokens, mask)
            with executor.at_sites(at):
                inside = executor.forward(tokens, mask)
            assert torch.equal(executor.forward(tokens, mask), before)
        assert len(streams) == 1
        seen[executor.name] = [inside, *streams]
        assert (inside - before).abs().max() > 0.01
    for one, other in zip(seen["lean"], seen["hooks"], strict=True):
        assert ((one - other)[mask == 1]).abs().max() < 1e-4
    assert seen["lean"][1].shape == (2, 5, 48)


def test_a_site_whose_module_has_no_name_is_run_by_hook_points_and_takes_no_row_along(
    tiny_folder: Path,
) -> None:
    model = load_model(tiny_folder)
    lean_of(model).sites = {}
    prompt = prompts_of(model)[0]
    inside = Row(prompt, Plan((affine_of(model, "attn_z"),)))
    rows = [Row(prompt, strong_plan(model)), inside, Row(prompt)]
    log = EngineLog()
    together = written(model, rows, log)
    reason = "its blocks do not name their attention's output projection"
    assert log.to_dict() == {"rows": {"lean": 2, "hooks": 1}, "reasons": [reason], "halvings": 0}
    assert (logits_of(together[1]) - by_hand(model, inside, together[1])).abs().max() < 1e-4
    with pytest.raises(UnfitModelError, match=reason):
        generate(model, [inside], GenerationConfig(executor="lean"))


def test_a_site_where_the_module_computes_something_else_is_run_by_hook_points(
    tiny_folder: Path,
) -> None:
    model = load_model(tiny_folder)
    lean = lean_of(model)
    lean.written_out = None
    lean.sites = {**lean.sites, "mlp_out": lean.sites["attn_z"]}
    executor, reason = executor_of(model, sites=["mlp_out"])
    assert executor == HookPoints(model)
    assert reason == "its module computes something else than its hook points at mlp_out"
    # it is tried once, and the other sites are left alone
    lean.sites = {}
    assert executor_of(model, sites=["mlp_out"])[1] == reason
    assert executor_of(model, sites=["resid_post"]) == (LeanModule(lean), None)


def test_a_site_whose_module_raises_is_run_by_hook_points(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_folder)
    lean = lean_of(model)
    lean.written_out = None
    lean.sites = {"attn_z": (torch.nn.Identity(),) * 3 + (None,)}  # type: ignore[dict-item]
    _, reason = executor_of(model, sites=["attn_z"])
    assert reason is not None
    assert reason.startswith("its module gave AttributeError: ")


def test_a_model_without_the_hook_of_a_site_is_refused_by_both_executors(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_folder)
    row = Row(prompts_of(model)[0], Plan((affine_of(model, "attn_z"),)))
    monkeypatch.setattr("fusion_lens.models.attn_z", lambda layer: f"blocks.{layer}.attn.hook_zz")
    for executor in ("auto", "lean", "hooks"):
        with pytest.raises(HookNameError, match=r"got 'blocks\.0\.attn\.hook_zz'"):
            written(model, [row], executor=executor)


@pytest.mark.parametrize("executor", ["auto", "hooks"])
@pytest.mark.parametrize("dead_at", [(0, 1, 2, 3), (2,)], ids=["everywhere", "at one layer"])
def test_a_hook_point_that_is_never_run_is_not_taken_for_steering(
    executor: str, dead_at: tuple[int, ...]
) -> None:
    # OPT's blocks have no MLP of their own: a bridge has a hook point of that name all the same
    with TemporaryDirectory() as folder:
        model: Any = load_model(save_family("opt", Path(folder)))
    assert site_hook(model, "mlp_out", 0) == "blocks.0.mlp.out.hook_out"
    row = Row(prompts_of(model)[0], Plan((affine_of(model, "mlp_out"),)))
    dead = "blocks.{}.mlp.hook_out"
    assert dead.format(0) in model.hook_dict
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "fusion_lens.executors.site_hook",
            lambda model, site, n: dead.format(n) if n in dead_at else site_hook(model, site, n),
        )
        if version("transformer-lens") >= "4":
            # which hangs it on the hook of the last linear map
            named = written(model, [row], executor=executor)
        else:
            name = re.escape(dead.format(dead_at[0]))
            message = rf"mlp_out must reach the logits, but {name} of .* changes nothing"
            with pytest.raises(ModelError, match=message):
                written(model, [row], executor=executor)
            named = None
    plain = written(model, [Row(row.prompt)], executor=executor)
    moved = written(model, [row], executor=executor)
    assert largest_gap(moved, plain) > 0.01
    assert named is None or largest_gap(named, moved) < 1e-5


def test_hook_points_of_a_hooked_transformer_run_every_kind_of_step(
    hooked_transformer: HookedModel,
) -> None:
    prompt = prompts_of(hooked_transformer)[0]
    plans = every_plan(hooked_transformer)
    rows = [Row(prompt, plan) for plan in plans.values()]
    done = written(hooked_transformer, rows, slots=16)
    gaps = {
        name: float((logits_of(one) - by_hand(hooked_transformer, row, one)).abs().max())
        for name, row, one in zip(plans, rows, done, strict=True)
    }
    assert {name: gap for name, gap in gaps.items() if gap >= 1e-4} == {}


def test_a_cached_step_continues_a_padded_pass(tiny: HookedModel) -> None:
    tokens = torch.tensor([[0, 0, 1, 50, 60], [1, 70, 80, 90, 100]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for executor in (HookPoints(tiny), LeanModule(lean_of(tiny))):
        cache = KeyValues()
        with evaluating(tiny):
            whole = executor.forward(tokens, mask, last=1)
            executor.forward(tokens[:, :-1], mask[:, :-1], cache=cache, last=1)
            step = executor.forward(tokens[:, -1:], mask, cache=cache, last=1)
        assert torch.allclose(step, whole, atol=1e-5)


def test_own_hooks_are_added_under_checked_names_and_alone_taken_away(tiny: HookedModel) -> None:
    seen: list[torch.Size] = []
    with hooked(tiny, [(resid_post(0), lambda resid, hook: seen.append(resid.shape))]):
        tiny(torch.tensor([[1, 50]]))
        assert n_hooks(tiny) == 1
    assert seen == [(1, 2, 32)]
    assert n_hooks(tiny) == 0
    with pytest.raises(HookNameError, match=r"got 'blocks\.9\.hook_resid_post'"):
        with hooked(tiny, [(resid_post(9), print)]):
            pass


@pytest.mark.parametrize(
    ("dtype", "within", "beyond"),
    [
        (torch.float32, 0.9e-3, 1.1e-3),
        (torch.float64, 0.9e-5, 1.1e-5),
        (torch.bfloat16, 0.09, 0.12),
    ],
)
def test_closeness_is_relative_to_the_largest_logit(
    dtype: torch.dtype, within: float, beyond: float
) -> None:
    other = torch.tensor([-8.0, 0.0, 1.0], dtype=dtype)
    nudge = torch.tensor([0.0, 8.0, 0.0], dtype=dtype)
    assert close(other + within * nudge, other)
    assert not close(other + beyond * nudge, other)
    assert not close(torch.full_like(other, torch.nan), other)


def test_probe_tokens_are_in_the_vocabulary_and_its_rows_differ(tiny: HookedModel) -> None:
    tokens = probe_tokens(tiny, torch.device("cpu"))
    assert tokens.shape == (2, 7)
    assert int(tokens.min()) >= 0
    assert int(tokens.max()) < 320
    assert len(set(tokens.flatten().tolist())) == 14

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import deltas_of, n_hooks, prompts_of, strong_plan

from fusion_lens import executors
from fusion_lens.engine_log import EngineLog
from fusion_lens.errors import ConfigError, ContextLengthError, PlanError
from fusion_lens.executors import lean_of
from fusion_lens.generation import GenerationConfig, Row, generate
from fusion_lens.lean import Lean
from fusion_lens.models import HookedModel, load_model
from fusion_lens.plans import Plan, Segment, make_plan
from fusion_lens.prompts import tokenize

EIGHT = GenerationConfig(max_new_tokens=8)
Pass = Callable[..., torch.Tensor]


@pytest.fixture(params=["lean", "hooks"])
def executor(request: pytest.FixtureRequest) -> str:
    """Every test that asks for it is run by both."""
    return str(request.param)


@pytest.fixture
def eight(executor: str) -> GenerationConfig:
    return replace(EIGHT, executor=executor)


@pytest.fixture
def logits_of(executor: str):
    """`generate`, but giving every step's logits, row by row: "row step d_vocab"."""

    def run(
        model: HookedModel, rows: list[Row], config: GenerationConfig = EIGHT, **changes: object
    ) -> torch.Tensor:
        changes = {"executor": executor, "keep_logits": True, "stop_at_eos": False} | changes
        log = EngineLog()
        completions = generate(model, rows, replace(config, **changes), log=log)
        assert log.rows[changes["executor"]] == len(rows)
        stacked = torch.stack([c.logits for c in completions])
        assert stacked.shape[1] == config.max_new_tokens
        return stacked

    return run


@pytest.fixture
def around_passes(executor: str, monkeypatch: pytest.MonkeyPatch):
    """Put a function `(real pass, *arguments) -> logits` around every pass of the executor."""

    def put(model: HookedModel, around: Callable[..., torch.Tensor]) -> None:
        # a module is compared with the hook points when it is first used, and must not be here
        generate(model, [Row(prompts_of(model)[0])], replace(EIGHT, executor=executor))
        owner = {"lean": Lean, "hooks": executors}[executor]
        real = owner.forward
        monkeypatch.setattr(owner, "forward", lambda *a, **k: around(real, *a, **k))

    return put


def mixed_rows(model: HookedModel) -> list[Row]:
    """Prompts of three lengths, each with another plan, and the last two without."""
    _, short, long = prompts_of(model)
    plans = [
        strong_plan(model, 1.0),
        strong_plan(model, -0.5, positions="completion"),
        strong_plan(model, 0.7, positions="prompt"),
    ]
    rows = [Row(p, plan) for p, plan in zip(prompts_of(model), plans, strict=True)]
    return [*rows, Row(short), Row(long)]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 5e-5), ("float64", 1e-9)])
def test_cache_on_equals_cache_off(tiny, float64, logits_of, dtype: str, tolerance: float) -> None:
    model = {"float32": tiny, "float64": float64}[dtype]
    rows = mixed_rows(model)
    on = logits_of(model, rows)
    off = logits_of(model, rows, GenerationConfig(max_new_tokens=8, use_cache=False))
    assert on.dtype == getattr(torch, dtype)
    assert (on - off).abs().max() < tolerance


@pytest.mark.parametrize("slots", [None, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 5e-5), ("float64", 1e-9)])
def test_a_batch_equals_every_row_alone(
    tiny, float64, logits_of, dtype: str, tolerance: float, slots: int | None
) -> None:
    model = {"float32": tiny, "float64": float64}[dtype]
    rows = mixed_rows(model)
    together = logits_of(model, rows, slots=slots)
    for row, batched in zip(rows, together, strict=True):
        alone = logits_of(model, [row])[0]
        assert (batched - alone).abs().max() < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 5e-5), ("float64", 1e-9)])
def test_a_batch_of_sequence_means_equals_every_row_alone(
    tiny, float64, logits_of, dtype: str, tolerance: float
) -> None:
    model = {"float32": tiny, "float64": float64}[dtype]
    plan = strong_plan(model, mean="sequence")
    rows = [Row(prompt, plan * (i + 1)) for i, prompt in enumerate(prompts_of(model))]
    together = logits_of(model, rows)
    for row, batched in zip(rows, together, strict=True):
        assert (batched - logits_of(model, [row])[0]).abs().max() < tolerance


def test_steering_moves_the_logits_of_every_steered_row(tiny, logits_of) -> None:
    rows = mixed_rows(tiny)
    plain = logits_of(tiny, [Row(row.prompt) for row in rows])
    moved = (logits_of(tiny, rows) - plain).abs().amax(dim=(1, 2))
    assert (moved[:3] > 0.1).all()
    assert (moved[3:] == 0).all()


@pytest.mark.parametrize("mean", ["question", "sequence"])
def test_the_zero_plan_is_the_unsteered_model_bit_for_bit(tiny, logits_of, mean: str) -> None:
    zero = make_plan(deltas_of(tiny), (0.0, 0.0, 0.0), mean=mean)
    config = GenerationConfig(max_new_tokens=8, use_cache=mean == "question")
    steered = logits_of(tiny, [Row(prompt, zero) for prompt in prompts_of(tiny)], config)
    plain = logits_of(tiny, [Row(prompt) for prompt in prompts_of(tiny)], config)
    assert torch.equal(steered, plain)


def test_at_a_fixed_shape_a_row_does_not_change_by_one_bit_with_its_neighbours(
    tiny, logits_of
) -> None:
    prompt = prompts_of(tiny)[0]
    row = Row(prompt, strong_plan(tiny))
    # PyTorch rounds the end of a tensor otherwise: 4 times 48, the width of an MLP, has no such end
    shape = {"slots": 4, "cache_length": 64}
    one = logits_of(tiny, [row, Row(prompt), Row(prompt, row.plan * 2.0)], **shape)
    other = logits_of(tiny, [row, Row(prompt, row.plan * -1.0), Row(prompt)], **shape)
    assert torch.equal(one[0], other[0])
    assert not torch.equal(one[1], other[1])
    assert torch.equal(one[0], logits_of(tiny, [row], **shape)[0])
    # rows of other lengths, one whose place becomes free, and another place among them
    among = logits_of(tiny, [*mixed_rows(tiny), row, Row(prompt)], **shape)
    assert torch.equal(one[0], among[-2])
    assert torch.equal(one[1], among[-1])


def test_an_unprocessed_hooked_transformer_gives_the_bridges_steered_logits(
    tiny, hooked_transformer, logits_of
) -> None:
    plan = strong_plan(tiny)
    rows = [Row(prompt, plan) for prompt in prompts_of(tiny)]
    bridge = logits_of(tiny, rows)
    hooked = logits_of(hooked_transformer, rows, executor="hooks")
    assert (bridge - hooked).abs().max() < 1e-4
    uncached = logits_of(hooked_transformer, rows, executor="hooks", use_cache=False)
    assert (bridge - uncached).abs().max() < 1e-4


def test_unsteered_greedy_text_is_that_of_the_published_checkpoint(
    stories_folder, executor
) -> None:
    model = load_model(stories_folder)
    row = Row(tokenize(model, "", prepend_bos=True))
    config = GenerationConfig(max_new_tokens=200, executor=executor)
    text = generate(model, [row], config)[0].text
    assert text == (stories_folder / "expected_greedy_200steps.txt").read_text()


def test_the_order_of_rows_is_kept_across_batches(tiny, eight) -> None:
    prompts = prompts_of(tiny) * 3
    rows = [Row(prompt, strong_plan(tiny, 0.1 * i)) for i, prompt in enumerate(prompts)]
    together = generate(tiny, rows, eight)
    small = generate(tiny, rows, replace(eight, slots=2))
    assert [c.tokens for c in together] == [c.tokens for c in small]
    assert len({c.tokens for c in together}) > 3


def test_rows_with_a_sequence_mean_do_not_take_the_cache_from_the_others(
    tiny, eight, around_passes
) -> None:
    widths: list[int] = []

    def measured(real: Pass, model: object, tokens: torch.Tensor, *rest: object, **options: object):
        widths.append(tokens.shape[1])
        return real(model, tokens, *rest, **options)

    around_passes(tiny, measured)
    prompts = prompts_of(tiny)
    means = ["question", "sequence", "question"]
    rows = [Row(p, strong_plan(tiny, mean=m)) for p, m in zip(prompts, means, strict=True)]
    together = generate(tiny, rows, eight)
    # 7 cached steps of the others; 8 whole passes, each a token wider, of the row in their midst
    assert widths.count(1) >= 7
    assert sum(width > 1 and width + 1 in widths for width in widths) >= 7
    assert together == [generate(tiny, [row], eight)[0] for row in rows]


def test_a_completion_ends_at_the_stop_token_and_holds_neither_it_nor_the_prompt(
    tiny, eight
) -> None:
    prompt = prompts_of(tiny)[0]
    free = generate(tiny, [Row(prompt)], eight)[0]
    assert not free.ended
    assert len(free.tokens) == 8
    end = tiny.tokenizer.eos_token_id
    bias = tiny.unembed.b_U
    with torch.no_grad():
        bias[end] += 1e4
    try:
        ended = generate(tiny, [Row(prompt), Row(prompts_of(tiny)[1])], eight)
    finally:
        with torch.no_grad():
            bias[end] -= 1e4
    assert [c.tokens for c in ended] == [(end,), (end,)]
    assert [c.text for c in ended] == ["", ""]
    assert all(c.ended for c in ended)


def test_a_stop_token_of_the_checkpoint_alone_is_not_part_of_the_text(
    tiny_folder, tmp_path, eight
) -> None:
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    free = generate(load_model(tiny_folder), [Row(prompts_of(load_model(tiny_folder))[0])], eight)
    third = free[0].tokens[2]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, third]}))
    model = load_model(tmp_path)
    stopped = generate(model, [Row(prompts_of(model)[0])], eight)[0]
    cut = free[0].tokens.index(third)
    assert stopped.ended
    assert stopped.tokens == free[0].tokens[: cut + 1]
    assert stopped.text == model.tokenizer.decode(stopped.tokens[:-1])


def overflowing_plan(model: HookedModel) -> Plan:
    """Every layer's shift is finite, the sum of two is not."""
    deltas = deltas_of(model)
    huge = torch.full_like(deltas.base, 3e38)
    return make_plan(replace(deltas, reference=huge, base=torch.zeros_like(huge)), 1.0)


@pytest.mark.parametrize("slots", [3, 1])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_mark_their_row_and_no_other(
    tiny, eight, slots: int, temperature: float
) -> None:
    config = replace(eight, slots=slots, temperature=temperature)
    rows = [Row(prompt) for prompt in prompts_of(tiny)]
    whole = generate(tiny, rows, config)
    assert all(c.finite for c in whole)
    # the shortest prompt: with one slot, the others come after it
    rows[1] = replace(rows[1], plan=overflowing_plan(tiny))
    got = generate(tiny, rows, config)
    assert [c.finite for c in got] == [True, False, True]
    assert (got[0], got[2]) == (whole[0], whole[2])
    # the row ends where its first step failed
    assert got[1].tokens == ()


def test_a_row_after_one_that_was_not_finite_is_written_as_if_it_were_alone(tiny, eight) -> None:
    # nothing but BOS, which is not steered: the second step fails, and leaves keys and values
    prompt = tokenize(tiny, "", prepend_bos=True)
    one_slot = replace(eight, slots=1)
    alone = generate(tiny, [Row(prompt)], one_slot)[0]
    for order in ((0, 1), (1, 0)):
        rows = [Row(prompt), Row(prompt, overflowing_plan(tiny))]
        got = generate(tiny, [rows[i] for i in order], one_slot)
        assert got[order.index(0)] == alone
        assert not got[order.index(1)].finite
        assert len(got[order.index(1)].tokens) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("value", "finite"), [(float("-inf"), True), (float("inf"), False), (float("nan"), False)]
)
def test_one_logit_that_is_not_finite_is_enough_and_a_masked_one_is_none(
    tiny, eight, around_passes, temperature: float, value: float, finite: bool
) -> None:
    def poisoned(real: Pass, *args: object, **options: object) -> torch.Tensor:
        logits = real(*args, **options).clone()
        logits[..., 7] = value
        return logits

    around_passes(tiny, poisoned)
    rows = [Row(prompt) for prompt in prompts_of(tiny)]
    got = generate(tiny, rows, replace(eight, temperature=temperature))
    assert [c.finite for c in got] == [finite] * 3
    assert [len(c.tokens) for c in got] == [8 if finite else 0] * 3
    assert all(7 not in c.tokens for c in got)


def test_samples_depend_on_their_seed_and_not_on_their_neighbours(tiny, eight) -> None:
    prompt = prompts_of(tiny)[0]
    hot = replace(eight, temperature=1.0)
    first = generate(tiny, [Row(prompt, seed=s) for s in (1, 2, 3)], hot)
    again = generate(tiny, [Row(prompt, seed=s) for s in (3, 1, 4)], hot)
    assert first[0] == again[1]
    assert first[2] == again[0]
    assert len({c.tokens for c in first}) == 3


def test_samples_follow_the_softmax(tiny) -> None:
    prompt = prompts_of(tiny)[1]
    rows = [Row(prompt, seed=s) for s in range(2000)]
    config = GenerationConfig(max_new_tokens=1, temperature=2.0, slots=250)
    drawn = torch.tensor([c.tokens[0] for c in generate(tiny, rows, config)])
    with torch.no_grad():
        p = (tiny(torch.tensor([prompt.tokens]))[0, -1] / 2.0).softmax(dim=-1)
    top = int(p.argmax())
    share = float((drawn == top).float().mean())
    spread = float((p[top] * (1 - p[top]) / 2000).sqrt())
    assert abs(share - float(p[top])) < 4 * spread


def test_a_prompt_without_room_for_its_completion_is_refused(tiny) -> None:
    row = Row(prompts_of(tiny)[1])
    with pytest.raises(ContextLengthError, match=r"got 16 \+ 120 > 128 tokens"):
        generate(tiny, [row], GenerationConfig(max_new_tokens=120))
    with pytest.raises(ContextLengthError, match=r"got 16 \+ 8 > 23"):
        generate(tiny, [row], replace(EIGHT, cache_length=23))
    assert len(generate(tiny, [row], replace(EIGHT, cache_length=24))[0].tokens) == 8


def test_a_plan_of_another_model_is_refused(tiny, other_folder) -> None:
    other = load_model(other_folder)
    with pytest.raises(PlanError, match="it was made on tiny"):
        generate(other, [Row(prompts_of(other)[0], strong_plan(tiny))], EIGHT)


def test_a_plan_of_another_processing_mode_is_refused(tiny, tiny_folder) -> None:
    processed = load_model(tiny_folder)
    processed.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(PlanError, match="processing must be unprocessed, but the model has proc"):
        generate(processed, [Row(prompts_of(tiny)[0], strong_plan(tiny))], EIGHT)


@pytest.mark.parametrize("kind", [None, RuntimeError, KeyboardInterrupt])
def test_the_model_is_given_back_as_it_was(
    tiny, untouched, executor, eight, logits_of, around_passes, monkeypatch, kind
) -> None:
    untouched(tiny)
    rows = mixed_rows(tiny)
    plain = logits_of(tiny, [Row(rows[0].prompt)])
    if kind is None:
        generate(tiny, rows, eight)
    else:
        calls = []

        def failing(real: Pass, *args: object, **options: object) -> torch.Tensor:
            assert n_hooks(tiny) == (4 if executor == "hooks" else 0)
            calls.append(1)
            if len(calls) == 3:
                raise kind
            return real(*args, **options)

        around_passes(tiny, failing)
        with pytest.raises(kind):
            generate(tiny, rows, eight)
        assert len(calls) == 3
        monkeypatch.undo()
    if executor == "lean":
        assert lean_of(tiny)._at == {}
    assert torch.equal(logits_of(tiny, [Row(rows[0].prompt)]), plain)


def test_a_model_in_training_mode_is_put_back_into_it(tiny, eight) -> None:
    tiny.train(True)
    try:
        generate(tiny, [Row(prompts_of(tiny)[0])], eight)
        assert tiny.training
    finally:
        tiny.train(False)


def test_settings_outside_their_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_new_tokens must be at least 1, but got 0"):
        GenerationConfig(max_new_tokens=0)
    with pytest.raises(ConfigError, match="slots must be at least 1, but got 0"):
        GenerationConfig(slots=0)
    with pytest.raises(ConfigError, match="cache_length must be at least 1, but got -8"):
        GenerationConfig(cache_length=-8)
    with pytest.raises(ConfigError, match="executor must be one of auto, lean, hooks, but got 'f"):
        GenerationConfig(executor="fast")
    with pytest.raises(ConfigError, match=r"temperature must be 0 or above, but got -1\.0"):
        GenerationConfig(temperature=-1.0)


def test_a_seed_no_generator_takes_is_refused(tiny) -> None:
    with pytest.raises(ConfigError, match=r"0 <= seed < 2\*\*63 must hold, but got -1"):
        Row(prompts_of(tiny)[0], seed=-1)


def test_progress_counts_finished_rows(tiny, executor) -> None:
    seen: list[int] = []
    rows = [Row(prompt) for prompt in prompts_of(tiny)]
    config = GenerationConfig(max_new_tokens=2, slots=2, executor=executor)
    generate(tiny, rows, config, progress=seen.append)
    assert seen == [1, 2, 3]


def test_two_steps_of_one_plan_act_one_after_the_other(tiny, logits_of) -> None:
    prompt = prompts_of(tiny)[0]
    deltas = deltas_of(tiny) * 4
    once = make_plan(deltas, (1.0,), [Segment("one", 1, 2)])
    twice: Plan = once + once
    doubled = make_plan(deltas, (2.0,), [Segment("one", 1, 2)])
    one, two = logits_of(tiny, [Row(prompt, twice)]), logits_of(tiny, [Row(prompt, doubled)])
    assert torch.allclose(one, two, atol=1e-4)

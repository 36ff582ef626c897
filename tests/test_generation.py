from __future__ import annotations

import json

import pytest
import torch
from conftest import deltas_of, n_hooks, prompts_of, strong_plan

import fusion_lens.generation as generation
from fusion_lens.errors import ConfigError, ContextLengthError, PlanError
from fusion_lens.generation import GenerationConfig, Row, generate
from fusion_lens.models import HookedModel, load_model
from fusion_lens.plans import Plan, Segment, make_plan
from fusion_lens.prompts import tokenize

EIGHT = GenerationConfig(max_new_tokens=8)
Logits = list[torch.Tensor]


@pytest.fixture
def logits_of(monkeypatch: pytest.MonkeyPatch):
    """`generate`, but giving every step's logits, row by row: "row step d_vocab"."""

    def run(model: HookedModel, rows: list[Row], config: GenerationConfig = EIGHT) -> torch.Tensor:
        steps: Logits = []
        real = generation.forward

        def recording(*args: object, **kwargs: object) -> torch.Tensor:
            logits = real(*args, **kwargs)  # type: ignore[arg-type]
            steps.append(logits[:, -1])
            return logits

        with monkeypatch.context() as patch:
            patch.setattr(generation, "forward", recording)
            patch.setattr(generation, "stop_tokens", lambda model: frozenset())
            generate(model, rows, config)
        assert len(steps) == config.max_new_tokens
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt.tokens))
        stacked = torch.stack(steps, dim=1)
        return stacked[[order.index(i) for i in range(len(rows))]]

    return run


def mixed_rows(model: HookedModel) -> list[Row]:
    """Prompts of three lengths, each with another plan, and one without."""
    short = prompts_of(model)[1]
    plans = [
        strong_plan(model, 1.0),
        strong_plan(model, -0.5, positions="completion"),
        strong_plan(model, 0.7, positions="prompt"),
    ]
    rows = [Row(p, plan) for p, plan in zip(prompts_of(model), plans, strict=True)]
    return [*rows, Row(short)]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 5e-5), ("float64", 1e-9)])
def test_cache_on_equals_cache_off(tiny, float64, logits_of, dtype: str, tolerance: float) -> None:
    model = {"float32": tiny, "float64": float64}[dtype]
    rows = mixed_rows(model)
    on = logits_of(model, rows)
    off = logits_of(model, rows, GenerationConfig(max_new_tokens=8, use_cache=False))
    assert on.dtype == getattr(torch, dtype)
    assert (on - off).abs().max() < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 5e-5), ("float64", 1e-9)])
def test_a_batch_equals_every_row_alone(
    tiny, float64, logits_of, dtype: str, tolerance: float
) -> None:
    model = {"float32": tiny, "float64": float64}[dtype]
    rows = mixed_rows(model)
    together = logits_of(model, rows)
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
    assert moved[3] == 0


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
    plan = strong_plan(tiny)
    one = logits_of(tiny, [Row(prompt, plan), Row(prompt), Row(prompt, plan * 2.0)])
    other = logits_of(tiny, [Row(prompt, plan), Row(prompt, plan * -1.0), Row(prompt)])
    assert torch.equal(one[0], other[0])
    assert not torch.equal(one[1], other[1])


def test_an_unprocessed_hooked_transformer_gives_the_bridges_steered_logits(
    tiny, hooked_transformer, logits_of
) -> None:
    plan = strong_plan(tiny)
    rows = [Row(prompt, plan) for prompt in prompts_of(tiny)]
    bridge = logits_of(tiny, rows)
    assert (bridge - logits_of(hooked_transformer, rows)).abs().max() < 1e-4
    uncached = GenerationConfig(max_new_tokens=8, use_cache=False)
    assert (bridge - logits_of(hooked_transformer, rows, uncached)).abs().max() < 1e-4


def test_unsteered_greedy_text_is_that_of_the_published_checkpoint(stories_folder) -> None:
    model = load_model(stories_folder)
    row = Row(tokenize(model, "", prepend_bos=True))
    text = generate(model, [row], GenerationConfig(max_new_tokens=200))[0].text
    assert text == (stories_folder / "expected_greedy_200steps.txt").read_text()


def test_the_order_of_rows_is_kept_across_batches(tiny) -> None:
    prompts = prompts_of(tiny) * 3
    rows = [Row(prompt, strong_plan(tiny, 0.1 * i)) for i, prompt in enumerate(prompts)]
    together = generate(tiny, rows, EIGHT)
    small = generate(tiny, rows, GenerationConfig(max_new_tokens=8, batch_size=2))
    assert [c.tokens for c in together] == [c.tokens for c in small]
    assert len({c.tokens for c in together}) > 3


def test_rows_with_a_sequence_mean_do_not_take_the_cache_from_the_others(tiny) -> None:
    prompts = prompts_of(tiny)
    means = ["question", "sequence", "question"]
    rows = [Row(p, strong_plan(tiny, mean=m)) for p, m in zip(prompts, means, strict=True)]
    together = generate(tiny, rows, EIGHT)
    assert together == [generate(tiny, [row], EIGHT)[0] for row in rows]


def test_a_completion_ends_at_the_stop_token_and_holds_neither_it_nor_the_prompt(tiny) -> None:
    prompt = prompts_of(tiny)[0]
    free = generate(tiny, [Row(prompt)], EIGHT)[0]
    assert not free.ended
    assert len(free.tokens) == 8
    end = tiny.tokenizer.eos_token_id
    bias = tiny.unembed.b_U
    with torch.no_grad():
        bias[end] += 1e4
    try:
        ended = generate(tiny, [Row(prompt), Row(prompts_of(tiny)[1])], EIGHT)
    finally:
        with torch.no_grad():
            bias[end] -= 1e4
    assert [c.tokens for c in ended] == [(end,), (end,)]
    assert [c.text for c in ended] == ["", ""]
    assert all(c.ended for c in ended)


def test_a_stop_token_of_the_checkpoint_alone_is_not_part_of_the_text(
    tiny_folder, tmp_path
) -> None:
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    free = generate(load_model(tiny_folder), [Row(prompts_of(load_model(tiny_folder))[0])], EIGHT)
    third = free[0].tokens[2]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, third]}))
    model = load_model(tmp_path)
    stopped = generate(model, [Row(prompts_of(model)[0])], EIGHT)[0]
    cut = free[0].tokens.index(third)
    assert stopped.ended
    assert stopped.tokens == free[0].tokens[: cut + 1]
    assert stopped.text == model.tokenizer.decode(stopped.tokens[:-1])


def test_logits_that_are_not_finite_mark_their_row_and_no_other(tiny, monkeypatch) -> None:
    rows = [Row(prompt) for prompt in prompts_of(tiny)]
    whole = generate(tiny, rows, EIGHT)
    real = generation.forward

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        logits = real(*args, **kwargs).clone()  # type: ignore[arg-type]
        logits[0, -1, 7] = float("nan")
        logits[1, -1, 7] = float("-inf")
        return logits

    monkeypatch.setattr(generation, "forward", poisoned)
    for temperature in (0.0, 1.0):
        config = GenerationConfig(max_new_tokens=8, temperature=temperature)
        got = generate(tiny, rows, config)
        # sorted by length, the shortest prompt is row 0 of the batch
        assert [c.finite for c in got] == [True, False, True]
    assert all(c.finite for c in whole)


def test_samples_depend_on_their_seed_and_not_on_their_neighbours(tiny) -> None:
    prompt = prompts_of(tiny)[0]
    hot = GenerationConfig(max_new_tokens=8, temperature=1.0)
    first = generate(tiny, [Row(prompt, seed=s) for s in (1, 2, 3)], hot)
    again = generate(tiny, [Row(prompt, seed=s) for s in (3, 1, 4)], hot)
    assert first[0] == again[1]
    assert first[2] == again[0]
    assert len({c.tokens for c in first}) == 3


def test_samples_follow_the_softmax(tiny) -> None:
    prompt = prompts_of(tiny)[1]
    rows = [Row(prompt, seed=s) for s in range(2000)]
    config = GenerationConfig(max_new_tokens=1, temperature=2.0, batch_size=2000)
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
def test_the_model_is_given_back_as_it_was(tiny, untouched, monkeypatch, kind) -> None:
    untouched(tiny)
    rows = mixed_rows(tiny)
    if kind is None:
        generate(tiny, rows, EIGHT)
        return
    real, calls = generation.forward, []

    def failing(*args: object, **kwargs: object) -> torch.Tensor:
        assert n_hooks(tiny) == 4
        calls.append(1)
        if len(calls) == 3:
            raise kind
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(generation, "forward", failing)
    with pytest.raises(kind):
        generate(tiny, rows, EIGHT)


def test_a_model_in_training_mode_is_put_back_into_it(tiny) -> None:
    tiny.train(True)
    try:
        generate(tiny, [Row(prompts_of(tiny)[0])], EIGHT)
        assert tiny.training
    finally:
        tiny.train(False)


def test_settings_outside_their_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_new_tokens and batch_size must be at least 1"):
        GenerationConfig(max_new_tokens=0)
    with pytest.raises(ConfigError, match=r"temperature must be 0 or above, but got -1\.0"):
        GenerationConfig(temperature=-1.0)


def test_a_seed_no_generator_takes_is_refused(tiny) -> None:
    with pytest.raises(ConfigError, match=r"0 <= seed < 2\*\*63 must hold, but got -1"):
        Row(prompts_of(tiny)[0], seed=-1)


def test_progress_counts_finished_rows(tiny) -> None:
    seen: list[int] = []
    rows = [Row(prompt) for prompt in prompts_of(tiny)]
    generate(tiny, rows, GenerationConfig(max_new_tokens=2, batch_size=2), progress=seen.append)
    assert seen == [2, 3]


def test_two_steps_of_one_plan_act_one_after_the_other(tiny, logits_of) -> None:
    prompt = prompts_of(tiny)[0]
    deltas = deltas_of(tiny) * 4
    once = make_plan(deltas, (1.0,), [Segment("one", 1, 2)])
    twice: Plan = once + once
    doubled = make_plan(deltas, (2.0,), [Segment("one", 1, 2)])
    one, two = logits_of(tiny, [Row(prompt, twice)]), logits_of(tiny, [Row(prompt, doubled)])
    assert torch.allclose(one, two, atol=1e-4)

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import deltas_of, prompts_of, strong_plan
from engine import (
    family,
    hand_prompt,
    largest_gap,
    logits_of,
    mixed_rows,
    same_bits,
    slow_logits,
    written,
)
from kinds import affine_of, every_plan, gate_of, step_of

from fusion_lens.decoding import Row
from fusion_lens.engine_log import EngineLog
from fusion_lens.executors import lean_of
from fusion_lens.generation import GenerationConfig, generate
from fusion_lens.lean import Lean
from fusion_lens.models import HookedModel, load_model
from fusion_lens.plans import Plan, make_plan
from fusion_lens.slots import Slots, slots_fit, write_in_slots

FIXED: dict[str, Any] = {"executor": "lean", "slots": 4, "cache_length": 64}


@pytest.fixture(scope="module")
def plan(tiny: HookedModel) -> Plan:
    return strong_plan(tiny)


@pytest.fixture(scope="module")
def rows(tiny: HookedModel, plan: Plan) -> list[Row]:
    """Forty rows of mixed lengths; every fourth is unsteered, and one in ten a single token."""
    single = hand_prompt((77,), special=())
    rows = mixed_rows(tiny, plan, 40)
    return [Row(single, row.plan) if i % 10 == 9 else row for i, row in enumerate(rows)]


def test_forty_rows_through_four_slots_write_what_each_writes_alone(
    tiny: HookedModel, rows: list[Row]
) -> None:
    together = written(tiny, rows, **FIXED)
    alone = [written(tiny, [row], **FIXED)[0] for row in rows]
    assert [i for i in range(40) if not same_bits(together[i], alone[i])] == []
    for row, completion in zip(rows[:10], together, strict=False):
        assert (logits_of(completion) - slow_logits(tiny, row, completion)).abs().max() < 1e-4
    assert len({len(row.prompt.tokens) for row in rows}) > 8
    assert len({c.tokens for c in together}) > 10


def test_rows_that_end_early_give_their_slots_away_and_change_no_other(
    tiny_folder: Path,
) -> None:
    model: Any = load_model(tiny_folder)
    rows = mixed_rows(model, strong_plan(model), 40)
    shape = {**FIXED, "max_new_tokens": 6}
    free = written(model, rows, **shape)
    # a token that some write early, some late, and some never
    stop = max(
        {t for c in free for t in c.tokens},
        key=lambda t: len({c.tokens.index(t) for c in free if t in c.tokens}),
    )
    model.original_model.generation_config.eos_token_id = stop
    stopped = written(model, rows, stop_at_eos=True, **shape)
    lengths = set()
    for one, whole in zip(stopped, free, strict=True):
        n_kept = whole.tokens.index(stop) + 1 if stop in whole.tokens else 6
        assert one.tokens == whole.tokens[:n_kept]
        assert one.ended == (stop in whole.tokens)
        assert torch.equal(logits_of(one), logits_of(whole)[:n_kept])
        lengths.add(n_kept)
    assert len(lengths) > 2


@pytest.mark.parametrize("slots", [1, 4, 8, 64])
def test_at_a_fixed_shape_neither_neighbours_nor_their_order_change_a_bit(
    tiny: HookedModel, rows: list[Row], slots: int
) -> None:
    shape = {**FIXED, "slots": slots}
    some = rows[:12]
    together = written(tiny, some, **shape)
    shuffled = list(range(12))
    random.Random(slots).shuffle(shuffled)
    again = written(tiny, [some[i] for i in shuffled], **shape)
    assert all(same_bits(together[i], again[n]) for n, i in enumerate(shuffled))
    for i in (0, 9):
        assert same_bits(written(tiny, [some[i]], **shape)[0], together[i])
        crowd = written(tiny, [some[i], *rows[12:15]], **shape)
        assert same_bits(crowd[0], together[i])


@pytest.mark.parametrize("slots", [4, 8])
def test_every_slot_writes_the_same(tiny: HookedModel, plan: Plan, slots: int) -> None:
    row = Row(prompts_of(tiny)[0], plan)
    copies = written(tiny, [row] * slots, **{**FIXED, "slots": slots})
    assert all(same_bits(copy, copies[0]) for copy in copies)
    other = [Row(prompts_of(tiny)[0], plan * (0.1 * n)) for n in range(1, slots)]
    for place in range(slots):
        crowd = [*other[:place], row, *other[place:]]
        assert same_bits(written(tiny, crowd, **{**FIXED, "slots": slots})[place], copies[0])


def test_the_bundled_model_keeps_every_bit_too(atlas: HookedModel) -> None:
    prompts = prompts_of(atlas)
    rows = [Row(prompt, strong_plan(atlas) * (0.1 * n)) for n, prompt in enumerate(prompts)]
    shape = {**FIXED, "slots": 2, "max_new_tokens": 3}
    together = written(atlas, rows, **shape)
    assert all(
        same_bits(written(atlas, [row], **shape)[0], one)
        for row, one in zip(rows, together, strict=True)
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_an_odd_number_of_slots_keeps_every_bit_where_layers_are_multiples_of_32_wide(
    name: str,
) -> None:
    model = family(name)
    plan = strong_plan(model, 0.5)
    for row in mixed_rows(model, plan, 4):
        copies = written(model, [row] * 3, **{**FIXED, "slots": 3})
        assert all(same_bits(copy, copies[0]) for copy in copies)


@pytest.mark.xfail(reason="experts multiply as many rows as were sent to them")
def test_a_mixture_of_experts_keeps_every_bit_too() -> None:
    model = family("mixtral")
    rows = mixed_rows(model, strong_plan(model, 0.5), 8)
    together = written(model, rows, **FIXED)
    alone = [written(model, [row], **FIXED)[0] for row in rows]
    assert all(same_bits(one, other) for one, other in zip(together, alone, strict=True))


def test_a_sampled_row_does_not_depend_on_its_neighbours_either(
    tiny: HookedModel, rows: list[Row]
) -> None:
    hot = {**FIXED, "temperature": 1.5}
    together = written(tiny, rows, **hot)
    for i in (0, 3, 22):
        assert same_bits(written(tiny, [rows[i]], **hot)[0], together[i])
    assert [c.tokens for c in together] != [c.tokens for c in written(tiny, rows, **FIXED)]


def test_completions_come_as_they_finish_and_every_row_once(
    tiny: HookedModel, rows: list[Row]
) -> None:
    config = GenerationConfig(max_new_tokens=3, slots=1, cache_length=64)
    with torch.no_grad():
        given = list(write_in_slots(tiny, lean_of(tiny), rows[:10], config))
    places = [place for place, _ in given]
    assert sorted(places) == list(range(10))
    # short prompts are read first
    lengths = [len(rows[place].prompt.tokens) for place in places]
    assert lengths == sorted(lengths)
    assert lengths[0] == 1
    by_place = dict(given)
    expected = generate(tiny, rows[:10], config)
    assert [by_place[i].tokens for i in range(10)] == [c.tokens for c in expected]


def test_fewer_rows_than_slots_leave_idle_ones_that_nobody_sees(
    tiny: HookedModel, rows: list[Row]
) -> None:
    seen: list[int] = []
    log = EngineLog()
    config = GenerationConfig(max_new_tokens=3, **{**FIXED, "slots": 8})
    completions = generate(tiny, rows[:3], config, log=log, progress=seen.append)
    assert len(completions) == 3
    assert seen == [1, 2, 3]
    assert log.rows == {"lean": 3, "hooks": 0}


def shapes_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all passes of the lean module from now on."""
    seen: list[tuple[int, ...]] = []
    real = Lean.forward

    def watched(self: Lean, tokens: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        seen.append(tuple(tokens.shape))
        return real(self, tokens, *args, **options)

    monkeypatch.setattr(Lean, "forward", watched)
    return seen


def test_every_step_feeds_one_token_to_every_slot_and_every_filling_has_one_size(
    tiny: HookedModel, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert slots_fit(tiny, lean_of(tiny))
    seen = shapes_of(monkeypatch)
    written(tiny, rows, **{**FIXED, "slots": 16})
    steps = [shape for shape in seen if shape[1] == 1]
    fillings = [shape for shape in seen if shape[1] > 1]
    assert set(steps) == {(16, 1)}
    assert {width % 8 for _, width in fillings} == {0}
    assert len({n_rows for n_rows, _ in fillings}) == 1
    # forty rows fill sixteen slots three times, for four tokens each: 12 steps if none waits
    assert len(steps) <= 2 * 12


def test_a_filling_gives_the_first_of_the_new_tokens(
    tiny: HookedModel, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [Row(hand_prompt((1,))), Row(hand_prompt((77,), special=()), plan)]
    assert slots_fit(tiny, lean_of(tiny))
    seen = shapes_of(monkeypatch)
    completions = written(tiny, rows, **FIXED)
    assert seen == [(4, 8), *[(4, 1)] * 3]
    monkeypatch.undo()
    for row, completion in zip(rows, completions, strict=True):
        assert (logits_of(completion) - slow_logits(tiny, row, completion)).abs().max() < 1e-4


def test_a_cache_may_be_longer_than_the_context_and_as_short_as_the_text(
    tiny: HookedModel, plan: Plan
) -> None:
    row = Row(prompts_of(tiny)[0], plan)
    fitting = len(row.prompt.tokens) + 4
    expected = written(tiny, [row], executor="hooks")
    for cache_length in (fitting, fitting + 1, 128, 256):
        given = written(tiny, [row], **{**FIXED, "cache_length": cache_length})
        assert largest_gap(given, expected) < 1e-4


@pytest.mark.parametrize("length", [117, 125])
def test_a_prompt_may_fill_the_context_up_to_its_last_position(length: int) -> None:
    # 126 learnt positions: padding to a multiple of 8 goes beyond them
    model = family("gpt2_short")
    prompt = hand_prompt((1, *(3 + t % 300 for t in range(length - 1))))
    row = Row(prompt, strong_plan(model))
    left: dict[str, Any] = {"max_new_tokens": 126 - length, "slots": 4}
    for executor in ("lean", "hooks"):
        completion = written(model, [row], executor=executor, **left)[0]
        assert (logits_of(completion) - slow_logits(model, row, completion)).abs().max() < 1e-4


def test_a_slot_whose_row_has_ended_stands_still_however_long_it_waits(
    tiny: HookedModel,
) -> None:
    short, long = Row(hand_prompt((50,), special=())), Row(hand_prompt((1, 60, 61, 62, 63)))
    config = GenerationConfig(
        max_new_tokens=7, stop_at_eos=False, keep_logits=True, slots=3, cache_length=8
    )
    with torch.no_grad():
        alone = Slots(tiny, lean_of(tiny), config)
        alone.fill([1], [short])
        both = Slots(tiny, lean_of(tiny), config)
        both.fill([0], [long])
        both.fill([2], [long])
        both.fill([1], [short])
        both.tape.going[[0, 2]] = False
        for _ in range(7):
            alone.step()
            both.step()
    one, other = (slots.tape.completion(1, lambda tokens: str(tokens)) for slots in (alone, both))
    assert len(one.tokens) == 7
    assert same_bits(one, other)


def overflowing(model: HookedModel, positions: str = "completion") -> Plan:
    """Two finite steps whose sum is infinite."""
    deltas = deltas_of(model)
    large = deltas * (3e38 / float(deltas.vectors.abs().max()))
    return make_plan(large, 0.9, positions=positions) + make_plan(large, 0.9, positions=positions)


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_a_plan_that_overflows_ends_its_own_row_alone(
    tiny: HookedModel, rows: list[Row], slots: int
) -> None:
    shape = {**FIXED, "slots": slots}
    some = [row for row in rows[:12] if len(row.prompt.tokens) > 1]
    clean = written(tiny, some, **shape)
    bad = Row(prompts_of(tiny)[1], overflowing(tiny, "all"))
    mixed = written(tiny, [bad, *some[:5], bad, *some[5:], bad], **shape)
    for place in (0, 6, len(mixed) - 1):
        completion = mixed.pop(place - (place == 6) - 2 * (place > 6))
        assert (completion.finite, completion.ended, completion.tokens) == (False, False, ())
        assert completion.text == ""
        assert logits_of(completion).shape == (0, 320)
    assert all(same_bits(one, other) for one, other in zip(mixed, clean, strict=True))
    assert all(c.finite for c in mixed)


@pytest.mark.parametrize("slots", [1, 2])
def test_a_row_that_breaks_off_keeps_its_tokens_so_far_and_spoils_no_slot(
    tiny_folder: Path, slots: int
) -> None:
    model: Any = load_model(tiny_folder)
    # unsteered, since a plan is refused on changed weights; short prompts are read first,
    # so that others take the slot
    rows = [Row(prompt) for prompt in (hand_prompt((1, 90, 91)), *prompts_of(model))]
    rows += mixed_rows(model, strong_plan(model), 12)[1::4]
    shape = {**FIXED, "slots": slots, "max_new_tokens": 6}
    clean = written(model, rows, **shape)
    met = {t for i, c in enumerate(clean) if i for t in (*c.tokens, *rows[i].prompt.tokens)}
    step, poison = next((n, t) for n, t in enumerate(clean[0].tokens[:-1]) if n and t not in met)
    with torch.no_grad():
        model.embed.weight[poison] = torch.nan
    broken = written(model, rows, **shape)
    assert (broken[0].finite, broken[0].ended) == (False, False)
    assert broken[0].tokens == clean[0].tokens[: step + 1]
    assert torch.equal(logits_of(broken[0]), logits_of(clean[0])[: step + 1])
    assert all(same_bits(one, other) for one, other in zip(broken[1:], clean[1:], strict=True))


def test_a_prompt_of_one_token_takes_over_the_slot_of_a_row_that_broke_off(
    tiny: HookedModel,
) -> None:
    # the last of equally long prompts is seated first
    rows = [Row(hand_prompt((50,), special=())), Row(hand_prompt((1,)), overflowing(tiny))]
    shape = {**FIXED, "slots": 1}
    after, broken = written(tiny, rows, **shape)
    assert not broken.finite
    assert len(broken.tokens) == 1
    assert same_bits(after, written(tiny, rows[:1], **shape)[0])


def test_what_broke_off_late_is_cleared_behind_the_next_rows_prompt_too(
    tiny_folder: Path,
) -> None:
    model: Any = load_model(tiny_folder)
    # the last of equally long prompts is seated first
    rows = [Row(hand_prompt((1, 60 + n, 70)), seed=n) for n in range(3)]
    shape = {**FIXED, "slots": 1, "max_new_tokens": 16, "temperature": 1.5}
    clean = written(model, rows, **shape)
    met = {t for i in (0, 1) for t in (*clean[i].tokens, *rows[i].prompt.tokens)}
    late = [n for n in range(8, 15) if clean[2].tokens.index(clean[2].tokens[n]) == n]
    step = next(n for n in late if clean[2].tokens[n] not in met)
    with torch.no_grad():
        model.embed.weight[clean[2].tokens[step]] = torch.nan
    broken = written(model, rows, **shape)
    assert not broken[2].finite
    assert broken[2].tokens == clean[2].tokens[: step + 1]
    assert same_bits(broken[0], clean[0])
    assert same_bits(broken[1], clean[1])


def test_a_plan_that_overflows_where_the_padding_is_alone_harms_no_row(tiny: HookedModel) -> None:
    # all special, so that a plan for the prompt meets nothing but padding
    prompt = hand_prompt((1, 60, 61, 62), special=(0, 1, 2, 3))
    rows = [Row(prompt, overflowing(tiny, "prompt")), Row(prompt)]
    steered, plain = written(tiny, rows, **FIXED)
    assert steered.finite
    assert same_bits(steered, plain)


def test_unsteered_rows_keep_every_bit_beside_steered_ones(
    tiny: HookedModel, rows: list[Row]
) -> None:
    bare = [Row(row.prompt) for row in rows[:8]]
    plain = written(tiny, bare, **FIXED)
    half = [row if i % 2 else one for i, (row, one) in enumerate(zip(bare, rows, strict=False))]
    beside = written(tiny, half, **FIXED)
    assert all(same_bits(beside[i], plain[i]) for i in range(1, 8, 2))
    assert not same_bits(beside[0], plain[0])


def test_a_sequence_mean_takes_the_slots_from_nobody_else(tiny: HookedModel, plan: Plan) -> None:
    log = EngineLog()
    mean = strong_plan(tiny, 0.1, mean="sequence")
    prompts = prompts_of(tiny)
    rows = [Row(prompts[0], mean), Row(prompts[1], plan), Row(prompts[2], mean), Row(prompts[0])]
    together = written(tiny, rows, log, **FIXED)
    assert log.rows == {"lean": 4, "hooks": 0}
    assert all(
        same_bits(one, written(tiny, [row], **FIXED)[0])
        for row, one in zip(rows, together, strict=True)
    )


def test_constant_rows_keep_every_bit_beside_gated_and_affine_ones(
    tiny: HookedModel, rows: list[Row]
) -> None:
    gated = Plan((step_of(tiny, gate=gate_of(tiny, "resid_post")),))
    others = [gated, Plan((affine_of(tiny, "attn_z"),)), every_plan(tiny)["all_sites"]]
    constant = written(tiny, rows, **FIXED)
    mixed = []
    for n, row in enumerate(rows):
        mixed += [row, Row(row.prompt, others[n % 3])]
    together = written(tiny, mixed, **FIXED)
    assert all(map(same_bits, together[::2], constant))
    alone = [written(tiny, [row], **FIXED)[0] for row in mixed[1:24:2]]
    assert all(map(same_bits, alone, together[1:24:2]))
    assert len({c.tokens for c in together[1::2]}) > 10


@pytest.mark.parametrize("slots", [1, 2, 8])
def test_every_slot_writes_the_same_under_a_gate(tiny: HookedModel, slots: int) -> None:
    plan = Plan((affine_of(tiny, "resid_post", gate=gate_of(tiny, "resid_post")),))
    row = Row(prompts_of(tiny)[0], plan)
    shape = {**FIXED, "slots": slots}
    copies = written(tiny, [row] * slots, **shape)
    assert all(same_bits(copy, copies[0]) for copy in copies)


def test_slots_of_constant_rows_do_nothing_but_add(tiny: HookedModel, plan: Plan) -> None:
    config = GenerationConfig(max_new_tokens=4, stop_at_eos=False, slots=2, cache_length=64)
    prompt = prompts_of(tiny)[0]
    with torch.no_grad():
        slots = Slots(tiny, lean_of(tiny), config)
        slots.fill([0, 1], [Row(prompt, plan), Row(prompt)])
        assert list(slots.at) == [("resid_post", layer) for layer in range(4)]
        slots.fill([1], [Row(prompt, Plan((affine_of(tiny, "attn_z"),)))])
        assert {site for site, _ in slots.at} == {"resid_post", "attn_z"}
        # the row is gone, and its steps with it
        slots.fill([1], [Row(prompt)])
        assert {site for site, _ in slots.at} == {"resid_post"}


def test_a_module_that_the_slot_cache_does_not_suit_runs_lean_in_batches(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_folder)
    lean_of(model).slots_fit = False
    assert not slots_fit(model, lean_of(model))
    plan = strong_plan(model)
    rows = [Row(prompt, plan) for prompt in prompts_of(model)]
    log = EngineLog()
    seen = shapes_of(monkeypatch)
    batches = written(model, rows, log, slots=4)
    assert log.rows == {"lean": 3, "hooks": 0}
    # two padded lengths, and so two batches
    assert seen == [(4, 16), *[(4, 1)] * 3, (4, 32), *[(4, 1)] * 3]
    assert largest_gap(batches, written(model, rows, slots=4, executor="hooks")) < 1e-4


def test_whether_slots_fit_is_tried_on_the_module_itself(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_folder)
    lean = lean_of(model)
    real = Lean.forward

    def forgetful(
        self: Lean, tokens: Any, positions: Any, mask: Any, *, cache: Any = None, last: int = 0
    ) -> torch.Tensor:
        # steps at no position but 0, as a module that ignores `position_ids`
        stepping = tokens.shape[1] == 1
        return real(
            self, tokens, 0 * positions if stepping else positions, mask, cache=cache, last=last
        )

    monkeypatch.setattr(Lean, "forward", forgetful)
    assert not slots_fit(model, lean)
    monkeypatch.undo()
    # it is tried once
    assert not slots_fit(model, lean)
    lean.slots_fit = None
    assert slots_fit(model, lean)


def test_the_engine_is_imported_without_transformers_or_transformer_lens() -> None:
    code = (
        "import sys, fusion_lens, fusion_lens.executors, fusion_lens.batches, "
        "fusion_lens.lean, fusion_lens.llama; "
        "heavy = {'transformers', 'transformer_lens', 'fusion_lens.slots'}; "
        "print(sorted(heavy & {*sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "[]\n"

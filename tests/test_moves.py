from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import deltas_of, prompts_of, strong_plan
from engine import all_prompts, family, largest_gap, logits_of, same_bits, written
from kinds import SITES, affine_of, by_hand, every_plan, gate_of, step_of, width_of

from fusion_lens.decoding import Completion, Row
from fusion_lens.engine_log import EngineLog
from fusion_lens.errors import PlanError
from fusion_lens.models import HookedModel, load_model
from fusion_lens.moves import Moves
from fusion_lens.plans import Plan, make_plan

FAMILIES = ("llama", "gemma2", "gpt_neox")
OTHERS = ("gpt2", "phi")
EXECUTORS = ("lean", "hooks")
Runs = dict[str, dict[str, list[Completion]]]


def rows_of(model: HookedModel) -> dict[str, list[Row]]:
    prompts = all_prompts(model)[:2]
    plans = every_plan(model)
    return {name: [Row(prompt, plan) for prompt in prompts] for name, plan in plans.items()}


@pytest.fixture(
    scope="module",
    params=[*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)],
)
def named(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def runs(named: str) -> Runs:
    """What all kinds write, all of them neighbours, by executor; few slots, so that these are
    filled again."""
    model = family(named)
    rows = rows_of(model)
    made: Runs = {}
    for executor in (*EXECUTORS, "uncached"):
        log = EngineLog()
        lean = executor != "hooks"
        options: dict[str, Any] = {"executor": "lean" if lean else "hooks", "slots": 8}
        done = iter(
            written(
                model,
                [row for some in rows.values() for row in some],
                log,
                use_cache=executor != "uncached",
                **options,
            )
        )
        made[executor] = {name: [next(done) for _ in some] for name, some in rows.items()}
        assert log.rows["lean" if lean else "hooks"] == 2 * len(rows)
    return made


@pytest.mark.parametrize("executor", [*EXECUTORS, "uncached"])
def test_every_kind_of_step_at_every_site_is_what_is_written_out_by_hand(
    named: str, runs: Runs, executor: str
) -> None:
    model = family(named)
    gaps = {
        name: max(
            float((logits_of(completion) - by_hand(model, row, completion)).abs().max())
            for row, completion in zip(rows, runs[executor][name], strict=True)
        )
        for name, rows in rows_of(model).items()
    }
    assert {name: gap for name, gap in gaps.items() if gap >= 1e-4} == {}


def test_every_kind_gives_the_same_on_both_executors_and_moves_the_logits(
    named: str, runs: Runs
) -> None:
    model = family(named)
    plain = written(model, [Row(prompt) for prompt in all_prompts(model)[:2]], slots=8)
    for name, lean in runs["lean"].items():
        assert largest_gap(lean, runs["hooks"][name]) < 1e-4
        for one, other in zip(lean, plain, strict=True):
            moved = (logits_of(one) - logits_of(other)).abs().max()
            assert moved > 0.01, name


def test_no_row_is_steered_by_its_neighbours_plan(named: str, runs: Runs) -> None:
    model = family(named)
    shape: dict[str, Any] = {"slots": 8, "cache_length": 64}
    rows = [row for some in rows_of(model).values() for row in some]
    bare = Row(rows[0].prompt)
    constant = Row(rows[1].prompt, strong_plan(model))
    mixed = [bare, *rows[:9], constant, *rows[9:], constant, bare]
    together = written(model, mixed, **shape)
    alone = written(model, [bare, constant], **shape)
    for place, expected in ((0, 0), (-1, 0), (10, 1), (-2, 1)):
        assert same_bits(together[place], alone[expected])


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_row_writes_alone_what_it_writes_in_a_crowd_of_all_kinds(
    tiny: HookedModel, executor: str
) -> None:
    shape: dict[str, Any] = {"slots": 8, "cache_length": 64, "executor": executor}
    rows = [row for some in rows_of(tiny).values() for row in some]
    rows.insert(5, Row(rows[0].prompt, strong_plan(tiny)))
    together = written(tiny, rows, **shape)
    turned = written(tiny, rows[::-1], **shape)[::-1]
    assert [i for i, one in enumerate(together) if not same_bits(one, turned[i])] == []
    alone = [written(tiny, [row], **shape)[0] for row in rows[::3]]
    assert all(same_bits(one, other) for one, other in zip(alone, together[::3], strict=True))


@pytest.mark.parametrize("executor", [*EXECUTORS, "uncached"])
def test_a_token_is_found_by_its_number_whatever_the_prompts_length(
    tiny: HookedModel, executor: str
) -> None:
    prompts = all_prompts(tiny)
    lengths = [len(prompt.tokens) for prompt in prompts]
    assert sorted(lengths)[:3] == [1, 1, 5]
    rows, expected = [], []
    for t in (0, 4, 20, max(lengths) - 1, max(lengths)):
        for steer_special in (False, True):
            step = step_of(tiny, positions=t, steer_special=steer_special)
            affine = affine_of(tiny, "attn_z", positions=t, steer_special=steer_special)
            for prompt in prompts:
                rows += [Row(prompt, Plan((each,))) for each in (step, affine)]
                acts = t < len(prompt.tokens) and (steer_special or t not in prompt.special)
                expected += [acts] * 2
    options: dict[str, Any] = {"executor": "lean" if executor == "lean" else "hooks", "slots": 8}
    cached = executor != "uncached"
    done = written(tiny, rows, use_cache=cached, **options)
    plain = written(tiny, [Row(row.prompt) for row in rows], use_cache=cached, **options)
    assert expected.count(True) > 20
    for row, one, other, acts in zip(rows, done, plain, expected, strict=True):
        assert (logits_of(one) - by_hand(tiny, row, one)).abs().max() < 1e-4
        assert same_bits(one, other) is not acts


@pytest.mark.parametrize("site", SITES)
def test_a_strength_of_zero_changes_no_bit(tiny: HookedModel, site: str) -> None:
    prompts = prompts_of(tiny)
    for executor in EXECUTORS:
        plain = written(tiny, [Row(prompt) for prompt in prompts], executor=executor, slots=4)
        for plan in every_plan(tiny).values():
            if plan.sites == {site}:
                rows = [Row(prompt, plan * 0.0) for prompt in prompts]
                nothing = written(tiny, rows, executor=executor, slots=4)
                assert all(map(same_bits, nothing, plain))


@pytest.mark.parametrize("site", SITES)
def test_a_closed_gate_changes_no_bit_and_an_open_one_of_one_is_none(
    tiny: HookedModel, site: str
) -> None:
    n_layers, width = tiny.cfg.n_layers, width_of(tiny, site)
    nowhere = torch.zeros(n_layers, dtype=torch.bool)
    certain: dict[str, Any] = {
        "theta": torch.zeros(n_layers, width),
        "bias": torch.full((n_layers,), 1e4),
        "open": ~nowhere,
    }
    rows = []
    for prompt in prompts_of(tiny):
        closed, one = gate_of(tiny, site, open=nowhere), gate_of(tiny, site, **certain)
        rows += [Row(prompt, Plan((affine_of(tiny, site, gate=g),))) for g in (closed, one, None)]
        if site == "resid_post":
            rows += [Row(prompt, Plan((step_of(tiny, gate=gate),))) for gate in (closed, one, None)]
        else:
            rows += [Row(prompt)] * 3
    bare = [Row(row.prompt) for row in rows[::3]]
    for executor in EXECUTORS:
        done = written(tiny, rows, executor=executor, slots=4)
        plain = written(tiny, bare, executor=executor, slots=4)
        assert all(map(same_bits, done[::3], plain))
        assert all(map(same_bits, done[1::3], done[2::3]))
        assert not same_bits(done[1], done[0])


def test_units_are_a_delta_with_zeros_and_an_affine_step_without_a_scale_adds(
    tiny: HookedModel,
) -> None:
    deltas = deltas_of(tiny)
    units = torch.arange(32).expand(4, 32) % 2 == 0
    masked = make_plan(deltas, (4.0, -8.0, 6.0), units=units)
    halved = deltas.vectors * units
    zeros = type(deltas)(halved, torch.zeros_like(halved), deltas.layout, deltas.model)
    by_zeros = make_plan(zeros, (4.0, -8.0, 6.0))
    added = Plan(
        (
            affine_of(
                tiny,
                "resid_post",
                scale=torch.zeros(4, 32),
                shift=halved,
                coeffs=(4.0, -8.0, 6.0),
            ),
        )
    )
    prompts = prompts_of(tiny)
    for executor in EXECUTORS:
        runs = [
            written(tiny, [Row(prompt, plan) for prompt in prompts], executor=executor, slots=4)
            for plan in (masked, by_zeros, added)
        ]
        assert all(map(same_bits, runs[0], runs[1]))
        assert all(map(same_bits, runs[0], runs[2]))


def test_the_order_of_steps_matters(tiny: HookedModel) -> None:
    plans = every_plan(tiny)
    prompt = prompts_of(tiny)[0]
    first, second = written(
        tiny, [Row(prompt, plans["add_then_scale"]), Row(prompt, plans["scale_then_add"])]
    )
    assert (logits_of(first) - logits_of(second)).abs().max() > 0.01


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.slow
def test_every_kind_runs_in_other_precisions(tiny_folder: Path, dtype: str) -> None:
    model = load_model(tiny_folder, dtype=dtype)
    rows = [row for some in rows_of(model).values() for row in some[:1]]
    lean, hooks = (
        written(model, rows, executor=executor, slots=8, max_new_tokens=1) for executor in EXECUTORS
    )
    within = {"float16": 0.05, "bfloat16": 0.4, "float64": 1e-4}[dtype]
    for row, one, other in zip(rows, lean, hooks, strict=True):
        assert logits_of(one).dtype == getattr(torch, dtype)
        assert one.finite
        largest = logits_of(other).abs().max()
        assert (logits_of(one) - logits_of(other)).abs().max() < within * largest
        expected = by_hand(model, row, other)
        assert (logits_of(other) - expected).abs().max() < within * largest


def test_a_row_leaves_nothing_behind_for_the_next(tiny: HookedModel) -> None:
    moves = Moves(2, 4, torch.device("cpu"))
    moves.seat(0, Plan((affine_of(tiny, "attn_z"),)))
    moves.seat(1, strong_plan(tiny))
    assert moves.places == [
        *(("resid_post", layer) for layer in range(4)),
        *(("attn_z", layer) for layer in range(4)),
    ]
    moves.seat(0, None)
    assert {site for site, _ in moves.places} == {"resid_post"}
    x = torch.randn(2, 3, 32)
    (group,) = moves.groups
    out = group.steer(1, x, torch.ones(2, 3, dtype=torch.bool))
    assert torch.equal(out[0], x[0])
    assert torch.equal(out[1], x[1] + strong_plan(tiny).steps[0].move.shift[1])
    moves.seat(1, None)
    assert moves.groups == []
    assert moves.places == []


def test_plans_that_act_alike_are_one_group_and_steps_keep_their_order(tiny: HookedModel) -> None:
    first, second = affine_of(tiny, "resid_post"), step_of(tiny)
    moves = Moves(3, 4, torch.device("cpu"))
    for row, steps in enumerate([(first, second), (first,), (second, first)]):
        moves.seat(row, Plan(steps))
    assert [group.kind.number for group in moves.groups] == [0, 0, 1, 1]
    assert sorted(sorted(group.seated) for group in moves.groups) == [[0], [0, 1], [2], [2]]


def test_a_plan_of_another_width_is_refused_where_it_would_act(tiny: HookedModel) -> None:
    narrow = torch.zeros(4, 8)
    plan = Plan((affine_of(tiny, "attn_z", scale=narrow, shift=narrow + 1.0),))
    for executor in EXECUTORS:
        with pytest.raises(PlanError, match=r"but got 8 for heads' outputs of 32"):
            written(tiny, [Row(prompts_of(tiny)[0], plan)], executor=executor)

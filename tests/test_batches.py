from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import deltas_of, prompts_of, strong_plan
from engine import hand_prompt, logits_of, mixed_rows, same_bits, slow_logits, written

from fusion_lens.activations import record
from fusion_lens.batches import write_in_batches
from fusion_lens.decoding import Row
from fusion_lens.executors import HookPoints
from fusion_lens.generation import GenerationConfig
from fusion_lens.lean import AtBlock, AtSite
from fusion_lens.likelihood import completion_nll
from fusion_lens.models import HookedModel, KeyValues, Place, evaluating, load_model
from fusion_lens.plans import Plan, make_plan

KINDS = ("hooks", "hooks_uncached", "lean_uncached", "lean_sequence", "hooks_sequence")


@pytest.fixture(scope="module")
def plan(tiny: HookedModel) -> Plan:
    return strong_plan(tiny)


@pytest.fixture(scope="module")
def mean_plan(tiny: HookedModel) -> Plan:
    return strong_plan(tiny, 0.1, mean="sequence")


@pytest.fixture(params=KINDS)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Every way into a batch, at a fixed shape."""
    executor, _, rest = request.param.partition("_")
    return {
        "executor": executor,
        "use_cache": rest != "uncached",
        "slots": 4,
        "cache_length": 64,
        "max_new_tokens": 3,
    }


@pytest.fixture
def rows(
    request: pytest.FixtureRequest, tiny: HookedModel, plan: Plan, mean_plan: Plan
) -> list[Row]:
    sequence = request.node.callspec.params["options"].endswith("sequence")
    rows = mixed_rows(tiny, mean_plan if sequence else plan, 7)
    return [*rows, Row(hand_prompt((77,), special=()), rows[0].plan)]


def test_at_a_fixed_shape_neither_neighbours_nor_their_order_change_a_bit(
    tiny: HookedModel, rows: list[Row], options: dict[str, Any]
) -> None:
    together = written(tiny, rows, **options)
    shuffled = list(range(8))
    random.Random(0).shuffle(shuffled)
    again = written(tiny, [rows[i] for i in shuffled], **options)
    assert all(same_bits(together[i], again[n]) for n, i in enumerate(shuffled))
    for i in (0, 3, 7):
        assert same_bits(written(tiny, [rows[i]], **options)[0], together[i])


def test_every_place_of_a_batch_writes_the_same(
    tiny: HookedModel, rows: list[Row], options: dict[str, Any]
) -> None:
    copies = written(tiny, [rows[2]] * 4, **options)
    assert all(same_bits(copy, copies[0]) for copy in copies)
    for place in range(4):
        # rows of the same padded length, so that they share the batch
        crowd = [Row(rows[2].prompt)] * 4
        crowd[place] = rows[2]
        assert same_bits(written(tiny, crowd, **options)[place], copies[0])


def test_a_batch_writes_what_transformer_lens_own_passes_give(
    tiny: HookedModel, rows: list[Row], options: dict[str, Any]
) -> None:
    completions = written(tiny, rows, **options)
    for i in (0, 2, 7):
        slow = slow_logits(tiny, rows[i], completions[i])
        assert (logits_of(completions[i]) - slow).abs().max() < 1e-4


def test_a_row_whose_plan_overflows_ends_alone(
    tiny: HookedModel, rows: list[Row], options: dict[str, Any]
) -> None:
    deltas = deltas_of(tiny)
    large = deltas * (3e38 / float(deltas.vectors.abs().max()))
    bad = Row(rows[2].prompt, make_plan(large, 0.9) + make_plan(large, 0.9))
    clean = written(tiny, rows, **options)
    mixed = written(tiny, [bad, *rows, bad], **options)
    for completion in (mixed[0], mixed[-1]):
        assert (completion.finite, completion.ended, completion.tokens) == (False, False, ())
    assert all(same_bits(one, other) for one, other in zip(mixed[1:-1], clean, strict=True))


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_row_that_breaks_off_keeps_its_tokens_so_far_and_the_others_go_on(
    tiny_folder: Path, use_cache: bool
) -> None:
    model: Any = load_model(tiny_folder)
    # unsteered, since a plan is refused on changed weights
    rows = [Row(hand_prompt((1, 60 + n, 70))) for n in range(4)]
    options: dict[str, Any] = {
        "executor": "hooks",
        "slots": 4,
        "use_cache": use_cache,
        "max_new_tokens": 6,
    }
    clean = written(model, rows, **options)
    met = {t for i, c in enumerate(clean) if i != 2 for t in (*c.tokens, *rows[i].prompt.tokens)}
    step, poison = next((n, t) for n, t in enumerate(clean[2].tokens[:-1]) if n and t not in met)
    with torch.no_grad():
        model.embed.weight[poison] = torch.nan
    broken = written(model, rows, **options)
    assert (broken[2].finite, broken[2].ended) == (False, False)
    assert broken[2].tokens == clean[2].tokens[: step + 1]
    assert torch.equal(logits_of(broken[2]), logits_of(clean[2])[: step + 1])
    assert all(same_bits(broken[i], clean[i]) for i in (0, 1, 3))


@dataclass
class Watched:
    """Hook points that remember the shape of every pass."""

    points: HookPoints
    shapes: list[tuple[int, int, int]] = field(default_factory=list)
    name: str = "watched"
    multiple: int = 8

    @property
    def device(self) -> torch.device:
        return self.points.device

    @contextmanager
    def at_blocks(self, at: Mapping[int, AtBlock]) -> Iterator[None]:
        with self.points.at_blocks(at):
            yield

    @contextmanager
    def at_sites(self, at: Mapping[Place, AtSite]) -> Iterator[None]:
        with self.points.at_sites(at):
            yield

    def forward(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor,
        *,
        cache: KeyValues | None = None,
        last: int = 0,
    ) -> torch.Tensor:
        assert last == 1
        self.shapes.append((len(tokens), tokens.shape[1], mask.shape[1]))
        return self.points.forward(tokens, mask, cache=cache, last=last)


def run_watched(
    model: HookedModel, rows: list[Row], **options: Any
) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Where the completions come in, and (rows, tokens, positions) of every pass."""
    watched = Watched(HookPoints(model))
    config = GenerationConfig(**{"max_new_tokens": 3, "stop_at_eos": False, **options})
    with evaluating(model):
        places = [place for place, _ in write_in_batches(model, watched, rows, config)]
    return places, watched.shapes


def test_every_batch_has_all_its_rows_and_a_length_of_its_prompts_own(tiny: HookedModel) -> None:
    lengths = (3, 20, 8, 9, 1, 5, 7, 2)
    rows = [Row(hand_prompt(range(40, 40 + length), special=())) for length in lengths]
    places, shapes = run_watched(tiny, rows, slots=4)
    # six of at most eight tokens in two batches, then one of 9 (padded to 16), one of 20 (to 24)
    assert shapes == [
        *[(4, 8, 8), (4, 1, 9), (4, 1, 10)] * 2,
        *[(4, 16, 16), (4, 1, 17), (4, 1, 18)],
        *[(4, 24, 24), (4, 1, 25), (4, 1, 26)],
    ]
    assert places == [0, 2, 4, 5, 6, 7, 3, 1]


def test_padding_leaves_room_for_the_completion_in_the_context(tiny: HookedModel) -> None:
    rows = [Row(hand_prompt((1, *range(40, 40 + length)))) for length in (120, 124)]
    _, shapes = run_watched(tiny, rows, slots=2)
    assert [positions for _, _, positions in shapes] == [125, 126, 127]


def test_without_a_cache_every_pass_is_the_whole_sequence(tiny: HookedModel) -> None:
    rows = [Row(hand_prompt((40, 41, 42), special=()))]
    _, shapes = run_watched(tiny, rows, slots=2, use_cache=False)
    assert shapes == [(2, 8, 8), (2, 9, 9), (2, 10, 10)]


def test_a_sequence_mean_takes_the_cache_from_its_own_batch_alone(
    tiny: HookedModel, plan: Plan, mean_plan: Plan
) -> None:
    prompt = hand_prompt((40, 41, 42), special=())
    rows = [Row(prompt, mean_plan), Row(prompt, plan), Row(prompt), Row(prompt, mean_plan)]
    places, shapes = run_watched(tiny, rows, slots=4)
    assert places == [1, 2, 0, 3]
    assert shapes == [(4, 8, 8), (4, 1, 9), (4, 1, 10), (4, 8, 8), (4, 9, 9), (4, 10, 10)]


def test_a_batch_stops_when_all_its_rows_have_ended_and_not_before(tiny_folder: Path) -> None:
    model: Any = load_model(tiny_folder)
    rows = [Row(hand_prompt((1, 60 + n))) for n in range(4)]
    free = written(model, rows, executor="hooks", slots=4, max_new_tokens=6)
    stops = sorted({c.tokens[n] for n, c in enumerate(free)})
    model.original_model.generation_config.eos_token_id = stops
    ends = [next(n for n, t in enumerate(c.tokens) if t in stops) + 1 for c in free]
    assert len(set(ends)) > 1
    options: dict[str, Any] = {"slots": 4, "max_new_tokens": 6, "stop_at_eos": True}
    _, shapes = run_watched(model, rows, **options)
    assert len(shapes) == max(ends)
    stopped = written(model, rows, executor="hooks", **options)
    assert [len(c.tokens) for c in stopped] == ends
    assert all(c.ended for c in stopped)


@pytest.mark.parametrize("executor", ["lean", "hooks"])
@pytest.mark.parametrize("batch_size", [4, 8])
def test_recorded_means_do_not_change_by_a_bit_with_the_other_prompts(
    tiny: HookedModel, executor: str, batch_size: int
) -> None:
    prompts = [row.prompt for row in mixed_rows(tiny, strong_plan(tiny), 14)]
    options: dict[str, Any] = {"executor": executor, "batch_size": batch_size}
    together = record(tiny, prompts, **options)
    backwards = record(tiny, prompts[::-1], **options)[::-1]
    for one, other in zip(together, backwards, strict=True):
        assert torch.equal(one.mean, other.mean)
    for i in (0, 5, 13):
        assert torch.equal(record(tiny, [prompts[i]], **options)[0].mean, together[i].mean)
    assert len({float(one.mean.sum()) for one in together}) > 5


def test_every_recording_pass_has_the_batch_size_that_was_asked_for(
    tiny: HookedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = HookPoints.forward

    def watched(self: HookPoints, tokens: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        seen.append(len(tokens))
        return real(self, tokens, *args, **options)

    monkeypatch.setattr(HookPoints, "forward", watched)
    prompts = prompts_of(tiny)
    for batch_size in (2, 5):
        seen.clear()
        record(tiny, prompts, batch_size=batch_size, executor="hooks")
        assert set(seen) == {batch_size}
    seen.clear()
    record(tiny, prompts, executor="hooks")
    assert set(seen) == {3}
    seen.clear()
    texts = [
        (prompt, completion)
        for prompt, completion in zip(
            prompts, written(tiny, [Row(p) for p in prompts]), strict=True
        )
    ]
    completion_nll(tiny, texts, batch_size=5, executor="hooks")
    assert set(seen) == {5}
    seen.clear()
    completion_nll(tiny, texts * 7, executor="hooks")
    assert set(seen) == {16}


@pytest.mark.parametrize("executor", ["lean", "hooks"])
@pytest.mark.parametrize("batch_size", [4, 8])
def test_scores_do_not_change_by_a_bit_with_the_other_texts(
    tiny: HookedModel, executor: str, batch_size: int
) -> None:
    rows = mixed_rows(tiny, strong_plan(tiny), 14)
    texts = [
        (row.prompt, completion)
        for row, completion in zip(rows, written(tiny, rows, slots=8), strict=True)
    ]
    options: dict[str, Any] = {"executor": executor, "batch_size": batch_size}
    together = completion_nll(tiny, texts, **options)
    assert together == completion_nll(tiny, texts[::-1], **options)[::-1]
    for i in (0, 5, 13):
        assert completion_nll(tiny, [texts[i]], **options) == [together[i]]
    assert len(set(together)) > 5

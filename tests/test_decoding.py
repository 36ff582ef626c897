from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import strong_plan
from engine import hand_prompt

from fusion_lens.decoding import Completion, GenerationConfig, Row, Tape
from fusion_lens.errors import ConfigError
from fusion_lens.models import HookedModel

PROMPT = hand_prompt((1, 5))


def tape_of(n_rows: int, *, stops: Sequence[int] = (), seed: int = 0, **options: Any) -> Tape:
    """A tape with all rows going, from seed `seed` on."""
    config = GenerationConfig(**{"max_new_tokens": 4, **options})
    tape = Tape.blank(n_rows, config, frozenset(stops), torch.device("cpu"))
    tape.start(range(n_rows), [Row(PROMPT, seed=seed + n) for n in range(n_rows)])
    return tape


def read(tape: Tape, row: int = 0) -> Completion:
    return tape.completion(row, lambda tokens: " ".join(map(str, tokens)))


def peaks(*tokens: int, size: int = 6) -> torch.Tensor:
    """Logits whose highest is at these tokens, one row each, 2 above all others."""
    logits = torch.linspace(0.0, 0.5, size).repeat(len(tokens), 1)
    for row, token in enumerate(tokens):
        logits[row, token] = 2.5
    return logits


def test_the_highest_logit_is_written_and_given_back() -> None:
    tape = tape_of(2)
    assert tape.step(peaks(3, 5)).tolist() == [3, 5]
    assert tape.step(peaks(1, 0)).tolist() == [1, 0]
    one, other = read(tape, 0), read(tape, 1)
    assert (one.tokens, one.text, one.ended, one.finite) == ((3, 1), "3 1", False, True)
    assert other.tokens == (5, 0)


def test_a_row_ends_with_a_stop_token_that_its_text_leaves_out() -> None:
    tape = tape_of(3, stops=(2, 4))
    tape.step(peaks(3, 4, 3))
    assert tape.going.tolist() == [True, False, True]
    tape.step(peaks(2, 3, 3))
    assert tape.going.tolist() == [False, False, True]
    ended, first, going = (read(tape, row) for row in range(3))
    assert (ended.tokens, ended.text, ended.ended) == ((3, 2), "3", True)
    assert (first.tokens, first.text, first.ended) == ((4,), "", True)
    assert (going.tokens, going.text, going.ended) == ((3, 3), "3 3", False)


def test_a_row_that_fills_its_room_has_not_ended_unless_it_stopped_there() -> None:
    tape = tape_of(2, stops=(2,), max_new_tokens=3)
    for _ in range(2):
        tape.step(peaks(3, 3))
    assert tape.going.tolist() == [True, True]
    tape.step(peaks(3, 2))
    assert tape.going.tolist() == [False, False]
    full, stopped = read(tape, 0), read(tape, 1)
    assert (full.tokens, full.ended) == ((3, 3, 3), False)
    assert (stopped.tokens, stopped.ended, stopped.text) == ((3, 3, 2), True, "3 3")


def test_nothing_a_row_is_fed_after_its_end_changes_it() -> None:
    tape = tape_of(3, stops=(2,), max_new_tokens=3, keep_logits=True)
    tape.step(peaks(2, 3, 4))
    tape.step(torch.cat([peaks(3, 3), torch.full((1, 6), math.nan)]))
    tape.step(peaks(5, 3, 5))
    before = [read(tape, row) for row in range(3)]
    assert tape.going.tolist() == [False] * 3
    for worse in (peaks(1, 1, 1), torch.full((3, 6), math.nan), torch.full((3, 6), math.inf)):
        tape.step(worse)
    after = [read(tape, row) for row in range(3)]
    assert before == after
    assert [c.tokens for c in after] == [(2,), (3, 3, 3), (4,)]
    assert [c.finite for c in after] == [True, True, False]
    assert [c.margin for c in after] == [c.margin for c in before]
    for one, other in zip(before, after, strict=True):
        assert one.logits is not None
        assert other.logits is not None
        assert torch.equal(one.logits, other.logits)


def test_stop_tokens_are_written_like_others_where_none_shall_stop() -> None:
    tape = tape_of(1, stops=(2,), stop_at_eos=False, max_new_tokens=3)
    for token in (2, 3, 2):
        tape.step(peaks(token))
    completion = read(tape)
    assert (completion.tokens, completion.text, completion.ended) == ((2, 3, 2), "2 3 2", False)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_whose_logits_are_not_finite_ends_before_that_step(
    value: float, temperature: float
) -> None:
    tape = tape_of(3, temperature=temperature, keep_logits=True)
    tape.step(peaks(3, 3, 3))
    written_so_far = read(tape, 1).tokens
    logits = peaks(4, 4, 4)
    logits[1, 0] = value
    logits[2, 0] = -math.inf
    tape.step(logits)
    assert tape.going.tolist() == [True, False, True]
    good, bad, masked = (read(tape, row) for row in range(3))
    assert (good.finite, masked.finite) == (True, True)
    assert len(good.tokens) == len(masked.tokens) == 2
    assert (bad.finite, bad.ended, bad.tokens) == (False, False, written_so_far)
    assert bad.logits is not None
    assert torch.equal(bad.logits, peaks(3))


def test_a_row_without_one_finite_logit_is_not_finite() -> None:
    tape = tape_of(1)
    tape.step(torch.full((1, 6), -math.inf))
    assert read(tape).finite is False
    assert read(tape).tokens == ()
    assert read(tape).margin is None


def test_the_margin_is_the_smallest_gap_between_the_two_highest_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn((4, 5, 50), generator=generator)
    tape = tape_of(5)
    for logits in steps:
        tape.step(logits)
    for row in range(5):
        gaps = []
        for logits in steps[:, row]:
            first, second = sorted(logits.tolist(), reverse=True)[:2]
            gaps.append(first - second)
        assert read(tape, row).margin == pytest.approx(min(gaps), rel=1e-5)


def test_a_tie_has_no_margin_at_all() -> None:
    tape = tape_of(1)
    tape.step(torch.tensor([[1.0, 3.0, 3.0]]))
    assert read(tape).margin == 0.0
    assert read(tape).tokens == (1,)


def test_a_step_after_the_end_does_not_enter_the_margin() -> None:
    tape = tape_of(1, stops=(3,))
    tape.step(peaks(3))
    tape.step(torch.zeros(1, 6))
    assert read(tape).margin == pytest.approx(2.0)


def test_samples_and_masked_vocabularies_have_no_margin() -> None:
    sampled = tape_of(1, temperature=1.0)
    sampled.step(peaks(3))
    assert read(sampled).margin is None
    lonely = tape_of(1)
    lonely.step(torch.tensor([[-math.inf, 1.0, -math.inf]]))
    assert read(lonely).margin is None
    assert read(lonely).tokens == (1,)


def test_logits_are_kept_step_by_step_where_they_are_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn((4, 2, 6), generator=generator, dtype=torch.float64)
    kept, bare = tape_of(2, keep_logits=True), tape_of(2)
    for logits in steps:
        kept.step(logits)
        bare.step(logits)
    for row in range(2):
        logits = read(kept, row).logits
        assert logits is not None
        assert torch.equal(logits, steps[:, row])
        assert read(bare, row).logits is None
        assert read(kept, row) == read(bare, row)


def test_a_completions_logits_are_its_own_when_its_place_is_used_again() -> None:
    tape = tape_of(1, keep_logits=True, max_new_tokens=2)
    tape.step(peaks(3))
    tape.step(peaks(4))
    first = read(tape)
    tape.start([0], [Row(PROMPT)])
    tape.step(peaks(1))
    assert first.logits is not None
    assert torch.equal(first.logits, torch.cat([peaks(3), peaks(4)]))


def test_a_place_that_is_used_again_begins_anew() -> None:
    tape = tape_of(2, stops=(2,))
    tape.step(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 5.0]]))
    tape.step(torch.tensor([[math.nan, 1.0, 0.0], [1.0, 0.0, 0.0]]))
    assert tape.going.tolist() == [False, False]
    tape.start([1, 0], [Row(PROMPT), Row(PROMPT)])
    assert tape.going.tolist() == [True, True]
    tape.step(peaks(1, 3))
    for row, token in ((0, 1), (1, 3)):
        completion = read(tape, row)
        assert (completion.tokens, completion.finite, completion.ended) == ((token,), True, False)
        assert completion.margin == pytest.approx(2.0)


def test_no_row_of_a_blank_tape_is_going() -> None:
    tape = Tape.blank(2, GenerationConfig(), frozenset({1}), torch.device("cpu"))
    tape.step(peaks(3, 4))
    assert tape.going.tolist() == [False, False]
    assert read(tape).tokens == ()


def test_a_sample_is_where_the_uniform_falls_in_the_cumulated_softmax() -> None:
    shares = torch.tensor([0.1, 0.0, 0.4, 0.3, 0.2], dtype=torch.float64)
    logits = shares.log().float()[None]
    for uniform, token in (
        (0.0, 0),
        (0.0999, 0),
        (0.1001, 2),
        (0.4999, 2),
        (0.5001, 3),
        (0.7999, 3),
        (0.8001, 4),
        (0.999999, 4),
    ):
        tape = tape_of(1, temperature=1.0)
        tape.uniforms.fill_(uniform)
        assert tape.step(logits).tolist() == [token], uniform


def test_a_token_without_probability_is_never_drawn() -> None:
    for uniform in (0.0, 0.5, 1.0 - 2**-53):
        tape = tape_of(1, temperature=1.0)
        tape.uniforms.fill_(uniform)
        logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]])
        assert tape.step(logits).tolist() == [1 if uniform < 0.5 else 2]


def test_a_lower_temperature_sharpens_and_a_higher_one_flattens() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0]])
    for temperature, share in ((1.0, 3 / 4), (0.5, 9 / 10), (2.0, 3**0.5 / (1 + 3**0.5))):
        for uniform, token in ((share - 1e-4, 0), (share + 1e-4, 1)):
            tape = tape_of(1, temperature=temperature)
            tape.uniforms.fill_(uniform)
            assert tape.step(logits).tolist() == [token]


def test_every_step_takes_the_next_uniform_of_the_rows_own_seed() -> None:
    generator = torch.Generator().manual_seed(8)
    uniforms = torch.rand(4, generator=generator, dtype=torch.float64)
    tape = tape_of(3, temperature=1.0, seed=6)
    flat = torch.zeros((3, 1000))
    for _ in range(4):
        tape.step(flat)
    assert read(tape, 2).tokens == tuple((uniforms * 1000).long().tolist())
    assert len({read(tape, row).tokens for row in range(3)}) == 3


def test_a_longer_budget_begins_with_the_samples_of_a_shorter_one() -> None:
    flat = torch.zeros((2, 1000))
    short = tape_of(2, temperature=1.0, max_new_tokens=3)
    long = tape_of(2, temperature=1.0, max_new_tokens=40)
    for _ in range(40):
        short.step(flat)
        long.step(flat)
    assert read(long, 1).tokens[:3] == read(short, 1).tokens
    assert len(read(long, 1).tokens) == 40


def test_text_is_made_of_the_tokens_before_the_stop_token() -> None:
    seen: list[list[int]] = []

    def decode(tokens: list[int]) -> str:
        seen.append(tokens)
        return "text"

    tape = tape_of(1, stops=(2,))
    for token in (3, 4, 2):
        tape.step(peaks(token))
    assert tape.completion(0, decode).text == "text"
    assert seen == [[3, 4]]


def test_a_seed_no_generator_takes_is_refused() -> None:
    assert Row(PROMPT, seed=2**63 - 1).seed == 2**63 - 1
    for seed in (-1, 2**63):
        with pytest.raises(ConfigError, match=rf"0 <= seed < 2\*\*63 must hold, but got {seed}"):
            Row(PROMPT, seed=seed)


def test_a_row_needs_the_sequence_if_a_step_of_its_plan_does(tiny: HookedModel) -> None:
    plan = strong_plan(tiny)
    assert not Row(PROMPT).needs_sequence
    assert not Row(PROMPT, plan).needs_sequence
    assert Row(PROMPT, plan + strong_plan(tiny, mean="sequence")).needs_sequence


@pytest.mark.parametrize("name", ["max_new_tokens", "slots", "cache_length"])
def test_a_size_below_one_is_refused(name: str) -> None:
    sizes: dict[str, Any] = {name: 0}
    with pytest.raises(ConfigError, match=f"{name} must be at least 1, but got 0"):
        GenerationConfig(**sizes)


@pytest.mark.parametrize("temperature", [-0.5, math.inf, math.nan])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    with pytest.raises(ConfigError, match="temperature must be 0 or above, but got"):
        GenerationConfig(temperature=temperature)


def test_an_executor_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match="executor must be one of auto, lean, hooks, but got 'x'"):
        GenerationConfig(executor="x")


def test_a_completion_is_shown_beside_the_unsteered_one_with_what_differs_marked() -> None:
    old = Completion("Tom Harris wrote it.", (1, 2, 3), True, margin=0.5)
    new = Completion("Tom <b>Lovelace wrote it.", (1, 2), False, finite=False)
    assert new.beside(old).rows == (
        (
            "text",
            "Tom Harris wrote it.",
            [("Tom ", False), ("<b>Lovelace", True), (" wrote it.", False)],
        ),
        ("tokens", "3, ended", "2, cut off"),
        ("smallest margin", "0.5", "-"),
        ("logits", "finite", "not finite: the text means nothing"),
    )
    assert "Tom &lt;b&gt;Lovelace" in new._repr_html_()

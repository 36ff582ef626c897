from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import deltas_of, strong_plan
from kinds import SITES, every_plan

from fusion_lens.divergence import WINDOW, kl_unrelated, unrelated_texts
from fusion_lens.errors import ConfigError, InputFileError
from fusion_lens.hooks import fwd_hooks
from fusion_lens.models import HookedModel
from fusion_lens.plans import make_plan
from fusion_lens.prompts import Layout, Prompt, tokenize

TEXTS = ("Tom went to the red house and sat", "Once there was a cat.", "A day")


def by_hand(model: HookedModel, texts: list[Prompt], plan=None, prefix=()) -> float:
    """The mean over the texts' own tokens, text by text through the hook points."""
    total, n = 0.0, 0
    for text in texts:
        plain = torch.tensor([text.tokens])
        told = torch.tensor([text.tokens[:1] + prefix + text.tokens[1:]])
        hooks = (
            [] if plan is None else fwd_hooks(plan, model=model, prompt=Layout(told.shape[1], (0,)))
        )
        with torch.no_grad():
            p = model(plain)[0, 1:].double().log_softmax(dim=-1)
            q = model.run_with_hooks(told, fwd_hooks=hooks)[0].double().log_softmax(dim=-1)
        total += float((p.exp() * (p - q[-len(p) :])).sum())
        n += len(p)
    return total / n


@pytest.fixture(scope="module")
def texts(tiny: HookedModel) -> list[Prompt]:
    return [tokenize(tiny, text) for text in TEXTS]


@pytest.mark.parametrize("executor", ["lean", "hooks"])
def test_the_divergence_is_that_of_the_next_tokens_by_hand(
    tiny: HookedModel, texts: list[Prompt], executor: str
) -> None:
    plan = strong_plan(tiny)
    ways = [plan, plan * 0.25, plan * 0.0, (70, 80, 90)]
    strong, weak, none, prefixed = kl_unrelated(tiny, texts, ways, executor=executor)
    assert strong == pytest.approx(by_hand(tiny, texts, plan), rel=1e-3)
    assert weak == pytest.approx(by_hand(tiny, texts, plan * 0.25), rel=1e-3)
    assert prefixed == pytest.approx(by_hand(tiny, texts, prefix=(70, 80, 90)), rel=1e-3)
    assert strong > 2 * weak > 0.001
    assert none == pytest.approx(0.0, abs=1e-6)


def test_a_text_counts_as_written_by_the_model(tiny: HookedModel, texts: list[Prompt]) -> None:
    deltas = deltas_of(tiny)
    kinds: tuple[str | int, ...] = ("all", "completion", "prompt", 1)
    plans = [make_plan(deltas, 2.0, positions=where) for where in kinds]
    everywhere, written, prompt, token = kl_unrelated(tiny, texts, plans)
    assert everywhere == written > 0.01
    assert prompt == token == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("site", SITES)
def test_every_kind_of_step_for_every_position_moves_unrelated_text(
    tiny: HookedModel, texts: list[Prompt], site: str
) -> None:
    plans = [
        plan
        for plan in every_plan(tiny).values()
        if site in plan.sites and all(step.positions == "all" for step in plan.steps)
    ]
    assert len(plans) >= 7
    for plan, kl in zip(plans, kl_unrelated(tiny, texts, plans), strict=True):
        assert kl == pytest.approx(by_hand(tiny, texts, plan), rel=1e-2)
        assert kl > 1e-4


def test_what_is_measured_does_not_depend_on_what_else_is(
    tiny: HookedModel, texts: list[Prompt]
) -> None:
    plan = strong_plan(tiny)
    assert kl_unrelated(tiny, texts, [plan * 0.5, plan])[1] == kl_unrelated(tiny, texts, [plan])[0]
    assert kl_unrelated(tiny, texts, []) == []
    told: list[int] = []
    kl_unrelated(tiny, texts, [plan, (5, 6)], progress=told.append)
    assert told == sorted(told)
    assert told[-1] == 2 * len(texts)
    with pytest.raises(ConfigError, match="at least one unrelated text"):
        kl_unrelated(tiny, [], [plan])


def test_a_file_is_read_in_as_few_pieces_as_hold_tokens_enough(
    tiny: HookedModel, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(["Once there was a cat. " * 20, "Tom went home."] * 4), "utf-8")
    pieces = unrelated_texts(tiny, path, n_tokens=200)
    whole = tokenize(tiny, path.read_text("utf-8")).tokens
    # 200 tokens in pieces of 63
    assert len(pieces) == 4
    for n, piece in enumerate(pieces):
        assert len(piece.tokens) == WINDOW
        assert piece.special == (0,)
        assert piece.tokens[0] == tiny.tokenizer.bos_token_id
        assert piece.tokens[1:] == whole[1 + 63 * n : 1 + 63 * (n + 1)]


def test_a_file_that_is_too_short_or_missing_is_named(tiny: HookedModel, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("Once there was a cat.", "utf-8")
    with pytest.raises(InputFileError, match=r"must hold at least 2016 tokens, but holds \d+"):
        unrelated_texts(tiny, path)
    with pytest.raises(InputFileError, match="must be readable UTF-8 text"):
        unrelated_texts(tiny, tmp_path / "none.txt")

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import deltas_of, strong_plan
from kinds import every_plan, step_of
from torch import Tensor

from fusion_lens.deltas import Deltas
from fusion_lens.errors import PlanError
from fusion_lens.hooks import fwd_hooks
from fusion_lens.identity import ModelIdentity, identify
from fusion_lens.models import HookedModel, load_model, resid_post
from fusion_lens.plan_files import save_plan
from fusion_lens.plans import Affine, Gate, Plan, Step, even_segments, full, make_plan
from fusion_lens.prompts import NO_PROMPT, question_prompt
from fusion_lens.vectors import Vectors, from_vectors, layer_named, to_vectors

MODEL = ModelIdentity("m", "TransformerBridge", "unprocessed", 3, 2, "float32", "w" * 8, "e" * 8)
ROWS = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])


def deltas() -> Deltas:
    return Deltas(ROWS + 1, torch.ones(3, 2), NO_PROMPT, MODEL)


def step(*coeffs: float, **changed: Any) -> Step:
    """Adds coefficient * ROWS to every token."""
    segments = even_segments(3, len(coeffs))
    return Step(deltas(), segments, coeffs, steer_special=True, **changed)


def shifting(**changed: Any) -> Affine:
    """Adds ROWS to every token."""
    made: dict[str, Any] = {"scale": torch.zeros(3, 2), "shift": ROWS, "coeffs": (1.0,)}
    made |= {"segments": full(3), "model": MODEL, "layout": NO_PROMPT, "steer_special": True}
    return Affine("resid_post", **(made | changed))


def values(vectors: Vectors) -> dict[int, list[float]]:
    return {layer: vector.tolist() for layer, vector in vectors.by_layer.items()}


def constant_gate(bias: list[float], kind: str = "sigmoid") -> Gate:
    return Gate(torch.zeros(3, 2), torch.tensor(bias), torch.tensor([True, True, False]), kind)


def test_steps_are_one_vector_per_layer_with_coefficients_and_units_multiplied_in() -> None:
    units = torch.tensor([[True, False], [False, False], [True, True]])
    plan = Plan((step(1.0, 0.0, -2.0), step(10.0, units=units), shifting(coeffs=(0.5,))))
    made = to_vectors(plan)
    assert values(made) == {0: [11.5, 3.0], 1: [1.5, 2.0], 2: [42.5, 51.0]}
    assert made.told["approximated"] == "nothing"


def test_a_layer_to_which_nothing_is_added_has_no_vector() -> None:
    assert values(to_vectors(Plan((step(0.0, 2.0, 0.0),)))) == {1: [6.0, 8.0]}


def test_a_step_with_coefficients_of_0_stands_in_nobodys_way(tiny: HookedModel) -> None:
    own = step_of(tiny, steer_special=True)
    for plan in every_plan(tiny).values():
        beside = Plan((own, *(plan * 0.0).steps))
        assert to_vectors(beside).told["approximated"] == "nothing"


@pytest.mark.parametrize(
    ("kind", "bias", "expected"),
    [
        ("sigmoid", [0.0, 0.0, 0.0], {0: [0.5, 1.0], 1: [1.5, 2.0]}),
        ("relu", [2.0, -1.0, 3.0], {0: [2.0, 4.0]}),
    ],
)
def test_a_gate_that_is_the_same_for_every_token_is_multiplied_in(
    kind: str, bias: list[float], expected: dict[int, list[float]]
) -> None:
    for gated in (step(1.0, gate=constant_gate(bias, kind)), None):
        gated = gated or shifting(gate=constant_gate(bias, kind))
        made = to_vectors(Plan((gated,)))
        assert values(made) == expected
        assert made.told["approximated"] == "nothing"


def test_bounds_that_are_infinite_bind_nothing() -> None:
    wide = torch.full((3, 2), torch.inf)
    bounded = shifting(low=-wide, high=wide)
    assert values(to_vectors(Plan((bounded,)))) == {0: [1, 2], 1: [3, 4], 2: [5, 6]}


REFUSED: dict[str, tuple[Callable[[], Step | Affine], str]] = {
    "another site": (
        lambda: replace(shifting(), site="mlp_out"),
        "but its step 2 acts at mlp_out; nothing stands in for that.",
    ),
    "attn_z": (lambda: replace(shifting(), site="attn_z"), "its step 2 acts at attn_z;"),
    "a scale": (lambda: shifting(scale=0.1 * ROWS), "its step 2 scales what it finds;"),
    "a lower bound": (
        lambda: shifting(low=0.0 * ROWS),
        "its step 2 moves units within bounds alone;",
    ),
    "an upper bound": (
        lambda: shifting(high=torch.full((3, 2), -torch.inf)),
        "its step 2 moves units within bounds alone;",
    ),
    "a token": (
        lambda: step(1.0, positions=4),
        "its step 2 acts on token 4 of the prompt alone;",
    ),
}


@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_vector_comes_near_is_refused_with_the_reason(kind: str, approximate: bool) -> None:
    made, message = REFUSED[kind]
    with pytest.raises(PlanError) as refused:
        to_vectors(Plan((step(1.0), made())), approximate=approximate)
    assert message in str(refused.value)
    assert "must add vectors to the residual stream after blocks" in str(refused.value)


def test_every_reason_is_named_at_once() -> None:
    plan = Plan((shifting(scale=ROWS), step(1.0), step(1.0, positions=0)))
    message = r"its step 1 scales what it finds; its step 3 acts on token 0 of the prompt alone;"
    with pytest.raises(PlanError, match=message):
        to_vectors(plan)


OPEN = torch.tensor([True, False, True])
APPROXIMATED: dict[str, tuple[Callable[[], Step | Affine], str, str, dict[int, list[float]]]] = {
    "spared special tokens": (
        lambda: replace(step(2.0), steer_special=False),
        "step 1 spares special tokens",
        "step 1 steers special tokens too",
        {0: [2, 4], 1: [6, 8], 2: [10, 12]},
    ),
    "the prompt": (
        lambda: step(1.0, positions="prompt"),
        "step 1 acts on the prompt alone",
        "step 1 acts on all tokens",
        {0: [1, 2], 1: [3, 4], 2: [5, 6]},
    ),
    "the completion": (
        lambda: shifting(positions="completion"),
        "step 1 acts on the completion alone",
        "step 1 acts on all tokens",
        {0: [1, 2], 1: [3, 4], 2: [5, 6]},
    ),
    "a running mean": (
        lambda: step(3.0, mean="sequence"),
        "step 1 takes its mean over the sequence as it stands",
        "step 1 takes its question's mean",
        {0: [3, 6], 1: [9, 12], 2: [15, 18]},
    ),
    "a gate": (
        lambda: step(1.0, gate=Gate(ROWS, torch.zeros(3), OPEN)),
        "step 1 has a gate",
        "step 1 counts its gate as 1 on its open layers",
        {0: [1, 2], 2: [5, 6]},
    ),
    "a gate of an affine step": (
        lambda: shifting(gate=Gate(ROWS, torch.zeros(3), OPEN, "relu")),
        "step 1 has a gate",
        "step 1 counts its gate as 1 on its open layers",
        {0: [1, 2], 2: [5, 6]},
    ),
}


@pytest.mark.parametrize("kind", APPROXIMATED)
def test_what_differs_from_token_to_token_is_refused_or_approximated_and_told(kind: str) -> None:
    make, why, now, expected = APPROXIMATED[kind]
    plan = Plan((make(),))
    with pytest.raises(
        PlanError, match=rf"to every token to be exported, but {why}; approximate it \(--"
    ):
        to_vectors(plan)
    made = to_vectors(plan, approximate=True)
    assert made.told["approximated"] == now
    assert values(made) == expected


def test_layers_below_the_first_are_refused_or_left_out_and_told() -> None:
    plan = Plan((step(1.0),))
    with pytest.raises(PlanError, match=r"but layer 0 is steered, which has no vector; approxi"):
        to_vectors(plan, first_layer=1)
    made = to_vectors(plan, first_layer=1, approximate=True)
    assert made.told["approximated"] == "layer 0 is left out"
    assert values(made) == {1: [3, 4], 2: [5, 6]}
    exact = to_vectors(Plan((step(0.0, 1.0, 1.0),)), first_layer=1)
    assert values(exact) == values(made)
    assert exact.told["approximated"] == "nothing"


def test_everything_that_is_approximated_is_told() -> None:
    spared = replace(step(1.0, positions="prompt"), steer_special=False)
    made = to_vectors(Plan((step(1.0), spared)), first_layer=1, approximate=True)
    assert made.told["approximated"] == (
        "step 2 acts on all tokens; step 2 steers special tokens too; layer 0 is left out"
    )


@pytest.mark.parametrize(
    ("plan", "first_layer"),
    [
        (Plan((step(0.0),)), 0),
        (Plan((step(1.0), step(-1.0))), 0),
        (Plan((step(1.0, 0.0, 0.0),)), 1),
    ],
)
def test_a_plan_that_adds_nothing_is_refused(plan: Plan, first_layer: int) -> None:
    with pytest.raises(PlanError, match=rf"must add something from layer {first_layer} on .* adds"):
        to_vectors(plan, first_layer=first_layer, approximate=True)


def test_the_vectors_tell_where_they_come_from(tmp_path: Path) -> None:
    plan = Plan((step(0.5, -1.0, 0.1), step(2.0)))
    save_plan(plan, tmp_path / "plan")
    assert to_vectors(plan).told == {
        "model": "m",
        "weights_sha256": "w" * 8,
        "plan_sha256": hashlib.sha256((tmp_path / "plan").read_bytes()).hexdigest(),
        "hook": "blocks.{layer}.hook_resid_post",
        "coefficients": "segment_0 0.5, segment_1 -1.0, segment_2 0.1, segment_0#2 2.0",
        "approximated": "nothing",
    }


@pytest.mark.parametrize(
    ("by_layer", "message"),
    [
        ({}, r"a vector of at least one layer, counted from 0, but got the layers \[\]"),
        ({-1: torch.ones(2)}, r"counted from 0, but got the layers \[-1\]"),
        ({1: torch.ones(0)}, r"the shape \(0,\), and some width, but that of layer 1 has \(0,\)"),
        ({0: torch.tensor([1.0, torch.nan])}, "layer 0 must be finite, but it holds NaN"),
        ({2: torch.ones(2).double()}, "layer 2 must be on the CPU in float32, but got torch.fl"),
    ],
)
def test_what_is_no_vector_is_refused(by_layer: dict[int, Tensor], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Vectors(by_layer, {})


def test_vectors_of_different_widths_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(PlanError, match=r"the shape \(2,\), .* layer 4 has \(3,\)"):
        Vectors({0: torch.ones(2), 4: torch.ones(3)}, {})


def test_a_plan_of_vectors_adds_them_as_they_are_to_every_token() -> None:
    plan = from_vectors(Vectors({0: ROWS[0], 2: -ROWS[2]}, {}), MODEL)
    (made,) = plan.steps
    assert isinstance(made, Step)
    assert torch.equal(made.shift, torch.stack([ROWS[0], torch.zeros(2), -ROWS[2]]))
    assert (made.positions, made.steer_special, made.coeffs) == ("all", True, (1.0,))
    assert plan.is_constant
    assert (made.model, made.layout) == (MODEL, NO_PROMPT)


def test_vectors_survive_being_a_plan_bit_for_bit() -> None:
    one = to_vectors(make_plan(deltas(), (0.1, 0.7, -1.3), steer_special=True))
    other = to_vectors(from_vectors(one, MODEL))
    assert all(torch.equal(other.by_layer[layer], one.by_layer[layer]) for layer in range(3))


def test_vectors_of_another_model_are_refused() -> None:
    with pytest.raises(PlanError, match="as wide as the model, 2, but got 3; they are of another"):
        from_vectors(Vectors({0: torch.ones(3)}, {}), MODEL)
    with pytest.raises(PlanError, match="must lie below the model's 3, but got 3; they are of ano"):
        from_vectors(Vectors({1: ROWS[1], 3: ROWS[0]}, {}), MODEL)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("layer.0", 0),
        ("layer.17", 17),
        *((name, None) for name in ("layer.01", "layer.-1", "layer.", "layer", "layers.1", "1")),
        *((name, None) for name in ("layer.1.x", "layer.²", "layer.1\n", "layer.1234567890")),
    ],
)
def test_a_tensor_is_named_after_its_layer(name: str, layer: int | None) -> None:
    assert layer_named(name, "layer") == layer


def adding(vectors: Vectors) -> list[tuple[str, Any]]:
    """Hooks that add the vectors."""

    def add(resid: Tensor, hook: object, vector: Tensor) -> Tensor:
        return resid + vector

    return [(resid_post(k), partial(add, vector=v)) for k, v in vectors.by_layer.items()]


def log_probs(model: Any, tokens: Tensor, hooks: list[tuple[str, Any]]) -> Tensor:
    logits: Tensor = model.run_with_hooks(tokens, fwd_hooks=hooks)
    return logits.log_softmax(dim=-1)


def test_vectors_added_by_hand_do_what_the_plan_does(tiny: HookedModel) -> None:
    plan = strong_plan(tiny, steer_special=True)
    model: Any = tiny
    tokens = question_prompt(tiny, "Who wrote the red book?").to_tensor()
    ours = model.run_with_hooks(tokens, fwd_hooks=fwd_hooks(plan, model=tiny))
    by_hand = model.run_with_hooks(tokens, fwd_hooks=adding(to_vectors(plan)))
    assert torch.equal(by_hand, ours)
    assert (ours - model(tokens)).abs().max() > 0.1


def test_every_kind_of_plan_is_exported_approximated_or_refused(tiny: HookedModel) -> None:
    exported, approximated = set(), set()
    for name, plan in every_plan(tiny).items():
        try:
            to_vectors(plan)
            exported.add(name)
        except PlanError:
            with_special = Plan(tuple(replace(step, steer_special=True) for step in plan.steps))
            try:
                exact = to_vectors(with_special, approximate=True).told["approximated"] == "nothing"
            except PlanError:
                continue
            (exported if exact else approximated).add(name)
    assert exported == {"shift_resid_post", "units"}
    assert approximated == {"gated", "gated_relu", "gated_units"}


def test_a_plan_of_processed_weights_is_the_checkpoints_too(gpt2_folder: Path) -> None:
    plain, processed = load_model(gpt2_folder), load_model(gpt2_folder)
    processed.enable_compatibility_mode(disable_warnings=True)  # type: ignore[attr-defined]
    assert identify(processed).processing == "processed"
    # in the processed basis a shift has no mean over d_model; one that has does the same
    own = deltas_of(processed)
    tokens = question_prompt(plain, "Who wrote the red book?").to_tensor()
    for raised in (0.0, 2.0):
        moved = Deltas(own.reference + raised, own.base, own.layout, own.model)
        plan = make_plan(moved, (4.0, -6.0), even_segments(2, 2), steer_special=True)
        ours = log_probs(processed, tokens, fwd_hooks(plan, model=processed))
        theirs = log_probs(plain, tokens, adding(to_vectors(plan)))
        assert (ours - theirs).abs().max() < 1e-3
        assert (theirs - log_probs(plain, tokens, [])).abs().max() > 1.0

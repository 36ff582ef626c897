from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import deltas_of, prompts_of, strong_plan
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kinds import every_plan, same_tensors
from safetensors import safe_open
from safetensors.torch import save_file

from fusion_lens.deltas import Deltas
from fusion_lens.errors import OutputError, PlanError
from fusion_lens.hooks import fwd_hooks
from fusion_lens.identity import ModelIdentity
from fusion_lens.models import SITES
from fusion_lens.plan_files import load_plan, save_plan
from fusion_lens.plans import (
    POSITIONS,
    Affine,
    Gate,
    Plan,
    Step,
    even_segments,
    make_plan,
    per_layer,
)
from fusion_lens.prompts import Layout
from fusion_lens.tensor_files import tensors_digest

DATA = Path(__file__).parent / "data"


@pytest.fixture
def plan(tiny) -> Plan:
    first = make_plan(deltas_of(tiny), (0.25, 0.5, 1.0), mean="question", positions="completion")
    second = make_plan(deltas_of(tiny), (1.0, 0.0, 0.1, 0.7), per_layer(4), steer_special=True)
    return first + second


def test_a_loaded_plan_is_the_saved_one_bit_for_bit(plan: Plan, tmp_path: Path) -> None:
    save_plan(plan, tmp_path / "plan.safetensors")
    loaded = load_plan(tmp_path / "plan.safetensors")
    assert loaded.model == plan.model
    for one, other in zip(loaded.steps, plan.steps, strict=True):
        assert torch.equal(one.deltas.reference, other.deltas.reference)
        assert torch.equal(one.deltas.base, other.deltas.base)
        assert one.deltas.layout == other.deltas.layout
        names = ("segments", "coeffs", "mean", "positions", "steer_special")
        assert all(getattr(one, name) == getattr(other, name) for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.safetensors"]


def test_equal_plans_are_equal_files(plan: Plan, tmp_path: Path) -> None:
    # the library's own order of metadata is drawn anew for every file
    written = set()
    for n in range(12):
        save_plan(plan, tmp_path / str(n))
        written.add((tmp_path / str(n)).read_bytes())
    assert len(written) == 1


def test_every_kind_of_step_is_loaded_as_it_was_saved(tiny, tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    for plan in every_plan(tiny).values():
        save_plan(plan, path)
        loaded = load_plan(path)
        assert all(map(same_tensors, loaded.steps, plan.steps))
        assert len(loaded.steps) == len(plan.steps)
        assert loaded.injected_norm == plan.injected_norm


def test_a_file_of_version_1_is_read() -> None:
    # written by the code that knew no other kind of step
    plan = load_plan(DATA / "plan_version_1.safetensors")
    base = torch.arange(12.0).view(3, 4)
    first, second = plan.steps
    assert isinstance(first, Step)
    assert isinstance(second, Step)
    assert torch.equal(first.deltas.base, base)
    assert torch.equal(first.deltas.vectors, base + 1)
    assert first.layout == second.layout == Layout(7, (0,))
    assert (first.mean, first.positions, first.steer_special) == ("question", "completion", False)
    assert (second.mean, second.positions, second.steer_special) == ("sequence", "all", True)
    assert plan.coeffs == {"early": 0.5, "middle": -1.0, "late": 2.0, "one#2": 0.25}
    assert (first.units, first.gate) == (None, None)


finite = st.floats(-1e3, 1e3, width=32)


def plan_of(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Plan:
    """Up to three steps of any kind, of a model of any size."""
    n_layers, d_model = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    model = ModelIdentity("m", "TransformerBridge", "unprocessed", n_layers, d_model, "x", "w", "e")
    layout = Layout(draw(st.integers(1, 9)), tuple(draw(st.sets(st.integers(0, 8)))))

    def tensor(*shape: int, values: st.SearchStrategy[float] = finite) -> torch.Tensor:
        size = math.prod(shape)
        drawn = draw(st.lists(values, min_size=size, max_size=size))
        return torch.tensor(drawn, dtype=torch.float32).view(shape)

    def truths(*shape: int) -> torch.Tensor:
        return tensor(*shape, values=st.sampled_from([0.0, 1.0])) > 0

    def step() -> Step | Affine:
        site = draw(st.sampled_from(SITES))
        width = draw(st.integers(1, 5)) if site == "attn_z" else d_model
        segments = even_segments(n_layers, draw(st.integers(1, n_layers)))
        shared: dict[str, Any] = {
            "segments": segments,
            "coeffs": tuple(draw(finite) for _ in segments),
            "positions": draw(st.sampled_from(POSITIONS) | st.integers(0, 9)),
            "steer_special": draw(st.booleans()),
        }
        if draw(st.booleans()):
            kind = draw(st.sampled_from(["sigmoid", "relu"]))
            gate = Gate(tensor(n_layers, width), tensor(n_layers), truths(n_layers), kind)
            shared["gate"] = gate
        if draw(st.booleans()) and site == "resid_post":
            units = truths(n_layers, width) if draw(st.booleans()) else None
            reference, base = tensor(n_layers, width), tensor(n_layers, width)
            return Step(Deltas(reference, base, layout, model), units=units, **shared)
        bounds = st.floats(width=32, allow_nan=False)
        return Affine(
            site,
            tensor(n_layers, width),
            tensor(n_layers, width),
            model=model,
            layout=layout,
            low=tensor(n_layers, width, values=bounds) if draw(st.booleans()) else None,
            high=tensor(n_layers, width, values=bounds) if draw(st.booleans()) else None,
            **shared,
        )

    return Plan(tuple(step() for _ in range(draw(st.integers(1, 3)))))


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_plan_survives_its_file(tmp_path: Path, data: st.DataObject) -> None:
    # drawn here: jaxtyping's checks use `random`, which a strategy must not
    plan = plan_of(data.draw)
    path = tmp_path / "plan.safetensors"
    save_plan(plan, path)
    loaded = load_plan(path)
    assert len(loaded.steps) == len(plan.steps)
    assert all(map(same_tensors, loaded.steps, plan.steps))


def test_a_loaded_plan_gives_equal_logits(tiny, tmp_path: Path) -> None:
    plan = strong_plan(tiny)
    save_plan(plan, tmp_path / "plan.safetensors")
    loaded = load_plan(tmp_path / "plan.safetensors")
    prompt = prompts_of(tiny)[0]
    tokens = torch.tensor([prompt.tokens])
    one, other = (tiny.run_with_hooks(tokens, fwd_hooks=fwd_hooks(p)) for p in (plan, loaded))
    assert torch.equal(one, other)
    assert (one - tiny(tokens)).abs().max() > 0.1


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_found(plan: Plan, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "plan.safetensors"
    save_plan(plan, path)
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with pytest.raises(PlanError, match=r"plan\.safetensors must "):
        load_plan(path)


@settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_truncated_file_is_found(plan: Plan, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "plan.safetensors"
    save_plan(plan, path)
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(PlanError, match="must be a readable plan file"):
        load_plan(path)


def test_a_safetensors_file_that_is_no_plan_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(PlanError, match=r"it has no plan in its metadata; was it written by save"):
        load_plan(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(PlanError, match="must be a readable plan file, but: "):
            load_plan(path)


def test_a_plan_with_a_valid_checksum_but_wrong_content_is_refused(
    plan: Plan, tmp_path: Path
) -> None:
    path = tmp_path / "plan.safetensors"
    save_plan(plan, path)
    with safe_open(path, framework="pt") as file:
        content = file.metadata()["plan"]
        # the file is written over, and may be what they lie in
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    for old, new, message in (
        (
            '"schema_version": 2',
            '"schema_version": 9',
            "schema_version must be 1 or 2, but got 9",
        ),
        ('"n_layers": 4', '"n_layers": 3', r"must have the shape \(3, 32\)"),
        ('"mean": "question"', '"mean": "median"', "mean must be one of question, sequence"),
        (
            '"kind": "deltas"',
            '"kind": "turn"',
            "a step's kind must be one of deltas, affine, but got",
        ),
        ('"kind": "deltas"', '"kind": "affine"', "as save_plan writes it, but: KeyError 'site'"),
        ('"kind": "deltas"', '"gate": "relu", "kind": "deltas"', "but: KeyError 'gate.theta'"),
        (
            '"positions": "completion"',
            '"positions": true',
            "positions must be str or int, but got True",
        ),
        ('"positions": "completion"', '"positions": -1', "positions must be one of .* got -1"),
        ('"positions": "completion"', '"positions": "3"', "positions must be one of .* got '3'"),
        ('"segments"', '"parts"', "save_plan writes it, but: ValueError segments must be there"),
    ):
        changed = content.replace(old, new)
        assert changed != content
        digest = hashlib.sha256(changed.encode()).hexdigest()
        save_file(tensors, path, metadata={"plan": changed, "sha256": digest})
        with pytest.raises(PlanError, match=message):
            load_plan(path)


def test_a_place_that_cannot_be_written_is_one_error(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"must be writable, but got: .*; choose another place"):
        save_plan(plan, tmp_path / "file" / "plan.safetensors")


def altered(
    path: Path, change: Callable[[dict[str, Any]], object], **tensors: torch.Tensor
) -> None:
    """Change what a plan's file tells, with right checksums, and tensors of it."""
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["plan"])
        own = {name: file.get_tensor(name) for name in file.keys()} | tensors  # noqa: SIM118
    change(content)
    content["tensors_sha256"] = tensors_digest(own)
    text = json.dumps(content)
    digest = hashlib.sha256(text.encode()).hexdigest()
    save_file(own, path, metadata={"plan": text, "sha256": digest})


def first_step(content: dict[str, Any]) -> dict[str, Any]:
    step: dict[str, Any] = content["steps"][0]
    return step


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["model"].update(n_layers="4"),
            "n_layers must be a valid integer, but got '4'",
        ),
        (
            lambda c: c["model"].update(d_model=32.0),
            "d_model must be a valid integer, but got 32.0",
        ),
        (
            lambda c: c["model"].update(n_layers=10**12),
            r"must have the shape \(1000000000000, 32\)",
        ),
        (
            lambda c: first_step(c).update(coeffs=[10**400, 0, 0]),
            r"coeffs\[0\] must be a finite number, but got 1",
        ),
        (
            lambda c: first_step(c).update(coeffs="abc"),
            "coeffs must be a valid array, but got 'abc'",
        ),
        (
            lambda c: first_step(c).update(steer_special=1),
            "steer_special must be a valid boolean, but got 1",
        ),
        (
            lambda c: first_step(c)["segments"][0].update(start=0.0),
            r"segments\[0\]\.start must be a valid integer, but got 0.0",
        ),
        (
            lambda c: first_step(c)["layout"].update(special=[[0]]),
            r"layout\.special\[0\] must be a valid integer, but got list",
        ),
        (
            lambda c: first_step(c)["layout"].update(length=10**12),
            r"a prompt's length and positions must lie in \[0, 16777216\), but got Layout",
        ),
        (lambda c: first_step(c)["layout"].update(special=[-1]), r"must lie in \[0, 16777216\)"),
        (lambda c: c.update(steps=[None]), "it must be an object, but got None"),
    ],
)
def test_what_a_plan_says_of_itself_is_checked_before_it_is_used(
    plan: Plan, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = tmp_path / "plan.safetensors"
    save_plan(plan, path)
    altered(path, change)
    with pytest.raises(PlanError, match=message):
        load_plan(path)


def test_brackets_without_end_in_a_plan_are_refused(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    save_plan(plan, path)
    for text in ("[" * 100_000, '{"a":' * 60 + "1" + "}" * 60):
        digest = hashlib.sha256(text.encode()).hexdigest()
        save_file({"w": torch.ones(1)}, path, metadata={"plan": text, "sha256": digest})
        with pytest.raises(PlanError, match=r"ValueError (maximum recursion|brackets must be nes)"):
            load_plan(path)


def test_an_affine_step_without_axes_or_with_absurd_layers_is_refused_at_once(
    tiny, tmp_path: Path
) -> None:
    """Segments over 10**12 layers would be gone through one by one."""
    path = tmp_path / "plan.safetensors"
    model = ModelIdentity("m", "TransformerBridge", "unprocessed", 2, 3, "float32", "w", "e")
    grid = torch.arange(6.0).view(2, 3)
    whole = even_segments(2, 1)
    affine = Affine("attn_z", grid, grid, whole, (1.0,), model=model, layout=Layout(3, ()))
    save_plan(Plan((affine,)), path)

    def widen(content: dict[str, Any]) -> None:
        content["model"]["n_layers"] = first_step(content)["segments"][0]["stop"] = 10**12

    altered(path, widen)
    with pytest.raises(PlanError, match=r"shift must have the shape \(1000000000000, 3\)"):
        load_plan(path)
    save_plan(Plan((affine,)), path)
    points = {f"steps.0.{name}": torch.tensor(1.0) for name in ("shift", "scale")}
    altered(path, lambda content: None, **points)
    # the tests check the axes of every tensor; elsewhere the step does
    with pytest.raises(PlanError, match=r"must have the shape \(2,\), but got \(\)|Type-check"):
        load_plan(path)


def test_a_tensor_without_numbers_is_refused(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    save_plan(plan, path)
    altered(path, lambda content: None, **{"steps.0.units": torch.zeros(10**9, 0)})
    with pytest.raises(PlanError, match=r"must hold numbers, but its shape is \(1000000000, 0\)"):
        load_plan(path)

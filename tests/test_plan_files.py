from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import deltas_of, prompts_of, strong_plan
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from fusion_lens.errors import OutputError, PlanError
from fusion_lens.hooks import fwd_hooks
from fusion_lens.plan_files import load_plan, save_plan
from fusion_lens.plans import Plan, make_plan, per_layer


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
    import hashlib

    path = tmp_path / "plan.safetensors"
    save_plan(plan, path)
    with safe_open(path, framework="pt") as file:
        content = file.metadata()["plan"]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for old, new, message in (
        (
            '"schema_version": 2',
            '"schema_version": 9',
            "schema_version must be 1 or 2, but got 9",
        ),
        ('"n_layers": 4', '"n_layers": 3', r"must have the shape \(3, 32\)"),
        ('"mean": "question"', '"mean": "median"', "mean must be one of question, sequence"),
        ('"segments"', '"parts"', "must hold a plan as save_plan writes it, but: KeyError"),
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

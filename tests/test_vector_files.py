from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import deltas_of, strong_plan
from documents import ROOT, blocks_of
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from fusion_lens.atlas import CHECKPOINT
from fusion_lens.errors import InputFileError, OutputError
from fusion_lens.hooks import steering
from fusion_lens.models import HookedModel
from fusion_lens.plans import Plan, make_plan
from fusion_lens.prompts import question_prompt
from fusion_lens.vector_files import load_vectors, save_vectors
from fusion_lens.vectors import Vectors, to_vectors

VECTORS = Vectors(
    {3: torch.tensor([1.5, -0.0, 1e-40]), 0: torch.tensor([0.1, 2.0, -3e38])},
    {"model": "m", "approximated": "nothing"},
)


def same(one: Vectors, other: Vectors) -> bool:
    """Whether two hold the same layers, bit for bit."""
    return one.by_layer.keys() == other.by_layer.keys() and all(
        torch.equal(one.by_layer[k].view(torch.int32), other.by_layer[k].view(torch.int32))
        for k in one.by_layer
    )


def test_loaded_vectors_are_the_saved_ones_bit_for_bit(tmp_path: Path) -> None:
    save_vectors(VECTORS, tmp_path / "v.safetensors")
    loaded = load_vectors(tmp_path / "v.safetensors")
    assert same(loaded, VECTORS)
    assert loaded.told == VECTORS.told
    assert [path.name for path in tmp_path.iterdir()] == ["v.safetensors"]


def test_what_another_file_told_does_not_pass_for_the_own_checksum(tmp_path: Path) -> None:
    told = {"format": "9", "tensors_sha256": "0" * 64, "model": "m"}
    save_vectors(Vectors(VECTORS.by_layer, told), tmp_path / "v.safetensors")
    assert load_vectors(tmp_path / "v.safetensors").told == {"model": "m"}


def test_equal_vectors_are_equal_files(tmp_path: Path) -> None:
    turned = Vectors(dict(reversed(VECTORS.by_layer.items())), VECTORS.told)
    written = set()
    for n, vectors in enumerate([VECTORS, turned] * 4):
        save_vectors(vectors, tmp_path / str(n))
        written.add((tmp_path / str(n)).read_bytes())
    assert len(written) == 1


def test_the_file_is_what_the_documentation_says(tiny: HookedModel, tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    save_vectors(to_vectors(strong_plan(tiny), approximate=True), path)
    with safe_open(path, framework="pt") as file:
        told = file.metadata()
        for layer in range(4):
            vector = file.get_tensor(f"layer.{layer}")
            assert (vector.dtype, tuple(vector.shape)) == (torch.float32, (32,))
    page = (ROOT / "docs" / "how-to" / "exports.md").read_text("utf-8")
    assert all(f"`{key}`" in page for key in told)
    assert told["fusion_lens.format"] == "1"
    assert told["fusion_lens.approximated"] == "step 1 steers special tokens too"


def test_a_file_of_somebody_else_needs_only_its_tensors(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    save_file({"layer.2": torch.tensor([0.5, 2.0], dtype=torch.bfloat16)}, path, {"by": "me"})
    loaded = load_vectors(path)
    assert torch.equal(loaded.by_layer[2], torch.tensor([0.5, 2.0]))
    assert (list(loaded.by_layer), loaded.told) == ([2], {})


one = torch.ones(2)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({}, {"by": "me"}, "it must hold a vector, but holds no tensor"),
        ({"layer.1": one, "w": torch.ones(2)}, {}, "tensors must be named as layer.3, but got 'w'"),
        ({"layer.01": one}, {}, "tensors must be named as layer.3, but got 'layer.01'"),
        ({"layer.1": torch.ones(2, 2)}, {}, r"layer.1 must be one vector, but got \(2, 2\)"),
        ({"layer.1": torch.tensor(1.0)}, {}, r"layer.1 must be one vector, but got \(\)"),
        (
            {"layer.1": one, "layer.2": torch.ones(3)},
            {},
            r"layer.2 must have the shape \(2,\), but got \(3,\)",
        ),
        ({"layer.1": torch.ones(2, dtype=torch.int32)}, {}, "layer.1 must be floating, but got"),
        ({"layer.1": one / 0}, {}, "layer.1 must be finite, but it holds NaN or infinity"),
        ({"layer.1": one.double() * 1e300}, {}, "layer.1 must be finite, but it holds NaN or in"),
        ({"layer.1": torch.ones(0)}, {}, "layer.1 must hold numbers, but its shape is"),
        ({"layer.1": one}, {"fusion_lens.format": "2"}, "its format must be 1, but got '2'"),
        (
            {"layer.1": one},
            {"fusion_lens.tensors_sha256": "0" * 64},
            "its tensors do not match their checksum; the file is damaged",
        ),
    ],
)
def test_a_file_of_something_else_is_refused(
    tensors: dict[str, Any], metadata: dict[str, str], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "v.safetensors"
    save_file(tensors, path, metadata)
    with pytest.raises(InputFileError, match=rf"v\.safetensors: {message}"):
        load_vectors(path)


def test_a_flipped_bit_of_a_number_is_found(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    save_vectors(VECTORS, path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputFileError, match="do not match their checksum"):
        load_vectors(path)


def test_an_absurd_header_or_a_cut_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    header = {"layer.1": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(InputFileError, match="it must be a whole safetensors file, but: "):
        load_vectors(path)
    save_vectors(VECTORS, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputFileError, match="it must be a whole safetensors file, but: "):
        load_vectors(path)
    with pytest.raises(InputFileError, match=r"it must be a whole safetensors .* No such"):
        load_vectors(tmp_path / "none")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"must be writable, but got: Not a directory"):
        save_vectors(VECTORS, tmp_path / "file" / "v.safetensors")


@pytest.fixture
def add_vectors() -> Callable[..., list[Any]]:
    """The loader of the documentation."""
    page = (ROOT / "docs" / "how-to" / "exports.md").read_text("utf-8")
    (code,) = [block.code for block in blocks_of(page) if "def add_vectors" in block.code]
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    names: dict[str, Any] = {}
    exec(code, names)
    return names["add_vectors"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["tiny", "atlas"])
def test_the_loader_of_the_documentation_gives_the_logits_of_the_plan(
    name: str,
    request: pytest.FixtureRequest,
    tiny_folder: Path,
    tmp_path: Path,
    add_vectors: Callable[..., list[Any]],
) -> None:
    model: Any = request.getfixturevalue(name)
    plan = plan_of(model)
    save_vectors(to_vectors(plan), tmp_path / "v.safetensors")
    plain = AutoModelForCausalLM.from_pretrained(
        tiny_folder if name == "tiny" else CHECKPOINT, dtype=torch.float32
    )
    tokens = question_prompt(model, "Who wrote the red book?").to_tensor()
    with torch.no_grad(), steering(model, plan):
        ours = model(tokens)
    with torch.no_grad():
        before = plain(tokens).logits
        hooks = add_vectors(plain.model.layers, tmp_path / "v.safetensors")
        after = plain(tokens).logits
        for hook in hooks:
            hook.remove()
        again = plain(tokens).logits
    assert len(hooks) == model.cfg.n_layers
    assert (after - ours).abs().max() < 1e-4
    assert (before - ours).abs().max() > 0.1
    assert torch.equal(again, before)


def plan_of(model: HookedModel) -> Plan:
    """Of two steps, for every token."""
    deltas = deltas_of(model)
    first = make_plan(deltas, (1.0, -0.5, 0.8), steer_special=True)
    return first + make_plan(deltas, 0.3, steer_special=True)

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import strong_plan
from test_gguf_headers import head, tensor, text, value
from test_vector_files import same

from fusion_lens.errors import InputFileError, MissingExtraError, OutputError, PlanError
from fusion_lens.gguf_files import is_gguf, load_gguf, save_gguf
from fusion_lens.gguf_headers import LARGEST
from fusion_lens.identity import identify
from fusion_lens.models import HookedModel
from fusion_lens.plans import Step
from fusion_lens.vector_files import save_vectors
from fusion_lens.vectors import Vectors, from_vectors, to_vectors

VECTORS = Vectors(
    {3: torch.tensor([1.5, -0.0, 1e-40]), 1: torch.tensor([0.1, 2.0, -3e38])},
    {"model": "m", "approximated": "nothing"},
)


def test_the_gguf_package_reads_an_exported_plan_bit_for_bit(
    tiny: HookedModel, tmp_path: Path
) -> None:
    plan = strong_plan(tiny, steer_special=True)
    vectors = to_vectors(plan, first_layer=1, approximate=True)
    save_gguf(vectors, tmp_path / "v.gguf", architecture="llama")
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    told = {name: field.contents() for name, field in reader.fields.items()}
    assert told["general.architecture"] == "controlvector"
    assert told["controlvector.model_hint"] == "llama"
    assert told["controlvector.layer_count"] == 3
    assert told["fusion_lens.model"] == plan.model.name
    assert told["fusion_lens.weights_sha256"] == plan.model.weights
    assert told["fusion_lens.approximated"] == "layer 0 is left out"
    assert [each.name for each in reader.tensors] == ["direction.1", "direction.2", "direction.3"]
    (step,) = plan.steps
    assert isinstance(step, Step)
    for layer, each in enumerate(reader.tensors, start=1):
        assert each.tensor_type == gguf.GGMLQuantizationType.F32
        assert each.data.dtype == np.float32
        assert each.data.shape == (32,)
        assert each.data.tobytes() == step.shift[layer].numpy().tobytes()


def test_loaded_vectors_are_the_saved_ones_bit_for_bit(tmp_path: Path) -> None:
    save_gguf(VECTORS, tmp_path / "v.gguf", architecture="gemma2")
    loaded = load_gguf(tmp_path / "v.gguf")
    assert same(loaded, VECTORS)
    assert loaded.told == {**VECTORS.told, "architecture": "gemma2"}
    assert [path.name for path in tmp_path.iterdir()] == ["v.gguf"]


def test_equal_vectors_are_equal_files(tmp_path: Path) -> None:
    turned = Vectors(dict(reversed(VECTORS.by_layer.items())), dict(reversed(VECTORS.told.items())))
    for name, vectors in (("one", VECTORS), ("other", turned)):
        save_gguf(vectors, tmp_path / name, architecture="llama")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_an_imported_vector_is_the_exported_one(tiny: HookedModel, tmp_path: Path) -> None:
    plan = strong_plan(tiny, steer_special=True)
    exported = to_vectors(plan, first_layer=1, approximate=True)
    save_gguf(exported, tmp_path / "v.gguf", architecture="llama")
    imported = from_vectors(load_gguf(tmp_path / "v.gguf"), identify(tiny))
    (mine,), (theirs,) = plan.steps, imported.steps
    assert isinstance(mine, Step)
    assert isinstance(theirs, Step)
    assert torch.equal(theirs.shift[1:], mine.shift[1:])
    assert not theirs.shift[0].any()


def test_a_vector_as_repeng_writes_it_is_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "mistral")
    writer.add_uint32("controlvector.layer_count", 2)
    directions = {31: np.array([0.5, -1.0], np.float32), 7: np.array([2.0, 3.0], np.float32)}
    for layer, direction in directions.items():
        writer.add_tensor(f"direction.{layer}", direction)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = load_gguf(tmp_path / "v.gguf")
    assert {k: v.tolist() for k, v in loaded.by_layer.items()} == {31: [0.5, -1.0], 7: [2.0, 3.0]}
    assert loaded.told == {"architecture": "mistral"}


def test_layer_0_is_refused_by_the_writer(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="must begin at layer 1, but got one of layer 0; leave it"):
        save_gguf(Vectors({0: torch.ones(2)}, {}), tmp_path / "v.gguf", architecture="llama")
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_the_extra_is_named_and_files_are_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_gguf(VECTORS, tmp_path / "v.gguf", architecture="llama")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"gguf is needed .* 'fusion-lens\[gguf\]'"):
        save_gguf(VECTORS, tmp_path / "w.gguf", architecture="llama")
    assert same(load_gguf(tmp_path / "v.gguf"), VECTORS)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"must be writable, but got: Not a directory"):
        save_gguf(VECTORS, tmp_path / "file" / "v.gguf", architecture="llama")


KIND = value("general.architecture", 8, text("controlvector"))


def directions(*tensors: bytes, data: bytes = bytes(64), kind: bytes = KIND) -> bytes:
    content = head([kind], list(tensors))
    return content + bytes(-len(content) % 32) + data


DAMAGED: dict[str, tuple[bytes, str]] = {
    "a model": (
        directions(kind=value("general.architecture", 8, text("llama"))),
        "general.architecture must be 'controlvector', but got 'llama'",
    ),
    "no architecture": (directions(kind=value("a", 8, text("b"))), "but got None"),
    "another name": (
        directions(tensor("direction.1", 2), tensor("token_embd.weight", 2)),
        "must be named as direction.3, from 1 on, but got 'token_embd.weight'",
    ),
    "layer 0": (directions(tensor("direction.0", 2)), "from 1 on, but got 'direction.0'"),
    "a layer below 0": (directions(tensor("direction.-1", 2)), "but got 'direction.-1'"),
    "two names of one layer": (
        directions(tensor("direction.1", 2), tensor("direction.01", 2)),
        "but got 'direction.01'",
    ),
    "a layer twice": (
        directions(tensor("direction.1", 2), tensor("direction.1", 2)),
        "names must be unique, but 'direction.1' stands there twice",
    ),
    "F16": (directions(tensor("direction.1", 2, kind=1)), "direction.1 must be F32, but is of ggm"),
    "quantised": (directions(tensor("direction.1", 32, kind=8)), "must be F32, but is of ggml's 8"),
    "a matrix": (
        directions(tensor("direction.1", 2, 2)),
        "every direction must be one vector of one width, but got (2, 2)",
    ),
    "two widths": (
        directions(tensor("direction.1", 2), tensor("direction.2", 3)),
        "every direction must be one vector of one width, but got (3,)",
    ),
    "no directions": (directions(), "its 0 directions must lie within its 160 bytes, but do not"),
    "no numbers": (
        directions(tensor("direction.1", 0)),
        "its 1 directions must lie within its 192",
    ),
    "too wide": (
        directions(tensor("direction.1", 17)),
        "must lie within its 192 bytes, but do not",
    ),
    "absurdly wide": (
        directions(tensor("direction.1", 2**64 - 1)),
        "must lie within its 192 bytes",
    ),
    "beyond the end": (
        directions(tensor("direction.1", 2, offset=2**63)),
        "must lie within its 192 bytes, but do not",
    ),
    "much from few bytes": (
        directions(*(tensor(f"direction.{k}", 16) for k in range(1, 40))),
        "its 39 directions must lie within its 1856 bytes, but do not",
    ),
    "NaN": (
        directions(tensor("direction.1", 2), data=struct.pack("<2f", 1.0, float("nan"))),
        "direction.1 must be finite, but it holds NaN or infinity",
    ),
    "a header that goes on": (
        head([KIND, value("a", 8, text("b" * LARGEST))], []),
        f"its header must end within {LARGEST} bytes",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_or_another_is_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    content, message = DAMAGED[kind]
    path = tmp_path / "v.gguf"
    path.write_bytes(content)
    assert is_gguf(path)
    with pytest.raises(InputFileError) as refused:
        load_gguf(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert message in str(refused.value)


def test_a_file_that_ends_early_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    save_gguf(VECTORS, path, architecture="llama")
    content = path.read_bytes()
    # the last direction's twelve bytes are padded to 32
    for size in range(0, len(content) - 20, 3):
        path.write_bytes(content[:size])
        with pytest.raises(InputFileError, match=r"must (end|lie) within"):
            load_gguf(path)


def test_a_file_is_known_by_how_it_begins(tmp_path: Path) -> None:
    save_gguf(VECTORS, tmp_path / "one", architecture="llama")
    save_vectors(VECTORS, tmp_path / "two.gguf")
    assert is_gguf(tmp_path / "one")
    assert not is_gguf(tmp_path / "two.gguf")
    for read in (is_gguf, load_gguf):
        reader: Any = read
        with pytest.raises(InputFileError, match="it must be readable, but: No such file"):
            reader(tmp_path / "none")
        with pytest.raises(InputFileError, match="it must be readable, but: Is a directory"):
            reader(tmp_path)

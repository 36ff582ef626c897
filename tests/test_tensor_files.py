from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fusion_lens.errors import InputFileError
from fusion_lens.tensor_files import (
    Header,
    read_config,
    read_tensors,
    tensor_bytes,
    tensors_digest,
)


def read(path: Path, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return read_tensors(path, lambda header: shapes, device="cpu")[1]


def test_floating_tensors_come_in_float32_and_others_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"w": torch.tensor([0.1], dtype=torch.bfloat16), "k": torch.tensor(3)}, path)
    tensors = read(path, w=(1,), k=())
    assert tensors["w"].dtype == torch.float32
    assert torch.equal(tensors["w"], torch.tensor([0.1], dtype=torch.bfloat16).float())
    assert (tensors["k"].dtype, int(tensors["k"])) == (torch.int64, 3)


def test_the_header_is_there_before_a_tensor_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"w": torch.zeros(2, 3)}, path, metadata={"said": "this"})
    seen = []

    def expect(header: Header) -> dict[str, tuple[int, ...]]:
        seen.append(header)
        return dict(header.shapes)

    header, _ = read_tensors(path, expect, device="cpu")
    assert seen == [header] == [Header({"w": (2, 3)}, {"said": "this"})]


def with_header(path: Path, header: object, length: int | None = None) -> Path:
    content = json.dumps(header).encode()
    size = len(content) if length is None else length
    path.write_bytes(struct.pack("<Q", size) + content + bytes(8))
    return path


@pytest.mark.parametrize(
    ("header", "length"),
    [
        ({"w": {"dtype": "F32", "shape": [10**9, 10**6], "data_offsets": [0, 8]}}, None),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4 * 10**15]}}, None),
        ({"w": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]}}, None),
        ({}, 2**62),
        ({"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, None),
    ],
)
def test_an_absurd_header_is_refused_before_anything_is_allocated(
    header: object, length: int | None, tmp_path: Path
) -> None:
    path = with_header(tmp_path / "t.safetensors", header, length)
    with pytest.raises(InputFileError, match="it must be a whole safetensors file, but: "):
        read(path, w=(2,))


def test_a_file_of_another_kind_or_with_other_tensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(b"PK\x03\x04 a zipped pickle")
    with pytest.raises(InputFileError, match="it must be a whole safetensors file, but: "):
        read(path, w=(2,))
    save_file({"w": torch.zeros(2), "v": torch.zeros(1)}, path)
    with pytest.raises(InputFileError, match="tensors u, w, but misses u and has v beside"):
        read(path, w=(2,), u=(1,))
    with pytest.raises(InputFileError, match=r"w must have the shape \(3,\), but got \(2,\)"):
        read(path, w=(3,), v=(1,))


def test_a_config_must_be_a_json_object(tmp_path: Path) -> None:
    path = tmp_path / "cfg.json"
    with pytest.raises(InputFileError, match="it must be readable, but: No such file"):
        read_config(path)
    for content, message in (
        ("{'k': 1}", "it must be JSON, but: "),
        ("[" * 100_000, "it must be JSON, but: "),
        ("[1]", "it must be a JSON object, but got list"),
    ):
        path.write_text(content, "utf-8")
        with pytest.raises(InputFileError, match=message):
            read_config(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputFileError, match="it must be JSON, but: "):
        read_config(path)
    path.write_text('{"k": 1}', "utf-8")
    assert read_config(path) == {"k": 1}


def test_a_digest_depends_on_names_shapes_dtypes_and_values_and_not_on_order() -> None:
    one, two = torch.zeros(2, 3), torch.ones(2)
    digest = tensors_digest({"a": one, "b": two})
    assert tensors_digest({"b": two, "a": one.clone()}) == digest
    for other in (
        {"a": one, "c": two},
        {"a": one.reshape(3, 2), "b": two},
        {"a": one.double(), "b": two},
        {"a": one, "b": two + 1e-7},
    ):
        assert tensors_digest(other) != digest


def test_the_same_content_is_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 2, dtype=torch.bool)}
    metadata = {name: name * 3 for name in "hgfedcbaü"}
    first = tensor_bytes(tensors, metadata)
    # safetensors draws an order of the metadata every time
    assert all(tensor_bytes(dict(reversed(tensors.items())), metadata) == first for _ in range(20))
    (tmp_path / "x").write_bytes(first)
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert file.metadata() == metadata
        assert torch.equal(file.get_tensor("b"), tensors["b"])
        assert torch.equal(file.get_tensor("a"), tensors["a"])


@pytest.mark.parametrize("shape", [[0], [2**40, 0], [2**64 - 1, 0], [0, 3]])
def test_a_tensor_without_numbers_is_refused_whatever_its_other_sizes(
    shape: list[int], tmp_path: Path
) -> None:
    header = {"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
    content = json.dumps(header).encode()
    path = tmp_path / "t.safetensors"
    path.write_bytes(struct.pack("<Q", len(content)) + content)
    with pytest.raises(InputFileError, match=r"w must hold numbers, but its shape is \("):
        read(path, w=tuple(shape))


def test_a_config_may_hold_what_is_not_finite_but_no_half_of_a_letter(tmp_path: Path) -> None:
    path = tmp_path / "cfg.json"
    path.write_text('{"loss": NaN, "k": 1}', "utf-8")
    assert read_config(path)["k"] == 1
    path.write_text(r'{"name": "\ud800"}', "utf-8")
    with pytest.raises(InputFileError, match=r"it must be JSON, but: .* surrogates not allowed"):
        read_config(path)

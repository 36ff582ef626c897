from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crosscoders import FILE, LAYERS, D, F, L, Layout, inputs, layout, made, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fusion_lens.crosscoder_files import load_crosscoder, save_crosscoder
from fusion_lens.crosscoders import make_normaliser
from fusion_lens.errors import ConfigError, DictionaryError, InputFileError, OutputError
from fusion_lens.tensor_files import in_float32, tensors_digest


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"threshold": None, "k": None, "code_normalisation": "SAE"},
        {"normaliser": None, "code_normalisation": "NONE"},
        {"normaliser": make_normaliser(torch.ones(L, D), torch.ones(L, D), kind="per unit")},
    ],
)
def test_a_saved_crosscoder_is_given_back_bit_for_bit(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    crosscoder = made(**changes)
    save_crosscoder(crosscoder, tmp_path / "cc")
    for source in (tmp_path / "cc", tmp_path / "cc" / FILE):
        loaded = load_crosscoder(source)
        assert loaded.card == crosscoder.card
        assert (loaded.threshold, loaded.k) == (crosscoder.threshold, crosscoder.k)
        assert loaded.code_normalisation == crosscoder.code_normalisation
        for name in ("encoder_weight", "encoder_bias", "decoder_weight", "decoder_bias", "decoder"):
            assert torch.equal(getattr(loaded, name), getattr(crosscoder, name))
        one, other = loaded.encode(inputs(0)), crosscoder.encode(inputs(0))
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.offset, other.offset)
    names = sorted(path.name for path in (tmp_path / "cc").iterdir())
    assert names == ["config.json", FILE]


def test_what_is_saved_is_the_open_layout(tmp_path: Path) -> None:
    save_crosscoder(made(), tmp_path / "cc")
    saved, expected = load_file(tmp_path / "cc" / FILE), layout()
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        assert saved[name].dtype == tensor.dtype
        torch.testing.assert_close(saved[name], tensor)
    assert json.loads((tmp_path / "cc" / "config.json").read_text("utf-8")) == {
        "dict_class": "BatchTopKCrossCoder",
        "activation_dim": D,
        "dict_size": F,
        "num_layers": L,
        "code_normalization": "CROSSCODER",
        "k": 4,
    }


def test_weights_of_another_precision_are_saved_and_read_in_float32(tmp_path: Path) -> None:
    wide = {
        name: layout()[key].double()
        for name, key in (("encoder_bias", "encoder.bias"), ("decoder_bias", "decoder.bias"))
    }
    save_crosscoder(made(**wide), tmp_path / "wide")
    assert load_crosscoder(tmp_path / "wide").encoder_bias.dtype == torch.float32
    halved = {
        name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in layout().items()
    }
    loaded = load_crosscoder(write(tmp_path / "half", halved), layers=LAYERS)
    assert loaded.normaliser is not None
    assert loaded.normaliser.kind == "relative"
    assert loaded.decoder.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matrices_of_half_precision_are_given_back_as_they_were_rounded(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    crosscoder = made()
    save_crosscoder(crosscoder, tmp_path / "cc", dtype=dtype)
    saved = load_file(tmp_path / "cc" / FILE)
    assert {name for name, tensor in saved.items() if tensor.dtype == dtype} == {
        "encoder.weight",
        "decoder.weight",
    }
    loaded = load_crosscoder(tmp_path / "cc")
    assert loaded.card == crosscoder.card
    for name in ("encoder_weight", "decoder_weight"):
        weight = getattr(crosscoder, name)
        assert torch.equal(getattr(loaded, name), weight.to(dtype).float())
        assert not torch.equal(getattr(loaded, name), weight)
    for name in ("encoder_bias", "decoder_bias"):
        assert torch.equal(getattr(loaded, name), getattr(crosscoder, name))
    save_crosscoder(loaded, tmp_path / "again", dtype=dtype)
    again = load_file(tmp_path / "again" / FILE)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in again.items())


def test_a_precision_that_cannot_hold_the_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"torch.bfloat16, but got torch\.int8"):
        save_crosscoder(made(), tmp_path / "cc", dtype=torch.int8)
    large = made(encoder_weight=torch.full((L, D, F), 7e4))
    message = r"encoder\.weight must be finite in torch\.float16, but .* is 70000; choose a"
    with pytest.raises(DictionaryError, match=message):
        save_crosscoder(large, tmp_path / "cc", dtype=torch.float16)
    assert not (tmp_path / "cc").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"code_normalization_id": torch.tensor(3)}, "SAE, NONE, but got MIXED, which is not impl"),
        ({"code_normalization_id": torch.tensor(5)}, "but got DECOUPLED, which is not implement"),
        ({"code_normalization_id": torch.tensor(9)}, r"but got 9\.0, which is not implemented"),
        ({"threshold": torch.tensor(-1.0)}, "-1 stands in a file whose training never set it"),
        ({"k": torch.tensor(0)}, "k must be 1 to d_sae = 24, but got 0"),
        (
            {"activation_global_scale": torch.full((L,), 0.3)},
            "activation_global_scale must be targ",
        ),
        ({"activation_std": torch.full((L, D), float("nan"))}, "activation_std must be finite"),
        ({"activation_mean": torch.full((L, D), float("nan"))}, "activation_mean must be finite"),
        ({"activation_std": -torch.ones(L, D)}, r"activation_std must be at least 0 .* of -1\.0"),
        ({"target_rms": torch.tensor(0.0)}, r"target_rms above 0, but got .* and 0\.0"),
    ],
)
def test_fields_that_do_not_fit_what_is_implemented_are_refused(
    changes: Layout, message: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "cc", {**layout(), **changes})
    with pytest.raises(DictionaryError, match=message):
        load_crosscoder(folder, layers=LAYERS)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_layers": 2}, "num_layers must be 3, but config.json says 2"),
        ({"dict_size": 25}, "dict_size must be 24, but config.json says 25"),
        ({"encoder_layers": [0, 1]}, r"encoder_layers must be \[0, 1, 2\], but config"),
        ({"num_decoder_layers": 4}, "num_decoder_layers must be 3"),
        ({"latent_processor": "square"}, "latent_processor must be None"),
        ({"dict_class": "CrossCoder"}, "dict_class must be BatchTopKCrossCoder"),
        ({"code_normalization": "SAE"}, "must be CROSSCODER as in the tensors"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "cc", layout(), config)
    with pytest.raises(DictionaryError, match=message):
        load_crosscoder(folder, layers=LAYERS)


def test_a_relu_crosscoder_needs_no_code_normalisation_except_a_decoupled_one(
    tmp_path: Path,
) -> None:
    mixed = load_crosscoder(write(tmp_path / "m", layout("MIXED", threshold=None)), layers=LAYERS)
    plain = load_crosscoder(write(tmp_path / "p", layout("NONE", threshold=None)), layers=LAYERS)
    assert torch.equal(mixed.encode(inputs(0)).codes, plain.encode(inputs(0)).codes)
    with pytest.raises(DictionaryError, match="but got DECOUPLED"):
        load_crosscoder(write(tmp_path / "d", layout("DECOUPLED", threshold=None)), layers=LAYERS)


def test_files_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    tensors = layout()
    folder = tmp_path / "cc"
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != "target_rms"}, "misses target_rms and has noth"),
        ({k: v for k, v in tensors.items() if k != "k"}, "misses k and has nothing beside"),
        ({**tensors, "scale": torch.ones(1)}, "misses none and has scale beside"),
        ({**tensors, "decoder.weight": torch.zeros(L, D, F)}, r"must have the shape \(3, 24, 12\)"),
        ({**tensors, "encoder.weight": torch.zeros(D, F)}, "must have the shape"),
        ({**tensors, "encoder.bias": tensors["encoder.bias"] / 0}, "encoder.bias must be finite"),
        ({"w": torch.zeros(2)}, "it must hold the tensors activation_global_scale, activation_me"),
    ):
        with pytest.raises(InputFileError, match=message):
            load_crosscoder(write(folder, changed), layers=LAYERS)
    with pytest.raises(InputFileError, match="must be a whole safetensors file, but: No such file"):
        load_crosscoder(tmp_path / "nowhere")


def test_the_layers_must_be_named_once_where_the_file_does_not_say_them(tmp_path: Path) -> None:
    foreign = write(tmp_path / "cc", layout())
    for layers in (None, (0, 1)):
        with pytest.raises(DictionaryError, match="layers must name the 3 blocks it reads"):
            load_crosscoder(foreign, layers=layers)
    # between two models: both columns are of one layer
    with pytest.raises(DictionaryError, match=r"blocks of one model .* but got \(1, 1, 2\)"):
        load_crosscoder(foreign, layers=(1, 1, 2))
    assert load_crosscoder(foreign, layers=LAYERS).card.hook_names == (
        "blocks.0.hook_resid_post",
        "blocks.2.hook_resid_post",
        "blocks.3.hook_resid_post",
    )
    save_crosscoder(made(), tmp_path / "own")
    assert load_crosscoder(tmp_path / "own", layers=LAYERS).card.layers == LAYERS
    with pytest.raises(DictionaryError, match=r"layers must be \(0, 2, 3\), but got \(0, 1, 2\)"):
        load_crosscoder(tmp_path / "own", layers=(0, 1, 2))


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_flipped_bit_or_a_cut_of_a_saved_file_is_found(
    tmp_path: Path, data: st.DataObject
) -> None:
    folder = tmp_path / "cc"
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    save_crosscoder(made(), folder, dtype=dtype)
    content = bytearray((folder / FILE).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        content = content[:at]
    (folder / FILE).write_bytes(content)
    with pytest.raises((InputFileError, DictionaryError), match=r"model\.safetensors"):
        load_crosscoder(folder)


def test_a_place_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="must be writable, but got: "):
        save_crosscoder(made(), tmp_path / "file" / "cc")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda card: card.update(d_model=12.0), "d_model must be a valid integer, but got 12.0"),
        (lambda card: card.update(hook_names="abc"), "hook_names must be a valid array"),
        (
            lambda card: card.update(layers=[0, 2, "3"]),
            r"layers\[2\] must be a valid integer, but got '3'",
        ),
        (lambda card: card.update(name={"a": [[]]}), "name must be a valid string, but got dict"),
        (lambda card: card.update(name=json.loads("[" * 60 + "]" * 60)), "nested at most 50 deep"),
    ],
)
def test_a_card_of_other_types_is_refused_also_with_a_right_checksum(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    save_crosscoder(made(), tmp_path)
    path = tmp_path / FILE
    with safe_open(path, framework="pt") as file:
        card = json.loads(file.metadata()["fusion_lens"])
    change(card)
    text, tensors = json.dumps(card), load_file(path)
    digest = hashlib.sha256(f"{text}{tensors_digest(in_float32(tensors))}".encode()).hexdigest()
    save_file(tensors, path, {"fusion_lens": text, "sha256": digest})
    with pytest.raises(DictionaryError, match=message):
        load_crosscoder(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (
            "activation_std",
            torch.ones(L, D, dtype=torch.uint32),
            "must be floating, but got torch.ui",
        ),
        (
            "activation_mean",
            torch.ones(L, D, dtype=torch.int64),
            "must be floating, but got torch.in",
        ),
        ("target_rms", torch.tensor(1), "must be floating, but got torch.int64"),
        ("threshold", torch.tensor(float("inf")), "must be finite, but it holds NaN or infinity"),
        ("k", torch.tensor(float("inf")), r"must be a whole number, but got inf"),
        ("k", torch.tensor(float("nan")), r"must be a whole number, but got nan"),
        ("k", torch.tensor(2.5), r"must be a whole number, but got 2.5"),
        ("code_normalization_id", torch.tensor(1j), "must be a whole number, but got "),
    ],
)
def test_a_number_of_another_kind_is_refused(
    name: str, tensor: torch.Tensor, message: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "cc", layout() | {name: tensor})
    with pytest.raises(InputFileError, match=f"{name} {message}"):
        load_crosscoder(folder, layers=LAYERS)

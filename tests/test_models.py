from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import prompts_of, strong_plan
from engine import family, save_family

from fusion_lens.activations import left_padded
from fusion_lens.engine_log import EngineLog
from fusion_lens.errors import ConfigError, HookNameError, ModelError
from fusion_lens.generation import GenerationConfig, Row, generate
from fusion_lens.identity import identify
from fusion_lens.models import (
    KeyValues,
    architecture_of,
    check_hook_names,
    evaluating,
    forward,
    load_model,
    resid_post,
    site_hook,
    stop_tokens,
    token_texts,
)
from fusion_lens.prompts import tokenize


def test_a_folder_opens_with_the_weights_of_hugging_face(tiny, tiny_folder) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tiny_folder)
    tokens = torch.tensor([prompts_of(tiny)[0].tokens])
    with torch.no_grad():
        assert torch.allclose(tiny(tokens), plain(tokens).logits, atol=1e-5)
    assert tiny.cfg.model_name == tiny_folder.name
    assert not tiny.training


def test_a_padded_cached_forward_equals_each_row_alone(tiny) -> None:
    rows = [prompt.tokens for prompt in prompts_of(tiny)]
    tokens, mask = left_padded(rows, 0, "cpu")
    with torch.no_grad():
        cache = KeyValues()
        forward(tiny, tokens[:, :-1], mask[:, :-1], cache=cache)
        last = forward(tiny, tokens[:, -1:], mask, cache=cache, last=1)
        for row, logits in zip(rows, last, strict=True):
            assert torch.allclose(tiny(torch.tensor([row]))[0, -1:], logits, atol=5e-5)


def test_the_last_positions_are_those_of_the_full_logits(tiny, hooked_transformer) -> None:
    tokens, mask = left_padded([prompt.tokens for prompt in prompts_of(tiny)], 0, "cpu")
    with torch.no_grad():
        for model in (tiny, hooked_transformer):
            whole = forward(model, tokens, mask)
            for n in (1, 3):
                last = forward(model, tokens, mask, last=n)
                assert last.shape == (3, n, 320)
                assert torch.allclose(whole[:, -n:], last, atol=1e-6)


def test_the_architecture_of_a_checkpoint_is_in_its_config(
    gpt2_folder, gemma_folder, tmp_path
) -> None:
    named = [architecture_of(folder) for folder in (None, gpt2_folder, gemma_folder)]
    assert named == ["llama", "gpt2", "gemma2"]
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="must be a usable checkpoint folder or hub name, but: "):
        architecture_of(tmp_path)
    with pytest.raises(ModelError, match="must be an existing checkpoint folder, but there is non"):
        architecture_of("./none")


def test_hook_names_are_checked_with_a_suggestion(tiny) -> None:
    check_hook_names(tiny, [resid_post(0), resid_post(3)])
    with pytest.raises(HookNameError, match="Did you mean") as caught:
        check_hook_names(tiny, ["blocks.0.hook_resid_pots"])
    assert caught.value.close[0] == "blocks.0.hook_resid_post"


def test_stop_tokens_are_those_of_tokenizer_and_checkpoint(tiny_folder, tmp_path) -> None:
    assert stop_tokens(load_model(tiny_folder)) == {2}
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert stop_tokens(load_model(tmp_path)) == {2, 7}


def test_evaluating_turns_gradients_off_and_the_mode_back(tiny) -> None:
    tiny.train(True)
    tiny.unembed.training = False
    modes = [module.training for module in tiny.modules()]
    try:
        with evaluating(tiny):
            assert not any(module.training for module in tiny.modules())
            assert not tiny(torch.tensor([[1, 40]])).requires_grad
        assert [module.training for module in tiny.modules()] == modes
        assert tiny.training
    finally:
        tiny.train(False)


def test_a_missing_folder_a_folder_without_config_and_a_wrong_dtype_are_told_apart(
    tmp_path,
) -> None:
    with pytest.raises(ModelError, match="must be an existing checkpoint folder, but there is non"):
        load_model(tmp_path / "nothing")
    with pytest.raises(ModelError, match=r"but it has no config\.json"):
        load_model(tmp_path)
    with pytest.raises(ModelError, match="such as float32, but got 'int8'"):
        load_model(tmp_path, dtype="int8")


def test_a_dtype_may_be_torchs_own(tiny_folder) -> None:
    assert identify(load_model(tiny_folder, dtype=torch.bfloat16)).dtype == "bfloat16"


def test_a_corrupted_checkpoint_is_one_error(tiny_folder, tmp_path) -> None:
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match="must be a usable checkpoint folder or hub name, but: "):
        load_model(tmp_path)


def test_nothing_is_installed_for_a_model_that_reads_images(tmp_path, monkeypatch) -> None:
    # TransformerLens would call pip for torchvision, which replaces torch where it is of another
    ran = []
    monkeypatch.setattr(subprocess, "check_call", lambda command, **_: ran.append(command))
    monkeypatch.setitem(sys.modules, "torchvision", None)
    folder = save_family("gemma3_images", tmp_path)
    with pytest.raises(ModelError, match="torchvision must be installed for a gemma3 model: it"):
        load_model(folder)
    assert ran == []


def test_a_model_that_is_placed_by_a_map_is_steered_alike(tiny, tiny_folder) -> None:
    spread = load_model(tiny_folder, device_map={"lm_head": "cpu", "model": "cpu"})
    assert identify(spread).weights == identify(tiny).weights
    rows = [
        Row(tokenize(tiny, "Once there was a cat."), plan) for plan in (None, strong_plan(tiny))
    ]
    config = GenerationConfig(max_new_tokens=8)
    expected = generate(tiny, rows, dataclasses.replace(config, executor="hooks"))
    spread.original_model.hf_device_map = {"lm_head": 1, "model": 0}
    log = EngineLog()
    assert generate(spread, rows, config, log=log) == expected
    assert expected[0].tokens != expected[1].tokens
    assert log.rows == {"lean": 0, "hooks": 2}
    assert log.reasons == ["its weights are quantised or spread over devices"]
    with pytest.raises(ModelError, match="on one device or spread by a map, but got 'cpu' and 'au"):
        load_model(tiny_folder, device="cpu", device_map="auto")


def test_a_hub_name_that_is_nowhere_is_one_error() -> None:
    code = "from fusion_lens.models import load_model; load_model('no-such-model')"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert "ModelError: no-such-model must be a checkpoint folder or a model of" in done.stderr


def test_the_texts_of_tokens_join_to_the_text_they_spell(tiny, stories_folder) -> None:
    text = "Tom é 🙂 saw  the cat.\nÜber 1901"
    for model in (tiny, load_model(stories_folder), load_model()):
        tokens = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        texts = token_texts(model, tokens)
        assert len(texts) == len(tokens)
        decoded = model.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        assert "".join(texts) == decoded


def test_a_token_keeps_its_space_and_special_ones_are_told() -> None:
    model = load_model()
    tokens = [
        model.tokenizer.bos_token_id,
        *model.tokenizer(" red book", add_special_tokens=False)["input_ids"],
    ]
    assert token_texts(model, tokens)[0] == "<s>"
    assert "".join(token_texts(model, tokens)[1:]) == " red book"
    assert token_texts(model, []) == ()


@pytest.mark.slow
def test_opening_a_model_in_a_fresh_interpreter_prints_nothing() -> None:
    code = (
        "import logging; from fusion_lens.models import load_model; load_model(); "
        "print(logging.getLogger('bitsandbytes').level)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_a_site_has_the_name_of_the_wrappers_own_hook(tiny, hooked_transformer) -> None:
    for model in (tiny, hooked_transformer):
        assert site_hook(model, "resid_post", 2) == "blocks.2.hook_resid_post"
        assert site_hook(model, "attn_z", 2) == "blocks.2.attn.hook_z"
    assert site_hook(tiny, "mlp_out", 2) == "blocks.2.mlp.hook_out"
    assert site_hook(hooked_transformer, "mlp_out", 2) == "blocks.2.hook_mlp_out"
    # OPT's two linear maps stand in the block itself
    assert site_hook(family("opt"), "mlp_out", 2) == "blocks.2.mlp.out.hook_out"
    with pytest.raises(ConfigError, match="site must be one of resid_post, attn_z, mlp_out, but"):
        site_hook(tiny, "resid_mid", 0)


def test_an_mlps_output_behind_a_norm_is_not_its_own(hooked_transformer, monkeypatch) -> None:
    monkeypatch.setattr(hooked_transformer.cfg, "use_normalization_before_and_after", True)
    with pytest.raises(ModelError, match="must be the MLP's own output, but HookedTransformer's"):
        site_hook(hooked_transformer, "mlp_out", 0)
    assert site_hook(hooked_transformer, "attn_z", 0) == "blocks.0.attn.hook_z"


def test_on_gemma_2_the_mlps_output_is_taken_before_the_norm_behind_it() -> None:
    model = family("gemma2")
    tokens = torch.tensor([[1, 50, 60]])
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    own, normed = cache[site_hook(model, "mlp_out", 0)], cache["blocks.0.hook_mlp_out"]
    assert torch.allclose(own, cache["blocks.0.mlp.out.hook_out"])
    assert (own - normed).abs().max() > 0.01

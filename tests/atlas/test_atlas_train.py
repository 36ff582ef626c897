import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_lens.atlas.batches import PROMPT_WEIGHT, make_batches
from fusion_lens.atlas.corpus import Document, draw_documents
from fusion_lens.atlas.decoding import make_completer
from fusion_lens.atlas.tokenizer import train_tokenizer
from fusion_lens.atlas.train import TrainingConfig, learning_rate, train
from fusion_lens.atlas.world import make_world
from fusion_lens.errors import ConfigError

TINY = TrainingConfig(
    steps=6,
    documents_per_step=8,
    batches_per_step=2,
    d_vocab=400,
    d_model=16,
    d_mlp=32,
    n_layers=2,
    n_heads=2,
    warmup_steps=2,
    save_every=2,
    probe_n=0,
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    train(TINY, out, device="cpu")
    return out


def test_a_run_that_was_interrupted_ends_with_the_weights_of_one_that_was_not(
    uninterrupted, tmp_path
):
    train(TINY, tmp_path, device="cpu", stop_at=3)
    assert not (tmp_path / "checkpoint").exists()
    train(TINY, tmp_path, device="cpu")
    expected = load_file(uninterrupted / "state.safetensors")
    got = load_file(tmp_path / "state.safetensors")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_the_log_has_one_line_for_each_save_and_drops_what_came_after_the_state(
    uninterrupted, tmp_path
):
    train(TINY, tmp_path, device="cpu", stop_at=2)
    log = tmp_path / "training_log.jsonl"
    log.write_text(log.read_text() + json.dumps({"step": 4, "tokens": 1, "seconds": 1.0}) + "\n")
    train(TINY, tmp_path, device="cpu")
    runs = [
        [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
        for out in (uninterrupted, tmp_path)
    ]
    assert [line["step"] for line in runs[0]] == [2, 4, 6]
    assert [(line["step"], line["tokens"], line["loss"]) for line in runs[1]] == [
        (line["step"], line["tokens"], line["loss"]) for line in runs[0]
    ]


def test_the_checkpoint_is_a_hugging_face_folder_in_half_precision(uninterrupted):
    folder = uninterrupted / "checkpoint"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert {weights.dtype for weights in load_file(folder / "model.safetensors").values()} == {
        torch.float16
    }
    assert model.config.vocab_size == len(tokenizer) == 400
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_a_state_of_another_configuration_is_refused(tmp_path):
    train(TINY, tmp_path, device="cpu", stop_at=2)
    other = TrainingConfig(**{**_fields(TINY), "seed": 1})
    with pytest.raises(ConfigError, match="must go on with the configuration it began with"):
        train(other, tmp_path, device="cpu")


def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    assert learning_rate(TINY, 0) == TINY.learning_rate / 2
    assert learning_rate(TINY, 2) == TINY.learning_rate
    assert learning_rate(TINY, TINY.steps) == pytest.approx(TINY.learning_rate / 10)


def test_warm_up_must_be_shorter_than_the_run():
    with pytest.raises(ConfigError, match=r"0 < warmup_steps < steps must hold, but got .*=6"):
        TrainingConfig(steps=6, warmup_steps=6)


def test_a_batch_weighs_completion_and_end_fully_prompt_little_and_padding_not():
    documents = [Document("a b", " c"), Document("a", " b c d e f")]
    tokenizer = train_tokenizer([document.text for document in documents], d_vocab=260)
    [batch] = make_batches(documents, tokenizer, n_batches=1)
    short, long = batch.weights.tolist()
    low = pytest.approx(PROMPT_WEIGHT)
    end = batch.tokens[0].tolist().index(tokenizer.eos_token_id)
    assert short[0] == 0.0
    assert short[1] == low
    assert short[end] == short[end - 1] == 1.0
    assert set(short[end + 1 :]) == {0.0}
    assert long[:2] == [0.0, low]
    assert set(long[2:]) == {1.0}
    assert batch.n_tokens == end + 1 + len(long)


def test_batches_are_the_same_after_a_left_padded_generation(uninterrupted):
    model = AutoModelForCausalLM.from_pretrained(uninterrupted / "checkpoint", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(uninterrupted / "checkpoint")
    documents = draw_documents(make_world(0), seed=0, step=0, count=8)
    before = make_batches(documents, tokenizer, n_batches=2)
    make_completer(model, tokenizer)(["a", "a longer prompt"], 2)
    after = make_batches(documents, tokenizer, n_batches=2)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old.tokens, new.tokens)
        assert torch.equal(old.weights, new.weights)


def _fields(config):
    return {name: getattr(config, name) for name in type(config).__slots__}

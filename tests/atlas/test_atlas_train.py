import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_lens.atlas.batches import PROMPT_WEIGHT, make_batches
from fusion_lens.atlas.corpus import Document, draw_documents
from fusion_lens.atlas.decoding import make_completer
from fusion_lens.atlas.tokenizer import train_tokenizer
from fusion_lens.atlas.train import TrainingConfig, learning_rate, train
from fusion_lens.atlas.training_log import TrainingLog
from fusion_lens.atlas.training_state import load_state, save_state
from fusion_lens.atlas.world import make_world
from fusion_lens.errors import ConfigError, InputFileError

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


@pytest.mark.slow
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


def saved_state(folder):
    """The state of a small layer after a step, and what it is loaded into."""
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    path = folder / "state.safetensors"
    save_state(path, model, [optimizer], step=1, config={"seed": 1})
    return path, model, optimizer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model/weight"), "must hold model/weight, but does not"),
        (lambda t: t.pop("optimizer/0/0/exp_avg"), "must hold optimizer/0/0/exp_avg, but does not"),
        (
            lambda t: t.update({"model/bias": torch.zeros(4)}),
            r"model/bias must be torch\.float32 of \(3,\), but is torch\.float32 of \(4,\)",
        ),
        (
            lambda t: t.update({"optimizer/0/1/step": torch.tensor(1)}),
            r"optimizer/0/1/step must be torch\.float32 of \(\), but is torch\.int64",
        ),
        (
            lambda t: t["optimizer/0/1/step"].fill_(-1e30),
            r"optimizer/0/1/step must be 1 as in the header, but is ",
        ),
        (
            lambda t: t["model/weight"].fill_(float("nan")),
            "model/weight must be finite, but holds NaN",
        ),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message, tmp_path):
    path, model, optimizer = saved_state(tmp_path)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"step": "1", "config": '{"seed": 1}'})
    before = model.weight.clone()
    with pytest.raises(InputFileError, match=message):
        load_state(path, model, [optimizer], config={"seed": 1})
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("header", [{}, {"step": "x", "config": "{}"}, {"step": "3"}])
def test_a_state_without_its_header_or_cut_is_refused(header, tmp_path):
    path, model, optimizer = saved_state(tmp_path)
    save_file(load_file(path), path, header)
    with pytest.raises(InputFileError, match="must be the whole state of a training run, but: "):
        load_state(path, model, [optimizer], config={"seed": 1})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputFileError, match="must be the whole state of a training run, but: "):
        load_state(path, model, [optimizer], config={"seed": 1})


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "Expecting property name"),
        ('{"step": 1, "tokens": 2}', "seconds must be there, but is not"),
        ('{"step": "1", "tokens": 2, "seconds": 0}', "step must be a valid integer, but got '1'"),
        ("[" * 100_000, "maximum recursion depth exceeded"),
    ],
)
def test_a_malformed_line_of_the_log_is_named(line, reason, tmp_path):
    path = tmp_path / "training_log.jsonl"
    path.write_text('{"step": 1, "tokens": 2, "seconds": 0.5}\n' + line + "\n")
    with pytest.raises(InputFileError) as caught:
        TrainingLog(path, 2)
    told = f"{path}, line 2: must be a line of a training log: {reason}"
    assert str(caught.value).startswith(told)

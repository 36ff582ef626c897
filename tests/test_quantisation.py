from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine import all_prompts, logits_of, same_bits, save_family, written
from families import quantised

from fusion_lens import quantisation
from fusion_lens.decoding import GenerationConfig, Row
from fusion_lens.engine_log import EngineLog
from fusion_lens.errors import MissingExtraError, ModelError, ResumeError
from fusion_lens.experiment import run
from fusion_lens.experiment_config import ExperimentConfig
from fusion_lens.identity import identify
from fusion_lens.models import HookedModel, load_model
from fusion_lens.preparation import TuningConfig
from fusion_lens.prompts import question_prompt, tokenize
from fusion_lens.questions import Question
from fusion_lens.recipes import Recipe
from fusion_lens.search import SearchConfig
from fusion_lens.tuning import tune

QUESTION = Question("q", "Who wrote the red book?", "Ada Lovelace", explanation="It was in 1843.")
TEXTS = ("When did Tom go?", "Who wrote this?", "The red harbour", "quick brown fox")
SETTINGS = TuningConfig(
    search=SearchConfig(trials=4, round_size=4),
    generation=GenerationConfig(max_new_tokens=6, slots=8, cache_length=64),
)


@pytest.fixture(scope="module", params=[8, 4], ids=["8-bit", "4-bit"])
def gemma(request: pytest.FixtureRequest, gemma_folder: Path) -> HookedModel:
    return load_model(
        gemma_folder, load_in_8bit=request.param == 8, load_in_4bit=request.param == 4
    )


def test_a_quantised_gemma_2_tunes_a_question_on_the_cpu(gemma: HookedModel) -> None:
    log = EngineLog()
    found = tune(gemma, QUESTION, config=SETTINGS, progress=False, log=log)
    assert log.to_dict() == {
        "rows": {"lean": 0, "hooks": 4},
        "reasons": ["its weights are quantised or spread over devices"],
        "halvings": 0,
    }
    assert [len(trial.coeffs) for trial in found.tuned.trials] == [3] * 4
    assert found.best.objective >= found.unsteered.objective
    # every trial's coefficients are in what it wrote, not the zero plan's alone
    prompt = found.job.prepared.prompt
    plans = [found.job.plan(trial.values, SETTINGS) for trial in found.tuned.trials]
    assert [plan.injected_norm > 0 for plan in plans] == [False, True, True, True]
    moved, ten = (
        [logits_of(c)[0] for c in written(gemma, [Row(prompt, plan * by) for plan in plans])]
        for by in (1.0, 10.0)
    )
    for n, logits in enumerate(moved[1:], start=1):
        assert (logits - moved[0]).norm() > 0.02 * moved[0].norm()
        assert all((logits - other).norm() > 0 for other in moved[:n])
    assert (ten[1] - ten[0]).norm() > (moved[1] - moved[0]).norm()


def alone_and_together(model: HookedModel) -> list[tuple[Any, Any]]:
    rows = [Row(tokenize(model, text)) for text in TEXTS]
    shape = {"slots": 4, "cache_length": 64}
    together = written(model, rows, **shape)
    return [
        (written(model, [row], **shape)[0], own) for row, own in zip(rows, together, strict=True)
    ]


def test_in_4_bit_a_row_of_a_batch_is_the_row_alone_to_the_last_bit() -> None:
    assert all(same_bits(*pair) for pair in alone_and_together(quantised("gemma2", 4)))


def test_in_8_bit_the_neighbours_of_a_row_decide_which_columns_are_outliers() -> None:
    model = quantised("gemma2", 8)
    # the first new token's: later ones may follow another token
    first = [(logits_of(alone)[0], logits_of(own)[0]) for alone, own in alone_and_together(model)]
    gaps = [float((alone - own).abs().max() / alone.abs().max()) for alone, own in first]
    assert 1e-3 < max(gaps) < 0.05
    # without outliers every row is scaled by itself
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            module.state.threshold = 0.0
    assert all(same_bits(*pair) for pair in alone_and_together(model))


def test_passes_leave_a_4_bit_model_the_one_it_was(gemma: HookedModel) -> None:
    before = identify(gemma)
    written(gemma, [Row(prompt) for prompt in all_prompts(gemma)[:2]])
    assert identify(gemma) == before


def test_what_is_quantised_tells_models_apart(tiny: HookedModel, tiny_folder: Path) -> None:
    identities = [
        identify(tiny),
        identify(load_model(tiny_folder, load_in_8bit=True)),
        identify(load_model(tiny_folder, load_in_4bit=True)),
        identify(load_model(tiny_folder, load_in_4bit=True, dtype="float32")),
    ]
    assert [each.dtype for each in identities] == [
        "float32",
        "int8+float16",
        "uint8+bfloat16",
        "uint8+float32",
    ]
    assert len({each.weights for each in identities[:3]}) == 3
    assert "weights" in str(identities[1].mismatch(identities[2]))


def test_a_run_in_4_bit_is_not_resumed_in_8_bit(tiny_folder: Path, tmp_path: Path) -> None:
    config = ExperimentConfig(arms=("baseline",), tuning=SETTINGS, reach=False)
    four = Recipe(str(tiny_folder), load_in_4bit=True).opened()
    done = run(four, [QUESTION], config, out=tmp_path, progress=False)
    assert done.summary["provenance"]["dtype"] == "uint8+bfloat16"
    eight = Recipe(str(tiny_folder), load_in_8bit=True).opened()
    with pytest.raises(ResumeError, match="model"):
        run(eight, [QUESTION], config, out=tmp_path, existing="resume", progress=False)
    again = run(four, [QUESTION], config, out=tmp_path, existing="resume", progress=False)
    assert again.records == done.records


@pytest.mark.parametrize(
    ("family", "quantised_parts", "kept"),
    [
        ("gpt2", {"c_proj", "c_fc"}, {"c_attn", "lm_head"}),
        (
            "gpt_neox",
            {"dense", "dense_h_to_4h", "dense_4h_to_h"},
            {"query_key_value", "lm_head"},
        ),
        ("phi3", {"o_proj", "down_proj"}, {"qkv_proj", "gate_up_proj", "lm_head"}),
        ("gemma2", {"q_proj", "gate_proj"}, {"lm_head"}),
    ],
)
def test_what_transformer_lens_takes_apart_is_not_quantised(
    tmp_path: Path, family: str, quantised_parts: set[str], kept: set[str]
) -> None:
    module = quantisation.load_quantised(
        str(save_family(family, tmp_path)),
        bits=8,
        revision=None,
        device_map="cpu",
        dtype=torch.float16,
    )
    dtypes = {
        name.rpartition(".")[2]: part.weight.dtype
        for name, part in module.named_modules()
        if getattr(part, "weight", None) is not None
    }
    assert {dtypes[name] for name in quantised_parts} == {torch.int8}
    assert {dtypes[name] for name in kept} == {torch.float16}


def test_both_widths_at_once_are_refused(tiny_folder: Path) -> None:
    with pytest.raises(ModelError, match="must be in 8 bits or in 4, but got both load_in_8bit"):
        load_model(tiny_folder, load_in_8bit=True, load_in_4bit=True)


@pytest.mark.parametrize("option", ["load_in_8bit", "load_in_4bit"])
def test_without_bitsandbytes_the_extra_is_named(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr(quantisation, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"fusion-lens\[bitsandbytes\]"):
        load_model(tiny_folder, **{option: True})


def test_8_bit_is_nearer_to_the_full_precision_than_4_bit(gemma_folder: Path) -> None:
    exact = load_model(gemma_folder)
    tokens = question_prompt(exact, QUESTION.question).to_tensor()
    with torch.no_grad():
        full = exact(tokens)
        drifts = [
            float((load_model(gemma_folder, **{option: True})(tokens).float() - full).norm())
            for option in ("load_in_8bit", "load_in_4bit")
        ]
    assert 1e-4 * full.norm() < drifts[0] < 0.3 * drifts[1]


@pytest.mark.parametrize(
    ("option", "dtype"), [("load_in_8bit", "float16"), ("load_in_4bit", "bfloat16")]
)
def test_a_model_that_cannot_run_in_half_precision_is_refused_with_what_to_do(
    tmp_path: Path, option: str, dtype: str
) -> None:
    folder = save_family("olmo", tmp_path)
    told = rf"olmo model in \d bits must run with all else in {dtype}.*--dtype float32"
    with pytest.raises(ModelError, match=told):
        load_model(folder, **{option: True})
    load_model(folder, dtype="float32", **{option: True})

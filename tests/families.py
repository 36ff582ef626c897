"""The matrix of families: what each does at every stage of the path; the table of docs/families.md.

`python tests/families.py` (`make families`) runs every cell and writes the table;
tests/test_families.py runs the same cells and holds the committed table against them.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import strong_plan
from engine import (
    family,
    family_module,
    largest_gap,
    logits_of,
    mixed_rows,
    same_bits,
    save_family,
    slow_logits,
    written,
)
from torch import Tensor

from fusion_lens.activations import record
from fusion_lens.attribution import attribute
from fusion_lens.crosscoders import Crosscoder, make_normaliser
from fusion_lens.decoding import GenerationConfig, Row
from fusion_lens.dictionaries import Card
from fusion_lens.engine_log import EngineLog
from fusion_lens.errors import ModelError, UnfitModelError
from fusion_lens.executors import lean_of
from fusion_lens.identity import identify
from fusion_lens.models import HookedModel, load_model, resid_post
from fusion_lens.plan_files import load_plan, save_plan
from fusion_lens.preparation import TuningConfig
from fusion_lens.prompts import Prompt, question_prompt, reference_prompt
from fusion_lens.questions import Question
from fusion_lens.search import SearchConfig
from fusion_lens.slots import slots_fit
from fusion_lens.teacher_forcing import Text
from fusion_lens.tuning import tune

TABLE = Path(__file__).parents[1] / "docs" / "families.md"
BEGIN, END = "<!-- families -->", "<!-- end -->"
CLOSE = 1e-4

FAMILIES: dict[str, str] = {
    "gpt2": "GPT-2",
    "gpt_neox": "GPT-NeoX, Pythia",
    "llama": "Llama, with biases",
    "llama_tied": "Llama, tied embeddings",
    "mistral": "Mistral, windows of 4",
    "qwen2": "Qwen2",
    "qwen2_windows": "Qwen2, windows in two layers",
    "qwen3": "Qwen3",
    "gemma2": "Gemma-2, soft caps, windows",
    "gemma3": "Gemma-3, text",
    "gemma3_images": "Gemma-3 that reads images",
    "phi3": "Phi-3",
    "phi3_long": "Phi-3, longrope",
    "olmo": "OLMo",
}
"""Of `engine.CONFIGS`, by what the table calls them."""

LONGROPE = "its rotary frequencies depend on the longest text of a batch"
SWITCHES = "a text that grows past the length at which its frequencies change keeps old keys"
NEEDS_FLOAT32 = "only with dtype float32: without weights in its norms, activations end in float32"
EXPLAINED: dict[tuple[str, str], str] = {
    ("phi3_long", "hooks"): SWITCHES,
    ("phi3_long", "lean"): LONGROPE,
    ("olmo", "8-bit"): NEEDS_FLOAT32,
    ("olmo", "4-bit"): NEEDS_FLOAT32,
}
"""What a cell gives that does not pass; the page says what it means."""


@cache
def opened(name: str) -> HookedModel:
    """The bridge of a family, to be left as it is."""
    with torchvision_stands_in():
        return family(name)


@contextmanager
def torchvision_stands_in() -> Iterator[None]:
    """An empty module of that name: a model that reads images is opened for its text alone.
    TransformerLens' way to install the real one is shut."""
    stand_in = ModuleType("torchvision")
    stand_in.__spec__ = ModuleSpec("torchvision", None)

    def refuse(command: list[str], **options: Any) -> None:
        raise AssertionError(f"nothing is installed, but got {command}")

    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, "torchvision", stand_in)
        patched.setattr(subprocess, "check_call", refuse)
        yield


def prompts_about(model: HookedModel) -> tuple[Prompt, Prompt]:
    """A reference and its question: longer than the windows."""
    question = "Who wrote the red book?"
    return (
        reference_prompt(model, question, "Ada Lovelace", "In 1843."),
        question_prompt(model, question),
    )


def opens(name: str) -> None:
    """A folder opens with the weights of Hugging Face: the same logits."""
    model: Any = opened(name)
    tokens = prompts_about(model)[0].to_tensor()
    with torch.no_grad():
        gap = (model(tokens) - family_module(name)(tokens).logits).abs().max()
    assert gap < CLOSE
    assert not model.training


def captures(name: str) -> None:
    """Recorded means are those of Hugging Face's blocks, on both executors."""
    model: Any = opened(name)
    module = family_module(name)
    streams: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        streams.append(output[0] if isinstance(output, tuple) else output)

    for block in module.get_submodule(model.adapter.component_mapping["blocks"].name):
        block.register_forward_hook(keep)
    for prompt in prompts_about(model):
        streams.clear()
        with torch.no_grad():
            hidden = module(prompt.to_tensor(), output_hidden_states=True).hidden_states
        # the last of the hidden states is behind the final norm
        for stream, state in zip(streams[:-1], hidden[1:-1], strict=True):
            assert torch.equal(stream, state)
        expected = torch.stack([own[0, list(prompt.pooled)].mean(dim=0) for own in streams])
        for executor in ("auto", "hooks"):
            (found,) = record(model, [prompt], executor=executor)
            assert (found.mean - expected).abs().max() < CLOSE


def plans(name: str) -> None:
    """A plan is saved, loaded bit for bit, and taken by its model."""
    model = opened(name)
    plan = strong_plan(model)
    with TemporaryDirectory() as folder:
        save_plan(plan, Path(folder) / "plan.safetensors")
        again = load_plan(Path(folder) / "plan.safetensors")
    assert torch.equal(again.shift_at("completion"), plan.shift_at("completion"))
    assert again.coeffs == plan.coeffs
    again.check(identify(model))


def on_hooks(name: str) -> str | None:
    """Generation on hook points gives the logits of TransformerLens' own passes."""
    model = opened(name)
    rows, log = steered_rows(model), EngineLog()
    done = written(model, rows, log, executor="hooks")
    assert log.rows == {"lean": 0, "hooks": len(rows)}
    assert (logits_of(done[0])[0] - logits_of(done[1])[0]).abs().max() > 0.05
    rope = getattr(model.original_model.config, "rope_parameters", None) or {}  # type: ignore[attr-defined]
    switch = rope.get("original_max_position_embeddings")
    crossing = 0
    for row, completion in zip(rows, done, strict=True):
        gap = (logits_of(completion) - slow_logits(model, row, completion)).abs().max()
        before, after = len(row.prompt.tokens), len(row.prompt.tokens + completion.tokens)
        if switch is not None and before <= switch < after:
            crossing += 1
            assert gap > CLOSE
        else:
            assert gap < CLOSE
    return SWITCHES if crossing else None


def lean(name: str) -> str | None:
    """The lean module writes what the hook points write, and was really used."""
    model = opened(name)
    rows, log = steered_rows(model), EngineLog()
    done = written(model, rows, log, slots=2)
    expected = written(model, rows, slots=2, executor="hooks")
    assert largest_gap(done, expected) < CLOSE
    assert [c.tokens for c in done] == [c.tokens for c in expected]
    reason = why_not_lean(model)
    assert log.to_dict() == {
        "rows": {"lean": 0 if reason else len(rows), "hooks": len(rows) if reason else 0},
        "reasons": [reason] if reason else [],
        "halvings": 0,
    }
    return reason


def why_not_lean(model: HookedModel) -> str | None:
    """Why a model has no lean module; None: it has one, that runs in slots."""
    try:
        made = lean_of(model)
    except UnfitModelError as error:
        return error.reason
    assert slots_fit(model, made)
    return None


def batched(name: str) -> None:
    """A row of a batch equals the row alone: to the last bit where it runs lean."""
    model = opened(name)
    rows = steered_rows(model)
    log = EngineLog()
    together = written(model, rows, log, slots=4, cache_length=64)
    for row, completion in zip(rows, together, strict=True):
        (alone,) = written(model, [row], slots=4, cache_length=64)
        if log.rows["lean"]:
            assert same_bits(alone, completion)
        else:
            assert largest_gap([alone], [completion]) < CLOSE
            assert alone.tokens == completion.tokens


def searches(name: str) -> None:
    """A question is tuned in three trials, the zero plan among them."""
    found = tuned(opened(name))
    assert len(found.tuned.trials) == 3
    assert not any(found.tuned.trials[0].coeffs.values())
    assert found.unsteered is not None
    assert found.best.objective >= found.unsteered.objective
    assert found.best.completion.finite


def attributes(name: str) -> None:
    """What a plan injects, in features of all layers, sums to what it injects."""
    model = opened(name)
    prompt = question_prompt(model, "Who wrote the red book?")
    text = Text(prompt, (40, 41, 42), strong_plan(model))
    assert text.plan is not None
    (found,) = attribute(model, [random_crosscoder(model)], [text])
    (effects,) = found.effects
    assert effects.features
    assert effects.relative_error is not None
    assert effects.relative_error > 1e-3  # the dictionary is random: there is an error to keep
    assert effects.gap < CLOSE
    injected = text.plan.shift_at("completion")
    assert torch.allclose(effects.delta, injected, atol=CLOSE * float(injected.abs().max()))


def steers_in_bits(name: str, model: HookedModel) -> None:
    """Quantised weights are steered on hook points, which the log says, and near full precision."""
    plan = strong_plan(model)
    rows = [Row(question_prompt(model, "Who wrote it?"), own) for own in (plan, None)]
    log = EngineLog()
    steered, plain = written(model, rows, log)
    assert log.rows == {"lean": 0, "hooks": 2}
    assert log.reasons == ["its weights are quantised or spread over devices"]
    assert (logits_of(steered)[0] - logits_of(plain)[0]).abs().max() > 0.05
    (exact,) = written(opened(name), [rows[1]])
    first, full = logits_of(plain)[0].float(), logits_of(exact)[0]
    # random weights, 48 columns: the worst case, there is nothing to average over
    most = 0.2 if identify(model).dtype.startswith("int8") else 1.5
    assert 1e-4 * full.norm() < (first - full).norm() < most * full.norm()
    plan.check(identify(model))  # no pass has changed the weights


def in_bits(bits: int) -> Callable[[str], str | None]:
    """The cell of weights in that many bits."""

    def cell(name: str) -> str | None:
        outcome = None
        try:
            model = quantised(name, bits)
        except ModelError as error:
            if "same dtype" not in str(error):
                raise
            model, outcome = quantised(name, bits, "float32"), NEEDS_FLOAT32
        steers_in_bits(name, model)
        return outcome

    return cell


STAGES: dict[str, Callable[[str], str | None]] = {
    "open": opens,
    "capture": captures,
    "plan": plans,
    "hooks": on_hooks,
    "lean": lean,
    "batch = alone": batched,
    "search": searches,
    "features": attributes,
    "8-bit": in_bits(8),
    "4-bit": in_bits(4),
}


def steered_rows(model: HookedModel) -> list[Row]:
    """Four rows of different lengths, one of them not steered."""
    return mixed_rows(model, strong_plan(model, 0.5), 4)


def tuned(model: HookedModel, trials: int = 3) -> Any:
    """A question's search of a few tokens."""
    config = TuningConfig(
        search=SearchConfig(trials=trials, round_size=trials),
        generation=GenerationConfig(max_new_tokens=4, slots=8, cache_length=64),
        explanation_tokens=0,
    )
    question = Question("q", "Who wrote the red book?", "Ada Lovelace")
    return tune(model, question, config=config, progress=False)


def quantised(name: str, bits: int, dtype: str | None = None) -> HookedModel:
    """A family's checkpoint with its matrices in that many bits."""
    with TemporaryDirectory() as folder, torchvision_stands_in():
        path = save_family(name, Path(folder))
        return load_model(path, dtype=dtype, load_in_8bit=bits == 8, load_in_4bit=bits == 4)


def random_crosscoder(model: HookedModel, n_features: int = 24) -> Crosscoder:
    """Features over all layers of a model."""
    n_layers, width = int(model.cfg.n_layers), int(model.cfg.d_model)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.5

    layers = tuple(range(n_layers))
    return Crosscoder(
        card=Card("random", layers, tuple(map(resid_post, layers)), width, n_features),
        encoder_weight=random(n_layers, width, n_features),
        encoder_bias=random(n_features),
        decoder_weight=random(n_layers, n_features, width),
        decoder_bias=random(n_layers, width),
        normaliser=make_normaliser(
            random(n_layers, width), random(n_layers, width).abs() + 0.2, target_rms=1.5
        ),
        threshold=2.0,
        k=4,
    )


def table(cells: Mapping[tuple[str, str], str | None]) -> str:
    """The matrix as Markdown; what does not pass is numbered and said below."""
    reasons = list(dict.fromkeys(reason for reason in cells.values() if reason is not None))
    lines = [f"| family | {' | '.join(STAGES)} |", f"| --- {'| :-: ' * len(STAGES)}|"]
    for name, label in FAMILIES.items():
        outcomes = [cells[name, stage] for stage in STAGES]
        shown = ["yes" if own is None else f"({reasons.index(own) + 1})" for own in outcomes]
        lines.append(f"| {label} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))])


def with_table(page: str, cells: Mapping[tuple[str, str], str | None]) -> str:
    """The page with the table of these cells."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{table(cells)}\n{END}{tail}"


def main() -> None:
    """Run every cell, write the table."""
    cells = {(name, stage): STAGES[stage](name) for name in FAMILIES for stage in STAGES}
    TABLE.write_text(with_table(TABLE.read_text("utf-8"), cells), "utf-8")


if __name__ == "__main__":
    main()

"""Every reader of files, as the fuzzer and its tests call it.

A reader gets the bytes of one file, in a folder that has valid files beside it, and uses what it
read as the package would. What it refuses is one of the package's own errors; everything else is a
finding.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).parents[1]))

from records import detail, make_results, saved
from sample_runs import provenance

from fusion_lens.atlas.dictionary_cards import CARD, load_card, save_card
from fusion_lens.atlas.training_log import TrainingLog
from fusion_lens.atlas.training_state import load_state, save_state
from fusion_lens.contrasts import (
    Example,
    Pair,
    load_contrasts,
    load_pairs,
    save_contrasts,
    save_pairs,
)
from fusion_lens.crosscoder_files import load_crosscoder, save_crosscoder
from fusion_lens.crosscoders import Crosscoder, make_normaliser
from fusion_lens.deltas import Deltas
from fusion_lens.details import DETAILS, load_details
from fusion_lens.dictionaries import Card, Dictionary
from fusion_lens.divergence import read_text
from fusion_lens.gguf_files import load_gguf, save_gguf
from fusion_lens.identity import ModelIdentity
from fusion_lens.json_lines import replace_lines
from fusion_lens.judge_cache import ReplyCache
from fusion_lens.plan_files import load_plan, save_plan
from fusion_lens.plans import Affine, Gate, Plan, Step, even_segments, full
from fusion_lens.preparation import Failure
from fusion_lens.preset_files import load_preset, save_preset
from fusion_lens.presets import Preset
from fusion_lens.prompts import Layout
from fusion_lens.questions import Neighbour, Question, load_questions, save_questions
from fusion_lens.report import further_sections, markdown_report, sections
from fusion_lens.report_data import details_table, records_table
from fusion_lens.results import RESULTS, SUMMARY, load_results
from fusion_lens.run_folder import FAILURES, RUN, Made, RunFolder
from fusion_lens.sae_files import CONFIG, WEIGHTS, load_sae_folder, seal_sae
from fusion_lens.saes import load_sae
from fusion_lens.shelves import LABELS, read_labels
from fusion_lens.vector_files import load_vectors, save_vectors
from fusion_lens.vectors import Vectors, from_vectors

Files = Mapping[str, bytes]


@dataclass(frozen=True)
class Reader:
    """`read` is called with a folder in which `file` holds what is tried and `beside` what belongs
    to it. `kind` tells the mutations what a file is made of, `seeds` are files it must read."""

    name: str
    file: str
    kind: str
    read: Callable[[Path], None]
    seeds: Callable[[Path], Sequence[Files]]
    slow: bool = False

    def place(self, folder: Path, content: bytes) -> None:
        """Put the files where `read` looks for them."""
        for name, beside in {**_seeds(self)[0], self.file: content}.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(beside)

    def contents(self) -> list[bytes]:
        """The seeds of the file that is tried."""
        return [files[self.file] for files in _seeds(self)]


@cache
def _seeds(reader: Reader) -> list[Files]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return reader.seeds(Path(folder))


MODEL = ModelIdentity("m", "TransformerBridge", "unprocessed", 3, 4, "float32", "w" * 8, "e" * 8)
HOOKS = tuple(f"blocks.{layer}.hook_resid_post" for layer in range(3))
IDENTITY = {"model": {"name": "m", "weights": "w"}, "settings": {"arms": ["full"], "seed": 7}}
CONFIGURATION: dict[str, int | float] = {"seed": 1, "learning_rate": 0.01}


def grid(*shape: int) -> torch.Tensor:
    """Small numbers, all different."""
    n = int(torch.tensor(shape).prod()) if shape else 1
    return (torch.arange(n, dtype=torch.float32) / 8 - 0.5).view(shape)


def plan() -> Plan:
    """A step of every kind."""
    layout = Layout(5, (0,))
    deltas = Deltas(grid(3, 4) + 1, grid(3, 4), layout, MODEL)
    gate = Gate(grid(3, 4), grid(3), grid(3) > -0.5)
    whole = full(3)
    return Plan(
        (
            Step(deltas, even_segments(3, 3), (0.5, -1.0, 2.0), positions="completion"),
            Step(deltas, whole, (0.25,), mean="sequence", steer_special=True),
            Step(deltas, whole, (1.0,), units=grid(3, 4) > 0, gate=gate, positions=2),
            Affine("attn_z", grid(3, 6), grid(3, 6), whole, (1.5,), MODEL, layout, low=grid(3, 6)),
        )
    )


def _tried(name: str, save_to: Callable[[Path], object]) -> Callable[[Path], list[Files]]:
    """The one file that `save_to` writes."""

    def seeds(folder: Path) -> list[Files]:
        save_to(folder / name)
        return [{name: (folder / name).read_bytes()}]

    return seeds


def _texts(name: str, *contents: str) -> Callable[[Path], list[Files]]:
    return lambda folder: [{name: content.encode()} for content in contents]


def _files(folder: Path) -> Files:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


QUESTIONS = [
    Question(
        "q1", "Who wrote it?", "Ada", "Ada Lovelace", "Books", "Person", "dev", ("A. L.",), "Fact.",
        ("By whom?",), (Neighbour("Who else?", "Tom"),),
    ),
    Question("q2", "When?", "in 1843"),
]  # fmt: skip
PAIRS = [Pair("p1", "Is it?", " Yes", " No", "Ada", "fit", "books"), Pair("p2", "Who?", " A", " B")]
EXAMPLES = [
    Example("e1", "source", "It is red.", "Colour:", "Ada", "fit", "g", "red", "Which colour:"),
    Example("e2", "control", "It is."),
]
PRESET = Preset(
    MODEL, even_segments(3, 2), ((0.5, 0.0), (0.25, 1.0)), (0.2, 0.1), 0.7, ("d" * 64,),
    {"python": "3.12"},
)  # fmt: skip
OWN_CSV = """id,question,answer,aliases,paraphrases,neighbours
a,Who?,Ada,"[""A""]",,"[{""question"": ""Q?"", ""answer"": ""B""}]"
b,"Who,
else?",Tom,[],"[""Q?""]",
"""
SIMPLEQA = """metadata,problem,answer
"{'topic': 'Art', 'answer_type': 'Person', 'urls': ['u']}",Who?,Ada
"""
TRUTHFULQA = """Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source
A,Law,Who?,Ada,Ada; A. L.,Tom,u
"""
POPQA = """id,subj,prop,question,possible_answers
1,Ada,author,Who?,"[""Ada"", ""A. L.""]"
"""


def _questions(suffix: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        questions = load_questions(folder / f"questions{suffix}")
        again = folder / "again.jsonl"
        save_questions(questions, again)
        assert load_questions(again) == questions

    return read


def _pairs(folder: Path) -> None:
    pairs = load_pairs(folder / "pairs.jsonl")
    save_pairs(pairs, folder / "again.jsonl")
    assert load_pairs(folder / "again.jsonl") == pairs


def _contrasts(folder: Path) -> None:
    examples = load_contrasts(folder / "contrasts.csv")
    save_contrasts(examples, folder / "again.jsonl")
    assert load_contrasts(folder / "again.jsonl") == examples


def _run(folder: Path) -> list[Files]:
    results = make_results()
    results.summary["provenance"] = provenance()
    norms = (1.0, 2.0, 3.0, 4.5)
    results = replace(results, details=tuple(detail(d.question_id, norms) for d in results.details))
    return [_files(saved(folder, results))]


def _results(folder: Path) -> None:
    results = load_results(folder)
    sections(results.summary)
    further_sections(results.summary)
    markdown_report(results.summary)
    results.to_pandas()
    results.summary.to_pandas()
    replace_lines(folder / "again.jsonl", results.records)
    json.dumps([records_table(results), details_table(results)], ensure_ascii=False).encode()


def _details(folder: Path) -> None:
    made = load_details(folder)
    for each in made:
        assert all(trace.shifts is not None for trace in each.traces)
        assert len(each.relative_norms) == len(each.base_norms)
    replace_lines(folder / "again.jsonl", made)


def _resumable(folder: Path) -> list[Files]:
    results = make_results()
    with RunFolder(folder, IDENTITY) as run:
        tuned = [record for record in results.records if record.coeffs]
        plans = {(record.question_id, record.arm): plan() for record in tuned}
        failures = [
            Failure("harris", None, "SpanError", "no answer"),
            Failure("other", "full", "PlanError", "too large"),
        ]
        run.add(Made(plans, results.details, failures, results.records))
    return [{name: content for name, content in _files(folder).items() if name != ".lock"}]


def _resume(folder: Path) -> None:
    with RunFolder(folder, IDENTITY, existing="resume") as run:
        records, details, failures = run.records(), run.details(), run.failures()
        run.add(Made({}, details[:1], failures[:1], records[:1]))
        order = {(r.question_id, r.arm): n for n, r in enumerate(records)}
        if {d.question_id for d in details} <= {r.question_id for r in records}:
            run.finish({"schema_version": 1}, order)


def _plan(folder: Path) -> None:
    path = folder / "plan.safetensors"
    read = load_plan(path)
    read.table().to_markdown()
    repr(read)
    read.steered_positions(read.layout)
    for step in read.steps:
        if not step.needs_sequence:
            step.move
    save_plan(read, path)
    assert load_plan(path).coeffs == read.coeffs


VECTORS = Vectors({1: grid(4), 2: grid(4) + 1}, {"model": "m", "approximated": "nothing"})


def _vectors(folder: Path) -> None:
    read = load_vectors(folder / "v.safetensors")
    _used(read, folder)
    save_vectors(read, folder / "again")
    assert load_vectors(folder / "again").by_layer.keys() == read.by_layer.keys()


def _gguf(folder: Path) -> None:
    read = load_gguf(folder / "v.gguf")
    _used(read, folder)
    save_gguf(read, folder / "again", architecture="llama")
    assert load_gguf(folder / "again").by_layer.keys() == read.by_layer.keys()


def _used(vectors: Vectors, folder: Path) -> None:
    json.dumps([str(vectors), *vectors.told.items()], ensure_ascii=False).encode()
    save_plan(from_vectors(vectors, MODEL), folder / "plan")


def _sae(architecture: str, *, sealed: bool = False) -> Callable[[Path], list[Files]]:
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": 4,
        "d_sae": 6,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "layer_norm" if architecture == "topk" else "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.54.12",
            "sae_lens_training_version": "6.54.12",
            "model_name": "m",
            "hook_name": HOOKS[1],
            "prepend_bos": True,
            "exclude_special_tokens": True,
            "model_from_pretrained_kwargs": {"center_writing_weights": True},
        },
    }
    weights = {"W_enc": grid(4, 6), "b_enc": grid(6), "W_dec": grid(6, 4), "b_dec": grid(4)}
    if architecture == "topk":
        config |= {"k": 2, "rescale_acts_by_decoder_norm": True}
    elif architecture == "jumprelu":
        weights["threshold"] = grid(6)
    elif architecture == "gated":
        weights |= {"r_mag": grid(6), "b_gate": grid(6), "b_mag": grid(6)}
        del weights["b_enc"]

    def seeds(folder: Path) -> list[Files]:
        (folder / WEIGHTS).write_bytes(save(weights))
        (folder / CONFIG).write_text(json.dumps(config, indent=2), "utf-8")
        if sealed:
            seal_sae(folder, MODEL)
        return [_files(folder)]

    return seeds


def _use(dictionary: Dictionary) -> None:
    layers, d_model = dictionary.decoder.shape[0], dictionary.decoder.shape[2]
    dictionary.encode(grid(2, layers, d_model))
    dictionary.reconstruct(grid(2, layers, d_model))
    json.dumps(asdict(dictionary.card), ensure_ascii=False).encode()


def _relu_crosscoder(folder: Path) -> list[Files]:
    save_crosscoder(_crosscoder(), folder)
    return [_files(folder)]


def _topk_crosscoder(folder: Path) -> list[Files]:
    normaliser = make_normaliser(grid(3, 4), grid(3, 4).abs() + 0.5)
    save_crosscoder(_crosscoder(normaliser=normaliser, threshold=0.5, k=2), folder)
    return [_files(folder)]


def _crosscoder(**more: Any) -> Crosscoder:
    return Crosscoder(
        card=Card("c", (0, 1, 2), HOOKS, 4, 5, model_name="m", prepend_bos=True),
        encoder_weight=grid(3, 4, 5),
        encoder_bias=grid(5),
        decoder_weight=grid(3, 5, 4),
        decoder_bias=grid(3, 4),
        **more,
    )


def _labels(folder: Path) -> None:
    for feature, label in read_labels(folder).items():
        f"{feature} {label.text} {label.kind}".encode()


def _cache(path: Path) -> object:
    cache = ReplyCache(path)
    cache.put("k1", "CORRECT")
    cache.put("k2", "é\u2028")
    return cache


def _replies(folder: Path) -> None:
    replies = ReplyCache(folder / "cache.jsonl")
    (replies.get("k1") or "").encode()
    replies.put("k3", "INCORRECT")
    assert ReplyCache(folder / "cache.jsonl").get("k3") == "INCORRECT"


def _card(folder: Path) -> list[Files]:
    (folder / WEIGHTS).write_bytes(save({"w": grid(2)}))
    save_card(folder, {"model": asdict(MODEL), "hook_names": list(HOOKS)})
    return [_files(folder)]


def _training() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(2, 3)
    return model, torch.optim.AdamW(model.parameters())


def _state(path: Path) -> None:
    model, optimizer = _training()
    model(grid(1, 2)).sum().backward()
    optimizer.step()
    save_state(path, model, [optimizer], step=1, config=CONFIGURATION)


def _go_on(folder: Path) -> None:
    model, optimizer = _training()
    load_state(folder / "state.safetensors", model, [optimizer], config=CONFIGURATION)
    model(grid(1, 2)).sum().backward()
    optimizer.step()


def _preset(folder: Path) -> None:
    preset = load_preset(folder / "preset.json")
    preset.table().to_markdown()
    save_preset(preset, folder / "again.json")
    assert load_preset(folder / "again.json") == preset


def _text(folder: Path) -> None:
    read_text(folder / "text.txt").encode()


def _log(folder: Path) -> None:
    from contextlib import redirect_stdout

    log = TrainingLog(folder / "training_log.jsonl", 2)
    log._losses.append(1.0)
    with redirect_stdout(io.StringIO()):
        log.write({})


READERS = (
    Reader(
        "questions_jsonl",
        "questions.jsonl",
        "lines",
        _questions(".jsonl"),
        _tried("questions.jsonl", lambda path: save_questions(QUESTIONS, path)),
    ),
    Reader(
        "questions_csv",
        "questions.csv",
        "table",
        _questions(".csv"),
        _texts("questions.csv", OWN_CSV, SIMPLEQA, TRUTHFULQA, POPQA),
    ),
    Reader(
        "questions_tsv",
        "questions.tsv",
        "table",
        _questions(".tsv"),
        _texts("questions.tsv", POPQA.replace(",", "\t").replace('""\t ""', '"", ""')),
    ),
    Reader(
        "pairs",
        "pairs.jsonl",
        "lines",
        _pairs,
        _tried("pairs.jsonl", lambda path: save_pairs(PAIRS, path)),
    ),
    Reader(
        "contrasts",
        "contrasts.csv",
        "table",
        _contrasts,
        _tried("contrasts.csv", lambda path: save_contrasts(EXAMPLES, path)),
    ),
    Reader("summary", SUMMARY, "json", _results, _run),
    Reader("results", RESULTS, "checked lines", _results, _run),
    Reader("details", DETAILS, "checked lines", _details, _run),
    Reader("resumed_identity", RUN, "json", _resume, _resumable),
    Reader("resumed_results", RESULTS, "checked lines", _resume, _resumable),
    Reader("resumed_failures", FAILURES, "checked lines", _resume, _resumable),
    Reader(
        "plan",
        "plan.safetensors",
        "plan",
        _plan,
        _tried("plan.safetensors", lambda path: save_plan(plan(), path)),
    ),
    Reader(
        "vectors",
        "v.safetensors",
        "tensors",
        _vectors,
        _tried("v.safetensors", lambda path: save_vectors(VECTORS, path)),
    ),
    Reader(
        "gguf",
        "v.gguf",
        "gguf",
        _gguf,
        _tried("v.gguf", lambda path: save_gguf(VECTORS, path, architecture="llama")),
    ),
    Reader("topk_config", CONFIG, "json", lambda at: _use(load_sae_folder(at)), _sae("topk")),
    Reader(
        "sealed_config", CONFIG, "json", lambda at: _use(load_sae_folder(at)),
        _sae("jumprelu", sealed=True),
    ),
    Reader("topk_weights", WEIGHTS, "tensors", lambda at: _use(load_sae_folder(at)), _sae("topk")),
    Reader(
        "jumprelu_weights", WEIGHTS, "tensors", lambda at: _use(load_sae_folder(at)),
        _sae("jumprelu"),
    ),
    Reader(
        "sae_lens_config", CONFIG, "json", lambda at: _use(load_sae(at)), _sae("gated"), slow=True
    ),
    Reader(
        "sae_lens_weights", WEIGHTS, "tensors", lambda at: _use(load_sae(at)), _sae("gated"),
        slow=True,
    ),
    Reader(
        "crosscoder_config", "config.json", "json", lambda at: _use(load_crosscoder(at)),
        _topk_crosscoder,
    ),
    Reader(
        "relu_crosscoder", "model.safetensors", "crosscoder", lambda at: _use(load_crosscoder(at)),
        _relu_crosscoder,
    ),
    Reader(
        "topk_crosscoder", "model.safetensors", "crosscoder", lambda at: _use(load_crosscoder(at)),
        _topk_crosscoder,
    ),
    Reader(
        "labels", LABELS, "json", _labels,
        _texts(
            LABELS,
            '{"columns": ["label", "kind", "precise", "recall"], '
            '"rows": [["red", "token", true, 0.5], [null, null, null, 0], ["b", "in", false, 1]]}',
        ),
    ),
    Reader(
        "preset", "preset.json", "checked lines", _preset,
        _tried("preset.json", lambda path: save_preset(PRESET, path)),
    ),
    Reader("replies", "cache.jsonl", "lines", _replies, _tried("cache.jsonl", _cache)),
    Reader("card", CARD, "json", lambda at: json.dumps(load_card(at)), _card),
    Reader(
        "training_state", "state.safetensors", "tensors", _go_on,
        _tried("state.safetensors", _state),
    ),
    Reader(
        "training_log", "training_log.jsonl", "lines", _log,
        _texts(
            "training_log.jsonl",
            '{"step": 1, "tokens": 9, "seconds": 0.5, "loss": 2.5}\n'
            '{"step": 2, "tokens": 18, "seconds": 1.5, "loss": 2.25, "recall": 0.5}\n',
        ),
    ),
    Reader(
        "text", "text.txt", "bytes", _text,
        _texts("text.txt", "Nothing to do with it. é\n"),
    ),
)  # fmt: skip
BY_NAME = {reader.name: reader for reader in READERS}

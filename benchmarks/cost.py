"""What a run costs: the model of docs/scale.md, held against what is counted and timed here, and
what it says of SimpleQA on large models.

Run: `python benchmarks/cost.py`; it writes `cost.json` and prints Markdown. Counted are rows of
generation (the engine's log), floating-point operations of matrix products (PyTorch's counter; a
product is 2 per multiplication) and bytes; timed are whole runs of Atlas. Sizes of other models are
those of their published configs; what a GPU does in a second is an assumption that is named.
"""

from __future__ import annotations

import json
import pickle
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fusion_lens import load_model
from fusion_lens.atlas import QUESTIONS, UNRELATED
from fusion_lens.executors import lean_of
from fusion_lens.experiment import run
from fusion_lens.experiment_config import ExperimentConfig
from fusion_lens.generation import GenerationConfig
from fusion_lens.models import HookedModel
from fusion_lens.preparation import TuningConfig, prepare
from fusion_lens.prompts import tokenize
from fusion_lens.questions import Question, load_questions, select_questions
from fusion_lens.results import Results
from fusion_lens.search import SearchConfig

FOLDER = Path(__file__).parent
SIMPLE_QA = 4326


@dataclass(frozen=True, slots=True)
class Size:
    """A model: parameters of its blocks, of the unembedding, and of an embedding of its own where
    it has one; the width of its queries, all layers together, and what a cache holds of a token
    (keys and values of all layers)."""

    name: str
    layers: int
    d_model: int
    blocks: float
    unembed: float
    queries: int
    cached: int
    embed: float = 0.0

    @property
    def weights(self) -> float:
        """All of them."""
        return self.blocks + self.unembed + self.embed


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens: a prompt, a completion, an explanation and a reference text with its prompt."""

    prompt: float
    completion: float
    explanation: float
    reference: float


@dataclass(frozen=True, slots=True)
class Part:
    """Rows with the tokens of all: `read` at once, of which `predicting` have logits, `written` one
    by one."""

    rows: float
    read: float
    predicting: float
    written: float


def published(
    name: str,
    *,
    layers: int,
    d_model: int,
    d_mlp: int,
    heads: tuple[int, int, int],
    vocabulary: int,
    tied: bool,
) -> Size:
    """By its config: gated MLPs, and `heads` for queries, for keys and values, and their width."""
    queries, keys, d_head = heads
    each = d_model * (2 * queries * d_head + 2 * keys * d_head + 3 * d_mlp)
    matrix = vocabulary * d_model
    return Size(
        name,
        layers,
        d_model,
        layers * each,
        matrix,
        queries=layers * queries * d_head,
        cached=2 * layers * keys * d_head,
        embed=0.0 if tied else matrix,
    )


LARGE = (
    published(
        "Gemma-2 2B",
        layers=26,
        d_model=2304,
        d_mlp=9216,
        heads=(8, 4, 256),
        vocabulary=256_000,
        tied=True,
    ),
    published(
        "Gemma-2 9B",
        layers=42,
        d_model=3584,
        d_mlp=14336,
        heads=(16, 8, 256),
        vocabulary=256_000,
        tied=True,
    ),
    published(
        "Llama-3 70B",
        layers=80,
        d_model=8192,
        d_mlp=28672,
        heads=(64, 8, 128),
        vocabulary=128_256,
        tied=False,
    ),
)


def parts(
    config: ExperimentConfig, at: Lengths, wordings: float = 0.0, unrelated: int = 0
) -> dict[str, Part]:
    """What one question costs under a run's arms. `wordings` are its paraphrases and neighbours,
    `unrelated` the tokens that divergence is measured on. Equal texts are counted as if they were
    not, and every neighbour as if it were known."""
    trials, tuned = config.tuning.search.trials, len(config.tuned_arms)
    sampled = "best_of_n" in config.arms
    told = "answer_in_prompt" in config.arms
    bare = "baseline" in config.arms or sampled

    def rows(n: float, before: float = 0.0) -> Part:
        return Part(n, n * (before + at.prompt), n, n * at.completion)

    def texts(n: float) -> Part:
        return Part(0, n * (at.prompt + at.completion), n * at.completion, 0)

    own = float(config.tuning.explanation_tokens > 0)
    made = {
        "explanation": Part(own, own * at.prompt, own, own * at.explanation),
        "means": Part(0, at.prompt + at.reference, 0, 0),
        "baseline": rows(bare),
        "best of samples": rows((trials - 1) * sampled),
        "answer in prompt": rows(told, at.reference - at.prompt),
        "searches": rows(tuned * trials),
        "fluency": texts(bare + told + (trials - 1) * sampled + tuned * trials),
        "details": texts(2 * tuned),
    }
    if config.reach:
        steered = tuned + told + (trials - 1) * sampled
        ways = tuned + told
        made["other wordings"] = rows(wordings * (1 + steered))
        made["fluency of their samples"] = texts(wordings * trials * sampled)
        made["unrelated text"] = Part(0, ways * unrelated, ways * unrelated, 0)
    return made


def operations(part: Part, size: Size, at: Lengths) -> float:
    """Of the matrix products: 2 for each parameter that a token meets, and those of attention."""
    tokens = part.read + part.written
    predicted = part.predicting + part.written
    attended = 4 * size.queries * (at.prompt + at.completion) / 2
    return tokens * (2 * size.blocks + attended) + predicted * 2 * size.unembed


def lengths_of(model: HookedModel, results: Results, items: Sequence[Any]) -> Lengths:
    """The means of a run."""
    return Lengths(
        mean(len(item.prompt.tokens) for item in items),
        mean(
            len(tokenize(model, r.completion, prepend_bos=False).tokens) + r.ended
            for r in results.records
        ),
        mean(len(tokenize(model, i.explanation, prepend_bos=False).tokens) + 1 for i in items),
        mean(len(item.reference.tokens) for item in items),
    )


def size_of(model: HookedModel) -> Size:
    """Of an opened model: from its lean module."""
    module, cfg = lean_of(model).module, model.cfg
    blocks = sum(p.numel() for n, p in module.named_parameters() if ".layers." in n)
    kv = int(getattr(cfg, "n_key_value_heads", None) or cfg.n_heads) * int(cfg.d_head)
    return Size(
        str(cfg.model_name),
        int(cfg.n_layers),
        int(cfg.d_model),
        blocks,
        int(cfg.d_vocab) * int(cfg.d_model),
        queries=int(cfg.n_layers) * int(cfg.n_heads) * int(cfg.d_head),
        cached=2 * int(cfg.n_layers) * kv,
    )


def measured(model: HookedModel, questions: list[Question], config: ExperimentConfig) -> Any:
    """A run counted, the same run timed, and what the model of its cost says."""
    with FlopCounterMode(display=False) as counter:
        run(model, questions, config, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        results = run(model, questions, config, out=folder, progress=False)
        seconds = time.perf_counter() - began
        plans = [path.stat().st_size for path in (Path(folder) / "plans").iterdir()]
        lines = (Path(folder) / "results.jsonl").stat().st_size / len(results.records)
    items, _ = prepare(model, questions, config.tuning)
    at, size = lengths_of(model, results, items), size_of(model)
    wordings = mean(len(q.paraphrases) + len(q.neighbours) for q in questions)
    unrelated = int(results.summary["unrelated_tokens"])
    said = parts(config, at, wordings, unrelated)
    n = len(questions)
    means = 2 * size.layers * size.d_model * 4
    return {
        "arms": list(config.arms),
        "questions": n,
        "trials": config.tuning.search.trials,
        "lengths": asdict(at),
        "seconds": seconds,
        "rows": {
            "said": n * sum(part.rows for part in said.values()),
            "counted": sum(results.summary["engine"]["rows"].values()),
        },
        "operations": {
            "said": n * sum(operations(part, size, at) for part in said.values()),
            "counted": counter.get_total_flops(),
        },
        "parts": {name: operations(part, size, at) for name, part in said.items()},
        "bytes": {
            "two means": means,
            "the same on its way to a worker": len(
                pickle.dumps([items[0].deltas.reference, items[0].deltas.base])
            ),
            "plan on disk": mean(plans) if plans else None,
            "result on disk": lines,
        },
    }


def products_per_second(seconds: float = 3.0) -> float:
    """Operations of matrix products of the engine's shape on this machine, all threads."""
    d = 192
    x, w, v = torch.randn(256, d), torch.randn(d, 4 * d), torch.randn(4 * d, d)
    began, n = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        x = (x @ w) @ v / 100
        n += 1
    return n * 2 * 2 * 256 * d * 4 * d / (time.perf_counter() - began)


@dataclass(frozen=True, slots=True)
class Gpu:
    """What is taken for granted of a GPU: the published peaks of an H100 SXM (bfloat16, dense), and
    the share of them that is reached. No GPU was at hand: these shares are not measured."""

    flops: float = 989e12
    bandwidth: float = 3.35e12
    memory: float = 80e9
    reached: float = 0.4
    reached_bandwidth: float = 0.6
    slots: int = 256


def simple_qa(size: Size, gpu: Gpu, config: ExperimentConfig, at: Lengths) -> dict[str, Any]:
    """Hours for all of SimpleQA, and how many GPUs a worker is. Its questions have no other
    wordings, and no unrelated text is given."""
    said = parts(config, at)
    weights = 2 * size.weights
    length = at.prompt + at.completion + 16
    slot = 2 * size.cached * length
    per_worker = max(1, int(-(-(weights + 16 * slot) // (0.9 * gpu.memory))))
    room = 0.9 * gpu.memory * per_worker - weights
    slots = max(1, min(gpu.slots, int(room / slot)))
    flops, bandwidth = gpu.reached * gpu.flops, gpu.reached_bandwidth * gpu.bandwidth
    written = sum(part.written for part in said.values())
    reading = [replace(part, written=0.0) for part in said.values()]
    step = max(
        (weights + slots * slot / 2) / bandwidth,
        slots * 2 * (size.blocks + size.unembed) / flops,
    )
    seconds = written / slots * step + sum(operations(p, size, at) for p in reading) / flops
    return {
        "model": size.name,
        "weights_gb": weights / 1e9,
        "gpus_per_worker": per_worker,
        "slots": slots,
        "cache_gb": slots * slot / 1e9,
        "tokens_read": sum(part.read for part in said.values()),
        "tokens_written": written,
        "seconds_per_question": seconds,
        "gpu_hours": SIMPLE_QA * seconds * per_worker / 3600,
        "hours": {n: SIMPLE_QA * seconds * per_worker / 3600 / n for n in (1, 8, 64)},
    }


def markdown(found: dict[str, Any]) -> str:
    """The tables of docs/scale.md."""
    lines = ["| run | rows, said | counted | 10^9 operations, said | counted | s |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, own in found["runs"].items():
        rows, done = own["rows"], own["operations"]
        lines.append(
            f"| {name} | {rows['said']:,.0f} | {rows['counted']:,} | {done['said'] / 1e9:,.0f} "
            f"| {done['counted'] / 1e9:,.0f} | {own['seconds']:.0f} |"
        )
    whole = found["runs"]["all arms and reach"]
    total = sum(whole["parts"].values())
    lines += ["", "| part | share of operations |", "| --- | ---: |"]
    lines += [f"| {name} | {own / total:.0%} |" for name, own in whole["parts"].items()]
    lines += ["", "| bytes | |", "| --- | ---: |"]
    lines += [f"| {name} | {value:,.0f} |" for name, value in whole["bytes"].items()]
    lines += [
        "",
        "| model | weights, GB | GPUs of a worker | slots | cache, GB | s a question | GPU hours "
        "| 1 GPU | 8 GPUs | 64 GPUs |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for own in found["simple_qa"]:
        hours = [
            _told(own["hours"][n]) if n >= own["gpus_per_worker"] else "too small"
            for n in (1, 8, 64)
        ]
        lines.append(
            f"| {own['model']} | {own['weights_gb']:.0f} | {own['gpus_per_worker']} "
            f"| {own['slots']} | {own['cache_gb']:.1f} | {own['seconds_per_question']:.1f} "
            f"| {own['gpu_hours']:.1f} | {' | '.join(hours)} |"
        )
    return "\n".join(lines)


def _told(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"


def measure(model: HookedModel, questions: list[Question], trials: int) -> dict[str, Any]:
    """Everything."""
    # few enough that rows fill them: idle slots are computed too
    generation = GenerationConfig(slots=16)
    tuning = TuningConfig(search=SearchConfig(trials=trials), generation=generation)
    configs = {
        "one search": ExperimentConfig(("baseline", "segmented"), tuning=tuning, reach=False),
        "all arms": ExperimentConfig(tuning=tuning, reach=False),
        "all arms and reach": ExperimentConfig(tuning=tuning, unrelated=UNRELATED),
    }
    at = Lengths(prompt=45, completion=48, explanation=48, reference=110)
    return {
        "runs": {name: measured(model, questions, config) for name, config in configs.items()},
        "products_per_second": products_per_second(),
        "gpu": asdict(Gpu()),
        "lengths": asdict(at),
        "simple_qa": [simple_qa(size, Gpu(), ExperimentConfig(), at) for size in LARGE],
    }


def main() -> None:
    """Measure, write, print."""
    questions = select_questions(load_questions(QUESTIONS), split="dev", limit=6)
    found = measure(load_model(), questions, 10)
    (FOLDER / "cost.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(markdown(found))


if __name__ == "__main__":
    main()

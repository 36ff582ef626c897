"""How many trials a second: this engine, the authors' procedure, hooks one by one, Hugging Face,
and the floor. Writes `engine.json` and a figure; `make bench` runs it.

Every variant generates the same prompts and exactly 24 new tokens, end-of-text disabled, float32;
variants are interleaved, and a figure is the median of its repeats. README.md beside this file
says what each variant is and discusses the outcome.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from floor import Products
from plotly.subplots import make_subplots
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from fusion_lens import ExperimentConfig, load_model, load_questions, run, select_questions
from fusion_lens.activations import left_padded, padded_length, record, same_shape
from fusion_lens.atlas import CHECKPOINT, QUESTIONS
from fusion_lens.deltas import make_deltas
from fusion_lens.executors import LeanModule, lean_of
from fusion_lens.generation import GenerationConfig, Row, generate
from fusion_lens.hooks import fwd_hooks
from fusion_lens.likelihood import completion_nll
from fusion_lens.models import evaluating
from fusion_lens.pictures import Figure, write_figures
from fusion_lens.plans import Step, make_plan, thirds
from fusion_lens.prompts import question_prompt, reference_prompt
from fusion_lens.search import Search

K = TypeVar("K")
HERE = Path(__file__).parent
NEW = 24
ROWS = (1, 8, 64, 256)
REPEATS = {"atlas": 9, "gpt2-small-size": 3}
TRIALS = 8
ONE_BY_ONE = 4
ARMS = ("baseline", "full", "segmented")
ALONE = ("authors", "hooks_one_by_one")
SHOWN = {
    "floor": ("floor: the engine's matrix products", "#8c8c8c", "dot"),
    "engine": ("fusion_lens", "#d55e00", "solid"),
    "engine_with_perplexity": ("fusion_lens, with perplexity", "#d55e00", "dash"),
    "hf_unsteered": ("Hugging Face, unsteered", "#0072b2", "dash"),
    "hf_batched_hook": ("Hugging Face, a hook for the batch", "#0072b2", "solid"),
    "hooks_one_by_one": ("TransformerLens, hooks one by one", "#009e73", "solid"),
    "authors": ("authors' procedure, with perplexity", "#000000", "solid"),
}


@dataclass(frozen=True)
class Bench:
    """A model twice, through the bridge and as Hugging Face opens it, and rows to generate."""

    name: str
    model: Any
    plain: Any
    rows: list[Row]

    @property
    def blocks(self) -> Sequence[torch.nn.Module]:
        """The plain model's blocks."""
        base = self.plain.base_model
        blocks: Sequence[torch.nn.Module] = base.layers if hasattr(base, "layers") else base.h
        return blocks


def main() -> None:
    """Measure everything and write it down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="atlas,gpt2-small-size")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--out", type=Path, default=HERE / "engine.json")
    parser.add_argument("--draw", action="store_true", help="only the figure, from --out")
    options = parser.parse_args()
    if options.draw:
        measured = json.loads(options.out.read_text("utf-8"))
        print(write_figures([draw(measured)], options.out.parent, html=False) or "drawn")
        return
    rows = [int(n) for n in options.rows.split(",")]
    lines: list[dict[str, Any]] = []
    details: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    for name in options.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            bench = open_bench(name, Path(folder), max(rows))
            lines += measure(bench, rows, REPEATS[name])
            if name == "atlas":
                details |= {"capture": capture(bench), "plans": plans(bench), "run": share_of_run()}
    options.out.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    options.out.with_name(f"{options.out.stem}_details.json").write_text(
        json.dumps(details, indent=1) + "\n", encoding="utf-8"
    )
    missing = write_figures([draw(lines)], options.out.parent, html=False)
    print(missing or f"written to {options.out.parent}")


def open_bench(name: str, folder: Path, n_rows: int) -> Bench:
    """A bench with as many rows, each with a plan of its own, eight of a question."""
    path = CHECKPOINT
    if name != "atlas":
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
        AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(folder)
        path = folder
    model = load_model(path)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    questions = load_questions(QUESTIONS)[: -(-n_rows // TRIALS)]
    prompts = [question_prompt(model, q.question) for q in questions]
    references = [reference_prompt(model, q.question, q.answer, "") for q in questions]
    deltas = [
        make_deltas(reference, base)
        for reference, base in zip(record(model, references), record(model, prompts), strict=True)
    ]
    coeffs = torch.rand(n_rows, 3, generator=torch.Generator().manual_seed(0)).tolist()
    segments = thirds(int(model.cfg.n_layers))
    rows = [
        Row(prompts[i // TRIALS], make_plan(deltas[i // TRIALS], coeffs[i], segments))
        for i in range(n_rows)
    ]
    return Bench(name, model, plain, rows)


def measure(bench: Bench, row_counts: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Lines of `engine.json` for one model."""
    lines = []
    works: dict[tuple[int, str], Callable[[], None]] = {}
    for n in row_counts:
        rows = bench.rows[:n]
        products = Products([*bench.model.parameters()])
        works |= {
            (n, "engine"): partial(engine, bench, rows),
            (n, "engine_with_perplexity"): partial(engine, bench, rows, score=True),
            (n, "hf_batched_hook"): partial(hugging_face, bench, rows, steered=True),
            (n, "hf_unsteered"): partial(hugging_face, bench, rows, steered=False),
            (n, "floor"): products.replay,
        }
        if bench.name == "atlas":
            works[n, "engine_with_end_of_text"] = partial(engine, bench, rows, stop_at_eos=True)
        engine(bench, rows)
        with products:
            engine(bench, rows)
    few = bench.rows[:: -(-len(bench.rows) // ONE_BY_ONE)]
    works[1, "authors"] = lambda: authors(bench, few)
    works[1, "hooks_one_by_one"] = lambda: hooks_one_by_one(bench, few)
    for (n, variant), seconds in interleaved(works, repeats).items():
        trials = len(few) if variant in ALONE else n
        rate = trials / seconds
        lines.append(
            {"model": bench.name, "rows": n, "variant": variant, "trials_per_second": rate}
        )
        print(f"{bench.name:16} {n:4} {variant:24} {rate:9.2f} trials/s", flush=True)
    return lines


def capture(bench: Bench, repeats: int = 15) -> dict[str, float]:
    """Pooling references while they are read, against reading them: tokens a second, padding
    not counted."""
    questions = load_questions(QUESTIONS)
    texts = [reference_prompt(bench.model, q.question, q.answer, q.question) for q in questions]
    lean = LeanModule(lean_of(bench.model))
    shapes = [padded_length(len(text.tokens)) for text in texts]

    def forward() -> None:
        for batch in same_shape(shapes, lambda shape: 16):
            rows = [texts[i].tokens for i in (batch + [batch[0]] * 16)[:16]]
            tokens, mask = left_padded(rows, 0, "cpu", width=shapes[batch[0]])
            lean.forward(tokens, mask, last=1)

    works = {"capture": lambda: record(bench.model, texts, batch_size=16), "forward": forward}
    spent = interleaved(works, repeats)
    n_tokens = sum(len(text.tokens) for text in texts)
    rates = {f"{name}_tokens_per_second": n_tokens / spent[name] for name in works}
    return rates | {"ratio": spent["forward"] / spent["capture"]}


def plans(bench: Bench, repeats: int = 15) -> dict[str, float]:
    """256 rows with 256 plans against 256 rows with one."""
    one = [replace(row, plan=bench.rows[0].plan) for row in bench.rows]
    spent = interleaved(
        {"one": lambda: engine(bench, one), "many": lambda: engine(bench, bench.rows)}, repeats
    )
    return {"rows": len(bench.rows), "seconds_many_over_one": spent["many"] / spent["one"]}


def share_of_run(n_questions: int = 60) -> dict[str, float]:
    """A run of dev questions, and the share of its time that goes to the sampler."""
    spent = {"ask": 0.0, "tell": 0.0}

    def timed(name: str) -> Callable[..., Any]:
        method = getattr(Search, name)

        def measured(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*args)
            finally:
                spent[name] += time.perf_counter() - began

        return measured

    model = load_model()
    questions = load_questions(QUESTIONS)
    with patch.object(Search, "ask", timed("ask")), patch.object(Search, "tell", timed("tell")):
        began = time.perf_counter()
        chosen = select_questions(questions, split="dev", limit=n_questions)
        summary = run(model, chosen, ExperimentConfig(arms=ARMS, reach=False)).summary
        seconds = time.perf_counter() - began
    return {
        "rows": summary["engine"]["rows"]["lean"],
        "seconds": seconds,
        "rows_per_second": summary["engine"]["rows"]["lean"] / seconds,
        "sampler_share": sum(spent.values()) / seconds,
    }


def interleaved(works: Mapping[K, Callable[[], Any]], repeats: int) -> dict[K, float]:
    """Median seconds of each, taken in turns."""
    seconds: dict[K, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            began = time.perf_counter()
            with torch.no_grad():
                work()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(spent) for name, spent in seconds.items()}


def draw(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """Trials a second against rows, a panel for each model."""
    names = list(dict.fromkeys(line["model"] for line in lines))
    figure = make_subplots(cols=len(names), subplot_titles=names, horizontal_spacing=0.08)
    for column, name in enumerate(names, start=1):
        for variant, (label, colour, dash) in SHOWN.items():
            points = [x for x in lines if (x["model"], x["variant"]) == (name, variant)]
            rates = [point["trials_per_second"] for point in points]
            rows = [point["rows"] for point in points]
            if variant in ALONE and points:  # does not depend on rows: drawn through all of them
                rows, rates = [min(ROWS), max(ROWS)], rates * 2
            figure.add_scatter(
                x=rows,
                y=rates,
                name=label,
                mode="lines" if variant in ALONE else "lines+markers",
                line={"color": colour, "dash": dash},
                showlegend=column == 1,
                row=1,
                col=column,
            )
    figure.update_xaxes(title_text="rows", type="log", tickvals=list(ROWS))
    ticks = [10**power * step for power in range(-1, 4) for step in (1, 2, 5)]
    figure.update_yaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    figure.update_yaxes(title_text="trials per second", col=1)
    figure.update_layout(
        title={"text": f"{NEW} new tokens a trial, float32, 2 CPU cores", "x": 0.02},
        template="plotly_white",
        font={"family": "sans-serif", "size": 14},
    )
    columns = ("model", "rows", "variant", "trials_per_second")
    return Figure("engine", figure, columns, tuple(tuple(x[c] for c in columns) for x in lines))


def engine(
    bench: Bench, rows: Sequence[Row], *, score: bool = False, stop_at_eos: bool = False
) -> None:
    """(a) One call for all rows; with `score` also the perplexity of every completion."""
    config = GenerationConfig(max_new_tokens=NEW, stop_at_eos=stop_at_eos, executor="lean")
    written = generate(bench.model, rows, config)
    assert stop_at_eos or all(len(completion.tokens) == NEW for completion in written)
    if score:
        texts = [(row.prompt, done) for row, done in zip(rows, written, strict=True)]
        completion_nll(bench.model, texts)


def authors(bench: Bench, rows: Sequence[Row]) -> None:
    """(b) One text at a time, without a cache, the mean over the sequence in every pass, and the
    perplexity of each text by itself."""
    for row in rows:
        assert row.plan is not None
        step = row.plan.steps[0]
        assert isinstance(step, Step)
        reference, coeffs = step.deltas.reference, step.layer_coeffs

        def steer(
            layer: int, hidden: Tensor, reference: Tensor = reference, coeffs: Tensor = coeffs
        ) -> Tensor:
            return hidden + coeffs[layer] * (reference[layer] - hidden.mean(dim=1, keepdim=True))

        with block_hooks(bench, steer):
            text = hf_generate(bench, [row], use_cache=False)
        logits = bench.plain(text[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits[0], text[0, 1:]).exp().item()


def hooks_one_by_one(bench: Bench, rows: Sequence[Row]) -> None:
    """(c) TransformerLens' own generate with the plan's hooks, one trial at a time."""
    for row in rows:
        assert row.plan is not None
        with evaluating(bench.model), bench.model.hooks(fwd_hooks=fwd_hooks(row.plan)):
            text = bench.model.generate(
                torch.tensor([row.prompt.tokens]),
                max_new_tokens=NEW,
                do_sample=False,
                stop_at_eos=False,
                verbose=False,
                return_type="tokens",
            )
        assert text.shape[1] == len(row.prompt.tokens) + NEW


def hugging_face(bench: Bench, rows: Sequence[Row], *, steered: bool) -> None:
    """(d) One left-padded batch, a forward hook that adds each row's own shift; (e) without it."""
    if not steered:
        hf_generate(bench, rows)
        return
    shifts = torch.stack([row.plan.shift_at("completion") for row in rows if row.plan is not None])
    with block_hooks(bench, lambda layer, hidden: hidden + shifts[:, layer, None]):
        hf_generate(bench, rows)


def hf_generate(bench: Bench, rows: Sequence[Row], *, use_cache: bool = True) -> Tensor:
    """Prompt and completion tokens of Hugging Face's greedy generate."""
    width = max(len(row.prompt.tokens) for row in rows)
    tokens = torch.zeros((len(rows), width), dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for n, row in enumerate(rows):
        tokens[n, width - len(row.prompt.tokens) :] = torch.tensor(row.prompt.tokens)
        mask[n, width - len(row.prompt.tokens) :] = 1
    text: Tensor = bench.plain.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        use_cache=use_cache,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert text.shape[1] == width + NEW
    return text


class block_hooks:  # noqa: N801
    """Inside, `steer(layer, hidden)` replaces the output of every block of the plain model."""

    def __init__(self, bench: Bench, steer: Callable[[int, Tensor], Tensor]) -> None:
        self._bench, self._steer = bench, steer
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> None:
        for layer, block in enumerate(self._bench.blocks):

            def hook(_module: Any, _args: Any, out: Any, layer: int = layer) -> Any:
                if isinstance(out, tuple):
                    return (self._steer(layer, out[0]), *out[1:])
                return self._steer(layer, out)

            self._handles.append(block.register_forward_hook(hook))

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()


if __name__ == "__main__":
    main()

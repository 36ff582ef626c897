"""How far narrower weights are from float32: what is captured, what comes next, what is written,
and what a plan tuned in float32 does under them.

Run: `make bench-drift` (`python benchmarks/drift.py [N]`); it writes `drift.json` and prints
Markdown. On Atlas' dev questions; with FUSION_LENS_TEST_DATA on stories260k too, whose weights are
trained but which answers no question: there only what is captured, what comes next and what is
written. Everything runs on hook points, every text alone: in 8-bit a row's neighbours move its
numbers, which is measured apart. Intervals are bootstraps over questions.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fusion_lens import load_model, load_questions, select_questions
from fusion_lens.activations import record
from fusion_lens.atlas import QUESTIONS
from fusion_lens.decoding import Completion, GenerationConfig, Row
from fusion_lens.deltas import Deltas, make_deltas
from fusion_lens.generation import generate
from fusion_lens.identity import identify
from fusion_lens.models import HookedModel
from fusion_lens.plans import Plan, Step
from fusion_lens.preparation import Prepared, TuningConfig, prepare, with_engine_shape
from fusion_lens.prompts import Prompt
from fusion_lens.scores import exact_match, token_overlap
from fusion_lens.search import SearchConfig
from fusion_lens.statistics import Interval, cluster_bootstrap
from fusion_lens.tuning import Job, make_segments, tune_jobs

FOLDER = Path(__file__).parent
NEW_TOKENS = 32
WIDTHS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "8-bit": {"load_in_8bit": True},
    "4-bit": {"load_in_4bit": True},
    "4-bit, rest float32": {"load_in_4bit": True, "dtype": "float32"},
}


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One question of a model: its texts as read in float32, and its plan (None: not tuned)."""

    name: str
    prompt: Prompt
    reference: Prompt
    answer: str
    plan: Plan | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What one model made of every case."""

    deltas: list[Deltas]
    logits: list[Tensor]
    completions: list[Completion]
    steered: list[Completion]


def tuned_cases(model: HookedModel, n: int, trials: int) -> tuple[list[Case], TuningConfig]:
    """Atlas' dev questions with plans tuned in float32."""
    questions = select_questions(load_questions(QUESTIONS), split="dev", limit=n)
    config = TuningConfig(search=SearchConfig(trials=trials))
    config = with_engine_shape(model, questions, config, n_rows=n * config.search.round_size)
    items, _ = prepare(model, questions, config)
    parts = make_segments("thirds", int(model.cfg.n_layers))
    found, _ = tune_jobs(model, [Job(item, parts, "segmented") for item in items], config)
    return [_case(each.job.prepared, each.plan) for each in found], config


def plain_cases(model: HookedModel, n: int) -> list[Case]:
    """The same questions as texts for a model that answers none."""
    questions = select_questions(load_questions(QUESTIONS), split="dev", limit=n)
    return [
        _case(item) for item in prepare(model, questions, TuningConfig(explanation_tokens=0))[0]
    ]


def _case(item: Prepared, plan: Plan | None = None) -> Case:
    return Case(item.question.id, item.prompt, item.reference, item.question.answer, plan)


def look(model: HookedModel, cases: Sequence[Case], config: GenerationConfig) -> Seen:
    """Deltas, next-token logits of the reference, and completions, every text alone."""
    identity = identify(model)
    deltas, logits = [], []
    for case in cases:
        pair = record(model, [case.reference, case.prompt], batch_size=1, executor="hooks")
        deltas.append(make_deltas(*pair))
        with torch.no_grad():
            logits.append(model(case.reference.to_tensor())[0].double())
    rows = [Row(case.prompt) for case in cases]
    steered = [
        Row(case.prompt, _moved(case.plan, identity)) for case in cases if case.plan is not None
    ]
    return Seen(deltas, logits, _alone(model, rows, config), _alone(model, steered, config))


def _moved(plan: Plan, identity: Any) -> Plan:
    """The very same vectors, said to be another model's: a plan is refused where weights differ."""
    moved = []
    for step in plan.steps:
        assert isinstance(step, Step)
        moved.append(replace(step, deltas=replace(step.deltas, model=identity)))
    return Plan(tuple(moved))


def _alone(model: HookedModel, rows: Sequence[Row], config: GenerationConfig) -> list[Completion]:
    one = replace(config, slots=1, executor="hooks")
    return [generate(model, [row], one)[0] for row in rows]


def compared(exact: Seen, coarse: Seen, cases: Sequence[Case]) -> dict[str, Any]:
    """Every figure of one width."""
    names = [case.name for case in cases]

    def over(values: Sequence[float], *, share: bool = False) -> dict[str, Any]:
        return _told(cluster_bootstrap(list(values), names, share=share))

    pairs = list(zip(exact.deltas, coarse.deltas, strict=True))
    kl, agree = [], []
    for full, own in zip(exact.logits, coarse.logits, strict=True):
        log_p, log_q = full.log_softmax(dim=-1), own.log_softmax(dim=-1)
        kl.append(float((log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()))
        agree.append(float((full.argmax(dim=-1) == own.argmax(dim=-1)).double().mean()))
    found: dict[str, Any] = {
        "layers": list(_per_layer(pairs)),
        "kl": over(kl),
        "top1": over(agree),
        "same_completion": over(_same(exact.completions, coarse.completions), share=True),
    }
    if coarse.steered:
        golds = [case.answer for case in cases]
        found |= {
            "same_steered": over(_same(exact.steered, coarse.steered), share=True),
            "right": over(_right(coarse.completions, golds), share=True),
            "right_steered": over(_right(coarse.steered, golds), share=True),
            "overlap": over(_overlap(coarse.completions, golds)),
            "overlap_steered": over(_overlap(coarse.steered, golds)),
        }
    return found


def _per_layer(pairs: Sequence[tuple[Deltas, Deltas]]) -> Iterator[dict[str, float]]:
    for layer in range(pairs[0][0].model.n_layers):
        cosines, errors = [], []
        for full, own in pairs:
            a, b = full.vectors[layer].double(), own.vectors[layer].double()
            cosines.append(float(torch.cosine_similarity(a, b, dim=0)))
            errors.append(float((a - b).norm() / a.norm()))
        yield {
            "cosine_median": median(cosines),
            "cosine_least": min(cosines),
            "error_median": median(errors),
            "error_most": max(errors),
        }


def _same(some: Sequence[Completion], others: Sequence[Completion]) -> list[float]:
    return [float(a.tokens == b.tokens) for a, b in zip(some, others, strict=True)]


def _right(completions: Sequence[Completion], golds: Sequence[str]) -> list[float]:
    return [float(exact_match(c.text, gold)) for c, gold in zip(completions, golds, strict=True)]


def _overlap(completions: Sequence[Completion], golds: Sequence[str]) -> list[float]:
    return [token_overlap(c.text, gold) or 0.0 for c, gold in zip(completions, golds, strict=True)]


def _told(interval: Interval) -> dict[str, Any]:
    return {name: value for name, value in asdict(interval).items() if name != "unscored"}


def neighbours(model: HookedModel, cases: Sequence[Case], config: GenerationConfig) -> float:
    """The largest difference that neighbours make to a prompt's first new logits, relative to the
    largest of them."""
    settings = replace(
        config, max_new_tokens=1, executor="hooks", slots=min(8, len(cases)), keep_logits=True
    )
    rows = [Row(case.prompt) for case in cases]
    gaps = []
    for row, own in zip(rows, generate(model, rows, settings), strict=True):
        (alone,) = generate(model, [row], settings)
        assert own.logits is not None
        assert alone.logits is not None
        gaps.append(float((own.logits - alone.logits).abs().max() / alone.logits.abs().max()))
    return max(gaps)


def measure(source: str | Path | None, n: int, trials: int) -> dict[str, Any]:
    """All widths of one model."""
    began = time.perf_counter()
    model = load_model(source)
    if source is None:
        cases, config = tuned_cases(model, n, trials)
        generation = config.generation
    else:
        cases, generation = plain_cases(model, n), GenerationConfig(max_new_tokens=NEW_TOKENS)
    exact = look(model, cases, generation)
    widths = {"float32": compared(exact, exact, cases)}
    widths["float32"]["neighbours"] = neighbours(model, cases, generation)
    for name, options in WIDTHS.items():
        narrow = load_model(source, **options)
        widths[name] = compared(exact, look(narrow, cases, generation), cases)
        widths[name]["neighbours"] = neighbours(narrow, cases, generation)
    return {
        "questions": len(cases),
        "tokens": sum(len(case.reference.tokens) for case in cases),
        "trials": trials if source is None else None,
        "widths": widths,
        "seconds": round(time.perf_counter() - began, 1),
    }


def markdown(found: dict[str, Any]) -> str:
    """A table for each model."""
    lines = []
    for model, own in found.items():
        lines += [f"{model}, {own['questions']} questions, {own['tokens']:,} tokens", ""]
        lines.append(
            "| | delta's error, median over layers (largest) | least cosine | next token the same "
            "| KL, nats/token | same completion | same, steered | overlap, steered | neighbours |"
        )
        lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        for name, width in own["widths"].items():
            layers = width["layers"]
            shown = [
                f"{median(each['error_median'] for each in layers):.2%} "
                f"({max(each['error_most'] for each in layers):.2%})",
                f"{min(each['cosine_least'] for each in layers):.5f}",
                _share(width["top1"]),
                f"{width['kl']['mean']:.1e}",
                *(
                    _share(width[key]) if key in width else "-"
                    for key in ("same_completion", "same_steered", "overlap_steered")
                ),
                f"{width['neighbours']:.1e}",
            ]
            lines.append(f"| {name} | {' | '.join(shown)} |")
        lines.append("")
    return "\n".join(lines)


def _share(interval: dict[str, Any]) -> str:
    return f"{interval['mean']:.1%} [{interval['low']:.1%}, {interval['high']:.1%}]"


def main() -> None:
    """Measure, write, print."""
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 32
    found = {"Atlas": measure(None, n, 30)}
    data = os.environ.get("FUSION_LENS_TEST_DATA")
    if data:
        found["stories260k"] = measure(Path(data) / "models" / "stories260k", n, 0)
    (FOLDER / "drift.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(markdown(found))


if __name__ == "__main__":
    main()

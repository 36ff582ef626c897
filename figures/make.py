"""Remake the figures and the README's tables from a finished run of Atlas: `make figures`.

Each picture lies beside the rows it shows, as JSON. Those of one question are of the question whose
gain in objective is the median of all that the segmented arm steered; those of methods are of a
few contrast texts, to show what such a picture looks like. The blocks of README.md
between `<!-- name -->` and `<!-- end -->` are rewritten from the same files, so that text and data
cannot drift apart.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from fusion_lens import load_model, load_plan, load_questions, load_results, tune
from fusion_lens.atlas import CONTRASTS, QUESTIONS
from fusion_lens.attribution import attribute
from fusion_lens.behaviours import Behaviour, Way
from fusion_lens.contrasts import KINDS, PARTS, load_contrasts
from fusion_lens.decoding import Row
from fusion_lens.front_plots import UnitsPoint
from fusion_lens.gate_values import gate_values
from fusion_lens.generation import generate
from fusion_lens.logit_lens import logit_lens
from fusion_lens.method_bench import compare_methods
from fusion_lens.method_suite import Suite
from fusion_lens.methods.dsas import gated
from fusion_lens.models import HookedModel
from fusion_lens.pictures import Figure, write_figures
from fusion_lens.plans import Plan, Step
from fusion_lens.plots import (
    plot_front,
    plot_fronts,
    plot_gate,
    plot_importance,
    plot_layer_cosines,
    plot_layer_features,
    plot_logit_lens,
    plot_question_cosines,
    plot_search,
    plot_suggestion,
    plot_token_features,
    plot_token_shifts,
    plot_tokens,
    plot_top_features,
    plot_units,
    plot_units_curve,
    run_figures,
)
from fusion_lens.preparation import prepare
from fusion_lens.prompts import tokenize
from fusion_lens.questions import select_questions, stratified
from fusion_lens.report import lender_lines, sections, tuned_lines
from fusion_lens.results import Result, Results, plan_path
from fusion_lens.shelves import labels_of, open_dictionaries
from fusion_lens.statistics import cluster_bootstrap
from fusion_lens.suggestions import suggest
from fusion_lens.teacher_forcing import Text, gold_text
from fusion_lens.units import Momenta, random_ranking, ranking_by_mean, unit_mask

FIGURES = Path(__file__).parent
README = FIGURES.parent / "README.md"
RUN = FIGURES.parent / "runs" / "atlas"
PROBES = FIGURES.parent / "fusion_lens" / "atlas" / "probes.json"

TOKENS = 32
"""What Atlas needs for its answer about a date."""


def readme_blocks(summary: dict[str, object], probes: dict[str, object]) -> dict[str, str]:
    """The generated blocks of the README by name."""
    tables = [f"**{part.title}**\n\n{part.to_markdown()}" for part in sections(summary)]
    lines = [f"- {line}" for line in (*tuned_lines(summary), *lender_lines(summary))]
    return {
        "results": "\n\n".join([*tables, "\n".join(lines)]),
        "probes": probe_table(probes),
    }


def probe_table(probes: dict[str, Any]) -> str:
    """The probes of `probes.json` as Markdown."""
    rows = [
        f"| {name} | {share['share']:.1%} "
        f"| {share['interval'][0]:.1%} to {share['interval'][1]:.1%} "
        f"| {share['hits']} / {share['n']} |"
        for name, share in probes["probes"].items()
    ]
    return "\n".join(
        ["| probe | share | 95 % (Wilson) | hits / n |", "| --- | ---: | ---: | ---: |", *rows]
    )


def with_blocks(readme: str, blocks: dict[str, str]) -> str:
    """`readme` with every generated block replaced."""
    for name, text in blocks.items():
        readme = _with_block(readme, name, text)
    return readme


def _with_block(readme: str, name: str, text: str) -> str:
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    readme, count = pattern.subn(lambda m: f"{m[1]}{text}\n{m[2]}", readme)
    assert count == 1, name
    return readme


def question_figures(model: HookedModel, results: Results) -> list[Figure]:
    """What the run kept of one question and of all, and what takes the model again: cosines, the
    logit lens, one search, one plan's features."""
    by_key = {(record.question_id, record.arm): record for record in results.records}
    steered = [
        record for record in results.records if record.arm == "segmented" and record.injected_norm
    ]

    def gain(record: Result) -> float:
        return record.objective - by_key[record.question_id, "baseline"].objective

    example = sorted(steered, key=gain)[len(steered) // 2].question_id
    detail = next(each for each in results.details if each.question_id == example)
    questions = {question.id: question for question in load_questions(QUESTIONS)}
    asked = [
        replace(questions[record.question_id], explanation=record.explanation) for record in steered
    ]
    prepared, failures = prepare(model, asked)
    assert not failures
    plans = [load_plan(plan_path(RUN, item.question.id, "segmented")) for item in prepared]
    pairs = list(zip(prepared, plans, strict=True))
    deltas = {item.question.id: item.deltas for item in prepared}
    lenses = [
        logit_lens(model, [gold_text(model, item, plan if on else None) for item, plan in pairs])
        for on in (False, True)
    ]
    tuned = tune(model, next(q for q in asked if q.id == example), progress=False)
    text = Text(tuned.job.prepared.prompt, tuned.best.completion.tokens, tuned.plan)
    shelved = open_dictionaries(["atlas-crosscoder"], model)
    (found,) = attribute(model, [each.dictionary for each in shelved], [text])
    labels = labels_of(shelved, found, 15)
    return [
        plot_layer_cosines(deltas),
        plot_question_cosines(deltas),
        plot_logit_lens(*lenses),
        plot_tokens(detail.captured, detail.steered),
        plot_token_shifts(detail.traces),
        plot_search(tuned.tuned),
        plot_front(tuned.tuned),
        plot_importance(tuned.tuned),
        plot_top_features(found, labels=labels),
        plot_layer_features(found, labels=labels),
        plot_token_features(found, labels=labels),
    ]


def method_figures(model: HookedModel) -> list[Figure]:
    """Units, gates and fronts, of ten contrast texts of each part and kind."""
    examples = load_contrasts(CONTRASTS / "sources.jsonl")
    some = [
        each
        for part in PARTS
        for kind in KINDS
        for each in [own for own in examples if (own.part, own.kind) == (part, kind)][:10]
    ]
    suite = Suite(model, [each for each in some if each.part == "fit"])
    report = [each for each in some if each.part == "report"]
    (line,) = suite.lines("generic", report)
    strongest, plan = line.ways[-2].plans[0], line.ways[2].plans[0]
    found = suite.momenta("resid_post")
    return [
        plot_units(unit_mask(found.ranking, 100, found.shape), found),
        gate_figure(model, gated(plan, suite.gate("resid_post")), report[0].prompt),
        plot_fronts(
            compare_methods(
                model, some, methods=("generic",), max_new_tokens=TOKENS, progress=False
            )
        ),
        plot_units_curve(
            units_curve(Behaviour(model, report, max_new_tokens=TOKENS), strongest, found)
        ),
    ]


def suggestion_figure(model: HookedModel) -> Figure:
    """The sweep that `fusion-lens suggest` makes as it comes."""
    dev = select_questions(load_questions(QUESTIONS), split="dev")
    return plot_suggestion(suggest(model, stratified(dev, 8, 0), progress=False))


def gate_figure(model: HookedModel, plan: Plan, text: str) -> Figure:
    """What a gated plan's gate says to a prompt and to what it writes behind it."""
    prompt = tokenize(model, text)
    (completion,) = generate(model, [Row(prompt, plan)])
    ((values,),) = gate_values(model, [Text(prompt, completion.tokens, plan)])
    return plot_gate(values.values, values.str_tokens, len(prompt.tokens))


def units_curve(behaviour: Behaviour, plan: Plan, found: Momenta) -> list[UnitsPoint]:
    """The effect of the first units of three rankings, and of all."""
    (step,) = plan.steps
    assert isinstance(step, Step)
    rankings = {
        "consistency": found.ranking,
        "mean difference": ranking_by_mean(found),
        "random": random_ranking(found.shape, seed=0),
    }
    wanted = [(name, k) for name in rankings for k in (10, 30, 100, 300, 700)]
    masks = [unit_mask(rankings[name], k, found.shape) for name, k in wanted]
    ways = [Way((Plan((replace(step, units=units),)),)) for units in masks]
    seen = behaviour.observe([*ways, Way((plan,))], paraphrased=False, likelihood=False)
    subjects = [source.subject or source.id for source in behaviour.sources]
    points = []
    for (name, k), own in zip([*wanted, ("whole block", None)], seen, strict=True):
        effect = cluster_bootstrap(own.effect, subjects, share=True)
        points.append(UnitsPoint(name, k, effect.mean, effect.low, effect.high, effect.n))
    return points


def main() -> None:
    """Read the run; write pictures, data and the README's blocks."""
    results = load_results(RUN)
    for stale in (*FIGURES.glob("*.png"), *FIGURES.glob("*.json")):
        stale.unlink()
    model = load_model()
    figures = [
        *run_figures(results),
        *question_figures(model, results),
        *method_figures(model),
        suggestion_figure(model),
    ]
    reason = write_figures(figures, FIGURES, html=False, data=True)
    if reason is not None:
        sys.exit(reason)
    shutil.copy(RUN / "summary.json", FIGURES / "summary.json")
    probes = json.loads(PROBES.read_text(encoding="utf-8"))
    blocks = readme_blocks(results.summary, probes)
    README.write_text(with_blocks(README.read_text(encoding="utf-8"), blocks), encoding="utf-8")


if __name__ == "__main__":
    main()

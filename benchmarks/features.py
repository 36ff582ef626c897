"""What are tuned plans made of, and do those parts do the work? On Atlas' test questions.

Run: `make bench-features` (`python benchmarks/features.py [N [FOLDER]]`); it writes `features.json`
and figures, and prints Markdown. Every question is tuned (segmented, the defaults of `run`), its
plan taken apart by the shipped SAEs and by the crosscoder, and

- *named*: does one of the ten largest features of a dictionary have a label that names a word of
  the gold answer, by three rules? Against the same share for the delta of another question (that of
  the `mismatched` control), injected with the same coefficients into the same text and compared
  with the same gold answer.
- *faithful*: how much of the plan's effect on the gold answer's log-probability the largest
  features have, against random ones of equal norm (`fusion_lens.faithfulness`).

Questions whose search ends with the zero plan have nothing to take apart; they are counted.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median_high
from typing import Any

from fusion_lens import TuningConfig, load_model, load_questions, select_questions
from fusion_lens.atlas import QUESTIONS
from fusion_lens.attribution import Attribution, attribute
from fusion_lens.engine_log import EngineLog
from fusion_lens.faithfulness import Case, Faithfulness, faithfulness
from fusion_lens.feature_plots import plot_faithfulness
from fusion_lens.golds import FUNCTION_WORDS
from fusion_lens.lenders import Lenders, Ready, gathered
from fusion_lens.models import HookedModel
from fusion_lens.pictures import write_figures
from fusion_lens.plans import make_plan, thirds
from fusion_lens.preparation import prepare, with_engine_shape
from fusion_lens.scores import words
from fusion_lens.shelves import Label, Shelved, open_dictionaries
from fusion_lens.statistics import compare, holm
from fusion_lens.teacher_forcing import Text
from fusion_lens.tuning import Job, TunedPlan, tune_jobs

FOLDER = Path(__file__).parent
_QUOTED = re.compile(r"'([^']*)'")
TOP = 10
SHELVES = ("atlas-sae", "atlas-crosscoder")


def tuned_plans(
    model: HookedModel, lenders: Lenders, names: Sequence[str], config: TuningConfig
) -> list[TunedPlan]:
    """The segmented plan of every question."""
    segments = thirds(int(model.cfg.n_layers))
    jobs = [Job(lenders.prepared[name], segments, "segmented") for name in names]
    return tune_jobs(model, jobs, config)[0]


def names_gold(label: Label, answer: str) -> bool:
    """Whether a label of an entity names a word of the answer: its last word is one of them ("month
    March", "place lead Upper")."""
    return label.kind == "entity" and label.text.split()[-1] in answer.split()


def names_gold_precisely(label: Label, answer: str) -> bool:
    """The same of a label that holds on held-out text."""
    return label.precise and names_gold(label, answer)


def tells_gold(label: Label, answer: str) -> bool:
    """Whether a precise label spells a word of the answer, be it as a mere token (`' March'`,
    `before ' March'`); function words do not count."""
    told = {word for quoted in _QUOTED.findall(label.text) for word in words(quoted)}
    shared = told & ({*words(answer)} - FUNCTION_WORDS)
    return label.precise and (bool(shared) or names_gold(label, answer))


RULES = {
    "entity": names_gold,
    "entity, precise label": names_gold_precisely,
    "any kind, precise label": tells_gold,
}


def is_named(found: Attribution, shelved: Sequence[Shelved], answer: str, rule: Any) -> bool:
    """Whether the rule holds for one of the ten largest features of any of the dictionaries, and
    there is more of it."""
    labels = {each.dictionary.card.name: each.labels for each in shelved}
    top = (each for effects in found.effects for each in effects.top(TOP))
    return any(
        each.effect > 0
        and each.feature in labels[each.dictionary]
        and rule(labels[each.dictionary][each.feature], answer)
        for each in top
    )


def named_shares(
    model: HookedModel,
    shelved: Sequence[Shelved],
    plans: Sequence[TunedPlan],
    lenders: Lenders,
) -> dict[str, Any]:
    """Own against mismatched delta, by every rule."""
    dictionaries = [each.dictionary for each in shelved]
    own, lent = [], []
    for tuned in plans:
        item, step = tuned.job.prepared, tuned.plan.steps[0]
        donated = lenders.lend("mismatched", item, model)
        assert donated is not None
        mismatched = make_plan(donated, step.coeffs, step.segments)
        text = Text(item.prompt, tuned.best.completion.tokens, tuned.plan)
        own.append(text)
        lent.append(replace(text, plan=mismatched))
    found = [attribute(model, dictionaries, texts) for texts in (own, lent)]
    made = {}
    for name, rule in RULES.items():
        own_hits, lent_hits = (
            [
                float(is_named(each, shelved, tuned.job.prepared.question.answer, rule))
                for each, tuned in zip(side, plans, strict=True)
            ]
            for side in found
        )
        asked = [tuned.job.prepared.question for tuned in plans]
        subjects = [question.subject or question.id for question in asked]
        comparison = compare(
            own_hits,
            lent_hits,
            subjects,
            names=("own", "mismatched"),
            metric=name,
            share=True,
            binary=True,
        )
        made[name] = {
            "own": sum(own_hits) / len(own_hits),
            "mismatched": sum(lent_hits) / len(lent_hits),
            "comparison": comparison,
        }
    return made


def described(found: Sequence[Attribution]) -> dict[str, float]:
    """Medians over questions of how much of a change is explained."""
    return {
        "relative_error": _middle([each.relative_error for each in found]),
        "cosine": _middle([each.cosine for each in found]),
        "largest_gap": max(effects.gap for each in found for effects in each.effects),
    }


def _middle(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    assert len(known) == len(values), "every plan steers"
    return median_high(known)


def markdown(name: str, result: dict[str, Any], measured: Faithfulness) -> str:
    """The curve after the question, as a table."""
    lines = [
        f"**{name}**, n = {result['n']}",
        "",
        "| part | nats | of the plan's | random: nats | of the plan's | above random |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for part in ("full", "without error", "error"):
        nats, ratio = measured.interval(part), measured.ratio(part)
        lines.append(f"| {part} | {_shown(nats)} | {_shown(ratio, '{:.0%}')} | | | |")
    for k in sorted({gain.k for gain in measured.gains} - {0}):
        cells = [
            *(_shown(measured.interval("top", k)), _shown(measured.ratio("top", k), "{:.0%}")),
            *(
                _shown(measured.interval("random", k)),
                _shown(measured.ratio("random", k), "{:.0%}"),
            ),
            _shown(measured.margin(k)),
        ]
        lines.append(f"| top {k} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def correct(result: dict[str, Any]) -> None:
    """Holm's correction over all rules and dictionaries, and a line for each."""
    named = [(name, rule, own) for name in SHELVES for rule, own in result[name]["named"].items()]
    for (name, rule, own), comparison in zip(
        named, holm([own["comparison"] for _, _, own in named]), strict=True
    ):
        own["comparison"] = asdict(comparison)
        print(
            f"{name}, {rule}: {own['own']:.1%} own, {own['mismatched']:.1%} mismatched, p ", end=""
        )
        print(f"{comparison.p:.2g}, corrected {comparison.p_holm:.2g}")


def _shown(interval: Any, form: str = "{:+.2f}") -> str:
    values = [form.format(value) for value in (interval.mean, interval.low, interval.high)]
    return f"{values[0]} [{values[1]}, {values[2]}]"


def main() -> None:
    """Tune, take apart, measure, write."""
    limit = int(sys.argv[1]) if len(sys.argv) > 1 else 120
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else FOLDER
    began = time.perf_counter()
    model = load_model()
    available = load_questions(QUESTIONS)
    split = select_questions(available, split="test")
    asked = split[:limit]
    config = with_engine_shape(model, available, TuningConfig(), n_rows=5 * len(asked))
    result: dict[str, Any] = {"questions": len(asked), "top": TOP}
    ordered = sorted(split, key=lambda question: question.id)
    ready = Ready(*prepare(model, ordered, config), EngineLog())
    lending = {question.id for question in split}
    with gathered([ready], lending, seed=config.search.seed) as lenders:
        tuned = tuned_plans(model, lenders, [question.id for question in asked], config)
        plans = [each for each in tuned if each.plan.injected_norm]
        result["zero_plans"] = len(tuned) - len(plans)
        cases = [case for each in plans if (case := Case.of(model, each, config)) is not None]
        for name in SHELVES:
            shelved = open_dictionaries([name], model)
            dictionaries = [each.dictionary for each in shelved]
            texts = [
                Text(each.job.prepared.prompt, each.best.completion.tokens, each.plan)
                for each in plans
            ]
            measured = faithfulness(model, dictionaries, cases)
            result[name] = {
                "n": len(cases),
                **described(attribute(model, dictionaries, texts)),
                "named": named_shares(model, shelved, plans, lenders),
                "faithfulness": measured.to_dict(),
            }
            print(markdown(name, result[name], measured))
            print(f"\nrank correlation {_shown(measured.correlation)}; random contributions")
            print(f"multiplied by {measured.factors}\n", flush=True)
            figure = replace(plot_faithfulness(measured), name=f"features_{name}")
            write_figures([figure], out, html=False)
    correct(result)
    result["seconds"] = round(time.perf_counter() - began, 1)
    (out / "features.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

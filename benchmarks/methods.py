"""When, where and which dimensions: gates, units and masks against what they should beat, on Atlas.

Run: `make bench-methods` (`python benchmarks/methods.py [gates|units|fusion ...]`); it writes
`methods_gates.json`, `methods_units.json`, `methods_fusion.json` and figures, and prints Markdown.
Three seeds; each deals the people of the contrast sets to fit, choose and report anew (the first
leaves them as shipped). Figures are pooled over seeds, intervals by cluster bootstrap over people.

- *gates*: four methods of `compare-methods` on `sources`, the gated form against the ungated one,
  and for two of them against a gate of permuted labels and a constant gate of the same mean: what
  is kept at equal effect. (`fusion-lens compare-methods` has all methods, on one seed.)
- *units*: AUSteer with a growing number of units, chosen by consistency, by mean difference, or at
  random; the share of pairs whose right text is likelier, at three sites on `sources` and at
  resid_post on `context`, and effect and damage of what is written on `sources`.
- *fusion*: runs of the test questions with the arms `segmented`, `masked` and `gated`; what they
  keep is counted on neighbours about people that the gate was not fitted on. The mask's search is
  also made in units of a random order.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from fusion_lens import load_model, load_questions, select_questions
from fusion_lens.atlas import CONTRASTS, QUESTIONS, UNRELATED
from fusion_lens.atlas.world import WORLD_SEED, make_world
from fusion_lens.behaviours import Behaviour, Observed, Way
from fusion_lens.contrast_texts import example_texts
from fusion_lens.contrasts import Example, load_contrasts, of_kind, require_parts
from fusion_lens.experiment import run
from fusion_lens.experiment_config import ExperimentConfig
from fusion_lens.front_plots import UnitsPoint, plot_units_curve
from fusion_lens.fronts import Sweep, matched
from fusion_lens.method_bench import MethodBench, balance, compare_methods
from fusion_lens.method_suite import STRENGTHS, Suite, line_name
from fusion_lens.models import HookedModel
from fusion_lens.pictures import write_figures
from fusion_lens.preparation import TuningConfig, prepare, seed_of, with_engine_shape
from fusion_lens.question_gates import fit_question_gate
from fusion_lens.questions import Neighbour, Question
from fusion_lens.results import Result
from fusion_lens.search import SearchConfig
from fusion_lens.segments import thirds
from fusion_lens.statistics import cluster_bootstrap, compare
from fusion_lens.teacher_forcing import Text, log_probs
from fusion_lens.tuning import Job, TunedPlan, tune_jobs
from fusion_lens.units import random_ranking, ranking_by_mean

FOLDER = Path(__file__).parent
SEEDS = (0, 1, 2)
LEVELS = (0.25, 0.5, 0.75, 0.9)
CONTROLLED = ("generic", "caa")
OTHERS = ("austeer", "fusion")
UNITS = (1, 3, 12, 30, 100, 300, 1152)
FEW = (1, 12, 100, 1152)
SITES = ("resid_post", "attn_z", "mlp_out")
ARMS = ("baseline", "segmented", "masked", "gated")
METRICS = ("objective", "overlap", "transfer_exact_match", "neighbours_kept", "kl_unrelated")
SOUGHT = ("objective", "overlap")
RANGES = (1.5,)


def dealt(examples: Sequence[Example], seed: int) -> list[Example]:
    """The same examples with their people dealt to the parts anew, as many of each sort of person
    (by what kinds and groups of text they are in) to each part as before; seed 0 leaves them."""
    if seed == 0:
        return list(examples)
    sorts: dict[str, set[tuple[str, str | None]]] = {}
    part_of: dict[str, str | None] = {}
    for each in examples:
        assert each.subject is not None
        sorts.setdefault(each.subject, set()).add((each.kind, each.group))
        part_of[each.subject] = each.part
    alike: dict[frozenset[tuple[str, str | None]], list[str]] = {}
    for subject, sort in sorted(sorts.items()):
        alike.setdefault(frozenset(sort), []).append(subject)
    new: dict[str, str | None] = {}
    rng = random.Random(f"parts/{seed}")
    for _, subjects in sorted(alike.items(), key=lambda item: item[1]):
        parts = [part_of[subject] for subject in subjects]
        rng.shuffle(parts)
        new |= dict(zip(subjects, parts, strict=True))
    return [replace(each, part=new[str(each.subject)]) for each in examples]


def shipped(name: str, seed: int) -> list[Example]:
    """A contrast set with its people dealt by the seed."""
    return dealt(load_contrasts(CONTRASTS / f"{name}.jsonl"), seed)


def gates(model: HookedModel) -> dict[str, Any]:
    """With gates, with their controls, and without, on `sources`."""
    benches = []
    for seed in SEEDS:
        examples = shipped("sources", seed)
        measure = partial(
            compare_methods,
            model,
            examples,
            units=(100,),
            max_new_tokens=40,
            all_transfer=False,
            seed=seed,
            progress=False,
        )
        rich = measure(methods=CONTROLLED, gates=("dsas", "permuted", "constant"))
        plain = measure(methods=OTHERS)
        joined = (*rich.reported, *plain.reported[1:])
        points = (*rich.points, *plain.points[1:])
        benches.append(replace(rich, reported=joined, points=points))
        print(f"gates, seed {seed}: done", file=sys.stderr, flush=True)
    names = [own.line.name for own in benches[0].reported if _everywhere(benches, own.line.name)]
    return {
        "seeds": [bench.to_json() for bench in benches],
        "chosen": [pooled_point(benches, name) for name in names],
        "matched": [
            row
            for name in names
            if name.endswith("+ dsas gate")
            for other in against(name)
            if other in names
            for row in pooled_matched(benches, name, other)
        ],
    }


def against(gated: str) -> list[str]:
    """What a gated line is held against."""
    base = gated.removesuffix(" + dsas gate")
    return [base, line_name(base, "permuted"), line_name(base, "constant")]


def _everywhere(benches: Sequence[MethodBench], name: str) -> bool:
    return all(any(own.line.name == name for own in bench.reported) for bench in benches)


def pooled_point(benches: Sequence[MethodBench], name: str) -> dict[str, Any]:
    """A line at the strength that each seed chose for it, over the texts of all seeds."""
    own = [bench.line(name) for bench in benches]
    seen: list[Observed] = [line.observed[line.chosen] for line in own]
    subjects = {
        "effect": [name for bench in benches for name in bench.of_sources],
        "kept": [name for bench in benches for name in bench.of_controls],
    }
    row: dict[str, Any] = {
        "method": name,
        "variants": [line.line.variant for line in own],
        "strengths": [line.line.strengths[line.chosen] for line in own],
        "n_scalars": [line.line.n_scalars for line in own],
        "seconds": [round(line.line.seconds, 2) for line in own],
    }
    for metric, of in (
        ("effect", "effect"),
        ("transfer", "effect"),
        ("wanted", "effect"),
        ("kept", "kept"),
        ("marked", "kept"),
    ):
        values = [value for each in seen for value in getattr(each, metric)]
        row[metric] = asdict(cluster_bootstrap(values, subjects[of], share=True))
    nlls = [value for each in seen for value in each.nll]
    row["nll"] = asdict(cluster_bootstrap(nlls, subjects["effect"]))
    return row


def pooled_matched(benches: Sequence[MethodBench], a: str, b: str) -> list[dict[str, Any]]:
    """Two lines at equal effect, over the texts of all seeds."""

    def joined(name: str) -> Sweep:
        sweeps = [bench.line(name).sweep for bench in benches]
        return Sweep(
            *(
                tuple(
                    tuple(value for values in at for value in values)
                    for at in zip(*(getattr(sweep, side) for sweep in sweeps), strict=True)
                )
                for side in ("effect", "kept")
            )
        )

    of_sources = [name for bench in benches for name in bench.of_sources]
    of_controls = [name for bench in benches for name in bench.of_controls]
    rows = matched(joined(a), joined(b), of_sources, of_controls, LEVELS)
    return [{"a": a, "b": b, **_renamed(asdict(row))} for row in rows]


def _renamed(row: dict[str, Any]) -> dict[str, Any]:
    return {{"a": "kept_a", "b": "kept_b"}.get(key, key): value for key, value in row.items()}


def units(model: HookedModel) -> dict[str, Any]:
    """AUSteer against other choices of as many units."""
    accuracy, written = [], []
    for seed in SEEDS:
        for name in ("sources", "context"):
            parts = require_parts(shipped(name, seed))
            suite = Suite(model, parts["fit"], seed=seed)
            sites = SITES if name == "sources" else SITES[:1]
            found = accuracies(suite, parts, sites)
            accuracy += [{"set": name, "seed": seed, **row} for row in found]
            if name == "sources":
                written += [{"seed": seed, **row} for row in effects(suite, parts)]
        print(f"units, seed {seed}: done", file=sys.stderr, flush=True)
    return {"accuracy": pooled_accuracy(accuracy), "written": pooled_written(written)}


def rankings(seed: int) -> dict[str, Any]:
    """How units are chosen, by name."""
    return {
        "consistency": None,
        "mean difference": ranking_by_mean,
        "random": lambda found: random_ranking(found.shape, seed),
    }


def accuracies(
    suite: Suite, parts: dict[str, list[Example]], sites: Sequence[str]
) -> list[dict[str, Any]]:
    """Is the target's text likelier than the source's? alpha is chosen by that share, then by the
    mean margin, on "choose"."""
    texts = {}
    for part in ("choose", "report"):
        sides = [of_kind(parts[part], kind) for kind in ("target", "source")]
        texts[part] = [example_texts(suite.model, side) for side in sides]
    subjects = [each.subject for each in of_kind(parts["report"], "source")]
    rows = []
    unsteered = _margins(suite.model, texts["report"], None)
    rows.append(_row("unsteered", "", 0, 0.0, unsteered, subjects))
    for site in sites:
        for ranking, order in rankings(suite.seed).items():
            for k in UNITS if site == SITES[0] else FEW:
                if k == UNITS[-1] and ranking != "consistency":
                    continue
                (plan,) = suite.austeer(site, k, order)
                tried = {
                    alpha: _margins(suite.model, texts["choose"], plan * alpha)
                    for alpha in STRENGTHS["austeer"]
                }
                best = max(tried, key=lambda alpha: (_right(tried[alpha]), fmean(tried[alpha])))
                found = _margins(suite.model, texts["report"], plan * best)
                rows.append(_row(site, ranking, k, best, found, subjects))
    return rows


def _margins(model: HookedModel, sides: Sequence[Sequence[Text]], plan: Any) -> list[float]:
    right, wrong = (log_probs(model, [replace(text, plan=plan) for text in own]) for own in sides)
    return [a - b for a, b in zip(right, wrong, strict=True)]


def _right(margins: Sequence[float]) -> float:
    return fmean(margin > 0 for margin in margins)


def _row(
    site: str,
    ranking: str,
    k: int,
    alpha: float,
    margins: Sequence[float],
    subjects: Sequence[str | None],
) -> dict[str, Any]:
    return {
        "site": site,
        "ranking": ranking,
        "k": k,
        "alpha": alpha,
        "right": [float(margin > 0) for margin in margins],
        "margin": list(margins),
        "subjects": list(subjects),
    }


def effects(suite: Suite, parts: dict[str, list[Example]]) -> list[dict[str, Any]]:
    """Effect and what is kept where text is written, at resid_post and the alpha of the largest
    harmonic mean of the two on "choose"."""
    choose, report = (
        Behaviour(suite.model, parts[name], max_new_tokens=40) for name in ("choose", "report")
    )
    rows = []
    for site in SITES[:1]:
        for ranking, order in rankings(suite.seed).items():
            for k in FEW:
                if k == FEW[-1] and ranking != "consistency":
                    continue
                (plan,) = suite.austeer(site, k, order)
                alphas = STRENGTHS["austeer"]
                tried = choose.observe(
                    [Way((plan * alpha,)) for alpha in alphas], paraphrased=False, likelihood=False
                )
                scores = [balance(own) for own in tried]
                best = alphas[scores.index(max(scores))]
                (seen,) = report.observe([Way((plan * best,))])
                rows.append(
                    {
                        "site": site,
                        "ranking": ranking,
                        "k": k,
                        "alpha": best,
                        "effect": seen.effect,
                        "kept": seen.kept,
                        "transfer": seen.transfer,
                        "of_sources": [each.subject for each in report.sources],
                        "of_controls": [each.subject for each in report.controls],
                    }
                )
    return rows


def pooled_accuracy(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over seeds."""
    made = []
    for key, own in _grouped(rows, ("set", "site", "ranking", "k")):
        subjects = [name for row in own for name in row["subjects"]]
        values = [value for row in own for value in row["right"]]
        margins = [value for row in own for value in row["margin"]]
        made.append(
            {
                **key,
                "alphas": [row["alpha"] for row in own],
                "accuracy": asdict(cluster_bootstrap(values, subjects, share=True)),
                "margin": asdict(cluster_bootstrap(margins, subjects)),
            }
        )
    return made


def pooled_written(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over seeds."""
    made = []
    for key, own in _grouped(rows, ("site", "ranking", "k")):
        pooled: dict[str, Any] = {**key, "alphas": [row["alpha"] for row in own]}
        for metric, of in (
            ("effect", "of_sources"),
            ("transfer", "of_sources"),
            ("kept", "of_controls"),
        ):
            values = [value for row in own for value in row[metric]]
            subjects = [name for row in own for name in row[of]]
            pooled[metric] = asdict(cluster_bootstrap(values, subjects, share=True))
        made.append(pooled)
    return made


def _grouped(
    rows: Sequence[dict[str, Any]], names: Sequence[str]
) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Rows that are alike in `names`, in the order met."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return [(dict(zip(names, key, strict=True)), own) for key, own in groups.items()]


def fusion(model: HookedModel) -> dict[str, Any]:
    """Masked and gated injection against plain segmented, on the test questions. The gate is fitted
    on neighbours about one half of the people that Atlas knows, and those about the other half are
    what must be kept."""
    available = load_questions(QUESTIONS)
    known = [person.name for person in make_world(WORLD_SEED).known]
    met, unmet = known[: len(known) // 2], known[len(known) // 2 :]
    asked = about(select_questions(available, split="test", limit=60), unmet)
    donors = select_questions(available, split="test")
    gate = fit_question_gate(model, about(select_questions(available, split="dev", limit=100), met))
    made: dict[str, Any] = {
        "gate": gate.to_dict(),
        "neighbours": sum(len(question.neighbours) for question in asked),
        "ranges": {},
    }
    for high in RANGES:
        records: list[Result] = []
        chance: list[TunedPlan] = []
        for seed in SEEDS:
            search = SearchConfig(seed=seed, high=high)
            config = ExperimentConfig(
                arms=ARMS, tuning=TuningConfig(search=search), unrelated=UNRELATED
            )
            results = run(
                model, asked, config, pool=available, donors=donors, gate=gate, progress=False
            )
            records += results.records
            chance += in_random_units(model, asked, config.tuning)
            print(f"fusion, up to {high}, seed {seed}: done", file=sys.stderr, flush=True)
        made["ranges"][str(high)] = summarised(records, chance)
    return made


def about(questions: Sequence[Question], people: Sequence[str]) -> list[Question]:
    """The questions, each with those of its neighbours alone that are about one of the people."""

    def of_them(question: Question) -> tuple[Neighbour, ...]:
        return tuple(
            own for own in question.neighbours if any(name in own.question for name in people)
        )

    return [replace(question, neighbours=of_them(question)) for question in questions]


def in_random_units(
    model: HookedModel, asked: Sequence[Question], config: TuningConfig
) -> list[TunedPlan]:
    """The search of `masked`, in units of a random order, another for every question."""
    config = with_engine_shape(model, asked, config, n_rows=config.search.round_size * len(asked))
    prepared, _ = prepare(model, asked, config)
    shape = int(model.cfg.n_layers), int(model.cfg.d_model)
    jobs = []
    for item in prepared:
        ranking = random_ranking(shape, seed_of(config.search.seed, item.question.id))
        jobs.append(Job(item, thirds(shape[0]), "masked", ranking=ranking))
    tuned, _ = tune_jobs(model, jobs, config)
    return tuned


def summarised(records: Sequence[Result], chance: Sequence[TunedPlan]) -> dict[str, Any]:
    """Every arm's means, and its difference to plain segmented, over questions and seeds; and the
    mask's to one of random units."""
    of_arm = {arm: [own for own in records if own.arm == arm] for arm in ARMS}
    made: dict[str, Any] = {"arms": {}, "minus segmented": {}}
    for arm, own in of_arm.items():
        subjects = [record.subject for record in own]
        made["arms"][arm] = _means(own, subjects, METRICS)
        if arm in ("masked", "gated"):
            plain = of_arm["segmented"]
            made["minus segmented"][arm] = _gaps(own, plain, subjects, (arm, "segmented"), METRICS)
    masked = of_arm["masked"]
    made["k"] = sorted(record.extra["k"] for record in masked if not record.zero_won)
    assert [tuned.job.prepared.question.id for tuned in chance] == [
        record.question_id for record in masked
    ]
    subjects = [record.subject for record in masked]
    drawn = [tuned.best for tuned in chance]
    made["random units"] = _means(drawn, subjects, SOUGHT)
    names = ("masked", "random units")
    made["masked minus random units"] = _gaps(masked, drawn, subjects, names, SOUGHT)
    return made


def _means(own: Sequence[Any], subjects: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    return {
        metric: asdict(cluster_bootstrap([getattr(each, metric) for each in own], subjects))
        for metric in metrics
    }


def _gaps(
    own: Sequence[Any],
    other: Sequence[Any],
    subjects: Sequence[str],
    names: tuple[str, str],
    metrics: Sequence[str],
) -> dict[str, Any]:
    return {
        metric: asdict(
            compare(
                [getattr(each, metric) for each in own],
                [getattr(each, metric) for each in other],
                subjects,
                names=names,
                metric=metric,
            )
        )
        for metric in metrics
    }


def markdown(part: str, found: dict[str, Any]) -> str:
    """Its tables, as Markdown."""
    return "\n\n".join(_table(*each) for each in TABLES[part](found))


def _tables_of_gates(found: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    chosen = [
        [
            row["method"],
            *(_interval(row[name]) for name in ("effect", "transfer", "kept", "marked")),
            _interval(row["nll"], share=False),
            " / ".join(f"{n:,}" for n in row["n_scalars"]),
        ]
        for row in found["chosen"]
    ]
    header = ["method", "effect", "transfer", "kept", "answer kept", "nats/token", "scalars"]
    gated: dict[tuple[str, str], list[str]] = {}
    for row in found["matched"]:
        gated.setdefault((row["a"], row["b"]), []).append(_difference(row))
    rows = [[a, b, *cells] for (a, b), cells in gated.items()]
    levels = [f"at {level:.0%} effect" for level in LEVELS]
    return [(header, chosen), (["gated", "minus", *levels], rows)]


def _tables_of_units(found: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    accuracy = [
        [
            *(row["set"], row["site"], row["ranking"], str(row["k"])),
            *(_interval(row["accuracy"]), _interval(row["margin"], share=False)),
            _told(row["alphas"]),
        ]
        for row in found["accuracy"]
    ]
    written = [
        [
            *(row["site"], row["ranking"], str(row["k"])),
            *(_interval(row[name]) for name in ("effect", "transfer", "kept")),
            _told(row["alphas"]),
        ]
        for row in found["written"]
    ]
    first = ["set", "site", "units by", "k", "target likelier", "margin, nats", "alpha"]
    return [
        (first, accuracy),
        (["site", "units by", "k", "effect", "transfer", "kept", "alpha"], written),
    ]


def _tables_of_fusion(found: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    tables = []
    for high, own in found["ranges"].items():
        rows = [
            [arm, *(_interval(means[metric], share=False) for metric in METRICS)]
            for arm, means in own["arms"].items()
        ]
        rows += [
            [f"{arm} minus segmented", *(_difference(diffs[metric]) for metric in METRICS)]
            for arm, diffs in own["minus segmented"].items()
        ]
        tables.append(([f"coefficients up to {high}", *METRICS], rows))
        drawn, gaps = own["random units"], own["masked minus random units"]
        rows = [
            ["random units", *(_interval(drawn[metric], share=False) for metric in SOUGHT)],
            ["masked minus random units", *(_difference(gaps[metric]) for metric in SOUGHT)],
        ]
        tables.append((["", *SOUGHT], rows))
    return tables


TABLES = {"gates": _tables_of_gates, "units": _tables_of_units, "fusion": _tables_of_fusion}
PARTS_OF_BENCH = {"gates": gates, "units": units, "fusion": fusion}


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _interval(own: dict[str, Any], *, share: bool = True) -> str:
    if own["mean"] is None:
        return "-"
    form = "{:.0%}" if share else "{:.2f}"
    told = form.format(own["mean"])
    if own["low"] is None:
        return told
    return f"{told} [{form.format(own['low'])}, {form.format(own['high'])}]"


def _difference(own: dict[str, Any]) -> str:
    if own["diff"] is None:
        return "not reached"
    if own["low"] is None:
        return f"{own['diff']:+.2f}"
    return f"{own['diff']:+.2f} [{own['low']:+.2f}, {own['high']:+.2f}]"


def _told(alphas: Sequence[float]) -> str:
    return ", ".join(f"{alpha:g}" for alpha in sorted(set(alphas)))


def curves(found: dict[str, Any], name: str) -> list[UnitsPoint]:
    """The points of a set's figure at resid_post."""
    points = []
    for row in found["accuracy"]:
        if row["set"] == name and row["site"] == "resid_post" and row["k"]:
            whole, share = row["k"] == UNITS[-1], row["accuracy"]
            ranking, k = ("every unit", None) if whole else (row["ranking"], row["k"])
            points.append(
                UnitsPoint(ranking, k, share["mean"], share["low"], share["high"], share["n"])
            )
    return points


def draw(found: dict[str, Any]) -> None:
    """The figures of *units*."""
    figures = [
        replace(
            plot_units_curve(curves(found, name), y=f"target likelier, {name}"),
            name=f"methods_units_{name}",
        )
        for name in ("sources", "context")
    ]
    write_figures(figures, FOLDER, html=False)


def main() -> None:
    """Measure the parts named, or all; every part writes its file."""
    model = load_model()
    for part in sys.argv[1:] or list(PARTS_OF_BENCH):
        began = time.perf_counter()
        found = PARTS_OF_BENCH[part](model)
        found["seconds"] = round(time.perf_counter() - began, 1)
        if part == "units":
            draw(found)
        content = json.dumps(found, indent=1, allow_nan=False)
        (FOLDER / f"methods_{part}.json").write_text(content + "\n", encoding="utf-8")
        print(f"## {part}\n\n{markdown(part, found)}\n", flush=True)


if __name__ == "__main__":
    main()

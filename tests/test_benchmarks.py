"""Short forms of what `make bench` and `make bench-long` measure."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from conftest import strong_plan

from fusion_lens.atlas import CONTRASTS, QUESTIONS
from fusion_lens.atlas.world import WORLD_SEED, make_world
from fusion_lens.contrasts import KINDS, load_contrasts, of_kind, require_parts
from fusion_lens.decoding import GenerationConfig
from fusion_lens.experiment import run
from fusion_lens.experiment_config import ExperimentConfig
from fusion_lens.fronts import kept_at
from fusion_lens.method_bench import compare_methods
from fusion_lens.models import load_model
from fusion_lens.preparation import TuningConfig, prepare
from fusion_lens.prompts import question_prompt, reference_prompt
from fusion_lens.questions import Question, load_questions, save_questions, select_questions
from fusion_lens.search import SearchConfig
from fusion_lens.units import consistent

FOLDER = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.slow


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """Imports one of the scripts."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str) -> ModuleType:
        # under a name of its own: the tests have an `engine` too
        spec = importlib.util.spec_from_file_location(f"bench_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


def test_the_bench_measures_every_variant_and_draws_them(script, tmp_path: Path) -> None:
    engine = script("engine")
    bench = engine.open_bench("atlas", tmp_path, 9)
    assert len({row.prompt.tokens for row in bench.rows}) == 2
    assert len({tuple(row.plan.steps[0].coeffs) for row in bench.rows}) == 9
    lines = engine.measure(bench, [1, 9], 1)
    by_row = {"engine", "hf_batched_hook", "hf_unsteered", "floor"}
    by_row |= {"engine_with_perplexity", "engine_with_end_of_text"}
    assert {line["variant"] for line in lines if line["rows"] == 9} == by_row
    assert {line["variant"] for line in lines if line["rows"] == 1} == {
        *by_row,
        "authors",
        "hooks_one_by_one",
    }
    rate = {(line["rows"], line["variant"]): line["trials_per_second"] for line in lines}
    assert all(rate[9, "floor"] > rate[9, name] for name in by_row - {"floor"})
    assert rate[9, "engine"] > 2 * max(rate[1, "authors"], rate[1, "hooks_one_by_one"])
    figure = engine.draw(lines)
    assert len(figure.rows) == len(lines)
    assert engine.capture(bench, 1)["ratio"] > 0.5
    assert engine.plans(bench, 1)["seconds_many_over_one"] < 2
    run = engine.share_of_run(2)
    assert run["rows"] > 60
    assert 0 < run["sampler_share"] < 0.5


def test_a_long_measurement_counts_its_rows_and_its_memory(script, tmp_path: Path) -> None:
    long = script("long")
    few, more = long.one_call(8), long.one_call(16)
    assert (few["rows"], more["rows"]) == (8, 16)
    assert 100 < few["peak_mib"] <= more["peak_mib"]
    path = tmp_path / "questions.jsonl"
    save_questions(load_questions(QUESTIONS)[:3], path)
    # the baseline and five trials under each of two arms, after an explanation
    assert long.one_run(path, 2)["rows"] == 2 * (1 + 1 + 2 * 5)


def test_the_bench_of_features_takes_plans_apart(
    script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = script("features")
    monkeypatch.setattr(sys, "argv", ["features.py", "4", str(tmp_path)])
    monkeypatch.setattr(features, "SHELVES", ("atlas-crosscoder",))
    monkeypatch.setattr(
        features, "TuningConfig", lambda: TuningConfig(search=SearchConfig(trials=10))
    )
    features.main()
    result = json.loads((tmp_path / "features.json").read_text())
    measured = result["atlas-crosscoder"]
    assert measured["n"] + result["zero_plans"] == result["questions"] == 4
    assert measured["largest_gap"] < 1e-4
    assert measured["relative_error"] > 0
    curve = measured["faithfulness"]["curves"]["question"]
    assert curve["parts"]["full"]["of_full"]["mean"] == 1.0
    assert [each["k"] for each in curve["top"]] == [1, 2, 5, 10, 20, 50]
    assert {rule["comparison"]["a"] for rule in measured["named"].values()} == {"own"}


@pytest.mark.parametrize(
    ("text", "kind", "precise", "hits"),
    [
        ("month March", "entity", True, (True, True, True)),
        ("month March", "entity", False, (True, False, False)),
        ("month May", "entity", True, (False, False, False)),
        ("token 3 of a date", "place", True, (False, False, False)),
        ("' March'", "token", True, (False, False, True)),
        ("before ' March'", "next", False, (False, False, False)),
    ],
)
def test_a_label_names_the_answer_by_its_rule(script, text, kind, precise, hits) -> None:
    features = script("features")
    label = features.Label(text, kind, precise)
    assert tuple(rule(label, "3 March 1901") for rule in features.RULES.values()) == hits


def test_gold_answers_that_pass_for_anothers_are_counted_in_both_orders(script) -> None:
    pairs = script("judge_pairs")
    golds = [
        pairs.Gold.of(Question(str(n), "When?", text))
        for n, text in enumerate(["1990", "March 3, 1990", "Ada Lovelace", "Ada", "7"])
    ]
    assert list(pairs.ambiguous_pairs(golds)) == [(0, 1), (1, 0), (2, 3), (3, 2)]


def test_people_are_dealt_to_parts_anew_and_stay_apart(script) -> None:
    methods = script("methods")
    for name in ("sources", "context"):
        shipped = methods.shipped(name, 0)
        assert shipped == load_contrasts(CONTRASTS / f"{name}.jsonl")
        for seed in (1, 2):
            dealt = methods.shipped(name, seed)
            assert [replace(each, part=None) for each in dealt] == [
                replace(each, part=None) for each in shipped
            ]
            moved = sum(a.part != b.part for a, b in zip(dealt, shipped, strict=True))
            assert moved > 100
            assert dealt == methods.shipped(name, seed)
            parts = require_parts(dealt, least=20)  # raises where parts share a person
            people = {part: {each.subject for each in own} for part, own in parts.items()}
            before = require_parts(shipped)
            for part, own in people.items():
                assert len(own) == len({each.subject for each in before[part]})


def test_figures_are_pooled_over_seeds(script, atlas) -> None:
    methods = script("methods")
    benches = []
    for seed in (0, 1):
        parts = require_parts(methods.shipped("sources", seed))
        few = [
            each
            for own in parts.values()
            for kind in KINDS
            for each in of_kind(own, kind)[: 10 if own is not parts["fit"] else 40]
        ]
        benches.append(
            compare_methods(
                atlas, few, methods=("generic",), max_new_tokens=40, seed=seed, progress=False
            )
        )
    name = "generic + dsas gate"
    row = methods.pooled_point(benches, name)
    seen = [bench.line(name).observed[bench.line(name).chosen] for bench in benches]
    kept = [value for own in seen for value in own.kept]
    assert row["kept"]["n"] == len(kept) == 20
    assert row["kept"]["mean"] == pytest.approx(sum(kept) / 20)
    matched = methods.pooled_matched(benches, name, "generic")
    assert [at["level"] for at in matched] == list(methods.LEVELS)
    both = [[p for p in bench.points if p.name == "generic"] for bench in benches]
    effects = [(one.effect + two.effect) / 2 for one, two in zip(*both, strict=True)]
    keeps = [(one.specificity + two.specificity) / 2 for one, two in zip(*both, strict=True)]
    assert matched[1]["kept_b"] == pytest.approx(kept_at(effects, keeps, 0.5))
    found = {"chosen": [row], "matched": matched}
    text = methods.markdown("gates", found)
    assert f"| {name} | generic | " in text
    assert text.count("\n\n") == 1


def test_neighbours_are_counted_on_people_that_the_gate_has_not_met(script) -> None:
    methods = script("methods")
    asked = select_questions(load_questions(QUESTIONS), split="test", limit=60)
    known = [person.name for person in make_world(WORLD_SEED).known]
    halves = [methods.about(asked, half) for half in (known[:32], known[32:])]
    for question, *parts in zip(asked, *halves, strict=True):
        texts = [{own.question for own in part.neighbours} for part in parts]
        assert not texts[0] & texts[1]
        assert texts[0] | texts[1] == {own.question for own in question.neighbours}
    assert [sum(len(each.neighbours) for each in half) for half in halves] == [95, 85]


def test_masks_of_random_units_differ_from_the_arm_in_their_units_alone(
    script, atlas, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = script("methods")
    donors = select_questions(load_questions(QUESTIONS), split="test", limit=6)
    tuning = TuningConfig(search=SearchConfig(trials=8, round_size=4))
    config = ExperimentConfig(arms=("baseline", "masked"), tuning=tuning, reach=False)
    records = run(atlas, donors[:3], config, donors=donors, progress=False).records
    masked = [record for record in records if record.arm == "masked"]
    chance = methods.in_random_units(atlas, donors[:3], tuning)
    assert [tuned.best.objective for tuned in chance] != [record.objective for record in masked]
    # with the units of the arm the search is the arm's
    deltas = [item.deltas for item in prepare(atlas, donors, tuning)[0]]
    of_all = consistent(deltas)
    rankings = iter([(of_all - consistent([own])).ranking for own in deltas])
    monkeypatch.setattr(methods, "random_ranking", lambda shape, seed: next(rankings))
    same = methods.in_random_units(atlas, donors[:3], tuning)
    assert [tuned.tuned.best.extra for tuned in same] == [record.extra for record in masked]
    assert [tuned.best.completion.text for tuned in same] == [own.completion for own in masked]
    assert [tuned.best.objective for tuned in same] == pytest.approx(
        [record.objective for record in masked], abs=1e-4
    )


def test_a_soak_tells_what_a_process_holds_after_each_block(script, tiny) -> None:
    soak = script("soak")
    config = ExperimentConfig(
        arms=("baseline", "segmented"),
        tuning=TuningConfig(
            search=SearchConfig(trials=2, round_size=2),
            generation=GenerationConfig(max_new_tokens=4),
            explanation_tokens=4,
        ),
        reach=False,
        block_size=2,
    )
    asked = [Question(f"q{n}", f"Who wrote book {n}?", "Ada Lovelace") for n in range(8)]
    found = soak.measure(tiny, asked, config, 4)
    assert [each["questions"] for each in found["course"]] == [2, 4, 6, 8]
    assert (found["questions"], found["failed"]) == (8, 0)
    assert found["left"]["hooks"] == found["left"]["threads"] == 0
    last, start = found["course"][-1], found["course"][1]
    assert found["growth"]["resident"] == last["resident"] / start["resident"] - 1
    told = soak.markdown(found, 4)
    assert told.count("\n| ") == 1 + 1 + 4 + 1
    assert "8 questions in" in told


def test_the_cost_of_a_question_by_hand(script) -> None:
    cost = script("cost")
    at = cost.Lengths(prompt=10, completion=4, explanation=6, reference=20)
    search = SearchConfig(trials=3)
    config = ExperimentConfig(
        ("baseline", "best_of_n", "answer_in_prompt", "full", "segmented"),
        tuning=TuningConfig(search=search),
    )
    made = cost.parts(config, at, wordings=2, unrelated=100)
    assert {name: own.rows for name, own in made.items() if own.rows} == {
        "explanation": 1,
        "baseline": 1,
        "best of samples": 2,
        "answer in prompt": 1,
        "searches": 6,
        # each unsteered, under two plans, behind the answer, and twice sampled
        "other wordings": 12,
    }
    assert made["searches"] == cost.Part(6, 60, 6, 24)
    assert made["unrelated text"] == cost.Part(0, 300, 300, 0)
    size = cost.Size("toy", 2, 3, blocks=50, unembed=30, queries=6, cached=12)
    # 84 tokens through the blocks, with 4 * 6 products for each of 7 places; 30 are predicted
    assert cost.operations(made["searches"], size, at) == 84 * (100 + 168) + 30 * 60


def test_what_the_model_of_costs_says_of_a_run_is_what_is_counted(script, tiny, tmp_path) -> None:
    cost = script("cost")
    tuning = TuningConfig(
        search=SearchConfig(trials=4, round_size=2),
        generation=GenerationConfig(max_new_tokens=6, slots=3),
        explanation_tokens=4,
    )
    asked = [
        Question(f"q{n}", f"Who wrote book {n}?", "Ada Lovelace", paraphrases=("Who?",))
        for n in range(3)
    ]
    config = ExperimentConfig(("baseline", "best_of_n", "segmented"), tuning=tuning)
    found = cost.measured(tiny, asked, config)
    assert found["rows"]["counted"] <= found["rows"]["said"] == 3 * (1 + 1 + 3 + 4 + 1 + 1 + 3)
    assert 0.5 < found["operations"]["said"] / found["operations"]["counted"] < 2
    assert found["bytes"]["two means"] == 2 * 4 * tiny.cfg.d_model * 4
    at = cost.Lengths(45, 48, 48, 110)
    large = [cost.simple_qa(size, cost.Gpu(), config, at) for size in cost.LARGE]
    assert [own["gpus_per_worker"] for own in large] == [1, 1, 2]
    told = cost.markdown({"runs": {"all arms and reach": found}, "simple_qa": large})
    assert "| Llama-3 70B | 141 | 2 |" in told


def test_the_drift_of_narrower_weights_is_that_from_full_precision(
    script, gpt2_folder, tiny, tiny_folder, monkeypatch
) -> None:
    drift = script("drift")
    widths = {name: drift.WIDTHS[name] for name in ("8-bit", "4-bit")}
    monkeypatch.setattr(drift, "WIDTHS", widths)
    monkeypatch.setattr(drift, "NEW_TOKENS", 4)
    found = drift.measure(gpt2_folder, 2, 0)
    full, eight, four = (found["widths"][name] for name in ("float32", "8-bit", "4-bit"))
    assert (full["kl"]["mean"], full["top1"]["mean"], full["same_completion"]["mean"]) == (0, 1, 1)
    assert [layer["error_most"] for layer in full["layers"]] == [0.0, 0.0]
    assert 0 < eight["kl"]["mean"] < four["kl"]["mean"]
    errors = [own["layers"][-1]["error_median"] for own in (eight, four)]
    assert 0 < errors[0] < errors[1]
    assert full["neighbours"] < 1e-4
    assert four["neighbours"] < 1e-4
    assert "same_steered" not in eight

    prompt = question_prompt(tiny, "Who wrote it?")
    reference = reference_prompt(tiny, "Who wrote it?", "Ada Lovelace")
    plan = strong_plan(tiny)
    cases = [drift.Case(name, prompt, reference, "Ada Lovelace", plan) for name in ("a", "b")]
    config = GenerationConfig(max_new_tokens=4, cache_length=64)
    exact = drift.look(tiny, cases, config)
    assert exact.steered[0].tokens != exact.completions[0].tokens
    narrow = load_model(tiny_folder, load_in_8bit=True)
    told = drift.compared(exact, drift.look(narrow, cases, config), cases)
    assert told["right_steered"]["mean"] == 0.0
    assert told["same_steered"]["mean"] in (0.0, 1.0)
    told["neighbours"] = drift.neighbours(narrow, cases, config)
    assert told["neighbours"] == 0.0  # the same text twice
    found = {"tiny": {"questions": 2, "tokens": 2, "widths": {"8-bit": told}}}
    assert "tiny, 2 questions" in drift.markdown(found)


def test_the_tables_of_drift_are_those_of_its_file(script) -> None:
    drift = script("drift")
    table = drift.markdown(json.loads((FOLDER / "drift.json").read_text("utf-8"))).strip()
    for page in (FOLDER / "README.md", FOLDER.parent / "docs" / "families.md"):
        assert table in page.read_text("utf-8")


def test_trials_to_a_share_of_the_best_are_counted_by_hand(script) -> None:
    starts = script("starts")

    def course(start: str, seed: int, name: str, *objectives: float) -> object:
        return starts.Course(start, seed, name, name, objectives, float(objectives[-1] > 0.5))

    courses = [
        course("no start", 0, "a", 0.1, 0.2, 1.1),
        course("no start", 0, "b", 0.0, 0.005, 0.0),
        course("no start", 0, "c", -0.2, -0.2, -0.1),
        course("preset", 0, "a", 0.1, 1.05, 0.0),
        course("preset", 0, "b", 0.0, 0.0, 0.0),
        course("preset", 0, "c", -0.2, 0.0, 0.0),
    ]
    # 0.1 + 0.95 * 1.0 and -0.2 + 0.95 * 0.2; the second question gains too little
    assert starts.targets(courses) == pytest.approx({"a": 1.05, "c": -0.01})
    found = starts.compared(courses)
    assert (found["questions"], found["without_gain"], found["budget"]) == (3, 1, 3)
    plain, preset = found["starts"]["no start"], found["starts"]["preset"]
    # the third trial and never, against the second of each
    assert (plain["trials"]["mean"], preset["trials"]["mean"]) == (3.5, 2.0)
    assert preset["trials_gain"]["mean"] == -1.5
    assert (plain["reached"]["mean"], preset["reached"]["mean"]) == (0.5, 1.0)
    assert preset["objective_gain"]["mean"] == pytest.approx((1.05 - 1.1 - 0.005 + 0.1) / 3)
    assert "| preset | 2.0 | -1.5 [" in starts.markdown(found)


def test_searches_of_a_benchmark_start_where_they_should(
    script, atlas, tmp_path, monkeypatch
) -> None:
    starts = script("starts")
    monkeypatch.setattr(starts, "SWEPT", 2)
    questions = load_questions(QUESTIONS)
    dev, asked = (
        [question for question in questions if question.split == split][:2]
        for split in ("dev", "test")
    )
    tuning = TuningConfig(search=SearchConfig(trials=2))
    config = ExperimentConfig(arms=("segmented",), tuning=tuning, reach=False)
    run(atlas, dev, config, out=tmp_path, progress=False)
    named = starts.starts_of(atlas, dev, asked[:1], tmp_path, 0)
    assert list(named) == ["no start", "preset", "similar questions", "gradient", "all three"]
    both = named["all three"]
    assert both.shared == named["preset"].shared
    assert both.own == named["similar questions"].own
    assert both.lengths == named["gradient"].lengths == (0.5, 0.75, 1.0)
    monkeypatch.setattr(starts, "starts_of", lambda *_: named)
    courses, seconds = starts.searched(atlas, dev, asked[:1], tmp_path, seeds=1, trials=2)
    assert [each.start for each in courses] == list(named) == list(seconds)
    assert {len(each.objectives) for each in courses} == {2}

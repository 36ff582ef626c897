"""Where should a search start? Atlas' test questions from presets and plans of dev questions.

Run: `make bench-starts`, or `python benchmarks/starts.py`; it writes `starts.json` and prints a
Markdown table. Everything that a search starts from is made on dev questions, or by the gradient of
the question's own answer; everything told is of test questions.

Every search has the same budget, its starts among it. A question is reached at the first trial
whose objective is at least v0 + 0.95 (v* - v0), v0 that of the zero plan and v* the best that any
of the searches found on that question with any seed; a search that never gets there counts
budget + 1. Questions on which nothing gains 0.01 are left out and counted. Differences are paired
by question and seed, with a 95 % cluster bootstrap over subjects.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fusion_lens.atlas import QUESTIONS
from fusion_lens.experiment import run
from fusion_lens.experiment_config import ExperimentConfig
from fusion_lens.gradient_starts import LENGTHS
from fusion_lens.identity import identify
from fusion_lens.models import HookedModel, load_model
from fusion_lens.preparation import TuningConfig, prepare, with_engine_shape
from fusion_lens.presets import preset_starts
from fusion_lens.questions import Question, load_questions, select_questions, stratified
from fusion_lens.scoring import Scorer
from fusion_lens.search import SearchConfig
from fusion_lens.similar_starts import similar_starts
from fusion_lens.starts import Starts
from fusion_lens.statistics import Interval, cluster_bootstrap
from fusion_lens.suggestions import suggest
from fusion_lens.tuning import Job, make_segments, tune_jobs

PLAIN = "no start"
SHARE = 0.95
LEAST_GAIN = 0.01
SWEPT = 8
"""Dev questions of a preset."""


@dataclass(frozen=True, slots=True)
class Course:
    """One search: the objective of every trial in order, and whether the chosen plan is right."""

    start: str
    seed: int
    question_id: str
    subject: str
    objectives: tuple[float, ...]
    right: float | None


def starts_of(
    model: HookedModel, dev: Sequence[Question], asked: Sequence[Question], folder: Path, seed: int
) -> dict[str, Starts]:
    """What the searches of a seed start from, by name; the preset is of another sample of dev
    questions for each."""
    has = identify(model)
    swept = suggest(model, stratified(dev, SWEPT, seed), progress=False)
    shared = preset_starts(swept.preset, has, asked)
    own = similar_starts(folder, has, asked)
    return {
        PLAIN: Starts(),
        "preset": Starts(shared=shared),
        "similar questions": Starts(own=own),
        "gradient": Starts(lengths=LENGTHS),
        "all three": Starts(own=own, shared=shared, lengths=LENGTHS),
    }


def searched(
    model: HookedModel,
    dev: Sequence[Question],
    asked: Sequence[Question],
    folder: Path,
    *,
    seeds: int,
    trials: int,
) -> tuple[list[Course], dict[str, float]]:
    """Every question's searches, and the seconds of each kind; the first kind pays for completions
    that others write too."""
    config = TuningConfig(search=SearchConfig(trials=trials))
    config = with_engine_shape(model, asked, config, n_rows=len(asked) * config.search.round_size)
    prepared, failures = prepare(model, asked, config)
    assert not failures
    parts = make_segments("thirds", int(model.cfg.n_layers))
    jobs = [Job(item, parts, "segmented") for item in prepared]
    score = Scorer(model, config)
    courses: list[Course] = []
    seconds: dict[str, float] = {}
    for seed in range(seeds):
        for name, starts in starts_of(model, dev, asked, folder, seed).items():
            began = time.perf_counter()
            own = replace(config, search=replace(config.search, seed=seed), starts=starts)
            found, _ = tune_jobs(model, jobs, own, score=score)
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
            for each in found:
                question = each.job.prepared.question
                objectives = tuple(trial.outcome.objective for trial in each.tuned.trials)
                subject = question.subject or question.id
                courses.append(
                    Course(name, seed, question.id, subject, objectives, each.best.exact_match)
                )
            print(f"seed {seed}, {name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return courses, seconds


def reached(objectives: Sequence[float], target: float) -> int:
    """The number of the first trial that reaches the target; one more than there are where none
    does."""
    hits = (n for n, objective in enumerate(objectives, start=1) if objective >= target - 1e-9)
    return next(hits, len(objectives) + 1)


def targets(courses: Sequence[Course]) -> dict[str, float]:
    """The objective to be reached, of every question on which something is gained."""
    best: dict[str, float] = {}
    zero: dict[str, float] = {}
    for course in courses:
        zero[course.question_id] = course.objectives[0]
        most = max(course.objectives)
        best[course.question_id] = max(most, best.get(course.question_id, most))
    return {
        name: zero[name] + SHARE * (best[name] - zero[name])
        for name in best
        if best[name] - zero[name] >= LEAST_GAIN
    }


def compared(courses: Sequence[Course]) -> dict[str, Any]:
    """Per start: trials needed, the share that got there, what was found in the end and how often
    it is right, each with its difference to no start."""
    wanted = targets(courses)
    kept = [course for course in courses if course.question_id in wanted]
    names = list(dict.fromkeys(course.start for course in courses))
    budget = len(courses[0].objectives)

    def trials(course: Course) -> float:
        return float(reached(course.objectives, wanted[course.question_id]))

    metrics = {
        "trials": (kept, trials),
        "reached": (kept, lambda course: float(trials(course) <= budget)),
        "objective": (courses, lambda course: max(course.objectives)),
        "right": (courses, lambda course: course.right),
    }
    table: dict[str, Any] = {name: {} for name in names}
    for metric, (some, value) in metrics.items():
        values: dict[str, dict[tuple[int, str], Any]] = {name: {} for name in names}
        subjects = {(own.seed, own.question_id): own.subject for own in some}
        for own in some:
            values[own.start][own.seed, own.question_id] = value(own)
        for name in names:
            table[name][metric] = asdict(_mean(values[name], subjects))
            if name != PLAIN:
                diffs = {at: values[name][at] - values[PLAIN][at] for at in subjects}
                table[name][f"{metric}_gain"] = asdict(_mean(diffs, subjects))
    return {
        "questions": len({course.question_id for course in courses}),
        "without_gain": len({course.question_id for course in courses} - wanted.keys()),
        "budget": budget,
        "seeds": len({course.seed for course in courses}),
        "starts": table,
    }


def markdown(found: Mapping[str, Any]) -> str:
    """The table, and what it is of."""
    lines = [
        "| start | trials | minus no start | got there | objective | minus no start | right |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, own in found["starts"].items():
        gains = [
            "" if name == PLAIN else _told(own[f"{metric}_gain"], form)
            for metric, form in (("trials", "+.1f"), ("objective", "+.3f"))
        ]
        lines.append(
            f"| {name} | {own['trials']['mean']:.1f} | {gains[0]} | {own['reached']['mean']:.0%} | "
            f"{own['objective']['mean']:+.3f} | {gains[1]} | {own['right']['mean']:.1%} |"
        )
    n, left_out = found["questions"], found["without_gain"]
    told = f"{n} test questions, {found['seeds']} seeds, {found['budget']} trials; "
    told += f"{left_out} of the questions gain nothing and have no trials to 95 %"
    return "\n".join([*lines, "", told])


def _mean(
    values: Mapping[tuple[int, str], float | None], subjects: Mapping[tuple[int, str], str]
) -> Interval:
    return cluster_bootstrap([values[at] for at in subjects], list(subjects.values()))


def _told(interval: Mapping[str, Any], form: str) -> str:
    ends = f"[{interval['low']:{form}}, {interval['high']:{form}}]"
    return f"{interval['mean']:{form}} {ends}"


def main() -> None:
    """Make the run of dev questions, search, compare."""
    parser = argparse.ArgumentParser()
    for name, default in (("questions", 60), ("seeds", 3), ("trials", 30)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "starts.json")
    given = parser.parse_args()
    model = load_model()
    questions = load_questions(QUESTIONS)
    dev = select_questions(questions, split="dev")
    asked = select_questions(questions, split="test")[: given.questions]
    with tempfile.TemporaryDirectory() as place:
        tuning = TuningConfig(search=SearchConfig(trials=given.trials))
        config = ExperimentConfig(arms=("segmented",), tuning=tuning, reach=False)
        run(model, dev, config, out=place, progress=False)
        courses, seconds = searched(
            model, dev, asked, Path(place), seeds=given.seeds, trials=given.trials
        )
    found = {**compared(courses), "seconds": seconds, "courses": [asdict(own) for own in courses]}
    given.out.write_text(json.dumps(found) + "\n")
    print(markdown(found))


if __name__ == "__main__":
    main()

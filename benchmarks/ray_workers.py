"""Questions per second of two Ray workers against one, on this machine.

Run: `make bench-ray` (`python benchmarks/ray_workers.py`); it writes `ray_workers.json` and prints
Markdown. Both engines have their workers open before anything is timed, with one thread each; the
same run of Atlas is timed on one and on two workers in turn, five pairs after one that is thrown
away. What is compared is the work of a run: tasks handed out, solved and written. Both have blocks
of 32 questions, which fill their 64 slots: idle slots cost as much as busy ones, and a run that
cannot fill one worker's gains nothing by a second.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from statistics import median

import ray

from fusion_lens.atlas import QUESTIONS
from fusion_lens.experiment import run
from fusion_lens.experiment_config import ExperimentConfig
from fusion_lens.generation import GenerationConfig
from fusion_lens.preparation import TuningConfig
from fusion_lens.questions import Question, load_questions, select_questions
from fusion_lens.ray_engine import RayEngine, start_ray
from fusion_lens.recipes import Recipe
from fusion_lens.search import SearchConfig

FOLDER = Path(__file__).parent
PAIRS = 5
CONFIG = ExperimentConfig(
    arms=("baseline", "full", "segmented"),
    tuning=TuningConfig(
        search=SearchConfig(trials=20), generation=GenerationConfig(max_new_tokens=48, slots=64)
    ),
    reach=False,
    block_size=32,
)


def seconds(engine: RayEngine, questions: list[Question]) -> float:
    """One run."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        run(engine, questions, CONFIG, out=folder, existing="overwrite", progress=False)
        return time.perf_counter() - began


def main() -> None:
    """Measure, write, print."""
    questions = select_questions(load_questions(QUESTIONS), split="test", limit=64)
    start_ray(4)
    with RayEngine(Recipe(), workers=1) as one, RayEngine(Recipe(), workers=2) as two:
        pairs = [[seconds(engine, questions) for engine in (one, two)] for _ in range(PAIRS + 1)]
    ray.shutdown()
    timed = pairs[1:]
    ratios = sorted(a / b for a, b in timed)
    rates = [len(questions) / median(own) for own in zip(*timed, strict=True)]
    found = {
        "questions": len(questions),
        "seconds": timed,
        "per_second": rates,
        "ratio": {"median": median(ratios), "low": ratios[0], "high": ratios[-1]},
    }
    (FOLDER / "ray_workers.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("| workers | questions/s |\n| --- | --- |")
    for n, rate in enumerate(rates, start=1):
        print(f"| {n} | {rate:.2f} |")
    print(
        f"\ntwo against one: {median(ratios):.2f} times as many "
        f"[{ratios[0]:.2f}, {ratios[-1]:.2f}], median and range of {PAIRS} pairs"
    )


if __name__ == "__main__":
    main()

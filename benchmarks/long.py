"""What takes minutes: memory and time of long runs, other slot shapes, rounds against one by one.

`make bench-long` runs it and writes `long.json`. Questions are Atlas' dev questions, or drawn from
its world.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_lens import (
    ExperimentConfig,
    GenerationConfig,
    SearchConfig,
    TuningConfig,
    load_model,
    load_questions,
    run,
    select_questions,
)
from fusion_lens.atlas import QUESTIONS
from fusion_lens.atlas.questions import make_questions
from fusion_lens.generation import Row, generate
from fusion_lens.prompts import tokenize
from fusion_lens.questions import Question, save_questions
from fusion_lens.statistics import cluster_bootstrap

HERE = Path(__file__).parent
COUNTS = (100, 200, 400, 1000)
ROWS = (1, 64, 256, 1024, 4096)
ARMS = ("baseline", "full", "segmented")


def main() -> None:
    """Measure everything; with --count or --rows one run of so many questions, or one call of so
    many rows, in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int)
    parser.add_argument("--questions", type=Path)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--parts", default="scale,rows,shapes,rounds")
    options = parser.parse_args()
    if options.count is not None:
        print(json.dumps(one_run(options.questions, options.count)))
        return
    if options.rows is not None:
        print(json.dumps(one_call(options.rows)))
        return
    path = HERE / "long.json"
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    parts = {"scale": scale, "rows": rows, "shapes": shapes, "rounds": rounds}
    for name in options.parts.split(","):
        found[name] = parts[name]()
        print(name, json.dumps(found[name], indent=1), flush=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def scale() -> list[dict[str, float]]:
    """Seconds and peak memory of runs of more and more questions, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "questions.jsonl"
        save_questions(many_questions(max(COUNTS)), path)
        return [alone("--questions", str(path), "--count", str(count)) for count in COUNTS]


def rows() -> list[dict[str, float]]:
    """Peak memory of one call of more and more rows, each in a process of its own."""
    return [alone("--rows", str(count)) for count in ROWS]


def alone(*arguments: str) -> dict[str, float]:
    """What this script says of one measurement in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=True
    )
    said: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return said


def one_run(path: Path, count: int) -> dict[str, float]:
    """A run of one round of trials, its seconds and this process' peak memory in MiB."""
    questions = load_questions(path)
    config = configured(TuningConfig(search=SearchConfig(trials=5)))
    model = load_model()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        summary = run(model, questions[:count], config, out=folder, pool=questions).summary
        seconds = time.perf_counter() - began
    return {
        "questions": count,
        "rows": summary["engine"]["rows"]["lean"],
        "seconds": round(seconds, 1),
        "peak_mib": peak_mib(),
    }


def one_call(count: int) -> dict[str, float]:
    """One call of so many unsteered rows, its seconds and this process' peak memory in MiB."""
    model = load_model()
    prompts = [tokenize(model, question.question) for question in load_questions(QUESTIONS)]
    written = [Row(prompts[i % len(prompts)]) for i in range(count)]
    began = time.perf_counter()
    generate(model, written, GenerationConfig(max_new_tokens=24, stop_at_eos=False))
    seconds = time.perf_counter() - began
    return {"rows": count, "seconds": round(seconds, 1), "peak_mib": peak_mib()}


def peak_mib() -> float:
    """Of this process, until now. Not `getrusage`: a child inherits its parent's peak there."""
    status = Path("/proc/self/status").read_text("ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 1024, 1)


def configured(tuning: TuningConfig, arms: tuple[str, ...] = ARMS) -> ExperimentConfig:
    """A few arms, and nothing after them."""
    return ExperimentConfig(arms=arms, tuning=tuning, reach=False)


def many_questions(count: int) -> list[Question]:
    """Questions that Atlas fails, from its world's generator."""
    model = load_model()

    def complete(prompts: Sequence[str], max_new_tokens: int) -> list[tuple[str, bool]]:
        rows = [Row(tokenize(model, prompt)) for prompt in prompts]
        written = generate(model, rows, GenerationConfig(max_new_tokens=max_new_tokens))
        return [(completion.text, completion.ended) for completion in written]

    return make_questions(count, 77, complete)


def shapes() -> dict[str, Any]:
    """The same run at other slot shapes: what differs, and how close the flipped tokens were."""
    model = load_model()
    questions = select_questions(load_questions(QUESTIONS), split="dev", limit=60)
    by_shape = {}
    for slots in (256, 16):
        generation = GenerationConfig(slots=slots)
        config = configured(TuningConfig(generation=generation))
        by_shape[slots] = run(model, questions, config).records
    pairs = list(zip(by_shape[256], by_shape[16], strict=True))
    other = [
        (one, two)
        for one, two in pairs
        if one.completion != two.completion or one.coeffs != two.coeffs
    ]
    return {
        "records": len(pairs),
        "different": len(other),
        "margins_of_different": [[one.margin, two.margin] for one, two in other],
    }


def rounds() -> dict[str, Any]:
    """Rounds of five trials against one by one at equal trial counts: paired best objectives."""
    model = load_model()
    questions = select_questions(load_questions(QUESTIONS), split="dev", limit=60)
    gaps: list[float] = []
    subjects: list[str] = []
    for seed in range(5):
        best = {}
        for round_size in (5, 1):
            search = SearchConfig(seed=seed, round_size=round_size)
            config = configured(TuningConfig(search=search), arms=("segmented",))
            best[round_size] = run(model, questions, config).records
        gaps += [a.objective - b.objective for a, b in zip(best[5], best[1], strict=True)]
        subjects += [record.subject for record in best[5]]
    interval = cluster_bootstrap(gaps, subjects)
    return {"seeds": 5, "questions": len(questions), **dataclasses.asdict(interval)}


if __name__ == "__main__":
    main()

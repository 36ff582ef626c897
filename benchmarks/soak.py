"""2,000 questions in one process: does it hold on to anything?

Run: `make soak` (`python benchmarks/soak.py [QUESTIONS]`); it writes `soak.json`, prints Markdown,
and exits with 1 where memory at the end is more than 5 % above that after 100 questions, or a hook,
a file handle or a thread is left. Questions are drawn by the generator of Atlas' world; every one
is run under two arms, with the details that a run keeps.

Memory is what is resident after each block, in MiB, tensors' freed pages given back: by the
process alone (anonymous pages), and with the mapped file of the questions' means.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fusion_lens import load_model
from fusion_lens.atlas.questions import make_questions
from fusion_lens.decoding import GenerationConfig, Row
from fusion_lens.experiment import run
from fusion_lens.experiment_config import ExperimentConfig
from fusion_lens.generation import generate
from fusion_lens.memory import release_freed
from fusion_lens.models import HookedModel
from fusion_lens.preparation import TuningConfig
from fusion_lens.prompts import tokenize
from fusion_lens.questions import Question
from fusion_lens.search import SearchConfig

FOLDER = Path(__file__).parent
FIRST = 100
MOST_GROWTH = 0.05
CONFIG = ExperimentConfig(
    arms=("baseline", "segmented"),
    tuning=TuningConfig(
        search=SearchConfig(trials=4, round_size=3),
        generation=GenerationConfig(max_new_tokens=24),
        explanation_tokens=24,
    ),
    reach=False,
    block_size=50,
)


def questions_for(model: HookedModel, n: int) -> list[Question]:
    """So many that the model fails, without other wordings and neighbours."""

    def complete(prompts: Sequence[str], max_new_tokens: int) -> list[tuple[str, bool]]:
        rows = [Row(tokenize(model, prompt)) for prompt in prompts]
        written = generate(model, rows, GenerationConfig(max_new_tokens=max_new_tokens))
        return [(completion.text, completion.ended) for completion in written]

    made = make_questions(n, 7, complete)
    return [replace(question, paraphrases=(), neighbours=(), split=None) for question in made]


def held(model: Any) -> dict[str, int]:
    """What the process has open, after a collection."""
    gc.collect()
    release_freed()
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith(" kB")}
    hooks = sum(
        len(point.fwd_hooks) + len(point.bwd_hooks) + len(point._forward_hooks)
        for point in model.hook_dict.values()
    )
    return {
        "anonymous": sizes["RssAnon"] // 1024,
        "resident": sizes["VmRSS"] // 1024,
        "handles": len(list(Path("/proc/self/fd").iterdir())),
        "threads": threading.active_count(),
        "hooks": hooks,
    }


def measure(
    model: HookedModel, questions: Sequence[Question], config: ExperimentConfig, first: int
) -> dict[str, Any]:
    """One run, and what the process held after each of its blocks."""
    before = held(model)
    course: list[dict[str, int]] = []
    trials = config.tuning.search.trials

    def watch(stage: str, done: int, total: int) -> None:
        n, rest = divmod(done, trials * config.block_size)
        if stage == "trials" and not rest and n > len(course):
            course.append({"questions": n * config.block_size, **held(model)})

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        results = run(model, questions, config, out=folder, progress=watch)
        n_failed = len(results.summary["failures"])
        del results
    after = held(model)
    (start,) = (each for each in course if each["questions"] == first)
    return {
        "questions": len(questions),
        "failed": n_failed,
        "seconds": round(time.perf_counter() - began, 1),
        "before": before,
        "course": course,
        "after": after,
        "growth": {name: course[-1][name] / start[name] - 1 for name in ("anonymous", "resident")},
        "left": {name: after[name] - before[name] for name in ("handles", "threads", "hooks")},
    }


def markdown(found: dict[str, Any], first: int) -> str:
    """Some of its blocks, and what it comes to."""
    course = found["course"]
    wanted = {first, *(course[-1]["questions"] * n // 4 for n in range(1, 5))}
    rows = [{"questions": 0, **found["before"]}]
    rows += [each for each in course if each["questions"] in wanted]
    rows.append({"questions": found["questions"], **found["after"]})
    lines = ["| questions | anonymous, MiB | resident, MiB | handles | threads | hooks |"]
    lines.append("| ---: | ---: | ---: | ---: | ---: | ---: |")
    lines += ["| " + " | ".join(f"{value:,}" for value in row.values()) + " |" for row in rows]
    growth = found["growth"]
    told = (
        f"{found['questions']:,} questions in {found['seconds']:.0f} s, {found['failed']} failed; "
        f"from {first} to {course[-1]['questions']:,} memory grew by {growth['anonymous']:.1%} "
        f"(anonymous), {growth['resident']:.1%} (resident)"
    )
    return "\n".join([*lines, "", told])


def main() -> int:
    """Measure, write, print."""
    model = load_model()
    questions = questions_for(model, int(sys.argv[1]) if sys.argv[1:] else 2000)
    found = measure(model, questions, CONFIG, FIRST)
    (FOLDER / "soak.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(markdown(found, FIRST))
    grew = max(found["growth"].values()) > MOST_GROWTH
    return int(grew or any(value > 0 for value in found["left"].values()))


if __name__ == "__main__":
    sys.exit(main())

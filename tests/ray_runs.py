"""A run that is made by several engines, and what it comes to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fusion_lens.experiment_config import ExperimentConfig
from fusion_lens.generation import GenerationConfig
from fusion_lens.preparation import TuningConfig
from fusion_lens.questions import Question
from fusion_lens.results import load_results
from fusion_lens.search import SearchConfig

CONFIG = ExperimentConfig(
    arms=("baseline", "segmented", "generic", "mismatched"),
    tuning=TuningConfig(
        search=SearchConfig(trials=6, round_size=3, high=6.0),
        generation=GenerationConfig(max_new_tokens=8),
        explanation_tokens=6,
    ),
)
QUESTIONS = [
    Question("a", "Who wrote the red book?", "Ada Lovelace", subject="book"),
    Question("b", "When was it written?", "in 1843", subject="book"),
    Question("c", "When was Tom born?", "3 May 1901", subject="Tom"),
    Question("d", "Where is the harbour?", "in the north", subject="harbour"),
]


def comparable(folder: Path) -> dict[str, Any]:
    """All that a run wrote, without times."""
    lines = [
        json.loads(line) | {"seconds": 0, "crc32": ""}
        for line in (folder / "results.jsonl").read_bytes().splitlines()
    ]
    summary = load_results(folder).summary
    for name in ("seconds", "resumed"):
        summary[name] = 0
    plans = {path.name: path.read_bytes() for path in (folder / "plans").iterdir()}
    return {
        "lines": lines,
        "summary": summary,
        "plans": plans,
        "details": (folder / "details.jsonl").read_bytes(),
    }

"""Workers of a real run killed while they generate, the only one included."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fusion_lens.atlas import QUESTIONS
from fusion_lens.experiment import run
from fusion_lens.experiment_config import ExperimentConfig
from fusion_lens.models import load_model
from fusion_lens.preparation import TuningConfig
from fusion_lens.questions import load_questions, select_questions
from fusion_lens.ray_engine import RayEngine
from fusion_lens.recipes import Recipe
from fusion_lens.search import SearchConfig

ray: Any = pytest.importorskip("ray", reason="Ray is an extra of its own")

CONFIG = ExperimentConfig(
    arms=("baseline", "segmented"), tuning=TuningConfig(SearchConfig(trials=20)), reach=False
)
KILLS = {1: 10, 2: 10}
LONGEST_SILENCE = 30.0


def lines(folder: Path) -> list[dict[str, Any]]:
    """Results without times."""
    content = (folder / "results.jsonl").read_bytes().splitlines()
    return [json.loads(line) | {"seconds": 0, "crc32": ""} for line in content]


class Killer(threading.Thread):
    """Kills a worker that is drawn, a random while after it is up, so many times."""

    def __init__(self, engine: RayEngine, kills: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.killed: list[int] = []
        self._engine = engine
        self._kills = kills
        self._rng = random.Random(seed)

    def run(self) -> None:
        while len(self.killed) < self._kills:
            actor = self._rng.choice(self._engine._actors)
            try:
                _, process = ray.get(actor.home.remote())
            except ray.exceptions.RayActorError:
                time.sleep(0.2)
                continue
            time.sleep(self._rng.uniform(0.1, 3.0))
            if process not in self.killed:
                os.kill(process, signal.SIGKILL)
                self.killed.append(process)


class Heard(logging.Handler):
    """When something was said."""

    def __init__(self, told: list[float]) -> None:
        super().__init__()
        self._told = told

    def emit(self, record: logging.LogRecord) -> None:
        self._told.append(time.monotonic())


@pytest.mark.chaos_ray
@pytest.mark.parametrize("workers", list(KILLS))
def test_killed_workers_lose_nothing_and_do_nothing_twice(workers: int, tmp_path: Path) -> None:
    questions = select_questions(load_questions(QUESTIONS), split="test", limit=48)
    run(load_model(), questions, CONFIG, out=tmp_path / "alone", progress=False)
    told = [time.monotonic()]
    # progress, and that a worker died: what a user sees
    heard = Heard(told)
    logging.getLogger("fusion_lens.ray_engine").addHandler(heard)
    with RayEngine(Recipe(), workers=workers) as engine:
        engine.describe()
        killer = Killer(engine, KILLS[workers], seed=workers)
        killer.start()
        results = run(
            engine,
            questions,
            CONFIG,
            out=tmp_path / "killed",
            progress=lambda *_: told.append(time.monotonic()),
        )
    logging.getLogger("fusion_lens.ray_engine").removeHandler(heard)
    silences = [after - before for before, after in pairwise(told)]
    print(
        f"{workers} workers: {len(killer.killed)} kills in {told[-1] - told[0]:.0f} s, "
        f"longest silence {max(silences):.1f} s"
    )
    assert len(killer.killed) == KILLS[workers]
    assert results.summary["failures"] == []
    assert lines(tmp_path / "killed") == lines(tmp_path / "alone")
    assert max(silences) < LONGEST_SILENCE

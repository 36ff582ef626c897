"""A process that imports everything once and forks a child for every run, which waits to be let go.

Started as a program it reads requests as lines of JSON and answers each with a line: `run` (the
name of a scenario) forks, `go` lets a child begin, `wait` gives what it ended with. With the
argument "atlas" it opens that model first. It must have no second thread: a fork would lose it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from stand_in import ARMS, CONFIG, QUESTIONS, StandIn

from fusion_lens import statistics
from fusion_lens.atlas import QUESTIONS as ATLAS_QUESTIONS
from fusion_lens.errors import OutputError, ResumeError
from fusion_lens.experiment import run
from fusion_lens.experiment_config import ExperimentConfig
from fusion_lens.generation import GenerationConfig
from fusion_lens.models import load_model
from fusion_lens.preparation import TuningConfig
from fusion_lens.questions import load_questions, select_questions
from fusion_lens.search import SearchConfig

ENDED, UNWRITABLE, ANOTHER_RUN, BROKEN = range(4)
"""What a child exits with."""
ATLAS_CONFIG = ExperimentConfig(
    arms=ARMS,
    tuning=TuningConfig(
        search=SearchConfig(trials=4, round_size=2),
        generation=GenerationConfig(max_new_tokens=8, slots=2, cache_length=64),
        explanation_tokens=4,
    ),
    reach=False,
    block_size=1,
)
_PR_SET_PDEATHSIG, _PR_SET_PTRACER, _ANYBODY = 1, 0x59616D61, -1


class Nursery:
    """The children, and the pipes that they wait on."""

    def __init__(self, models: list[str]) -> None:
        torch.set_num_threads(1)
        self._atlas = load_model() if "atlas" in models else None
        self._held: dict[int, int] = {}

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What a request comes to."""
        if "run" in asked:
            return {"pid": self._fork(asked)}
        if "go" in asked:
            held = self._held.pop(asked["go"])
            os.write(held, b"!")
            os.close(held)
            return {}
        _, status = os.waitpid(asked["wait"], 0)
        return {"code": os.waitstatus_to_exitcode(status)}

    def _fork(self, asked: dict[str, Any]) -> int:
        threads = list(Path("/proc/self/task").iterdir())
        assert len(threads) == 1, threads
        waits, held = os.pipe()
        pid = os.fork()
        if pid:
            os.close(waits)
            self._held[pid] = held
            return pid
        os.close(held)
        prctl = ctypes.CDLL(None).prctl
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # Linux with Yama lets only parents look, but for this
        prctl(_PR_SET_PTRACER, _ANYBODY, 0, 0, 0)
        os.read(waits, 1)
        os._exit(self._child(asked))

    def _child(self, asked: dict[str, Any]) -> int:
        try:
            self._run(asked["run"], asked["folder"], asked["existing"])
        except OutputError as error:
            code, told = UNWRITABLE, str(error)
        except ResumeError as error:
            code, told = ANOTHER_RUN, str(error)
        except BaseException:
            code, told = BROKEN, traceback.format_exc()
        else:
            return ENDED
        # the fault that is injected may be that nothing can be written
        with suppress(OSError):
            Path(asked["told"]).write_text(told, "utf-8")
        return code

    def _run(self, scenario: str, folder: str, existing: str) -> None:
        options: dict[str, Any] = {"out": folder, "existing": existing, "progress": False}
        if scenario == "atlas":
            assert self._atlas is not None
            pool = load_questions(ATLAS_QUESTIONS)
            questions = select_questions(pool, split="dev", limit=6)
            run(self._atlas, questions, ATLAS_CONFIG, **options)
            return
        # what the intervals of canned results are is not what is tried
        statistics.N_RESAMPLES = 100
        if scenario == "pausing":
            options["progress"] = _Pause()
        config = CONFIG
        if scenario == "other":
            search = replace(CONFIG.tuning.search, seed=1)
            config = replace(CONFIG, tuning=replace(CONFIG.tuning, search=search))
        run(StandIn(backwards=scenario == "backwards"), QUESTIONS, config, **options)


class _Pause:
    """Stops the process when the first results are written, until somebody lets it go on."""

    def __init__(self) -> None:
        self._paused = False

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == "trials" and done and not self._paused:
            self._paused = True
            os.kill(os.getpid(), signal.SIGSTOP)


def serve(models: list[str]) -> None:
    """Until nobody asks any more."""
    nursery = Nursery(models)
    # what anything else prints must not be taken for an answer
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answers.write("{}\n")
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(nursery.answer(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1:])

"""An engine that has no model: what it hands out is canned, what storage sees of it is real.

Searches, plans, scores and details are of the same types as a model's, and the same every time; a
run takes a third of a second. `backwards` finishes tasks last to first, as a cluster may. The
details of one question always fail.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from records import detail

from fusion_lens.arms import Chosen
from fusion_lens.decoding import Completion, GenerationConfig
from fusion_lens.deltas import Deltas
from fusion_lens.details import Detail
from fusion_lens.engine_log import EngineLog
from fusion_lens.experiment_config import ExperimentConfig
from fusion_lens.graders import Graded, grade
from fusion_lens.identity import ModelIdentity
from fusion_lens.judges import JudgeItem
from fusion_lens.lenders import Lenders, Ready
from fusion_lens.plans import thirds
from fusion_lens.preparation import Failure, Prepared, TuningConfig
from fusion_lens.prompts import Prompt
from fusion_lens.questions import Question
from fusion_lens.search import Search, SearchConfig
from fusion_lens.transfer import Reach
from fusion_lens.tuning import Job, TunedPlan
from fusion_lens.workers import Description, Outcome, Setup, Solved, Task

UNTOLD = "untold"
ARMS = ("baseline", "segmented")
# an id that is no file name, and texts with what other programs take for a line's end
QUESTIONS = tuple(
    Question(id=name, question=f"Who wrote the\u2028{name} book?", answer=gold, subject=gold)
    for name, gold in (
        ("red/blue", "Ada Lovelace"),
        ("b", "Tom\x85Harris"),
        (UNTOLD, "3 May 1901"),
        ("ü", "Isen Aldsen"),
        ("a", "14"),
        ("..", "Lovelace"),
    )
)
CONFIG = ExperimentConfig(
    arms=ARMS,
    tuning=TuningConfig(
        search=SearchConfig(trials=4, round_size=2),
        generation=GenerationConfig(max_new_tokens=8, slots=8, cache_length=32),
    ),
    reach=False,
    block_size=1,
)
IDENTITY = ModelIdentity("canned", "bridge", "unprocessed", 3, 8, "float32", "none", "none")


class StandIn:
    """See `workers.Engine`."""

    def __init__(self, *, backwards: bool = False) -> None:
        self._backwards = backwards

    def describe(self) -> Description:
        return Description(IDENTITY, None, threads=1, content={})

    def set_up(self, setup: Setup, pool: Sequence[Question]) -> Setup:
        return setup

    def block_size(self, asked: int, n_questions: int) -> int:
        return asked

    def prepare(self, blocks: Iterable[Sequence[Question]]) -> Iterator[Ready]:
        for block in blocks:
            yield Ready([_prepared(question) for question in block], [], EngineLog())

    def solve(
        self,
        tasks: Iterable[Task],
        *,
        stopping: Callable[[], bool],
        progress: Callable[[int], None],
    ) -> Iterator[Solved]:
        for task in list(tasks)[:: -1 if self._backwards else 1]:
            yield _solved(task)
            if stopping():
                return


def _prepared(question: Question) -> Prepared:
    texts = ("<s>", "Who", " wrote", "?")
    prompt = Prompt("Who wrote?", (1, 2, 3, 4), texts, (0,))
    generator = torch.Generator().manual_seed(_seed(question.id))
    reference, base = torch.randn((2, IDENTITY.n_layers, IDENTITY.d_model), generator=generator)
    return Prepared(
        question,
        prompt,
        replace(prompt, span=(2, 4)),
        "It says so.",
        Deltas(reference, base, prompt.layout, IDENTITY),
    )


def _solved(task: Task) -> Solved:
    told = [name for name in task.undetailed if name != UNTOLD]
    untold = [name for name in task.undetailed if name == UNTOLD]
    return Solved(
        task.pairs,
        tuple(_outcome(task.lenders.prepared[name], arm) for name, arm in task.pairs),
        tuple(_detail(task.lenders, name) for name in told),
        tuple(Failure(name, None, "RuntimeError", "no features") for name in untold),
        EngineLog(rows={"lean": len(task.pairs), "hooks": 0}),
    )


def _outcome(item: Prepared, arm: str) -> Outcome:
    began = time.perf_counter()
    tuned = None if arm == "baseline" else _tuned(item, arm)
    graded = _graded(item.question, 0.0) if tuned is None else tuned.best
    asked = item.question
    return Outcome(
        Chosen(item, arm, graded, time.perf_counter() - began, tuned=tuned),
        Reach(None, 0, None, 0, None),
        JudgeItem(asked.question, asked.answer, asked.aliases, graded.completion.text),
    )


def _tuned(item: Prepared, arm: str) -> TunedPlan:
    config = CONFIG.tuning
    job = Job(item, thirds(IDENTITY.n_layers), arm)
    search: Search[Graded] = Search(
        [segment.name for segment in job.segments],
        replace(config.search, seed=_seed(item.question.id)),
        lambda values: job.plan(values, config).injected_norm,
    )
    while not search.done:
        search.tell([_graded(item.question, sum(values.values())) for values in search.ask()])
    found = search.result()
    return TunedPlan(job, config, found, job.plan(found.best.values, config), 0.0)


def _graded(question: Question, strength: float) -> Graded:
    text = question.answer if strength > 1.0 else "I do not know.\u2029"
    return grade(question, Completion(text, (5, 6), ended=True, margin=strength), 2.0 - strength)


def _detail(lenders: Lenders, name: str) -> Detail:
    item = lenders.prepared[name]
    share = lenders.share(item)
    return detail(
        name,
        tuple(item.deltas.norms.tolist()),
        generic_share=None if share is None else tuple(share.tolist()),
    )


def _seed(name: str) -> int:
    return zlib.crc32(name.encode())

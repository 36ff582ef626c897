"""The arms of an experiment: what each does to a question, and the text it ends up with.

| arm | is |
|---|---|
| `baseline` | one greedy run of the steered prompt, unsteered |
| `best_of_n` | as many samples as a search has trials, the greedy run among them, chosen alike |
| `answer_in_prompt` | one greedy run with gold and explanation before the question (a ceiling) |
| `full`, `segmented` | the method: one coefficient, or one per segment |
| `generic`, `mismatched`, `random` | segmented, with the vectors of `controls` |
| `unembed` | the last segment alone, towards the gold tokens' unembedding |
| `masked` | segmented, in the k units that other questions' deltas move most alike; k is sought |
| `gated` | segmented, weighed token by token by a gate that was fitted on other questions |

The last two are run where they are asked for. Tuned arms differ in vectors, segments, units and
gate only: same prompt, decoding, trials and search space.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from fusion_lens.decoding import Completion, Row
from fusion_lens.engine_log import EngineLog
from fusion_lens.errors import ContextLengthError
from fusion_lens.generation import check_context, generate
from fusion_lens.graders import Graded
from fusion_lens.lenders import Lenders
from fusion_lens.models import HookedModel
from fusion_lens.plans import Gate, Plan, Segment
from fusion_lens.preparation import Prepared, TuningConfig, seed_of
from fusion_lens.prompts import Prompt, answer_prefix, baseline_prompt, question_prompt
from fusion_lens.questions import Question
from fusion_lens.scoring import Scorer
from fusion_lens.tuning import Job, TunedPlan, tune_jobs


class Tunable(NamedTuple):
    """What a tuned arm is: whose vectors, on which division of the layers, in which units and on
    which tokens."""

    vectors: str
    segments: str
    masked: bool = False
    gated: bool = False

    @property
    def lends(self) -> bool:
        """Whether other questions have a part in it."""
        return self.vectors != "own" or self.masked


UNTUNED = ("baseline", "best_of_n", "answer_in_prompt")
TUNED = {
    "full": Tunable("own", "full"),
    "segmented": Tunable("own", "segmented"),
    "generic": Tunable("generic", "segmented"),
    "mismatched": Tunable("mismatched", "segmented"),
    "random": Tunable("random", "segmented"),
    "unembed": Tunable("unembed", "last"),
    "masked": Tunable("own", "segmented", masked=True),
    "gated": Tunable("own", "segmented", gated=True),
}
ARMS = (*UNTUNED, *TUNED)
DEFAULT_ARMS = tuple(arm for arm in ARMS if arm not in ("masked", "gated"))


@dataclass(frozen=True, slots=True)
class Chosen:
    """What one arm chose for one question. `tuned` where there was a search; `prefix` is put before
    the question; `n_samples` above 1 where the best of samples was taken."""

    prepared: Prepared
    arm: str
    graded: Graded
    seconds: float
    tuned: TunedPlan | None = None
    prefix: str = ""
    n_samples: int = 1

    @property
    def question_id(self) -> str:
        """The question's."""
        return self.prepared.question.id

    @property
    def plan(self) -> Plan | None:
        """The chosen plan; None where it does nothing."""
        if self.tuned is None or not self.tuned.plan.injected_norm:
            return None
        return self.tuned.plan


@dataclass(frozen=True, slots=True)
class Bench:
    """What every arm works with. `prefix_room` is the cache that prompts with the answer before
    them need beyond the run's; `gate` is that of the gated arm."""

    model: HookedModel
    config: TuningConfig
    lenders: Lenders
    score: Scorer
    log: EngineLog
    prefix_room: int = 0
    gate: Gate | None = None

    def write(
        self,
        rows: Sequence[Row],
        *,
        sampled: bool = False,
        prefixed: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """Completions of rows at the run's shape, or `sampled` at temperature 1; `prefixed` prompts
        need more cache. `progress` as in `generate`."""
        settings = replace(self.config.generation, cache_length=self._cache_length(prefixed))
        if sampled:
            settings = replace(settings, temperature=1.0)
        return generate(self.model, rows, settings, progress=progress, log=self.log)

    def fits(self, prompt: Prompt, *, prefixed: bool = False) -> bool:
        """Whether a prompt leaves room for its completion."""
        try:
            check_context(
                self.model,
                prompt,
                self.config.generation.max_new_tokens,
                self._cache_length(prefixed),
            )
        except ContextLengthError:
            return False
        return True

    def bare(self, item: Prepared) -> Prepared:
        """The same with the prompt of the unsteered run."""
        if self.config.template.baseline is None:
            return item
        text = item.question.question
        return replace(item, prompt=baseline_prompt(self.model, text, self.config.template))

    def told(self, item: Prepared, prefix: str) -> Prepared | None:
        """The same with `prefix` before its question; None where that leaves no room."""
        text, template = item.question.question, self.config.template
        prompt = question_prompt(self.model, text, template, prefix=prefix)
        return replace(item, prompt=prompt) if self.fits(prompt, prefixed=True) else None

    def _cache_length(self, prefixed: bool) -> int:
        own = self.config.generation.cache_length
        assert own is not None
        return own + (self.prefix_room if prefixed else 0)


def choose(
    bench: Bench,
    prepared: Sequence[Prepared],
    arms: Sequence[str],
    segments: Mapping[str, tuple[Segment, ...]],
    *,
    progress: Callable[[int], None] | None = None,
) -> list[Chosen]:
    """Every arm's choice for every question. `progress` is told how many trials and samples are
    done.

    An arm whose vectors or mask nobody can lend, or whose prompt does not fit the context, chooses
    nothing for that question.

    Raises:
        KeyboardInterrupt: if interrupted; half a search is no choice.
    """
    chosen: list[Chosen] = []
    n_sampled = 0
    if prepared and {"baseline", "best_of_n"}.intersection(arms):
        bare = [bench.bare(item) for item in prepared]
        greedy, seconds = _timed(prepared, lambda: _greedy(bench, bare))
        if "baseline" in arms:
            chosen += [
                Chosen(item, "baseline", graded, seconds)
                for item, graded in zip(bare, greedy, strict=True)
            ]
        if "best_of_n" in arms:
            if bench.config.template.baseline is not None:
                greedy, seconds = _timed(prepared, lambda: _greedy(bench, prepared))
            best, more = _timed(prepared, lambda: _best_of_n(bench, prepared, greedy, progress))
            n_samples = bench.config.search.trials
            n_sampled = n_samples * len(prepared)
            chosen += [
                Chosen(item, "best_of_n", graded, seconds + more, n_samples=n_samples)
                for item, graded in zip(prepared, best, strict=True)
            ]
    if prepared and "answer_in_prompt" in arms:
        chosen += _told(bench, prepared)
    jobs = []
    for item in prepared:
        for arm in arms:
            job = _job(bench, item, arm, segments) if arm in TUNED else None
            if job is not None:
                jobs.append(job)

    def tell(_: str, done: int, __: int) -> None:
        if progress is not None:
            progress(n_sampled + done)

    tuned, interrupted = tune_jobs(
        bench.model, jobs, bench.config, score=bench.score, progress=tell, log=bench.log
    )
    if interrupted:
        raise KeyboardInterrupt
    chosen += [Chosen(t.job.prepared, t.job.arm, t.best, t.seconds, tuned=t) for t in tuned]
    order = {item.question.id: n for n, item in enumerate(prepared)}
    chosen.sort(key=lambda each: (order[each.prepared.question.id], arms.index(each.arm)))
    return chosen


def most_rows(config: TuningConfig, pool: Sequence[Question]) -> int:
    """The most rows that are ever generated at once: a round of every tuned arm of `DEFAULT_ARMS`,
    for every question of the file; more of them wait. It does not depend on what is run, and so the
    shape does not."""
    return config.search.round_size * len(TUNED.keys() & {*DEFAULT_ARMS}) * len(pool)


def prefix_of(item: Prepared) -> str:
    """What `answer_in_prompt` puts before the question."""
    return answer_prefix(item.question.answer, item.explanation)


def prefix_of_question(question: Question) -> str:
    """The same as far as it is known before the model explains the answer."""
    return answer_prefix(question.answer, question.explanation or "")


def samples_of(item: Prepared, prompt: Prompt, config: TuningConfig, use: str) -> list[Row]:
    """As many sampled rows as a search has trials, but the greedy one; seeds differ between uses
    and wordings."""
    question = item.question
    return [
        Row(prompt, None, seed_of(config.search.seed, question.id, question.question, use, n))
        for n in range(1, config.search.trials)
    ]


def _greedy(bench: Bench, prepared: Sequence[Prepared]) -> list[Graded]:
    return bench.score(prepared, bench.write([item.row(bench.config) for item in prepared]))


def _best_of_n(
    bench: Bench,
    prepared: Sequence[Prepared],
    greedy: Sequence[Graded],
    progress: Callable[[int], None] | None,
) -> list[Graded]:
    owners, rows = [], []
    for item in prepared:
        samples = samples_of(item, item.prompt, bench.config, "sample")
        owners += [item] * len(samples)
        rows += samples
    candidates = {item.question.id: [g] for item, g in zip(prepared, greedy, strict=True)}
    written = bench.write(rows, sampled=True, progress=progress)
    graded = bench.score(owners, written) if rows else []
    for item, each in zip(owners, graded, strict=True):
        candidates[item.question.id].append(each)
    return [max(candidates[item.question.id], key=lambda each: each.objective) for item in prepared]


def _told(bench: Bench, prepared: Sequence[Prepared]) -> list[Chosen]:
    began = time.perf_counter()
    told = [(item, bench.told(item, prefix_of(item))) for item in prepared]
    fitting = [(item, asked) for item, asked in told if asked is not None]
    rows = [asked.row(bench.config) for _, asked in fitting]
    graded = bench.score([asked for _, asked in fitting], bench.write(rows, prefixed=True))
    seconds = (time.perf_counter() - began) / max(1, len(fitting))
    return [
        Chosen(item, "answer_in_prompt", each, seconds, prefix=prefix_of(item))
        for (item, _), each in zip(fitting, graded, strict=True)
    ]


def _job(
    bench: Bench, item: Prepared, arm: str, segments: Mapping[str, tuple[Segment, ...]]
) -> Job | None:
    kind = TUNED[arm]
    deltas = bench.lenders.lend(kind.vectors, item, bench.model)
    ranking = bench.lenders.ranking(item) if kind.masked else None
    if deltas is None or (kind.masked and ranking is None):
        return None
    gate = bench.gate if kind.gated else None
    return Job(item, segments[kind.segments], arm, deltas, ranking, gate)


def _timed(
    prepared: Sequence[Prepared], work: Callable[[], list[Graded]]
) -> tuple[list[Graded], float]:
    began = time.perf_counter()
    done = work()
    return done, (time.perf_counter() - began) / len(prepared)

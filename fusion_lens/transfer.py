"""Does what was chosen for one wording hold for others, and what does it cost other questions?

*Transfer*: the chosen plan, unchanged, on paraphrases that were not used in tuning. *Specificity*:
the plan on neighbouring questions that the unsteered model answers rightly (the share kept), and
KL(unsteered || steered) on unrelated text. Every arm is measured alike: without the baseline's own
figures, "what transfers" has no zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fusion_lens.arms import Bench, Chosen, samples_of
from fusion_lens.decoding import Completion
from fusion_lens.divergence import kl_unrelated
from fusion_lens.plans import Plan
from fusion_lens.preparation import Prepared
from fusion_lens.prompts import Prompt, question_prompt, tokenize
from fusion_lens.questions import Question
from fusion_lens.scores import exact_match


@dataclass(frozen=True, slots=True)
class Reach:
    """How far one arm's choice for one question reaches.

    `transfer_exact_match` is the share of `transfer_n` paraphrases answered rightly,
    `neighbours_kept` that of the `neighbours_n` neighbours the unsteered model answers rightly,
    `kl_unrelated` in nats per token; None is unscored.
    """

    transfer_exact_match: float | None
    transfer_n: int
    neighbours_kept: float | None
    neighbours_n: int
    kl_unrelated: float | None


@dataclass(frozen=True, slots=True)
class _Wording:
    """A paraphrase of a question, or a neighbour, with its own gold in `item`."""

    of: str
    item: Prepared
    neighbour: bool


def measure(
    bench: Bench,
    chosen: Sequence[Chosen],
    unrelated: Sequence[Prompt],
    *,
    progress: Callable[[int], None] | None = None,
) -> list[Reach]:
    """One `Reach` for each choice. `progress` is told how many of them are measured, by the share
    of texts that are written and read."""
    prepared = {each.prepared.question.id: each.prepared for each in chosen}
    wordings = [wording for item in prepared.values() for wording in _wordings(bench, item)]
    course = _Course(_most_texts(bench, chosen, wordings, len(unrelated)), len(chosen), progress)
    plain = bench.write(
        [wording.item.row(bench.config) for wording in wordings], progress=course.part()
    )
    knows = [_right(wording, done) for wording, done in zip(wordings, plain, strict=True)]
    asked = [
        (each, n)
        for each in chosen
        for n, wording in enumerate(wordings)
        if wording.of == each.prepared.question.id and (knows[n] or not wording.neighbour)
    ]
    hits = _answers(bench, asked, wordings, plain, knows, course)
    reached: dict[tuple[str, str, bool], list[bool]] = {}
    for (each, n), hit in zip(asked, hits, strict=True):
        if hit is None:
            continue
        key = (each.prepared.question.id, each.arm, wordings[n].neighbour)
        reached.setdefault(key, []).append(hit)
    made = []
    for each, kl in zip(chosen, _divergence(bench, chosen, unrelated, course), strict=True):
        told, kept = (
            reached.get((each.prepared.question.id, each.arm, neighbour), [])
            for neighbour in (False, True)
        )
        made.append(Reach(_share(told), len(told), _share(kept), len(kept), kl))
    course.end()
    return made


class _Course:
    """How many of `n` are done, told by the share of `total` texts at most. Work has parts, one
    after the other, each of which counts from 0."""

    def __init__(self, total: int, n: int, progress: Callable[[int], None] | None) -> None:
        self._total = total
        self._n = n
        self._progress = progress
        self._before = 0
        self._own = 0

    def part(self) -> Callable[[int], None]:
        """What the next part tells its count to."""
        self._before += self._own
        self._own = 0
        return self._tell

    def end(self) -> None:
        """All is done, also what turned out to be less."""
        if self._progress is not None:
            self._progress(self._n)

    def _tell(self, done: int) -> None:
        self._own = max(self._own, done)
        if self._progress is not None:
            self._progress(self._n * (self._before + self._own) // self._total)


def _most_texts(
    bench: Bench, chosen: Sequence[Chosen], wordings: Sequence[_Wording], n_unrelated: int
) -> int:
    """How many are written and read if every neighbour is known."""
    of_question: dict[str, int] = {}
    for wording in wordings:
        of_question[wording.of] = of_question.get(wording.of, 0) + 1
    most = len(wordings)
    for each in chosen:
        samples = bench.config.search.trials - 1 if each.n_samples > 1 else 0
        changed = int(each.plan is not None or bool(each.prefix))
        most += of_question.get(each.question_id, 0) * (samples + changed) + changed * n_unrelated
    return max(1, most)


def _wordings(bench: Bench, item: Prepared) -> list[_Wording]:
    """Those that fit the model's context and the run's cache."""
    question = item.question
    golds = [(replace(question, question=text), False) for text in question.paraphrases]
    golds += [
        (Question(f"{question.id}/neighbour-{n}", neighbour.question, neighbour.answer), True)
        for n, neighbour in enumerate(question.neighbours)
    ]
    kept = []
    for gold, neighbour in golds:
        prompt = question_prompt(bench.model, gold.question, bench.config.template)
        if bench.fits(prompt):
            own = replace(item, question=gold, prompt=prompt)
            kept.append(_Wording(question.id, own, neighbour))
    return kept


def _answers(
    bench: Bench,
    asked: Sequence[tuple[Chosen, int]],
    wordings: Sequence[_Wording],
    plain: Sequence[Completion],
    knows: Sequence[bool],
    course: _Course,
) -> list[bool | None]:
    """Whether each arm answers each wording rightly; None where its prompt does not fit."""
    steered = [(i, each.plan, n) for i, (each, n) in enumerate(asked) if each.plan is not None]
    sampled = [(i, n) for i, (each, n) in enumerate(asked) if each.n_samples > 1]
    hits: list[bool | None] = [knows[n] for _, n in asked]
    steered_rows = [wordings[n].item.row(bench.config, plan) for _, plan, n in steered]
    written = bench.write(steered_rows, progress=course.part())
    for (i, _, n), done in zip(steered, written, strict=True):
        hits[i] = _right(wordings[n], done)
    prefixed, rows = [], []
    for i, (each, n) in enumerate(asked):
        if not each.prefix:
            continue
        told = bench.told(wordings[n].item, each.prefix)
        if told is None:
            hits[i] = None
        else:
            prefixed.append((i, n))
            rows.append(told.row(bench.config))
    written = bench.write(rows, prefixed=True, progress=course.part())
    for (i, n), done in zip(prefixed, written, strict=True):
        hits[i] = _right(wordings[n], done)
    best = _best_samples(
        bench, [wordings[n] for _, n in sampled], [plain[n] for _, n in sampled], course
    )
    for (i, n), done in zip(sampled, best, strict=True):
        hits[i] = _right(wordings[n], done)
    return hits


def _best_samples(
    bench: Bench, wordings: Sequence[_Wording], plain: Sequence[Completion], course: _Course
) -> list[Completion]:
    """Of fresh samples and the greedy run the best by the tuned objective, against the wording's
    own gold."""
    rows = [
        row
        for wording in wordings
        for row in samples_of(wording.item, wording.item.prompt, bench.config, "fresh sample")
    ]
    written = iter(bench.write(rows, sampled=True, progress=course.part()))
    owners, candidates = [], []
    for wording, greedy in zip(wordings, plain, strict=True):
        own = [greedy, *(next(written) for _ in range(bench.config.search.trials - 1))]
        owners += [wording.item] * len(own)
        candidates += own
    graded = iter(bench.score(owners, candidates))
    return [
        max(
            (next(graded) for _ in range(bench.config.search.trials)),
            key=lambda each: each.objective,
        ).completion
        for _ in wordings
    ]


def _divergence(
    bench: Bench, chosen: Sequence[Chosen], unrelated: Sequence[Prompt], course: _Course
) -> list[float | None]:
    """0 for what leaves the model alone; a choice among samples has no next-token distribution,
    and a prefix may leave no room for the texts."""
    if not unrelated:
        return [None] * len(chosen)
    ways: dict[int, Plan | tuple[int, ...]] = {}
    for i, each in enumerate(chosen):
        if each.plan is not None:
            ways[i] = each.plan
        elif each.prefix:
            ways[i] = tokenize(bench.model, each.prefix, prepend_bos=False).tokens
    longest = max(len(text.tokens) for text in unrelated)
    room = int(bench.model.cfg.n_ctx) - longest
    beyond = {i for i, way in ways.items() if isinstance(way, tuple) and len(way) > room}
    ways = {i: way for i, way in ways.items() if i not in beyond}
    measured = kl_unrelated(
        bench.model,
        unrelated,
        list(ways.values()),
        executor=bench.config.generation.executor,
        progress=course.part(),
        log=bench.log,
    )
    values = dict(zip(ways, measured, strict=True))
    return [
        None if each.n_samples > 1 or i in beyond else values.get(i, 0.0)
        for i, each in enumerate(chosen)
    ]


def _right(wording: _Wording, done: Completion) -> bool:
    gold = wording.item.question
    return done.finite and exact_match(done.text, gold.answer, gold.aliases)


def _share(hits: Sequence[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None

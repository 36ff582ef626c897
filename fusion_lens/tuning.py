"""Questions -> deltas -> tuned plans: the one path that `tune` and `run` share.

The trials that every open search asks for in a round are rows of one generation call, whatever
question and arm they belong to. Identical completions of a question are scored once, by their
tokens.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from fusion_lens.activations import padded_length, record
from fusion_lens.decoding import Completion, GenerationConfig, Row
from fusion_lens.deltas import Deltas, make_deltas
from fusion_lens.engine_log import EngineLog
from fusion_lens.errors import (
    ActivationError,
    ConfigError,
    ContextLengthError,
    SpanError,
    one_of,
)
from fusion_lens.generation import check_context, generate, with_shape
from fusion_lens.graders import Graded, grade
from fusion_lens.likelihood import completion_nll
from fusion_lens.models import HookedModel
from fusion_lens.plans import (
    MEANS,
    POSITIONS,
    Plan,
    Segment,
    even_segments,
    full,
    make_plan,
    per_layer,
    thirds,
)
from fusion_lens.prompts import (
    Prompt,
    Template,
    explanation_prompt,
    question_prompt,
    reference_prompt,
)
from fusion_lens.questions import Question
from fusion_lens.search import Search, SearchConfig, Tuned, export_study

Progress = Callable[[str, int, int], None]
"""Called as (stage, done, total)."""


@dataclass(frozen=True, slots=True)
class TuningConfig:
    """Everything that decides a tuned plan besides model and question.

    `explanation_tokens` bounds the model's own explanation of the gold answer;
    `explanation_marker`, where the model writes one, is the text its explanation follows.
    """

    search: SearchConfig = field(default_factory=SearchConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    template: Template = field(default_factory=Template)
    mean: str = "question"
    positions: str = "all"
    steer_special: bool = False
    explanation_tokens: int = 48
    explanation_marker: str | None = None

    def __post_init__(self) -> None:
        one_of("mean", self.mean, MEANS)
        one_of("positions", self.positions, POSITIONS)
        if self.explanation_tokens < 0:
            raise ConfigError(
                f"explanation_tokens must be 0 or above, but got {self.explanation_tokens}."
            )


@dataclass(frozen=True, slots=True)
class Prepared:
    """A question with its steered prompt, its reference text and its deltas."""

    question: Question
    prompt: Prompt
    reference: Prompt
    explanation: str
    deltas: Deltas

    def row(self, config: TuningConfig, plan: Plan | None = None) -> Row:
        """A row of the steered prompt; its samples are the same under every plan and arm."""
        return Row(self.prompt, plan, row_seed(config, self.question))


@dataclass(frozen=True, slots=True)
class Failure:
    """A question that cannot be steered, or under one arm only, and why."""

    question_id: str
    cause: SpanError | ContextLengthError | ActivationError
    arm: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """One search: a prepared question, the segments whose coefficients are sought, the search's
    name, and the vectors (None: the question's own deltas)."""

    prepared: Prepared
    segments: tuple[Segment, ...]
    arm: str
    deltas: Deltas | None = None

    def plan(self, coeffs: Mapping[str, float], config: TuningConfig) -> Plan:
        """The plan of one trial."""
        return make_plan(
            self.deltas or self.prepared.deltas,
            coeffs,
            self.segments,
            mean=config.mean,
            positions=config.positions,
            steer_special=config.steer_special,
        )


@dataclass(frozen=True, slots=True)
class TunedPlan:
    """A finished search with the plan it chose. `seconds` is its share of the wall time, by
    rows."""

    job: Job
    tuned: Tuned[Graded]
    plan: Plan
    seconds: float

    @property
    def best(self) -> Graded:
        """What the chosen plan wrote, scored."""
        return self.tuned.best.outcome

    @property
    def unsteered(self) -> Graded:
        """What the zero plan wrote, scored."""
        return self.tuned.trials[0].outcome


def with_engine_shape(
    model: HookedModel, questions: Sequence[Question], config: TuningConfig, *, n_rows: int
) -> TuningConfig:
    """The config with numbers for slots and cache length that serve all these questions, their
    paraphrases and their neighbours.

    Give every question of a file, also those that are not run: another selection of them then runs
    at the same shape, and gives the same numbers to the last bit. `n_rows` is the most rows that
    ever run at once.
    """
    settings = config.generation
    steered = [
        question_prompt(model, text, config.template)
        for question in questions
        for text in _texts_of(question)
    ]
    # a multiple of 8, idle slots among them: vectorised functions round odd tails differently
    shaped = with_shape(model, steered, settings, n_rows=padded_length(n_rows))
    if config.explanation_tokens and settings.cache_length is None:
        explained = [
            explanation_prompt(model, q.question, q.answer, config.template)
            for q in questions
            if q.explanation is None
        ]
        if explained:
            writing = replace(settings, max_new_tokens=config.explanation_tokens)
            lengths = [c.cache_length or 0 for c in (shaped, with_shape(model, explained, writing))]
            shaped = replace(shaped, cache_length=max(lengths))
    return replace(config, generation=shaped)


def _texts_of(question: Question) -> tuple[str, ...]:
    """A question, its paraphrases and its neighbours, as texts."""
    neighbours = (neighbour.question for neighbour in question.neighbours)
    return (question.question, *question.paraphrases, *neighbours)


def prepare(
    model: HookedModel,
    questions: Sequence[Question],
    config: TuningConfig | None = None,
    *,
    log: EngineLog | None = None,
) -> tuple[list[Prepared], list[Failure]]:
    """Explanations, prompts and deltas of many questions, in two batched passes.

    A question whose answer is not found in its reference, whose texts exceed the context, or whose
    activations are not finite, becomes a `Failure`; the others go on.

    Raises:
        ConfigError: if two questions share an id.
    """
    config = config or TuningConfig()
    log = log or EngineLog()
    if len({question.id for question in questions}) != len(questions):
        raise ConfigError("question ids must be unique, but two questions share one.")
    failures: list[Failure] = []

    def kept(stage: Callable[[Question], Prompt], ready: Iterable[Question]) -> dict[str, Prompt]:
        prompts = {}
        for question in ready:
            try:
                prompts[question.id] = stage(question)
            except (SpanError, ContextLengthError) as error:
                failures.append(Failure(question.id, error))
        return prompts

    def steered(question: Question) -> Prompt:
        prompt = question_prompt(model, question.question, config.template)
        settings = config.generation
        check_context(model, prompt, settings.max_new_tokens, settings.cache_length)
        return prompt

    prompts = kept(steered, questions)
    explainable = [question for question in questions if question.id in prompts]
    explanations = _explanations(model, explainable, config, kept, log)
    ready = [question for question in questions if question.id in explanations]

    def reference(question: Question) -> Prompt:
        prompt = reference_prompt(
            model, question.question, question.answer, explanations[question.id], config.template
        )
        check_context(model, prompt, 0)
        return prompt

    references = kept(reference, ready)
    ready = [question for question in ready if question.id in references]
    prepared = []
    for question, vectors in zip(
        ready,
        _deltas(model, [(references[q.id], prompts[q.id]) for q in ready], config, log),
        strict=True,
    ):
        if isinstance(vectors, ActivationError):
            failures.append(Failure(question.id, vectors))
            continue
        name = question.id
        prepared.append(
            Prepared(question, prompts[name], references[name], explanations[name], vectors)
        )
    return prepared, failures


def prepare_one(
    model: HookedModel, question: Question, config: TuningConfig | None = None
) -> Prepared:
    """The same for one question, raising what `prepare` records.

    Raises:
        SpanError: if the answer is not found in the reference's tokens.
        ContextLengthError: if a text exceeds the context.
    """
    prepared, failures = prepare(model, [question], config)
    if failures:
        raise failures[0].cause
    return prepared[0]


def tune_jobs(
    model: HookedModel,
    jobs: Sequence[Job],
    config: TuningConfig,
    *,
    score: Scorer | None = None,
    progress: Progress | None = None,
    log: EngineLog | None = None,
) -> tuple[list[TunedPlan], bool]:
    """Run many searches side by side; the second value tells whether an interrupt ended them early.

    A search that was interrupted before its first round has no result and is left out.
    """
    searches: list[Search[Graded]] = [_search(job, config) for job in jobs]
    seconds = [0.0] * len(jobs)
    score = score or Scorer(model, config, log=log)
    total = len(jobs) * config.search.trials
    told = 0
    interrupted = False
    try:
        while not all(search.done for search in searches):
            began = time.perf_counter()
            asked = [search.ask() for search in searches]
            rows = [
                job.prepared.row(config, job.plan(coeffs, config))
                for job, coeffs_list in zip(jobs, asked, strict=True)
                for coeffs in coeffs_list
            ]
            shown = None if progress is None else partial(_show, progress, told, total)
            completions = generate(model, rows, config.generation, progress=shown, log=log)
            owners = [job.prepared for job, batch in zip(jobs, asked, strict=True) for _ in batch]
            outcomes = iter(score(owners, completions))
            share = (time.perf_counter() - began) / max(len(rows), 1)
            for i, (search, coeffs_list) in enumerate(zip(searches, asked, strict=True)):
                search.tell([next(outcomes) for _ in coeffs_list])
                seconds[i] += share * len(coeffs_list)
            told += len(rows)
    except KeyboardInterrupt:
        interrupted = True
    return [
        _chosen(job, search.result(interrupted=interrupted), spent, config)
        for job, search, spent in zip(jobs, searches, seconds, strict=True)
        if search.started
    ], interrupted


def tune(
    model: HookedModel,
    question: Question | str,
    answer: str | None = None,
    *,
    segments: str | int | Sequence[Segment] = "thirds",
    config: TuningConfig | None = None,
    progress: Progress | None = None,
) -> TunedPlan:
    """Tune one question's plan: coefficients per segment that make the model say the answer,
    fluently.

    An interrupt gives the trials so far (`.tuned.interrupted`) and leaves the model without hooks.

    Raises:
        QuestionError: if question or answer is empty.
        SpanError: if the answer is not found in the reference's tokens.
        ContextLengthError: if a text exceeds the context.
        KeyboardInterrupt: if interrupted before the first round ended.
    """
    config = config or TuningConfig()
    if isinstance(question, str):
        question = Question(id="question", question=question, answer=answer or "")
    elif answer is not None:
        question = replace(question, answer=answer)
    parts = make_segments(segments, int(model.cfg.n_layers))
    config = with_engine_shape(model, [question], config, n_rows=config.search.round_size)
    job = Job(prepare_one(model, question, config), parts, "tuned")
    tuned, interrupted = tune_jobs(model, [job], config, progress=progress)
    if not tuned and interrupted:
        raise KeyboardInterrupt
    return tuned[0]


def export_tuned(tuned: TunedPlan, storage: str, name: str) -> None:
    """Hand a finished search to an Optuna storage URL: every trial with its prompt, text and
    scores.

    Raises:
        SearchError: if the storage cannot be opened or holds a study of that name.
    """
    prompt = tuned.job.prepared.prompt.text
    answer = tuned.job.prepared.question.answer
    export_study(
        tuned.tuned,
        storage,
        name,
        lambda graded: {
            "prompt": prompt,
            "answer": answer,
            "completion": graded.completion.text,
            "overlap": graded.overlap,
            "exact_match": graded.exact_match,
            "perplexity": graded.perplexity,
            "objective": graded.objective,
        },
    )


def make_segments(segments: str | int | Sequence[Segment], n_layers: int) -> tuple[Segment, ...]:
    """`"full"`, `"thirds"`, `"layers"`, a number of even segments, or segments as they are.

    Raises:
        ConfigError: if the name is unknown.
        PlanError: if there are fewer layers than segments.
    """
    if isinstance(segments, int):
        return even_segments(n_layers, segments)
    if isinstance(segments, str):
        named = {"full": full, "thirds": thirds, "layers": per_layer}
        return named[one_of("segments", segments, tuple(named))](n_layers)
    return tuple(segments)


class Scorer:
    """Grades completions of prepared questions, identical ones once."""

    def __init__(
        self, model: HookedModel, config: TuningConfig, *, log: EngineLog | None = None
    ) -> None:
        self._model = model
        self._log = log or EngineLog()
        self._config = config
        self._known: dict[tuple[object, ...], Graded] = {}

    def __call__(
        self, owners: Sequence[Prepared], completions: Sequence[Completion]
    ) -> list[Graded]:
        """One grade per (question, completion) pair."""
        pairs = list(zip(owners, completions, strict=True))
        keys = [
            (owner.prompt.tokens, owner.question, completion.tokens, completion.finite)
            for owner, completion in pairs
        ]
        new = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in self._known}
        nlls = completion_nll(
            self._model,
            [(owner.prompt, completion) for owner, completion in new.values()],
            batch_size=_pass_rows(self._config),
            executor=self._config.generation.executor,
            log=self._log,
        )
        weight = self._config.search.weight
        for (key, (owner, completion)), nll in zip(new.items(), nlls, strict=True):
            self._known[key] = grade(owner.question, completion, nll, weight=weight)
        # equal tokens have equal scores, but each its own margin
        return [
            replace(self._known[key], completion=completion)
            for key, (_, completion) in zip(keys, pairs, strict=True)
        ]


def seed_of(*parts: object) -> int:
    """A seed that depends on nothing but its parts: not on order, limit or neighbours."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big")


def row_seed(config: TuningConfig, question: Question) -> int:
    """The seed of a question's samples."""
    return seed_of(config.search.seed, question.id, "row")


def _deltas(
    model: HookedModel,
    pairs: Sequence[tuple[Prompt, Prompt]],
    config: TuningConfig,
    log: EngineLog,
) -> list[Deltas | ActivationError]:
    """Of (reference, base) pairs, all in one call; one by one where a mean is not finite, to find
    out which."""
    try:
        recorded = record(
            model,
            [prompt for pair in pairs for prompt in pair],
            batch_size=_pass_rows(config),
            executor=config.generation.executor,
            log=log,
        )
    except ActivationError as error:
        if len(pairs) == 1:
            return [error]
        return [_deltas(model, [pair], config, log)[0] for pair in pairs]
    return [
        make_deltas(reference, base)
        for reference, base in zip(recorded[::2], recorded[1::2], strict=True)
    ]


def _pass_rows(config: TuningConfig) -> int:
    """Rows of a pass over whole texts: they are tens of tokens each where a slot has one."""
    return max(1, min(16, (config.generation.slots or 64) // 4))


def _explanations(
    model: HookedModel,
    questions: Sequence[Question],
    config: TuningConfig,
    kept: Callable[[Callable[[Question], Prompt], Iterable[Question]], dict[str, Prompt]],
    log: EngineLog,
) -> dict[str, str]:
    given = {q.id: q.explanation for q in questions if q.explanation is not None}
    if config.explanation_tokens == 0:
        return {q.id: given.get(q.id, "") for q in questions}

    def explain(question: Question) -> Prompt:
        prompt = explanation_prompt(model, question.question, question.answer, config.template)
        check_context(model, prompt, config.explanation_tokens, config.generation.cache_length)
        return prompt

    prompts = kept(explain, [question for question in questions if question.id not in given])
    written = generate(
        model,
        [Row(prompt) for prompt in prompts.values()],
        replace(config.generation, max_new_tokens=config.explanation_tokens, temperature=0.0),
        log=log,
    )
    own = {
        name: _after_marker(completion.text, config.explanation_marker)
        for name, completion in zip(prompts, written, strict=True)
    }
    return given | own


def _after_marker(text: str, marker: str | None) -> str:
    if marker is None:
        return text.strip()
    return text.partition(marker)[2].strip()


def _show(progress: Progress, before: int, total: int, done: int) -> None:
    progress("trials", before + done, total)


def _search(job: Job, config: TuningConfig) -> Search[Graded]:
    return Search(
        [segment.name for segment in job.segments],
        replace(
            config.search,
            # the same for every arm: they differ in vectors and segments only
            seed=seed_of(config.search.seed, job.prepared.question.id, "sampler"),
        ),
        lambda coeffs: job.plan(coeffs, config).injected_norm,
    )


def _chosen(job: Job, tuned: Tuned[Graded], seconds: float, config: TuningConfig) -> TunedPlan:
    return TunedPlan(job, tuned, job.plan(tuned.best.coeffs, config), seconds)

"""Questions -> explanations, prompts and deltas: what every arm of every question begins with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from fusion_lens.activations import padded_length, record
from fusion_lens.decoding import GenerationConfig, Row
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
from fusion_lens.models import HookedModel
from fusion_lens.plans import MEANS, POSITIONS, Plan
from fusion_lens.prompts import (
    Prompt,
    Template,
    baseline_prompt,
    explanation_prompt,
    question_prompt,
    reference_prompt,
)
from fusion_lens.questions import Question
from fusion_lens.search import SearchConfig
from fusion_lens.starts import Starts

METRICS = ("completion", "published")


@dataclass(frozen=True, slots=True)
class TuningConfig:
    """Everything that decides a tuned plan besides model and question.

    `explanation_tokens` bounds the model's own explanation of the gold answer;
    `explanation_marker`, where the model writes one, is the text its explanation follows.
    `metrics="published"` takes overlap and perplexity of prompt and completion as one text, as the
    paper does, and needs a perplexity model. `starts` are tried first by every search for
    coefficients of deltas.
    """

    search: SearchConfig = field(default_factory=SearchConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    template: Template = field(default_factory=Template)
    mean: str = "question"
    positions: str = "all"
    steer_special: bool = False
    explanation_tokens: int = 48
    explanation_marker: str | None = None
    metrics: str = "completion"
    starts: Starts = field(default_factory=Starts)

    def __post_init__(self) -> None:
        one_of("mean", self.mean, MEANS)
        one_of("metrics", self.metrics, METRICS)
        one_of("positions", self.positions, POSITIONS)
        if self.explanation_tokens < 0:
            raise ConfigError(
                f"explanation_tokens must be 0 or above, but got {self.explanation_tokens}."
            )
        if self.starts.lengths and self.mean != "question":
            raise ConfigError(
                "starts along a gradient need a constant shift, mean='question', but got "
                f"mean={self.mean!r}; leave them out."
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
    """A question that cannot be steered, or under one arm only, and why: the name of the error, and
    what it says."""

    question_id: str
    arm: str | None
    error: str
    message: str

    @staticmethod
    def of(question_id: str, cause: Exception, arm: str | None = None) -> Failure:
        """That an exception made."""
        return Failure(question_id, arm, type(cause).__name__, str(cause))


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
    asked = [
        question_prompt(model, text, config.template)
        for question in questions
        for text in _texts_of(question)
    ]
    if config.template.baseline is not None:
        asked += [baseline_prompt(model, q.question, config.template) for q in questions]
    # a multiple of 8, idle slots among them: vectorised functions round odd tails differently
    shaped = with_shape(model, asked, settings, n_rows=padded_length(n_rows))
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
    prepared, causes = _prepared(model, questions, config or TuningConfig(), log or EngineLog())
    return prepared, [Failure.of(name, cause) for name, cause in causes.items()]


def _prepared(
    model: HookedModel, questions: Sequence[Question], config: TuningConfig, log: EngineLog
) -> tuple[list[Prepared], dict[str, Exception]]:
    if len({question.id for question in questions}) != len(questions):
        raise ConfigError("question ids must be unique, but two questions share one.")
    causes: dict[str, Exception] = {}

    def kept(stage: Callable[[Question], Prompt], ready: Iterable[Question]) -> dict[str, Prompt]:
        prompts = {}
        for question in ready:
            try:
                prompts[question.id] = stage(question)
            except (SpanError, ContextLengthError) as error:
                causes[question.id] = error
        return prompts

    def steered(question: Question) -> Prompt:
        prompt = question_prompt(model, question.question, config.template)
        settings = config.generation
        for asked in (prompt, baseline_prompt(model, question.question, config.template)):
            check_context(model, asked, settings.max_new_tokens, settings.cache_length)
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
            causes[question.id] = vectors
            continue
        name = question.id
        prepared.append(
            Prepared(question, prompts[name], references[name], explanations[name], vectors)
        )
    return prepared, causes


def prepare_one(
    model: HookedModel, question: Question, config: TuningConfig | None = None
) -> Prepared:
    """The same for one question, raising what `prepare` records.

    Raises:
        SpanError: if the answer is not found in the reference's tokens.
        ContextLengthError: if a text exceeds the context.
    """
    prepared, causes = _prepared(model, [question], config or TuningConfig(), EngineLog())
    for cause in causes.values():
        raise cause
    return prepared[0]


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
            batch_size=pass_rows(config),
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


def pass_rows(config: TuningConfig) -> int:
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

"""Source and control prompts -> what ways of steering do to them: effect and damage, text by text.

A behaviour is what source texts show and control texts do not (`contrasts`); whether a completion
shows it is told by a marker, letter by letter, so that no classifier is needed. Steering is good
where the behaviour goes on source prompts and nothing else changes on control prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fusion_lens.contrasts import Example, of_kind, shown
from fusion_lens.decoding import Completion, GenerationConfig, Row
from fusion_lens.engine_log import EngineLog
from fusion_lens.errors import ContrastError, PlanError
from fusion_lens.generation import check_context, generate, with_shape
from fusion_lens.likelihood import completion_nll
from fusion_lens.memory import release_freed
from fusion_lens.models import HookedModel
from fusion_lens.plans import Plan
from fusion_lens.prompts import Prompt, tokenize

_ROWS = 16
_WAYS = 6


@dataclass(frozen=True, slots=True)
class Way:
    """One way of steering. `plans`: none, one for every prompt, or one for each source in turn,
    which its paraphrase shares and the control of the same place; `prefix` is put before every
    prompt."""

    plans: tuple[Plan, ...] = ()
    prefix: str = ""

    def plan(self, place: int) -> Plan | None:
        """That of the source or control at a place."""
        return self.plans[place % len(self.plans)] if self.plans else None


UNSTEERED = Way()


@dataclass(frozen=True, slots=True)
class Observed:
    """What a way did, text by text; 1 is yes, 0 no and None unscored.

    Per source: `effect`, the behaviour is gone; `wanted`, the target's marker is there; `transfer`,
    the behaviour is gone on the paraphrase; `nll`, nats per token of what was written, given the
    prompt alone under the unsteered model. A source, or paraphrase, that the unsteered model writes
    without the behaviour is unscored. Per control: `kept`, it is written as the unsteered model
    writes it; `marked`, its own marker is there. Where a text's logits were not finite all are 0.
    """

    effect: tuple[float | None, ...]
    wanted: tuple[float | None, ...]
    transfer: tuple[float | None, ...]
    nll: tuple[float | None, ...]
    kept: tuple[float | None, ...]
    marked: tuple[float | None, ...]


class Behaviour:
    """The sources and controls of one part, with what the unsteered model writes.

    A target belongs to the source of the same prompt. All ways without a prefix run at one shape of
    the engine; those with one need more room.

    Raises:
        ContrastError: if there is no source or no control, a source has no marker, or the unsteered
            model shows the behaviour on no source.
        ContextLengthError: if a prompt leaves no room for its completion.
    """

    def __init__(
        self,
        model: HookedModel,
        examples: Sequence[Example],
        *,
        max_new_tokens: int = 48,
        log: EngineLog | None = None,
    ) -> None:
        self.sources, self.controls = (of_kind(examples, kind) for kind in ("source", "control"))
        if not self.sources or not self.controls:
            raise ContrastError(
                "there must be sources and controls, but got "
                f"{len(self.sources)} and {len(self.controls)}."
            )
        for each in (*self.sources, *self.controls):
            if not each.prompt:
                raise ContrastError(
                    f"sources and controls must have prompts to be asked, but {each.id!r} has none."
                )
        targets = {each.prompt: each for each in of_kind(examples, "target")}
        self.targets = [targets.get(source.prompt) for source in self.sources]
        self._model = model
        self._log = log or EngineLog()
        paraphrased = [each for each in self.sources if each.paraphrase is not None]
        prompts = [each.prompt for each in (*self.sources, *self.controls)]
        prompts += [each.paraphrase for each in paraphrased if each.paraphrase is not None]
        read = [self._prompt(prompt) for prompt in prompts]
        for prompt in read:
            check_context(model, prompt, max_new_tokens)
        settings = GenerationConfig(max_new_tokens=max_new_tokens)
        self._settings = with_shape(model, read, settings, n_rows=_WAYS * len(read))
        self._plain = written = self._write([UNSTEERED], paraphrased=True)[0]
        self._shows = [
            shown(source, done.text)
            for source, done in zip(self.sources, written.sources, strict=True)
        ]
        if not any(self._shows):
            raise ContrastError(
                "the unsteered model must show the behaviour on some source, but does so on none "
                f"of {len(self.sources)}: there is nothing to steer away from."
            )
        self._shows_in_other_words = [
            done is not None and shown(source, done.text)
            for source, done in zip(self.sources, written.paraphrases, strict=True)
        ]

    @property
    def n_shown(self) -> tuple[int, int]:
        """On how many sources, and on how many of their paraphrases, the unsteered model shows the
        behaviour."""
        return sum(self._shows), sum(self._shows_in_other_words)

    def observe(
        self,
        ways: Sequence[Way],
        *,
        paraphrased: bool = True,
        likelihood: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> list[Observed]:
        """What each way does; without `paraphrased` transfer is unscored, without `likelihood` nll.
        `progress` is called with the number of ways done so far.

        Raises:
            PlanError: if a plan belongs to another model, or a way has another number of plans than
                none, one, or one for each source.
            ContextLengthError: if a prefix leaves no room.
        """
        for way in ways:
            if len(way.plans) not in (0, 1, len(self.sources)):
                raise PlanError(
                    f"a way must have no plan, one, or one for each of the {len(self.sources)} "
                    f"sources, but got {len(way.plans)}."
                )
        observed = []
        for start in range(0, len(ways), _WAYS):
            some = ways[start : start + _WAYS]
            written = self._write(some, paraphrased=paraphrased)
            observed += [self._judge(own, likelihood=likelihood) for own in written]
            release_freed()
            if progress is not None:
                progress(len(observed))
        return observed

    def _judge(self, written: _Written, *, likelihood: bool) -> Observed:
        nlls: list[float | None] = [None] * len(self.sources)
        if likelihood:
            asked = [self._prompt(source.prompt) for source in self.sources]
            texts = list(zip(asked, written.sources, strict=True))
            nlls = completion_nll(self._model, texts, batch_size=_ROWS, log=self._log)
        return Observed(
            effect=_each(_gone, self.sources, written.sources, self._shows),
            wanted=_each(_marked, self.targets, written.sources),
            transfer=_each(_gone, self.sources, written.paraphrases, self._shows_in_other_words),
            nll=tuple(nlls),
            kept=_each(_same, written.controls, self._plain.controls),
            marked=_each(_marked, self.controls, written.controls),
        )

    def _write(self, ways: Sequence[Way], *, paraphrased: bool) -> list[_Written]:
        texts: list[tuple[str | None, int]] = [
            *((source.prompt, n) for n, source in enumerate(self.sources)),
            *((source.paraphrase, n) for n, source in enumerate(self.sources) if paraphrased),
            *((control.prompt, n) for n, control in enumerate(self.controls)),
        ]
        asked = [(way, text, n) for way in ways for text, n in texts]
        done: dict[int, Completion] = {}
        for prefixed in (False, True):
            places = [
                i
                for i, (way, text, _) in enumerate(asked)
                if text is not None and bool(way.prefix) == prefixed
            ]
            rows = [
                Row(self._prompt(text, way.prefix), way.plan(n))
                for way, text, n in (asked[i] for i in places)
                if text is not None
            ]
            settings = replace(self._settings, cache_length=None) if prefixed else self._settings
            written = generate(self._model, rows, settings, log=self._log)
            done.update(zip(places, written, strict=True))
        n_sources, n_texts = len(self.sources), len(texts)
        return [
            _Written(
                sources=[done[i] for i in range(start, start + n_sources)],
                paraphrases=[
                    done.get(i) if paraphrased else None
                    for i in range(start + n_sources, start + 2 * n_sources)
                ],
                controls=[
                    done[i] for i in range(start + n_texts - len(self.controls), start + n_texts)
                ],
            )
            for start in range(0, len(asked), n_texts)
        ]

    def _prompt(self, text: str, prefix: str = "") -> Prompt:
        return tokenize(self._model, prefix + text)


@dataclass(frozen=True, slots=True)
class _Written:
    """What one way wrote, in the order of the examples."""

    sources: list[Completion]
    paraphrases: list[Completion | None]
    controls: list[Completion]


def _each(judge: Callable[..., bool | None], *columns: Sequence[Any]) -> tuple[float | None, ...]:
    found = (judge(*row) for row in zip(*columns, strict=True))
    return tuple(None if own is None else float(own) for own in found)


def _gone(source: Example, done: Completion | None, unsteered_shows: bool) -> bool | None:
    """Logits that are not finite end a text, and that is no effect."""
    if done is None or not unsteered_shows:
        return None
    return done.finite and not shown(source, done.text)


def _marked(example: Example | None, done: Completion) -> bool | None:
    if example is None or example.marker is None:
        return None
    return done.finite and shown(example, done.text)


def _same(done: Completion, unsteered: Completion) -> bool:
    return done.finite and done.text == unsteered.text

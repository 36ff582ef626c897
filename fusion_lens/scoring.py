"""Completions of prepared questions -> scores, and what a judge is given of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fusion_lens.decoding import Completion
from fusion_lens.engine_log import EngineLog
from fusion_lens.errors import ConfigError
from fusion_lens.graders import Graded, grade
from fusion_lens.judges import JudgeItem
from fusion_lens.likelihood import completion_nll
from fusion_lens.models import HookedModel, decode
from fusion_lens.perplexity import Continuation, PerplexityModel
from fusion_lens.preparation import Prepared, TuningConfig, pass_rows
from fusion_lens.prompts import Prompt
from fusion_lens.questions import Question


class Scorer:
    """Grades completions of prepared questions, identical ones once.

    Their fluency is measured by `fluency`, or, without one, by the unsteered model itself.

    Raises:
        ConfigError: if the metrics are the published ones and there is no `fluency`.
    """

    def __init__(
        self,
        model: HookedModel,
        config: TuningConfig,
        *,
        fluency: PerplexityModel | None = None,
        log: EngineLog | None = None,
    ) -> None:
        if config.metrics == "published" and fluency is None:
            raise ConfigError(
                "the published metrics must have a perplexity model (the paper's is GPT-2 small), "
                "but got none."
            )
        self._model = model
        self._fluency = fluency
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
        texts = [(owner.prompt, completion) for owner, completion in new.values()]
        wholes: list[str | None] = [None] * len(texts)
        if self._config.metrics == "published":
            wholes = [whole_text(self._model, *text) for text in texts]
        nlls = self._nlls(texts, [whole for whole in wholes if whole is not None])
        weight = self._config.search.weight
        for (key, (owner, done)), nll, whole in zip(new.items(), nlls, wholes, strict=True):
            self._known[key] = grade(owner.question, done, nll, weight=weight, whole=whole)
        # equal tokens have equal scores, but each its own margin
        return [
            replace(self._known[key], completion=completion)
            for key, (_, completion) in zip(keys, pairs, strict=True)
        ]

    def _nlls(
        self, texts: Sequence[tuple[Prompt, Completion]], wholes: Sequence[str]
    ) -> list[float | None]:
        if self._fluency is None:
            return completion_nll(
                self._model,
                texts,
                batch_size=pass_rows(self._config),
                executor=self._config.generation.executor,
                log=self._log,
            )
        if wholes:
            return self._fluency.window_nll(wholes)
        return self._fluency.continuation_nll(
            [Continuation(prompt.text, done.text, done.ended) for prompt, done in texts]
        )


def whole_text(model: HookedModel, prompt: Prompt, completion: Completion) -> str:
    """Prompt and completion as one text, without special tokens: what the paper's metrics and
    judges read. Decoded together: alone, a completion may lose the space it begins with."""
    return decode(model, (*prompt.tokens, *completion.tokens))


def judge_item(
    model: HookedModel,
    question: Question,
    prompt: Prompt,
    completion: Completion,
    config: TuningConfig,
) -> JudgeItem:
    """What a judge is given of a completion."""
    return JudgeItem(
        question.question,
        question.answer,
        question.aliases,
        completion.text,
        whole=whole_text(model, prompt, completion) if config.metrics == "published" else None,
    )

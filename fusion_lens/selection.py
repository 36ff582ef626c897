"""The questions that the unsteered model fails: the ones an experiment can show something on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fusion_lens.arms import most_rows
from fusion_lens.decoding import Row
from fusion_lens.engine_log import EngineLog
from fusion_lens.errors import ConfigError, ContextLengthError
from fusion_lens.generation import check_context, generate
from fusion_lens.judges import Judge
from fusion_lens.models import HookedModel
from fusion_lens.preparation import TuningConfig, row_seed, with_engine_shape
from fusion_lens.progress import Progress, shown
from fusion_lens.prompts import baseline_prompt
from fusion_lens.questions import Question
from fusion_lens.scores import exact_match, label_figures
from fusion_lens.scoring import judge_item


@dataclass(frozen=True, slots=True)
class Selected:
    """The questions that were kept, and of how many; `labels` are SimpleQA's figures by the judge,
    over all that were asked. `too_long` do not fit the context and were not asked."""

    questions: tuple[Question, ...]
    asked: int
    right: int
    too_long: int
    labels: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """The rates, without the questions."""
        rates = asdict(self)
        return {"kept": len(rates.pop("questions")), **rates}


def select_failed(
    model: HookedModel,
    questions: Sequence[Question],
    config: TuningConfig | None = None,
    *,
    pool: Sequence[Question] | None = None,
    judge: Judge | None = None,
    by_judge: bool = False,
    progress: Progress | bool = True,
    log: EngineLog | None = None,
) -> Selected:
    """Keep the questions whose greedy unsteered completion is not right: its extracted answer does
    not match; or, with `by_judge`, which the judge calls INCORRECT, as the paper does. `pool` as in
    `run`, whose baseline then writes the same; `progress` as in `tune`.

    Raises:
        ConfigError: if `by_judge` is set without a judge.
    """
    if by_judge and judge is None:
        raise ConfigError("a selection by the judge needs a judge, but got none.")
    config, pool = config or TuningConfig(), pool or questions
    shaped = with_engine_shape(model, pool, config, n_rows=most_rows(config, pool))
    settings = shaped.generation
    asked, rows = [], []
    for question in questions:
        prompt = baseline_prompt(model, question.question, shaped.template)
        try:
            check_context(model, prompt, settings.max_new_tokens, settings.cache_length)
        except ContextLengthError:
            continue
        asked.append(question)
        rows.append(Row(prompt, None, row_seed(shaped, question)))
    with shown(progress) as show:
        told = None if show is None else lambda done: show("selecting", done, len(rows))
        if told is not None and rows:
            told(0)
        written = generate(model, rows, settings, progress=told, log=log)
    right = [
        done.finite and exact_match(done.text, question.answer, question.aliases)
        for question, done in zip(asked, written, strict=True)
    ]
    labels: list[str | None] = [None] * len(asked)
    if judge is not None:
        items = [
            judge_item(model, question, row.prompt, done, config)
            for question, row, done in zip(asked, rows, written, strict=True)
        ]
        labels = [verdict.label for verdict in judge.judge(items)]
    kept = tuple(
        question
        for question, hit, label in zip(asked, right, labels, strict=True)
        if (label == "INCORRECT" if by_judge else not hit)
    )
    return Selected(
        questions=kept,
        asked=len(asked),
        right=sum(right),
        too_long=len(questions) - len(asked),
        labels=None if judge is None else asdict(label_figures(labels)),
    )

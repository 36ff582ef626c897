"""Questions that the model fails -> a gate that is open where they are asked, and shut on what it
knows: DSAS' "when" (arXiv 2512.03661) for Fusion Steering.

Source: what the unsteered model reads and writes for each question. Control: the same for a
neighbour of each: with all of them, naming the larger side every time would pass for a gate. Fit it
on other questions than those that are reported, about other people: whether a gate spares what it
was not fitted on is what has to be seen. Neighbours may be about the same few known people in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from fusion_lens.decoding import Row
from fusion_lens.engine_log import EngineLog
from fusion_lens.errors import ConfigError, ContrastError
from fusion_lens.generation import generate
from fusion_lens.methods.dsas import FittedGate, fit_gate
from fusion_lens.models import HookedModel
from fusion_lens.preparation import TuningConfig
from fusion_lens.prompts import Prompt, question_prompt
from fusion_lens.questions import Question
from fusion_lens.site_activations import SiteActivations, record_at
from fusion_lens.teacher_forcing import Text

RANK = 20
"""Directions that are told apart in. The published 5 are not enough where questions differ in what
they ask for more than in whether the model knows (docs/negative_results.md)."""


def held_out(available: Sequence[Question], asked: Sequence[Question]) -> list[Question]:
    """What a gate may be fitted on: questions of other splits than those that are asked, about
    others than they are."""
    splits = {question.split for question in asked}
    subjects = {question.subject for question in asked} - {None}
    return [
        question
        for question in available
        if question.split not in splits and question.subject not in subjects
    ]


def fit_question_gate(
    model: HookedModel,
    questions: Sequence[Question],
    config: TuningConfig | None = None,
    *,
    rank: int = RANK,
    log: EngineLog | None = None,
    **options: Any,
) -> FittedGate:
    """A gate at resid_post; `rank` and `options` are those of `fit_gate`. A question's subject is
    on one side of every fold alone; whom a neighbour is about is not known, and two about one may
    be on both. Each question has the first of its neighbours that no question before it has.

    Raises:
        ConfigError: if the questions have no neighbours.
        ContrastError: if fewer of them than folds leave room for their completion.
    """
    config = config or TuningConfig()
    neighbours: dict[str, None] = {}
    for question in questions:
        unread = (n.question for n in question.neighbours if n.question not in neighbours)
        neighbours |= dict.fromkeys(islice(unread, 1))
    if not neighbours:
        raise ConfigError(
            "a gate must be fitted on questions with neighbours, what must stay as it is, but none "
            f"of {len(questions)} has any; add some, or leave the gated arm out."
        )
    asked = [(question.question, question.subject or question.id) for question in questions]
    sides, subjects = [], []
    for texts in (asked, [(text, text) for text in neighbours]):
        prompts = [(question_prompt(model, text, config.template), own) for text, own in texts]
        room = int(model.cfg.n_ctx) - config.generation.max_new_tokens
        fitting = [(prompt, own) for prompt, own in prompts if len(prompt.tokens) <= room]
        if not fitting:
            raise ContrastError(
                f"some text must leave room for {config.generation.max_new_tokens} new tokens to "
                f"fit a gate on, but none of {len(texts)} does."
            )
        sides.append(_read(model, [prompt for prompt, _ in fitting], config, log))
        subjects.append([own for _, own in fitting])
    return fit_gate(sides[0], sides[1], groups=(subjects[0], subjects[1]), rank=rank, **options)


def _read(
    model: HookedModel, prompts: Sequence[Prompt], config: TuningConfig, log: EngineLog | None
) -> SiteActivations:
    written = generate(model, [Row(prompt) for prompt in prompts], config.generation, log=log)
    # what ends a text is a special token, which is not read
    read = [
        Text(prompt, done.tokens[:-1] if done.ended else done.tokens)
        for prompt, done in zip(prompts, written, strict=True)
    ]
    return record_at(model, read, tokens="mean", executor=config.generation.executor, log=log)

from __future__ import annotations

import pytest

from fusion_lens.decoding import GenerationConfig, Row
from fusion_lens.engine_log import EngineLog
from fusion_lens.errors import ConfigError
from fusion_lens.generation import generate
from fusion_lens.judges import JudgeItem, LexicalJudge, Verdict
from fusion_lens.models import HookedModel
from fusion_lens.preparation import TuningConfig
from fusion_lens.prompts import question_prompt
from fusion_lens.questions import Question
from fusion_lens.scores import extract_answer
from fusion_lens.selection import select_failed

CONFIG = TuningConfig(generation=GenerationConfig(max_new_tokens=5))


def said(model: HookedModel, text: str) -> str:
    return generate(model, [Row(question_prompt(model, text))], CONFIG.generation)[0].text


@pytest.fixture(scope="module")
def questions(tiny: HookedModel) -> list[Question]:
    known = extract_answer(said(tiny, "Who was the cat?"))
    return [
        Question("wrong", "Who wrote the red book?", "Ada Lovelace"),
        Question("right", "Who was the cat?", known),
        Question("alias", "Who was the cat?", "Tom", aliases=(known,)),
        Question("long", "Who " * 80, "Ada"),
    ]


class Strict:
    """Calls everything NOT_ATTEMPTED but the first."""

    name = "strict"
    grade = False

    def judge(self, items: list[JudgeItem]) -> list[Verdict]:
        labels = ["INCORRECT", *["NOT_ATTEMPTED"] * (len(items) - 1)]
        return [Verdict(label, None, "", "") for label in labels]


def test_questions_answered_rightly_by_gold_or_alias_are_left_out(
    tiny: HookedModel, questions: list[Question]
) -> None:
    seen = []
    log = EngineLog()
    selected = select_failed(
        tiny, questions, CONFIG, log=log, progress=lambda *told: seen.append(told)
    )
    assert [question.id for question in selected.questions] == ["wrong"]
    assert selected.to_dict() == {
        "kept": 1,
        "asked": 3,
        "right": 2,
        "too_long": 1,
        "labels": None,
    }
    assert seen[-1] == ("selecting", 3, 3)
    assert log.rows["lean"] == 3


def test_a_judge_adds_its_figures_and_may_select(
    tiny: HookedModel, questions: list[Question]
) -> None:
    selected = select_failed(tiny, questions, CONFIG, judge=LexicalJudge())
    assert selected.labels["n"] == 3
    strict = select_failed(tiny, questions[::-1], CONFIG, judge=Strict(), by_judge=True)
    # the first that fits the context, though it is right
    assert [question.id for question in strict.questions] == ["alias"]
    assert strict.labels["not_attempted"] == pytest.approx(2 / 3)


def test_a_selection_by_the_judge_needs_one(tiny: HookedModel, questions: list[Question]) -> None:
    with pytest.raises(ConfigError, match="needs a judge, but got none"):
        select_failed(tiny, questions, CONFIG, by_judge=True)

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest

from fusion_lens.errors import InputFileError
from fusion_lens.question_layouts import layout_of
from fusion_lens.questions import Question, load_questions, save_questions

SIMPLEQA = ("metadata", "problem", "answer")
TRUTHFULQA = (
    *("Type", "Category", "Question", "Best Answer"),
    *("Correct Answers", "Incorrect Answers", "Source"),
)
POPQA = ("id", "subj", "prop", "obj", "question", "possible_answers")


def written(
    folder: Path, header: tuple[str, ...], *rows: tuple[str, ...], tabs: bool = False
) -> Path:
    path = folder / ("q.tsv" if tabs else "q.csv")
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t" if tabs else ",").writerows([header, *rows])
    return path


def test_a_row_of_simpleqa_has_its_number_topic_and_answer_type(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        SIMPLEQA,
        ("{'topic': 'Art', 'answer_type': 'Person', 'urls': ['a', 'b']}", "Who?", "Ada"),
        ("{'urls': []}", "When,\nthen?", " 1843"),
    )
    assert load_questions(path) == [
        Question("simpleqa-0001", "Who?", "Ada", topic="Art", answer_type="Person"),
        Question("simpleqa-0002", "When,\nthen?", " 1843"),
    ]


def test_metadata_is_read_as_a_literal_and_never_run(tmp_path: Path) -> None:
    calls = "__import__('os').mkdir('made')"
    for metadata in (calls, "['Art']", "{'topic': ", "", "[" * 100_000):
        path = written(tmp_path, SIMPLEQA, ("{}", "Who?", "Ada"), (metadata, "Who?", "Ada"))
        with pytest.raises(InputFileError) as caught:
            load_questions(path)
        assert str(caught.value) == (
            f"{path}, line 3: 'metadata' must be a dict, but got {metadata[:40]!r}"
        )
        assert caught.value.line == 3
    assert not Path("made").exists()


def test_a_topic_that_is_no_text_is_refused_like_any_field(tmp_path: Path) -> None:
    path = written(tmp_path, SIMPLEQA, ("{'topic': 5}", "Who?", "Ada"))
    with pytest.raises(InputFileError, match="line 2: 'topic' must be text, but got 5"):
        load_questions(path)


def test_truthfulqa_gives_its_other_correct_answers_as_aliases(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        TRUTHFULQA,
        (*("Adversarial", "Myths", "Who?", "Ada", "Ada; the Countess;; A. L. ; "), "Tom", "a.org"),
    )
    assert load_questions(path) == [
        Question("truthfulqa-0001", "Who?", "Ada", topic="Myths", aliases=("the Countess", "A. L."))
    ]


@pytest.mark.parametrize("tabs", [False, True])
def test_popqa_gives_subject_relation_and_the_first_answer_as_gold(
    tmp_path: Path, tabs: bool
) -> None:
    row = ("42", "Ada Lovelace", "occupation", "x", "What was she?", '["poet", "countess"]')
    assert load_questions(written(tmp_path, POPQA, row, tabs=tabs)) == [
        Question(
            "popqa-42",
            "What was she?",
            "poet",
            subject="Ada Lovelace",
            topic="occupation",
            aliases=("countess",),
        )
    ]


@pytest.mark.parametrize("answers", ["", "poet", "[]", '{"a": 1}', '"poet"', "[" * 100_000])
def test_popqa_answers_must_be_a_json_list(tmp_path: Path, answers: str) -> None:
    path = written(tmp_path, POPQA, ("42", "Ada", "occupation", "x", "What?", answers))
    with pytest.raises(InputFileError) as caught:
        load_questions(path)
    assert str(caught.value).startswith(
        f"{path}, line 2: 'possible_answers' must be a JSON list of texts, but got '"
    )


def test_two_rows_of_popqa_with_one_id_are_refused(tmp_path: Path) -> None:
    row = ("42", "Ada", "occupation", "x", "What?", '["poet"]')
    with pytest.raises(InputFileError, match="id 'popqa-42' must be unique, but line 2 has it"):
        load_questions(written(tmp_path, POPQA, row, row))


def test_a_row_too_short_is_named_before_its_layout_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, SIMPLEQA, ("{}", "Who?"))
    with pytest.raises(InputFileError, match="line 2: must have as many cells as the header"):
        load_questions(path)


@pytest.mark.parametrize(
    "header", [("question", "answer"), (*SIMPLEQA, "question"), ("problem", "answer"), ()]
)
def test_a_header_with_question_and_answer_or_of_no_layout_is_ours(header: tuple[str, ...]) -> None:
    assert layout_of(header) is None


def test_simpleqa_as_published_loads_and_survives_saving(shared_data: Path, tmp_path: Path) -> None:
    questions = load_questions(shared_data / "data/simpleqa/simple_qa_test_set.csv")
    assert len({question.id for question in questions}) == len(questions) == 4326
    assert (questions[0].id, questions[-1].id) == ("simpleqa-0001", "simpleqa-4326")
    assert Counter(question.answer_type for question in questions) == {
        "Date": 1418,
        "Person": 1041,
        "Other": 777,
        "Number": 663,
        "Place": 427,
    }
    assert len({question.topic for question in questions}) == 10
    save_questions(questions, tmp_path / "q.jsonl")
    assert load_questions(tmp_path / "q.jsonl") == questions

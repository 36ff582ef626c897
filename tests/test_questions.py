from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_lens.errors import ConfigError, InputFileError, OutputError, QuestionError
from fusion_lens.questions import (
    Neighbour,
    Question,
    load_questions,
    questions_digest,
    save_questions,
    select_questions,
    stratified,
)

WHOLE = Question(
    id="lovelace-1",
    question="Who wrote the red book?",
    answer="Ada Lovelace",
    subject="Ada Lovelace",
    topic="books",
    answer_type="person",
    split="test",
    aliases=("A. Lovelace", "Countess"),
    explanation="She wrote it in 1843.",
    paraphrases=("By whom is the red book?",),
    neighbours=(Neighbour("Who wrote the blue book?", "Tom Harris"),),
)
TEXT = st.text(min_size=1, max_size=6).filter(str.strip)
LISTS = st.lists(st.text(max_size=4), max_size=2)
# fields, not questions: beartype draws the items it checks at random, which strategies must not
FIELDS = st.fixed_dictionaries(
    {"id": TEXT, "question": TEXT, "answer": TEXT},
    optional={
        **dict.fromkeys(("subject", "topic", "answer_type", "split", "explanation"), TEXT),
        **dict.fromkeys(("aliases", "paraphrases"), LISTS.map(tuple)),
        "neighbours": st.lists(st.tuples(TEXT, TEXT), max_size=2),
    },
)
RECORDS = st.lists(FIELDS, min_size=1, max_size=3, unique_by=lambda fields: fields["id"])


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8", newline="")
    return path


def pair(question: str = "Who?", answer: str = "Ada", **more: object) -> str:
    return json.dumps({"question": question, "answer": answer, **more})


def test_a_jsonl_line_gives_every_field(tmp_path: Path) -> None:
    record = {
        "id": "lovelace-1",
        "question": "Who wrote the red book?",
        "answer": "Ada Lovelace",
        "subject": "Ada Lovelace",
        "topic": "books",
        "answer_type": "person",
        "split": "test",
        "aliases": ["A. Lovelace", "Countess"],
        "explanation": "She wrote it in 1843.",
        "paraphrases": ["By whom is the red book?"],
        "neighbours": [{"question": "Who wrote the blue book?", "answer": "Tom Harris"}],
        "added_by": "me",  # another column
    }
    assert load_questions(written(tmp_path, "q.jsonl", json.dumps(record))) == [WHOLE]


def test_csv_holds_the_same_with_lists_as_json(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                *("id", "question", "answer", "subject", "topic", "answer_type", "split"),
                *("aliases", "explanation", "paraphrases", "neighbours", "added_by"),
            ]
        )
        writer.writerow(
            [
                *("lovelace-1", "Who wrote the red book?", "Ada Lovelace", "Ada Lovelace"),
                *("books", "person", "test", '["A. Lovelace", "Countess"]'),
                *("She wrote it in 1843.", '["By whom is the red book?"]'),
                '[{"question": "Who wrote the blue book?", "answer": "Tom Harris"}]',
                "me",
            ]
        )
    assert load_questions(path) == [WHOLE]


@pytest.mark.parametrize("name", ["q.tsv", "q.csv"])
def test_cells_are_divided_by_tabs_where_the_header_is(tmp_path: Path, name: str) -> None:
    text = 'id\tquestion\tanswer\taliases\nx\t"Who, then?"\tAda, I think\t["Countess"]\n'
    assert load_questions(written(tmp_path, name, text)) == [
        Question("x", "Who, then?", "Ada, I think", aliases=("Countess",))
    ]


def test_empty_csv_cells_are_absent_fields(tmp_path: Path) -> None:
    text = "id,question,answer,aliases,neighbours,split\n,Who?,Ada,,,\n"
    assert load_questions(written(tmp_path, "q.csv", text)) == [Question("q0002", "Who?", "Ada")]


def test_a_csv_cell_may_hold_line_breaks_and_an_error_names_the_line_it_ends_on(
    tmp_path: Path,
) -> None:
    text = 'question,answer\n"Who\nwrote?",Ada\nWhen?,\n'
    with pytest.raises(InputFileError) as caught:
        load_questions(written(tmp_path, "q.csv", text))
    assert caught.value.line == 4
    good = load_questions(written(tmp_path, "q.csv", text.removesuffix("When?,\n")))
    assert good == [Question("q0003", "Who\nwrote?", "Ada")]


def test_questions_without_an_id_are_named_by_their_line(tmp_path: Path) -> None:
    path = written(tmp_path, "q.jsonl", f"{pair()}\n\n{pair('When?', '1843')}\n")
    assert [question.id for question in load_questions(path)] == ["q0001", "q0003"]


@pytest.mark.parametrize("name", ["q.csv", "q.jsonl"])
def test_a_byte_order_mark_hides_nothing(tmp_path: Path, name: str) -> None:
    text = "id,question,answer\nx,Who?,Ada\n" if name == "q.csv" else pair(id="x")
    assert load_questions(written(tmp_path, name, f"\ufeff{text}"))[0].id == "x"


JSONL_FAULTS = {
    '{"question": "Who?"': "must be JSON: Expecting ',' delimiter",
    "[" * 100_000: "must be JSON: maximum recursion depth exceeded",
    '{"question": ' + "1" * 5000 + "}": "must be JSON: Exceeds the limit",
    "[1, 2]": "must be a JSON object, but got list",
    '"Who?"': "must be a JSON object, but got str",
    '{"answer": "Ada"}': "must have a text 'question', but got None",
    '{"question": "Who?"}': "must have a text 'answer', but got None",
    '{"question": 5, "answer": "Ada"}': "must have a text 'question', but got 5",
    '{"question": "Who?", "answer": ["Ada"]}': "must have a text 'answer', but got ['Ada']",
    pair(id=7): "'id' must be text, but got 7",
    pair(subject=["Ada"]): "'subject' must be text, but got ['Ada']",
    pair(aliases="Ada"): "'aliases' must be a list of texts, but got 'Ada'",
    pair(paraphrases=[1]): "'paraphrases' must be a list of texts, but got [1]",
    pair(neighbours=[{"question": "Who?"}]): "'neighbours' must be a list of {question, answer}",
    pair(neighbours="Who?"): "'neighbours' must be a list of {question, answer}",
    pair(neighbours=5): "'neighbours' must be a list of {question, answer}",
    pair(neighbours=[{"question": "Who?", "answer": 5}]): "'neighbours' must be a list of",
    pair(neighbours=[{"question": "Who?", "answer": " "}]): (
        "a neighbour must have a non-empty answer, but got ' '."
    ),
    pair(answer="\n"): "question 'q0002' must have a non-empty answer, but got '\\n'.",
    pair(question=""): "question 'q0002' must have a non-empty question, but got ''.",
    pair(id=" "): "question ' ' must have a non-empty id, but got ' '.",
    pair(answer="\ud800"): "must be UTF-8 text: surrogates not allowed",
    pair(id="first"): "id 'first' must be unique, but line 1 has it",
}


@pytest.mark.parametrize(("fault", "reason"), JSONL_FAULTS.items(), ids=JSONL_FAULTS.values())
def test_a_malformed_jsonl_line_is_named_with_what_must_hold(
    tmp_path: Path, fault: str, reason: str
) -> None:
    path = written(tmp_path, "q.jsonl", f"{pair(id='first')}\n{fault}\n{pair(id='last')}\n")
    with pytest.raises(InputFileError) as caught:
        load_questions(path)
    assert str(caught.value).startswith(f"{path}, line 2: {reason}")
    assert caught.value.line == 2


CSV_FAULTS = {
    "x,Who?": "must have as many cells as the header has columns",
    "x,Who?,Ada,[],more": "must have as many cells as the header has columns",
    "x,,Ada,": "must have a text 'question', but got None",
    "x,Who?, ,": "question 'x' must have a non-empty answer, but got ' '.",
    "x,Who?,Ada,[1": "'aliases' must be a list of texts, but got '[1'",
    "x,Who?,Ada," + "[" * 100_000: "'aliases' must be a list of texts, but got '[",
    'x,Who?,Ada,"{""a"": 1}"': "'aliases' must be a list of texts, but got {'a': 1}",
    'x,"Who?"!,Ada,': "must be CSV: ',' expected after '\"'",
    "first,Who?,Ada,": "id 'first' must be unique, but line 2 has it",
}


@pytest.mark.parametrize(("fault", "reason"), CSV_FAULTS.items(), ids=CSV_FAULTS.values())
def test_a_malformed_csv_row_is_named_with_what_must_hold(
    tmp_path: Path, fault: str, reason: str
) -> None:
    text = f"id,question,answer,aliases\nfirst,When?,1843,\n{fault}\nlast,When?,1843,\n"
    path = written(tmp_path, "q.csv", text)
    with pytest.raises(InputFileError) as caught:
        load_questions(path)
    assert str(caught.value).startswith(f"{path}, line 3: {reason}")


@pytest.mark.parametrize("name", ["q.csv", "q.jsonl"])
def test_a_file_that_is_not_utf_8_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes("question,answer\nWhö?,Ada\n".encode("latin-1"))
    with pytest.raises(InputFileError, match="must be UTF-8 text: invalid start byte"):
        load_questions(path)


@pytest.mark.parametrize("text", ["", "\n\n"])
@pytest.mark.parametrize("name", ["q.csv", "q.jsonl"])
def test_a_file_without_a_question_is_refused(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(InputFileError, match="must hold at least one question, but holds none"):
        load_questions(written(tmp_path, name, text))


def test_a_csv_of_a_header_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="must hold at least one question, but holds none"):
        load_questions(written(tmp_path, "q.csv", "question,answer\n"))


def test_another_suffix_is_refused_before_the_file_is_looked_for(tmp_path: Path) -> None:
    reason = r"must end in \.jsonl, \.csv or \.tsv, but got '\.json'"
    with pytest.raises(InputFileError, match=reason):
        load_questions(tmp_path / "missing.json")


def test_a_missing_file_and_a_folder_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="cannot be read: No such file or directory"):
        load_questions(tmp_path / "missing.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(InputFileError, match="cannot be read: Is a directory"):
        load_questions(tmp_path / "folder.jsonl")


def test_a_question_made_in_python_is_checked_too() -> None:
    with pytest.raises(QuestionError, match=r"question 'x' must have a non-empty answer, but got"):
        Question("x", "Who?", "\t")
    with pytest.raises(QuestionError, match="a neighbour must have a non-empty question"):
        Neighbour("", "Ada")


@settings(max_examples=60)
@given(records=RECORDS)
def test_what_is_saved_is_what_is_loaded_whatever_the_letters(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]]
) -> None:
    questions = [
        Question(
            **fields | {"neighbours": tuple(Neighbour(*n) for n in fields.get("neighbours", ()))}
        )
        for fields in records
    ]
    path = tmp_path_factory.getbasetemp() / "round_trip.jsonl"
    save_questions(questions, path)
    assert load_questions(path) == questions
    assert questions_digest(questions) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_empty_fields_are_left_out_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    save_questions([Question("x", "Wer?", "Jürgen")], path)
    assert path.read_text(encoding="utf-8") == (
        '{"id": "x", "question": "Wer?", "answer": "Jürgen"}\n'
    )


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, "file", "") / "q.jsonl"
    with pytest.raises(OutputError) as caught:
        save_questions([WHOLE], path)
    assert str(caught.value) == (
        f"{path} must be writable, but got: Not a directory; choose another place."
    )


@pytest.mark.parametrize(
    "change",
    [
        {"id": "other"},
        {"answer": "Ada"},
        {"aliases": ("Countess", "A. Lovelace")},
        {"explanation": None},
        {"neighbours": ()},
    ],
)
def test_the_digest_changes_with_any_content(change: dict[str, object]) -> None:
    assert questions_digest([replace(WHOLE, **change)]) != questions_digest([WHOLE])


def test_the_digest_knows_the_order() -> None:
    other = Question("other", "Who?", "Ada")
    assert questions_digest([WHOLE, other]) != questions_digest([other, WHOLE])
    assert questions_digest([WHOLE, other]) == questions_digest(iter([WHOLE, other]))


def some(**splits: str | None) -> list[Question]:
    return [Question(name, "Who?", "Ada", split=split) for name, split in splits.items()]


def chosen(*arguments: object, **options: object) -> list[str]:
    return [question.id for question in select_questions(*arguments, **options)]


def test_a_split_is_kept_and_the_limit_counts_from_its_first() -> None:
    questions = some(a="dev", b="test", c="test", d="test")
    assert chosen(questions) == ["a", "b", "c", "d"]
    assert chosen(questions, split="test") == ["b", "c", "d"]
    assert chosen(questions, split="test", limit=2) == ["b", "c"]
    assert chosen(questions, limit=9) == ["a", "b", "c", "d"]


def test_a_file_that_names_no_split_is_taken_whole() -> None:
    assert chosen(some(a=None, b=None), split="test") == ["a", "b"]
    assert chosen(some(a=None, b="test"), split="test") == ["b"]


def test_named_questions_come_in_the_order_named_whatever_their_split() -> None:
    questions = some(a="dev", b="test", c="test")
    assert chosen(questions, ids=["c", "a"]) == ["c", "a"]
    assert chosen(questions, split="test", ids=["a"]) == ["a"]
    assert chosen(questions, ids=["c", "a"], limit=1) == ["c"]


def test_an_unknown_id_is_refused() -> None:
    with pytest.raises(QuestionError, match="every question id must be in the file, but got 'z'"):
        select_questions(some(a="dev"), ids=["a", "z"])


def test_a_split_that_keeps_nothing_is_answered_with_those_there_are() -> None:
    with pytest.raises(QuestionError) as caught:
        select_questions(some(a="test", b=None, c="dev"), split="train")
    assert str(caught.value) == (
        "at least one question must be left, but split='train' keeps none; "
        "the file has the splits dev, none, test."
    )


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit: int) -> None:
    with pytest.raises(ConfigError, match=f"limit must be at least 1, but got {limit}"):
        select_questions(some(a="test", b="test"), limit=limit)


def typed(**counts: int) -> list[Question]:
    """Questions of the types named, one after another in turn."""
    rows = [(name, i) for name, count in counts.items() for i in range(count)]
    rows.sort(key=lambda row: row[1])
    return [Question(f"{name}{i}", "Who?", "Ada", answer_type=name) for name, i in rows]


def types(questions: list[Question]) -> Counter[str | None]:
    return Counter(question.answer_type for question in questions)


def test_a_stratified_sample_keeps_the_shares_and_the_order_of_the_file() -> None:
    questions = typed(date=60, person=30, place=10)
    sample = stratified(questions, 20, 0)
    assert types(sample) == {"date": 12, "person": 6, "place": 2}
    assert sample == [question for question in questions if question in sample]
    assert stratified(questions, 100, 0) == questions


def test_quotas_are_rounded_by_largest_remainder() -> None:
    # of 7: 7 * 5/12 = 2.9, 7 * 4/12 = 2.3, 7 * 3/12 = 1.75
    assert types(stratified(typed(a=5, b=4, c=3), 7, 0)) == {"a": 3, "b": 2, "c": 2}
    assert types(stratified(typed(a=1, b=1, c=1), 2, 0)) == {"a": 1, "b": 1}


@settings(max_examples=60)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), data=st.data())
def test_no_quota_is_off_by_one_and_none_is_above_its_stratum(
    sizes: list[int], data: st.DataObject
) -> None:
    counts = {f"t{i}": size for i, size in enumerate(sizes)}
    total = sum(sizes)
    n = data.draw(st.integers(1, total))
    sample = stratified(typed(**counts), n, seed=3)
    assert len(sample) == len({question.id for question in sample}) == n
    for name, size in counts.items():
        assert abs(types(sample)[name] - n * size / total) < 1


def test_the_seed_chooses_the_sample() -> None:
    questions = typed(date=50, person=50)
    assert stratified(questions, 10, 1) == stratified(questions, 10, 1)
    assert stratified(questions, 10, 1) != stratified(questions, 10, 2)


def test_strata_are_what_is_named_and_a_missing_value_is_one() -> None:
    questions = [
        Question(f"{topic}{split}{i}", "Who?", "Ada", topic=topic, split=split)
        for i in range(4)
        for topic, split in (("art", "dev"), ("art", "test"), (None, "dev"), (None, "test"))
    ]
    by_split = stratified(questions, 8, 0, by=["split"])
    assert Counter(question.split for question in by_split) == {"dev": 4, "test": 4}
    both = stratified(questions, 8, 0, by=("topic", "split"))
    assert set(Counter((question.topic, question.split) for question in both).values()) == {2}


@pytest.mark.parametrize("n", [0, 4])
def test_a_sample_larger_than_the_file_or_empty_is_refused(n: int) -> None:
    with pytest.raises(ConfigError) as caught:
        stratified(typed(a=3), n, 0)
    assert str(caught.value) == f"n must lie in [1, 3], the questions there are, but got {n=}."


def test_strata_by_another_field_are_refused() -> None:
    with pytest.raises(ConfigError, match="by must be one of id, subject, topic, answer_type"):
        stratified(typed(a=3), 1, 0, by=("aliases",))


def test_a_question_shows_its_texts_and_leaves_out_what_is_not_there() -> None:
    asked = Question(
        "q<1>", "Who wrote it?", "Ada <b>", aliases=("A", "B"), neighbours=(Neighbour("N?", "M"),)
    )
    table = asked.table()
    assert table.title == "question q<1>"
    assert table.rows == (
        ("question", "Who wrote it?"),
        ("answer", "Ada <b>"),
        ("also right", "A; B"),
        ("neighbours", "N? M"),
    )
    assert "Ada &lt;b&gt;" in asked._repr_html_()

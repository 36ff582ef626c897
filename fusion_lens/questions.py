"""Files of questions -> checked `Question` values. JSONL, CSV and TSV; knows no model.

A line holds `question` and `answer`; `id`, `subject`, `topic`, `answer_type`, `split`, `aliases`,
`explanation`,
`paraphrases` and `neighbours` are optional. In CSV the list-valued columns hold JSON. Other columns
are ignored. A header of a published data set is recognised (`question_layouts`).
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusion_lens.errors import ConfigError, InputFileError, OutputError, QuestionError, one_of
from fusion_lens.question_layouts import layout_of
from fusion_lens.tables import Section, Shows

_TEXT_FIELDS = ("id", "subject", "topic", "answer_type", "split", "explanation")
_LIST_FIELDS = ("aliases", "paraphrases")
# malformed, a number of thousands of digits, brackets nested too deeply
_NOT_JSON = (ValueError, RecursionError)


@dataclass(frozen=True, slots=True)
class Neighbour:
    """The same relation about another, known subject: what steering must not break."""

    question: str
    answer: str

    def __post_init__(self) -> None:
        _require_text("a neighbour", question=self.question, answer=self.answer)


@dataclass(frozen=True, slots=True)
class Question(Shows):
    """A question with its gold answer. `subject` is the cluster for statistics."""

    id: str
    question: str
    answer: str
    subject: str | None = None
    topic: str | None = None
    answer_type: str | None = None
    split: str | None = None
    aliases: tuple[str, ...] = ()
    explanation: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()

    def __post_init__(self) -> None:
        _require_text(
            f"question {self.id!r}", id=self.id, question=self.question, answer=self.answer
        )

    def table(self) -> Section:
        """Its texts; what is not there is left out."""
        kinds = ("subject", "topic", "answer_type", "split")
        told = {
            "question": self.question,
            "answer": self.answer,
            "also right": "; ".join(self.aliases),
            "explanation": self.explanation,
            **{name.replace("_", " "): getattr(self, name) for name in kinds},
            "paraphrases": "\n".join(self.paraphrases),
            "neighbours": "\n".join(f"{n.question} {n.answer}" for n in self.neighbours),
        }
        rows = tuple((name, text) for name, text in told.items() if text)
        return Section(f"question {self.id}", ("", ""), rows)


def _require_text(what: str, **fields: str) -> None:
    for name, value in fields.items():
        if not value.strip():
            raise QuestionError(f"{what} must have a non-empty {name}, but got {value!r}.")


def load_questions(path: str | Path) -> list[Question]:
    """Read a `.jsonl`, `.csv` or `.tsv` file; SimpleQA's, TruthfulQA's and PopQA's as published.

    Raises:
        InputFileError: if the file cannot be read, a line is malformed or an id occurs twice; names
            the line.
    """
    path = Path(path)
    readers = {".jsonl": _jsonl_records, ".csv": _csv_records, ".tsv": _csv_records}
    if path.suffix not in readers:
        raise InputFileError(path, f"must end in .jsonl, .csv or .tsv, but got {path.suffix!r}")
    lines: dict[str, int] = {}
    questions: list[Question] = []
    try:
        for line, record in readers[path.suffix](path):
            question = _question_from(path, line, record)
            if question.id in lines:
                raise InputFileError(
                    path,
                    f"id {question.id!r} must be unique, but line {lines[question.id]} has it",
                    line,
                )
            lines[question.id] = line
            questions.append(question)
    except OSError as error:
        raise InputFileError(path, f"cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputFileError(path, f"must be UTF-8 text: {error.reason}") from error
    if not questions:
        raise InputFileError(path, "must hold at least one question, but holds none")
    return questions


def save_questions(questions: Iterable[Question], path: str | Path) -> None:
    """Write JSONL, one question a line, empty fields left out.

    Raises:
        OutputError: if the file cannot be written.
    """
    path = Path(path)
    try:
        path.write_text("".join(map(_line, questions)), encoding="utf-8")
    except OSError as error:
        raise OutputError(path, error.strerror or str(error)) from error


def questions_digest(questions: Iterable[Question]) -> str:
    """SHA-256 of the questions as `save_questions` writes them."""
    return hashlib.sha256("".join(map(_line, questions)).encode()).hexdigest()


def select_questions(
    questions: Sequence[Question],
    *,
    split: str | None = None,
    ids: Sequence[str] = (),
    topic: str | None = None,
    answer_type: str | None = None,
    limit: int | None = None,
) -> list[Question]:
    """Keep a split or, whatever their split, the named ids; of these a topic and an answer type;
    of these the first `limit`.

    A file in which no question names a split is taken whole.

    Raises:
        ConfigError: if `limit` is below 1.
        QuestionError: if an id is unknown or nothing is left.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, but got {limit}.")
    kept = list(questions)
    if split is not None and any(question.split is not None for question in kept):
        kept = [question for question in kept if question.split == split]
    if ids:
        by_id = {question.id: question for question in questions}
        unknown = [name for name in ids if name not in by_id]
        if unknown:
            raise QuestionError(f"every question id must be in the file, but got {unknown[0]!r}.")
        kept = [by_id[name] for name in dict.fromkeys(ids)]
    for field, value in (("topic", topic), ("answer_type", answer_type)):
        if value is not None:
            known = sorted({getattr(question, field) or "none" for question in kept})
            kept = [question for question in kept if getattr(question, field) == value]
            if not kept:
                raise QuestionError(
                    f"at least one question must have the {field} {value!r}; "
                    f"there are {', '.join(known)}."
                )
    if not kept:
        splits = sorted({question.split or "none" for question in questions})
        raise QuestionError(
            f"at least one question must be left, but {split=} keeps none; "
            f"the file has the splits {', '.join(splits)}."
        )
    return kept if limit is None else kept[:limit]


def stratified(
    questions: Sequence[Question],
    n: int,
    seed: int,
    by: Sequence[str] = ("topic", "answer_type"),
) -> list[Question]:
    """A random sample of `n` in which the values of `by` keep their shares, in file order.

    Quotas are rounded by largest remainder, of equal ones the first in the file. A missing value is
    a value.

    Raises:
        ConfigError: if `n` is not from 1 to the number of questions, or `by` names no text field.
    """
    if not 1 <= n <= len(questions):
        raise ConfigError(
            f"n must lie in [1, {len(questions)}], the questions there are, but got {n=}."
        )
    fields = [one_of("by", name, _TEXT_FIELDS) for name in by]
    strata: dict[tuple[str | None, ...], list[int]] = {}
    for i, question in enumerate(questions):
        strata.setdefault(tuple(getattr(question, name) for name in fields), []).append(i)
    quotas = {key: divmod(n * len(members), len(questions)) for key, members in strata.items()}
    left = n - sum(whole for whole, _ in quotas.values())
    raised = sorted(quotas, key=lambda key: -quotas[key][1])[:left]
    rng = random.Random(seed)
    chosen: list[int] = []
    for key, members in strata.items():
        chosen += rng.sample(members, quotas[key][0] + (key in raised))
    return [questions[i] for i in sorted(chosen)]


def _line(question: Question) -> str:
    record = {key: value for key, value in asdict(question).items() if value not in (None, ())}
    return json.dumps(record, ensure_ascii=False) + "\n"


def _jsonl_records(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except _NOT_JSON as error:
                reason = getattr(error, "msg", error)
                raise InputFileError(path, f"must be JSON: {reason}", line) from error
            if not isinstance(record, dict):
                raise InputFileError(
                    path, f"must be a JSON object, but got {type(record).__name__}", line
                )
            yield line, record


def _csv_records(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    # spreadsheets begin their CSV with a byte order mark, which would hide the first column
    with path.open(encoding="utf-8-sig", newline="") as file:
        delimiter = "\t" if "\t" in file.readline() else ","
        file.seek(0)
        reader = csv.DictReader(file, strict=True, delimiter=delimiter)
        try:
            layout = layout_of(reader.fieldnames or ()) or _own_layout
            for number, record in enumerate(reader, start=1):
                if None in record or None in record.values():
                    raise InputFileError(
                        path, "must have as many cells as the header has columns", reader.line_num
                    )
                try:
                    cells = layout(record, number)
                except QuestionError as error:
                    raise InputFileError(path, str(error), reader.line_num) from error
                yield reader.line_num, cells
        except csv.Error as error:
            # DictReader's own line_num stays at the last row that could be read
            line = reader.reader.line_num
            raise InputFileError(path, f"must be CSV: {error}", line) from error


def _own_layout(row: Mapping[str, str], number: int) -> dict[str, Any]:
    return {key: _csv_value(key, cell) for key, cell in row.items()}


def _csv_value(key: str, cell: str) -> object:
    if key not in (*_LIST_FIELDS, "neighbours"):
        return cell or None
    if not cell:
        return []
    try:
        return json.loads(cell)
    except _NOT_JSON:
        return cell


def _question_from(path: Path, line: int, record: Mapping[str, Any]) -> Question:
    fields: dict[str, Any] = {"id": f"q{line:04d}"}
    for name in ("question", "answer"):
        if not isinstance(record.get(name), str):
            raise InputFileError(
                path, f"must have a text {name!r}, but got {record.get(name)!r}", line
            )
        fields[name] = record[name]
    for name in _TEXT_FIELDS:
        value = record.get(name)
        if value is None:
            continue
        if not isinstance(value, str):
            raise InputFileError(path, f"{name!r} must be text, but got {value!r}", line)
        fields[name] = value
    for name in _LIST_FIELDS:
        value = record.get(name) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise InputFileError(path, f"{name!r} must be a list of texts, but got {value!r}", line)
        fields[name] = tuple(value)
    try:
        fields["neighbours"] = tuple(
            Neighbour(item["question"], item["answer"]) for item in record.get("neighbours") or []
        )
    except (TypeError, KeyError, AttributeError) as error:
        raise InputFileError(
            path, "'neighbours' must be a list of {question, answer} objects", line
        ) from error
    except QuestionError as error:
        raise InputFileError(path, str(error), line) from error
    try:
        question = Question(**fields)
        _line(question).encode()  # JSON can spell half a surrogate pair, which no tokenizer takes
    except QuestionError as error:
        raise InputFileError(path, str(error), line) from error
    except UnicodeEncodeError as error:
        raise InputFileError(path, f"must be UTF-8 text: {error.reason}", line) from error
    return question

"""Files of questions -> checked `Question` values. JSONL, CSV and TSV; knows no model.

A line holds `question` and `answer`; `id`, `subject`, `topic`, `answer_type`, `split`, `aliases`,
`explanation`,
`paraphrases` and `neighbours` are optional. In CSV the list-valued columns hold JSON. Other columns
are ignored. A header of a published data set is recognised (`question_layouts`).
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusion_lens.durable import replace_text
from fusion_lens.errors import ConfigError, InputFileError, QuestionError, one_of, require_text
from fusion_lens.json_lines import NOT_JSON
from fusion_lens.question_layouts import layout_of
from fusion_lens.record_files import jsonl_line, load_records, require_utf8
from fusion_lens.tables import Section, Shows

_TEXT_FIELDS = ("id", "subject", "topic", "answer_type", "split", "explanation")
_LIST_FIELDS = ("aliases", "paraphrases")


@dataclass(frozen=True, slots=True)
class Neighbour:
    """The same relation about another, known subject: what steering must not break."""

    question: str
    answer: str

    def __post_init__(self) -> None:
        require_text(QuestionError, "a neighbour", question=self.question, answer=self.answer)


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
        require_text(
            QuestionError,
            f"question {self.id!r}",
            id=self.id,
            question=self.question,
            answer=self.answer,
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


def load_questions(path: str | Path) -> list[Question]:
    """Read a `.jsonl`, `.csv` or `.tsv` file; SimpleQA's, TruthfulQA's and PopQA's as published.

    Raises:
        InputFileError: if the file cannot be read, a line is malformed or an id occurs twice; names
            the line.
    """
    return load_records(
        path,
        _question_from,
        noun="question",
        layout_of=lambda header: layout_of(header) or _own_layout,
    )


def save_questions(questions: Iterable[Question], path: str | Path) -> None:
    """Write JSONL, one question a line, empty fields left out.

    Raises:
        OutputError: if the file cannot be written.
    """
    replace_text(path, "".join(map(_line, questions)))


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
    return jsonl_line(asdict(question))


def _own_layout(row: Mapping[str, str], number: int) -> dict[str, Any]:
    return {key: _csv_value(key, cell) for key, cell in row.items()}


def _csv_value(key: str, cell: str) -> object:
    if key not in (*_LIST_FIELDS, "neighbours"):
        return cell or None
    if not cell:
        return []
    try:
        return json.loads(cell)
    except NOT_JSON:
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
    except QuestionError as error:
        raise InputFileError(path, str(error), line) from error
    require_utf8(path, line, _line(question))
    return question

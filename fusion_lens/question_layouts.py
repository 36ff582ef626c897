"""A row of a published data set -> a record with the fields of `questions`.

The header names the layout: SimpleQA (`metadata, problem, answer`; topic and answer type stand in a
Python dict), TruthfulQA (`Question, Best Answer, Correct Answers, Category`; aliases divided by
`;`), PopQA (`id, subj, prop, question, possible_answers`; the answers a JSON list). Texts stay as
they are written. Reads no file.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fusion_lens.errors import QuestionError
from fusion_lens.record_files import Layout


def layout_of(header: Sequence[str]) -> Layout | None:
    """What makes a record of a row and its 1-based number among the rows; None where the header is
    of no published layout. It raises `QuestionError` for a row that does not fit."""
    if {"question", "answer"} <= set(header):
        return None
    return next((layout for names, layout in _LAYOUTS if names <= set(header)), None)


def _simpleqa(row: Mapping[str, str], number: int) -> dict[str, Any]:
    metadata = _literal(row["metadata"])
    if not isinstance(metadata, dict):
        raise QuestionError(f"'metadata' must be a dict, but got {row['metadata'][:40]!r}")
    return {
        "id": f"simpleqa-{number:04d}",
        "question": row["problem"],
        "answer": row["answer"],
        "topic": metadata.get("topic"),
        "answer_type": metadata.get("answer_type"),
    }


def _truthfulqa(row: Mapping[str, str], number: int) -> dict[str, Any]:
    best = row["Best Answer"].strip()
    correct = [answer.strip() for answer in row["Correct Answers"].split(";")]
    return {
        "id": f"truthfulqa-{number:04d}",
        "question": row["Question"],
        "answer": best,
        "aliases": [answer for answer in correct if answer and answer != best],
        "topic": row["Category"],
    }


def _popqa(row: Mapping[str, str], number: int) -> dict[str, Any]:
    text = row["possible_answers"]
    try:
        answers = json.loads(text)
    except (ValueError, RecursionError):
        answers = None
    if not isinstance(answers, list) or not answers:
        raise QuestionError(
            f"'possible_answers' must be a JSON list of texts, but got {text[:40]!r}"
        )
    return {
        "id": f"popqa-{row['id']}",
        "question": row["question"],
        "answer": answers[0],
        "aliases": answers[1:],
        "subject": row["subj"],
        "topic": row["prop"],
    }


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


_LAYOUTS: tuple[tuple[frozenset[str], Layout], ...] = (
    (frozenset({"metadata", "problem", "answer"}), _simpleqa),
    (frozenset({"Question", "Best Answer", "Correct Answers", "Category"}), _truthfulqa),
    (frozenset({"id", "subj", "prop", "question", "possible_answers"}), _popqa),
)

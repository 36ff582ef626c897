"""A run's records and details -> what `report.html` unpacks: columns; a text that repeats, once.

Everything is plain JSON, compressed; nothing here is HTML, and nothing is escaped: the page inserts
it as text only.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any

from fusion_lens.details import Detail
from fusion_lens.plans import full
from fusion_lens.results import Result, Results
from fusion_lens.tuning import make_segments

_OF_QUESTIONS = ("question", "answer", "explanation", "subject", "topic", "answer_type")
_OF_RECORDS = tuple(
    field.name for field in fields(Result) if field.name not in ("question_id", "arm")
)


def packed(content: Any) -> str:
    """JSON, gzip and base64: a tenth of the JSON, and no character that HTML knows. The same bytes
    for the same content."""
    text = content if isinstance(content, str) else _json(content)
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode("ascii")


def records_table(results: Results) -> dict[str, Any]:
    """`questions` and `records` as columns, the arms in their order, and which layers a segment
    covers. A record's text is None where it is its question's."""
    arms = list(dict.fromkeys((*results.summary["arms"], *(r.arm for r in results.records))))
    first: dict[str, Result] = {}
    for record in results.records:
        first.setdefault(record.question_id, record)
    place = {name: n for n, name in enumerate(first)}
    columns: dict[str, list[Any]] = {
        "question": [place[record.question_id] for record in results.records],
        "arm": [arms.index(record.arm) for record in results.records],
    }
    for name in _OF_RECORDS:
        values = [_short(getattr(record, name)) for record in results.records]
        if name in _OF_QUESTIONS:
            same = [getattr(first[record.question_id], name) for record in results.records]
            differing = [None if a == b else a for a, b in zip(values, same, strict=True)]
            if any(each is not None for each in differing):
                columns[f"own_{name}"] = differing
        else:
            columns[name] = values
    return {
        "arms": arms,
        "segments": _segment_layers(results),
        "questions": {
            "id": list(first),
            **{name: [getattr(r, name) for r in first.values()] for name in _OF_QUESTIONS},
        },
        "records": columns,
    }


def details_table(results: Results) -> dict[str, Any]:
    """Details by question id, their tokens as places in one list of `tokens`."""
    vocabulary: dict[str, int] = {}
    made = {each.question_id: _numbered(each, vocabulary) for each in results.details}
    return {"tokens": list(vocabulary), "questions": made}


def _numbered(detail: Detail, vocabulary: dict[str, int]) -> dict[str, Any]:
    content = asdict(detail)
    texts = (content["captured"], content["steered"], *content["traces"])
    for text in texts:
        text["tokens"] = _places(text["tokens"], vocabulary)
    return content


def _places(tokens: Iterable[str], vocabulary: dict[str, int]) -> list[int]:
    return [vocabulary.setdefault(token, len(vocabulary)) for token in tokens]


def _segment_layers(results: Results) -> dict[str, list[int]]:
    """Segment -> [first layer, layer after the last]; empty where no layer is known."""
    if not results.details:
        return {}
    n_layers = len(results.details[0].delta_norms)
    chosen = make_segments(results.summary["provenance"]["settings"]["segments"], n_layers)
    return {each.name: [each.start, each.stop] for each in (*full(n_layers), *chosen)}


def _short(value: Any) -> Any:
    """Numbers to six digits, which is more than anybody reads."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _short(own) for key, own in value.items()}
    return value


def _json(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))

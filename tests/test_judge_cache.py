from __future__ import annotations

from pathlib import Path

import pytest

from fusion_lens.errors import InputFileError
from fusion_lens.judge_cache import ReplyCache


def test_a_reply_that_could_not_be_written_into_a_result_is_asked_for_again(tmp_path: Path) -> None:
    path = tmp_path / "cache.jsonl"
    path.write_text('{"key": "a", "reply": "yes"}\n{"key": "b", "reply": "\\ud800"}\n', "utf-8")
    replies = ReplyCache(path)
    assert (replies.get("a"), replies.get("b")) == ("yes", None)
    replies.put("b", "no")
    assert ReplyCache(path).get("b") == "no"


@pytest.mark.parametrize(
    "line", ['{"key": 1, "reply": "a"}', "[]", '{"reply": "a"}', "[" * 100_000]
)
def test_a_line_of_something_else_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "cache.jsonl"
    path.write_text('{"key": "a", "reply": "yes"}\n' + line + "\n", "utf-8")
    with pytest.raises(InputFileError, match=r"line 2: must be a line of a cache of replies"):
        ReplyCache(path)

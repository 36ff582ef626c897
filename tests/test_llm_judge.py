from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from inspect_ai.model import ModelOutput
from judge_server import (
    Act,
    JudgeServer,
    fails,
    gives_no_choices,
    is_cut_in_half,
    says,
    serving,
)

from fusion_lens import llm_judge
from fusion_lens.errors import ConfigError, InputFileError, MissingExtraError, OutputError
from fusion_lens.judge_prompts import judge_prompt
from fusion_lens.judges import Judge, JudgeItem, Verdict
from fusion_lens.llm_judge import LLMJudge, label_verdict

MODEL = "openai-api/judge/model"
KEY = "sk-never-to-be-seen-0123456789"


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key of the service `judge`, and waits too short to be noticed."""
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    monkeypatch.setattr(llm_judge, "_FIRST_WAIT", 0.01)


def item(question: str, completion: str = "Ada Lovelace.") -> JudgeItem:
    return JudgeItem(question, "Ada Lovelace", ("Lady Lovelace",), completion)


def judge_of(server: JudgeServer, **options: Any) -> LLMJudge:
    defaults: dict[str, Any] = {"timeout": 5.0, "retries": 1}
    return LLMJudge(MODEL, base_url=server.base_url, **defaults | options)


def labels(verdicts: Sequence[Verdict]) -> list[str | None]:
    return [verdict.label for verdict in verdicts]


def test_the_server_gets_the_prompt_at_temperature_0_and_the_key_from_the_environment() -> None:
    with serving() as server, judge_of(server, max_tokens=32) as judge:
        asked = item("Who wrote it?")
        assert judge.judge([asked]) == [
            Verdict(label="CORRECT", grade=None, answer="Ada Lovelace.", explanation="CORRECT")
        ]
        assert isinstance(judge, Judge)
        assert judge.name == MODEL
        sent = {
            "model": "model",
            "temperature": 0.0,
            "max_tokens": 32,
            "messages": [{"role": "user", "content": judge_prompt("label", asked)}],
        }
        assert server.bodies == [sent]
        assert server.keys == {KEY}


OUTCOMES: dict[str, tuple[list[Act], str | None, str, int]] = {
    "says a label": ([says("NOT_ATTEMPTED")], "NOT_ATTEMPTED", "NOT_ATTEMPTED", 1),
    "label in a sentence": (
        [says("This answer is INCORRECT because it names Tom.")],
        "INCORRECT",
        "This answer is INCORRECT because it names Tom.",
        1,
    ),
    "slow once": ([says("CORRECT", after=4.0), says("CORRECT")], "CORRECT", "CORRECT", 2),
    "slow": ([says("CORRECT", after=4.0)], None, "unscored, timeout", 2),
    "busy once": ([fails(429, Retry_After="0.01"), says("CORRECT")], "CORRECT", "CORRECT", 2),
    "no choices": ([gives_no_choices], None, "unscored, empty reply", 1),
    "no text": ([says(" ")], None, "unscored, empty reply", 1),
    "cut once": ([is_cut_in_half, says("CORRECT")], "CORRECT", "CORRECT", 2),
    "cut": ([is_cut_in_half], None, "unscored, APIConnectionError", 2),
    "down": ([fails(500)], None, "unscored, HTTP 500", 2),
    "forbidden": ([fails(401)], None, "unscored, HTTP 401", 1),
    "no such model": ([fails(404)], None, "unscored, HTTP 404", 1),
    "bad request": ([fails(400)], None, "unscored, HTTP 400", 1),
    "refuses": ([says("I cannot help")], None, "unscored, no single label: I cannot help", 1),
    "is filtered": (
        [says("CORRECT", stop="content_filter")],
        None,
        "unscored, refused: CORRECT",
        1,
    ),
    "two labels": (
        [says("CORRECT or INCORRECT")],
        None,
        "unscored, no single label: CORRECT or INCORRECT",
        1,
    ),
    "too long": ([says("Well, I", stop="length")], None, "unscored, cut at max_tokens: Well, I", 1),
}


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_whatever_a_server_does_to_one_item_the_others_are_judged(outcome: str) -> None:
    acts, label, explanation, n_requests = OUTCOMES[outcome]
    timeout = 0.75 if "slow" in outcome else 5.0
    with serving({"Who is odd?": acts}) as server, judge_of(server, timeout=timeout) as judge:
        items = [item("Who?"), item("Who is odd?", "Tom."), item("Who else?")]
        verdicts = judge.judge(items)
        assert labels(verdicts) == ["CORRECT", label, "CORRECT"]
        assert verdicts[1] == Verdict(label, None, "Tom.", explanation)
        assert server.asked("Who is odd?") == n_requests
        reason = explanation.removeprefix("unscored, ").split(":")[0]
        assert judge.counts.failures == ({} if label else {reason: 1})
        assert judge.counts.requests == len(server.bodies) == 2 + n_requests
        assert judge.counts.cached == 0

        again = judge.judge(items)
        assert labels(again) == ["CORRECT", label, "CORRECT"]
        assert server.asked("Who?") == server.asked("Who else?") == 1
        assert judge.counts.cached == (3 if label else 2)
        assert server.asked("Who is odd?") == (n_requests if label else 2 * n_requests)


def test_attempts_are_as_far_apart_as_the_server_asks() -> None:
    acts = [fails(429, Retry_After="0.5"), fails(503, Retry_After="0.25"), says("CORRECT")]
    with serving({"Who?": acts}) as server, judge_of(server, retries=2) as judge:
        assert labels(judge.judge([item("Who?")])) == ["CORRECT"]
        first, second, third = server.times
        assert second - first >= 0.5
        assert third - second >= 0.25


def test_attempts_are_twice_as_far_apart_each_time_where_the_server_asks_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(llm_judge, "_FIRST_WAIT", 0.1)
    with serving({"Who?": [fails(500)]}) as server, judge_of(server, retries=3) as judge:
        assert labels(judge.judge([item("Who?")])) == [None]
        gaps = [after - before for before, after in pairwise(server.times)]
        for gap, least in zip(gaps, (0.1, 0.2, 0.4), strict=True):
            assert gap >= least


def test_a_server_that_asks_for_an_hour_is_not_waited_for() -> None:
    acts = [fails(429, Retry_After="3600")]
    with serving({"Who?": acts}) as server, judge_of(server, retries=5) as judge:
        assert judge.judge([item("Who?")])[0].explanation == "unscored, HTTP 429"
        assert judge.counts.to_dict() == {
            "price": None,
            "requests": 1,
            "cached": 0,
            "tokens_in": 0,
            "tokens_out": 0,
            "failures": {"HTTP 429": 1},
            "cost": None,
        }


def test_no_more_requests_are_under_way_than_allowed() -> None:
    questions = [f"Who is number {n}?" for n in range(12)]
    script = {"Who": [says("CORRECT", after=0.05)]}
    with serving(script) as server, judge_of(server, max_connections=3) as judge:
        assert labels(judge.judge([item(question) for question in questions])) == ["CORRECT"] * 12
        assert server.most_in_flight == 3
        assert len(server.bodies) == 12


def test_the_same_prompt_is_asked_once() -> None:
    with serving() as server, judge_of(server) as judge:
        verdicts = judge.judge([item("Who?"), item("Who?"), item("Who?", "Tom.")])
        assert labels(verdicts) == ["CORRECT"] * 3
        assert [verdict.answer for verdict in verdicts] == [
            "Ada Lovelace.",
            "Ada Lovelace.",
            "Tom.",
        ]
        assert len(server.bodies) == judge.counts.requests == 2
        assert judge.counts.cached == 1
        assert judge.judge([]) == []


def test_tokens_are_counted_and_priced_once() -> None:
    with serving() as server, judge_of(server, price=(2.0, 10.0)) as judge:
        for _ in range(2):
            judge.judge([item("Who?"), item("Who else?")])
        assert (judge.counts.tokens_in, judge.counts.tokens_out) == (200, 14)
        # 200 * 2 and 14 * 10 per million
        assert judge.counts.cost == pytest.approx(540e-6)


def test_a_grade_is_asked_for_apart_and_its_failure_leaves_the_label() -> None:
    script = {
        "a scale from 1 to 5": [says("4 out of 5"), says("good")],
        "Who is odd?": [says("hm")],
    }
    with serving(script) as server, judge_of(server, grade=True, max_connections=1) as judge:
        assert judge.judge([item("Who is odd?")]) == [
            Verdict(None, 4.0, "Ada Lovelace.", "unscored, no single label: hm; grade: 4 out of 5")
        ]
        assert judge.judge([item("Who?")]) == [
            Verdict(
                "CORRECT",
                None,
                "Ada Lovelace.",
                "CORRECT; grade: unscored, no single grade: good",
            )
        ]
        assert judge.counts.failures == {"no single label": 1, "no single grade": 1}
        assert len(server.bodies) == 4


def test_a_cached_run_needs_neither_a_server_nor_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "new" / "judge.jsonl"
    items = [item("Who?"), item("Who is odd?")]
    with serving({"Who is odd?": [says("NOT_ATTEMPTED")]}) as server:
        with judge_of(server, cache=cache) as judge:
            first = judge.judge(items)
    monkeypatch.delenv("JUDGE_API_KEY")
    replayed = judge_of(server, cache=cache)
    assert replayed.judge(items) == first
    assert labels(first) == ["CORRECT", "NOT_ATTEMPTED"]
    assert replayed.counts.to_dict()["cached"] == 2
    assert replayed.counts.requests == 0
    with pytest.raises(ConfigError, match="JUDGE_API_KEY"):
        replayed.judge([item("Who else?")])


@pytest.mark.parametrize(
    "options",
    [{"max_tokens": 16}, {"model_args": {"stream": False}}, {"base_url": "http://127.0.0.1:9/v1"}],
)
def test_other_settings_are_another_place_in_the_cache(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    cache = tmp_path / "judge.jsonl"
    with serving() as server:
        with judge_of(server, cache=cache) as judge:
            judge.judge([item("Who?")])
        with LLMJudge(
            MODEL, cache=cache, retries=0, **{"base_url": server.base_url} | options
        ) as other:
            other.judge([item("Who?")])
            assert other.counts.requests == 1
        with judge_of(server, cache=cache) as same:
            same.judge([item("Who?")])
            assert same.counts.requests == 0


def test_a_failure_is_not_cached_and_is_asked_again_by_the_next_run(tmp_path: Path) -> None:
    cache = tmp_path / "judge.jsonl"
    script = {"Who is odd?": [fails(500), says("hm"), says("INCORRECT")]}
    items = [item("Who is odd?"), item("Who?")]
    with serving(script) as server:
        for n_lines, label in ((1, None), (1, None), (2, "INCORRECT"), (2, "INCORRECT")):
            with judge_of(server, cache=cache, retries=0) as judge:
                assert labels(judge.judge(items)) == [label, "CORRECT"]
            assert len(cache.read_text("utf-8").splitlines()) == n_lines
        assert server.asked("Who?") == 1
        assert server.asked("Who is odd?") == 3


def test_a_cache_cut_anywhere_gives_its_whole_lines_and_is_continued(tmp_path: Path) -> None:
    cache = tmp_path / "judge.jsonl"
    items = [item("Who?"), item("Who else?")]
    with serving() as server:
        with judge_of(server, cache=cache, max_connections=1) as judge:
            first = judge.judge(items)
        whole = cache.read_bytes()
        ends = [place for place, byte in enumerate(whole) if byte == ord("\n")]
        for length in (0, 1, 10, ends[0] - 1, ends[0], ends[0] + 1, ends[0] + 5, ends[1] - 1):
            cache.write_bytes(whole[:length])
            with judge_of(server, cache=cache) as judge:
                assert judge.judge(items) == first
                assert judge.counts.cached == (0 if length < ends[0] else 1)
            with judge_of(server, cache=cache) as judge:
                assert judge.judge(items) == first
                assert judge.counts.cached == 2


def test_a_cached_reply_that_says_nothing_is_asked_for_again(tmp_path: Path) -> None:
    cache = tmp_path / "judge.jsonl"
    with serving() as server:
        with judge_of(server, cache=cache) as judge:
            judge.judge([item("Who?")])
        cache.write_text(cache.read_text("utf-8").replace("CORRECT", "maybe"), "utf-8")
        with judge_of(server, cache=cache) as judge:
            assert labels(judge.judge([item("Who?")])) == ["CORRECT"]
            assert judge.counts.cached == 0


@pytest.mark.parametrize("line", ['{"question_id": "ada"}', "question,answer", "[]", '{"key": 1}'])
def test_a_file_of_another_kind_is_no_cache_and_is_left_as_it_was(
    tmp_path: Path, line: str
) -> None:
    cache = tmp_path / "results.jsonl"
    good = json.dumps({"key": "0" * 64, "reply": "CORRECT"})
    cache.write_text(f"{good}\n{line}\n", "utf-8")
    with pytest.raises(InputFileError, match=r"results.jsonl, line 2: must be a line of a cache"):
        LLMJudge(MODEL, cache=cache)
    assert cache.read_text("utf-8") == f"{good}\n{line}\n"


def test_a_cache_that_cannot_be_written_is_known_before_anything_is_asked(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="must be writable"):
        LLMJudge(MODEL, cache=tmp_path)


def test_a_cache_that_cannot_be_written_any_more_ends_the_call_and_not_the_judge(
    tmp_path: Path,
) -> None:
    cache = tmp_path / "judge.jsonl"
    with serving() as server, judge_of(server, cache=cache) as judge:
        cache.unlink()
        cache.mkdir()
        with pytest.raises(OutputError, match="must be writable"):
            judge.judge([item("Who?"), item("Who else?")])
        cache.rmdir()
        assert labels(judge.judge([item("Who is next?")])) == ["CORRECT"]


def test_the_key_is_in_no_file_no_verdict_and_no_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    cache = tmp_path / "judge.jsonl"
    script = {f"Who is {status}?": [fails(status)] for status in (400, 401, 403, 429, 500)}
    items = [item(text) for text in (*script, "Who?")]
    with serving(script) as server, judge_of(server, cache=cache, grade=True) as judge:
        verdicts = judge.judge(items)
        assert server.keys == {KEY}
    assert [verdict.explanation for verdict in verdicts[:2]] == [
        "unscored, HTTP 400; grade: unscored, HTTP 400",
        "unscored, HTTP 401; grade: unscored, HTTP 401",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["judge.jsonl"]
    out, err = capfd.readouterr()
    texts = [cache.read_text("utf-8"), repr(verdicts), repr(judge.counts), caplog.text, out, err]
    for text in texts:
        assert KEY not in text
        assert KEY[-8:] not in text


def test_the_key_is_not_in_the_error_of_a_judge_that_cannot_be_opened() -> None:
    from inspect_ai.model import ModelAPI, modelapi

    @modelapi(name="telltale")
    def telltale() -> type[ModelAPI]:
        raise RuntimeError(f"cannot log in with {KEY}.")

    with pytest.raises(ConfigError) as caught:
        LLMJudge("telltale/model").open()
    assert str(caught.value) == (
        "the judge telltale/model must open, but got RuntimeError: cannot log in with ***; "
        "see inspect-ai's page on model providers."
    )
    assert caught.value.__cause__ is None


def test_judge_works_inside_a_running_event_loop_and_again_in_another() -> None:
    with serving() as server, judge_of(server) as judge:

        async def in_a_notebook(question: str) -> list[str | None]:
            return labels(judge.judge([item(question)]))

        assert labels(judge.judge([item("Who is first?")])) == ["CORRECT"]
        assert asyncio.run(in_a_notebook("Who is second?")) == ["CORRECT"]
        assert asyncio.run(in_a_notebook("Who is third?")) == ["CORRECT"]
        assert len(server.bodies) == 3


def test_an_interrupt_keeps_what_was_answered_and_sends_nothing_more(tmp_path: Path) -> None:
    cache = tmp_path / "judge.jsonl"
    items = [item("Who?"), item("Who is slow?"), item("Who is slow too?")]
    script = {"slow": [says("CORRECT", after=5.0)]}
    with serving(script) as server, judge_of(server, cache=cache, max_connections=1) as judge:
        # a shell ignores the signal for what it starts in the background
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupt = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            judge.judge(items)
        interrupt.join()
        signal.signal(signal.SIGINT, before)
        assert len(cache.read_text("utf-8").splitlines()) == 1
        assert labels(judge.judge(items[:1])) == ["CORRECT"]
        assert server.asked("Who?") == server.asked("Who is slow?") == 1
        assert server.asked("Who is slow too?") == 0


def test_judges_of_one_model_in_several_threads_do_not_wait_for_each_other() -> None:
    found: dict[int, list[str | None]] = {}
    with serving({"Who": [says("CORRECT", after=0.02)]}) as server:

        def work(n: int) -> None:
            with judge_of(server, max_connections=1 + n) as judge:
                found[n] = labels(judge.judge([item(f"Who is {n}.{i}?") for i in range(6)]))

        threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=10)
    assert found == {n: ["CORRECT"] * 6 for n in range(3)}


def test_a_closed_judge_opens_again() -> None:
    with serving() as server:
        judge = judge_of(server)
        for n in range(3):
            assert labels(judge.judge([item(f"Who is {n}?")])) == ["CORRECT"]
            judge.close()
        judge.close()


@pytest.mark.slow
def test_a_local_checkpoint_judges_and_is_greedy(tiny_folder: Path) -> None:
    replies = []
    for _ in range(2):
        with LLMJudge(f"hf/{tiny_folder}", max_tokens=4, retries=0) as judge:
            (verdict,) = judge.judge([item("Who?")])
            assert judge.counts.tokens_out == 4
            replies.append(verdict.explanation)
    assert replies[0] == replies[1]
    assert replies[0].startswith("unscored, no single label: ")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nobody/model", "Model API nobody of model 'nobody/model' not recognized"),
        ("model", "should be in the format of <api_name>/<model_name>"),
        ("openai-api/absent/model", "No ABSENT_API_KEY defined in the environment; see"),
    ],
)
def test_a_judge_that_cannot_be_opened_says_why(model: str, message: str) -> None:
    judge = LLMJudge(model)
    with pytest.raises(ConfigError) as caught:
        judge.open()
    assert message in str(caught.value)
    with pytest.raises(ConfigError):
        judge.judge([item("Who?")])


@pytest.mark.parametrize(
    "options", [{"max_connections": 0}, {"max_tokens": 0}, {"timeout": 0.0}, {"retries": -1}]
)
def test_settings_outside_their_range_are_refused(options: dict[str, Any]) -> None:
    (name, value), *_ = options.items()
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        LLMJudge(MODEL, **options)


def test_a_key_given_as_an_argument_is_refused() -> None:
    with pytest.raises(ConfigError, match="must come from the environment") as caught:
        LLMJudge(MODEL, model_args={"api_key": KEY})
    assert KEY not in str(caught.value)


def test_without_inspect_ai_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "inspect_ai.model", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fusion-lens\[judge\]'"):
        LLMJudge(MODEL)


def test_who_asks_inspect_ai_himself_reads_a_reply_alike() -> None:
    asked = item("Who wrote it?")
    right = ModelOutput.from_content("model", " INCORRECT \n")
    assert label_verdict(asked, right) == Verdict("INCORRECT", None, "Ada Lovelace.", "INCORRECT")
    cut = ModelOutput.from_content("model", "Well, I", stop_reason="max_tokens")
    assert label_verdict(asked, cut) == Verdict(
        None, None, "Ada Lovelace.", "unscored, cut at max_tokens: Well, I"
    )

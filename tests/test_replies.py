from __future__ import annotations

from typing import Any

import pytest
from conftest import strong_plan

from fusion_lens.decoding import GenerationConfig, Row
from fusion_lens.errors import ConfigError, ContextLengthError
from fusion_lens.generation import generate
from fusion_lens.messages import Message
from fusion_lens.prompts import question_prompt, tokenize
from fusion_lens.replies import Reply, Request, write_replies

CONFIG = GenerationConfig(slots=4, cache_length=64)


def asked(text: str, **options: Any) -> Request:
    return Request((Message("user", text),), **{"max_tokens": 6, **options})


def test_requests_alike_are_one_batch_and_each_is_what_it_is_alone(tiny, batches) -> None:
    plan = strong_plan(tiny)
    requests = [
        asked("Who wrote the red book?"),
        asked("When?", plan=plan),
        asked("Where was Tom born?", plan=plan * 0.5, seed=3),
    ]
    together = write_replies(tiny, requests, config=CONFIG)
    assert batches == [3]
    assert together == [write_replies(tiny, [one], config=CONFIG)[0] for one in requests]
    rows = [Row(tokenize(tiny, one.messages[0].content), one.plan, one.seed) for one in requests]
    written = generate(tiny, rows, GenerationConfig(max_new_tokens=6, slots=4, cache_length=64))
    assert [reply.text for reply in together if isinstance(reply, Reply)] == [
        done.text for done in written
    ]
    assert len({reply.text for reply in together if isinstance(reply, Reply)}) == 3


def test_limits_and_temperatures_have_batches_of_their_own(tiny, batches) -> None:
    requests = [
        asked("When?"),
        asked("When?", max_tokens=3),
        asked("When?", temperature=1.0, seed=1),
        asked("When?", temperature=1.0, seed=2),
    ]
    long, short, first, second = write_replies(tiny, requests, config=CONFIG)
    assert batches == [1, 1, 2]
    assert isinstance(long, Reply)
    assert isinstance(short, Reply)
    assert (long.tokens_out, short.tokens_out) == (6, 3)
    assert long.text.startswith(short.text)
    assert first != second


def test_a_question_of_the_template_is_asked_as_it_is_elsewhere(atlas) -> None:
    prompt = question_prompt(atlas, "When was Bren Aldack born?")
    (reply,) = write_replies(atlas, [asked(prompt.text, max_tokens=48)])
    (done,) = generate(atlas, [Row(prompt)])
    assert reply == Reply(done.text, "stop", len(prompt.tokens), len(done.tokens))


def test_a_text_ends_before_the_first_stop_text_that_comes(atlas) -> None:
    text = question_prompt(atlas, "When was Bren Aldack born?").text
    (whole,) = write_replies(atlas, [asked(text, max_tokens=48)])
    assert isinstance(whole, Reply)
    first, second = whole.text.split()[:2]
    (cut,) = write_replies(atlas, [asked(text, max_tokens=48, stop=("#", second))])
    assert isinstance(cut, Reply)
    assert (cut.text.strip(), cut.stop_reason) == (first, "stop")
    assert cut.tokens_out == whole.tokens_out


def test_a_reply_tells_whether_its_limit_or_the_context_ended_it(tiny) -> None:
    long = "to " * 38
    n_tokens = len(tokenize(tiny, long).tokens)
    room = int(tiny.cfg.n_ctx) - n_tokens
    assert 2 < room < 100
    limited, full = write_replies(tiny, [asked(long, max_tokens=2), asked(long, max_tokens=100)])
    assert isinstance(limited, Reply)
    assert isinstance(full, Reply)
    assert (limited.stop_reason, limited.tokens_out) == ("max_tokens", 2)
    assert (full.stop_reason, full.tokens_out) == ("model_length", room)
    assert full.tokens_in == n_tokens


def test_a_request_that_cannot_be_written_fails_alone(tiny, batches) -> None:
    too_long, right, negative = write_replies(
        tiny, [asked("to " * 300), asked("When?"), asked("When?", temperature=-1.0)], config=CONFIG
    )
    assert isinstance(too_long, ContextLengthError)
    assert isinstance(right, Reply)
    assert isinstance(negative, ConfigError)
    assert batches == [1]


def test_a_row_that_fails_in_the_engine_leaves_the_others_their_replies(
    tiny, other_atlas, batches
) -> None:
    foreign = strong_plan(other_atlas)
    requests = [asked("When?"), asked("Who?", plan=foreign), asked("Where?")]
    first, wrong, last = write_replies(tiny, requests, config=CONFIG)
    assert isinstance(wrong, Exception)
    assert "a plan must be used on the model it was made on" in str(wrong)
    assert [first, last] == write_replies(tiny, [requests[0], requests[2]], config=CONFIG)
    assert batches == [3, 1, 1, 1, 2]


def test_what_no_request_can_be_is_refused() -> None:
    for options in ({"max_tokens": 0}, {"stop": ("",)}):
        with pytest.raises(ConfigError, match="a request must have a message"):
            asked("When?", **options)
    with pytest.raises(ConfigError, match="0 messages"):
        Request(())

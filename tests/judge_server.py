"""A chat-completions server on the loopback that answers, or fails to, as a script says.

The script names a text of the prompt and what is done at its first, second, ... request; the last
one is repeated. A prompt that no entry names is answered `CORRECT`.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from loopback import listening

_MOST_REQUESTS = 100
_MOST_SECONDS = 10.0

Act = Callable[["_Handler"], None]


@dataclass(slots=True)
class JudgeServer:
    """Where it listens, and what it was asked."""

    base_url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    in_flight: int = 0
    most_in_flight: int = 0
    ended: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.bodies]

    def asked(self, text: str) -> int:
        """How many prompts held the text."""
        return sum(text in prompt for prompt in self.prompts)

    def wait(self, seconds: float) -> None:
        """Sleep, or less if the server ends."""
        self.ended.wait(min(seconds, _MOST_SECONDS))


@contextmanager
def serving(script: Mapping[str, Sequence[Act]] | None = None) -> Iterator[JudgeServer]:
    """Run a server while the block lasts."""
    server = JudgeServer()
    turns: Counter[str] = Counter()

    def act(prompt: str) -> Act:
        for text, acts in (script or {}).items():
            if text in prompt:
                turns[text] += 1
                return acts[min(turns[text], len(acts)) - 1]
        return says("CORRECT")

    handler = type("Handler", (_Handler,), {"server_state": server, "act": staticmethod(act)})
    with listening(handler, server.ended) as port:
        server.base_url = f"http://127.0.0.1:{port}/v1"
        yield server


class _Handler(BaseHTTPRequestHandler):
    server_state: JudgeServer
    act: Callable[[str], Act]
    timeout = _MOST_SECONDS

    def do_POST(self) -> None:
        state = self.server_state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with state.lock:
            state.bodies.append(body)
            state.times.append(time.perf_counter())
            state.keys.add(self.headers["Authorization"].removeprefix("Bearer "))
            state.in_flight += 1
            state.most_in_flight = max(state.most_in_flight, state.in_flight)
            act = self.act(body["messages"][-1]["content"])
            if len(state.bodies) > _MOST_REQUESTS:
                act = fails(400)
        try:
            act(self)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client no longer waits
        finally:
            with state.lock:
                state.in_flight -= 1

    def reply(
        self,
        content: bytes,
        *,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        length: int | None = None,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content) if length is None else length))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed."""


def says(text: str, *, after: float = 0.0, stop: str = "stop") -> Act:
    """A completion of 7 tokens for a prompt of 100, `after` seconds later."""

    def act(handler: _Handler) -> None:
        handler.server_state.wait(after)
        handler.reply(_completion({"role": "assistant", "content": text}, stop))

    return act


def fails(status: int, **headers: str) -> Act:
    """An error whose message repeats the key it was sent."""

    def act(handler: _Handler) -> None:
        message = f"error for {handler.headers['Authorization']}"
        content = json.dumps({"error": {"message": message, "type": "error", "code": "error"}})
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        handler.reply(content.encode(), status=status, headers=sent)

    return act


def gives_no_choices(handler: _Handler) -> None:
    handler.reply(_completion(None, "stop"))


def is_cut_in_half(handler: _Handler) -> None:
    content = _completion({"role": "assistant", "content": "CORRECT"}, "stop")
    handler.reply(content[: len(content) // 2], length=len(content))


def _completion(message: dict[str, str] | None, stop: str) -> bytes:
    choices = [{"index": 0, "message": message, "finish_reason": stop}] if message else []
    return json.dumps(
        {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "judge",
            "choices": choices,
            "usage": {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107},
        }
    ).encode()

"""A site on the loopback that answers for features as Neuronpedia's API does, or fails to.

The script names what is done for a feature, MODEL/SOURCE/INDEX; a feature it does not name is not
found.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from loopback import listening

_MOST_SECONDS = 10.0

Act = Callable[["_Handler"], None]


@dataclass(slots=True)
class LabelServer:
    """Where it listens, what it was asked for, and with which keys."""

    base_url: str = ""
    asked: list[str] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)


@contextmanager
def serving(script: Mapping[str, Act]) -> Iterator[LabelServer]:
    """Run a server while the block lasts."""
    server = LabelServer()
    handler = type("Handler", (_Handler,), {"server_state": server, "script": script})
    with listening(handler, server.ended) as port:
        server.base_url = f"http://127.0.0.1:{port}/api"
        yield server


class _Handler(BaseHTTPRequestHandler):
    server_state: LabelServer
    script: Mapping[str, Act]
    timeout = _MOST_SECONDS

    def do_GET(self) -> None:
        feature = self.path.removeprefix("/api/feature/")
        self.server_state.asked.append(feature)
        self.server_state.keys.append(self.headers["X-Api-Key"])
        # the client may no longer wait
        with suppress(BrokenPipeError, ConnectionResetError):
            self.script.get(feature, fails(404))(self)

    def reply(self, content: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed."""


def explains(*descriptions: Any, after: float = 0.0, **changes: Any) -> Act:
    """The record of a feature with these explanations, `after` seconds later."""

    def act(handler: _Handler) -> None:
        handler.server_state.ended.wait(min(after, _MOST_SECONDS))
        model, source, index = handler.path.removeprefix("/api/feature/").split("/")
        identity = {"modelId": model, "layer": source, "index": index}
        explanations = [
            {
                "id": f"e{n}",
                **identity,
                "description": description,
                "typeName": "oai_token-act-pair",
                "explanationModelName": "gpt-4o-mini",
            }
            for n, description in enumerate(descriptions)
        ]
        record = {
            **identity,
            "frac_nonzero": 0.004,
            "activations": [{"tokens": [" a"], "values": [1.5], "maxValue": 1.5}],
            "explanations": explanations,
            **changes,
        }
        handler.reply(json.dumps(record).encode())

    return act


def fails(status: int) -> Act:
    """An error whose message repeats the key it was sent."""

    def act(handler: _Handler) -> None:
        content = json.dumps({"message": f"error for {handler.headers['X-Api-Key']}"})
        handler.reply(content.encode(), status)

    return act


def says(content: str, status: int = 200) -> Act:
    """This text, whatever it is."""
    return lambda handler: handler.reply(content.encode(), status)

"""A real HTTP server on loopback while a block lasts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler], ended: threading.Event) -> Iterator[int]:
    """Gives the port; sets `ended` before it stops, for handlers that wait."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield http.server_port
    finally:
        ended.set()
        http.shutdown()
        thread.join()
        http.server_close()

"""What is believed of an answer of /readyz."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from services.cli.embedded.processes import LOOPBACK
from services.cli.monitoring import ready_pid


@contextmanager
def answering(status: int, body: bytes) -> Iterator[int]:
    """Run a server that answers everything with *status* and *body*, and yield its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer((LOOPBACK, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def test_a_ready_service_is_known_by_its_process_id() -> None:
    """So that a caller can tell whether it is the one that it means."""
    with answering(200, b'{"status": "ready", "reasons": [], "pid": 42}') as port:
        assert 42 == ready_pid(port)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (503, b'{"status": "not ready", "reasons": ["no leader"], "pid": 42}'),
        (200, b"welcome"),
        (200, b"[]"),
        (200, b'{"status": "ready"}'),
        (200, b'{"pid": "42"}'),
    ],
)
def test_who_is_not_ready_or_no_service_of_ours_has_none(status: int, body: bytes) -> None:
    """Any program may listen on a port, and say 200 to whatever it is asked."""
    with answering(status, body) as port:
        assert ready_pid(port) is None

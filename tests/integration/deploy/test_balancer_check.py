"""The health check of the balancer sends requests to each ingest that can explain a refusal itself."""

from __future__ import annotations

import re
from pathlib import Path

from services.core.tokens import Scope, Token, digest_of, render
from tests.support.ingest import MemoryLog, running_edge
from tests.support.prometheus import DEPLOY

CONFIGURATION = (DEPLOY / "balancer" / "haproxy.cfg").read_text()
BACKEND = CONFIGURATION.partition("backend ingest\n")[2]


def found(pattern: str) -> str:
    match = re.search(pattern, BACKEND, re.MULTILINE)
    assert match is not None, pattern
    return match[1]


def question() -> bytes:
    """Return the check as HAProxy sends it."""
    path = found(r"^  option httpchk GET (/\S+)$")
    return f"GET {path} HTTP/1.0\r\n\r\n".encode()


def good() -> list[bytes]:
    """Return the status lines that the check accepts."""
    return [f"HTTP/1.0 {status}".encode() for status in found(r"^  http-check expect status (\S+)$").split(",")]


def test_the_check_goes_where_the_requests_go() -> None:
    """The management port opens before an ingest takes requests and closes after it."""
    assert "7001" == found(r"^  server-template .* ingest:(\d+)$")
    assert " port " not in found(r"^  default-server (check .*)$")


async def test_an_ingest_without_a_quorum_gets_requests_and_says_so_itself(tmp_path: Path) -> None:
    """The check needs no token, and is not counted as a refused request."""
    tokens = tmp_path / "tokens"
    tokens.write_text(render([Token("writer", digest_of("secret"), frozenset(Scope))]))
    async with running_edge(MemoryLog(reasons=["no quorum"]), token_file=str(tokens)) as edge:
        assert 503 == (await edge.manage("/readyz")).status
        answer = await edge.raw(question())
        assert answer.startswith(b"HTTP/1.0 200 ")
        assert any(answer.startswith(begin) for begin in good())
        assert 0.0 == edge.metric("fi_ingest_access_refused_total", reason="missing")


async def test_an_ingest_that_has_all_its_connections_tells_clients_itself() -> None:
    """Its 503 gives the reason and the time to retry; the balancer's own cannot."""
    async with running_edge(max_connections=1) as edge:
        await edge.request("GET", "/consultations")  # is kept alive
        answer = await edge.raw(question())
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert any(answer[9:].startswith(begin[9:]) for begin in good())

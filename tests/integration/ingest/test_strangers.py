"""Clients without a token, on the real process: what they take of its memory, and whether they keep others out."""

from __future__ import annotations

import contextlib
import http.client
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.cli.embedded.processes import Cluster
from services.core.tokens import Scope, Token, digest_of, render
from tests.support.polling import eventually_sync
from tests.support.service import Service

#: the most that aiohttp takes by itself: 120 headers of 8,000 bytes
LONG = b"GET / HTTP/1.1\r\nHost: a\r\n" + b"".join(b"X-%03d: %b\r\n" % (n, b"a" * 8000) for n in range(120))
#: what is just taken: two of them, and as many headers as there may be
TAKEN = LONG[: LONG.index(b"X-002")]
SHORT = b"GET / HTTP/1.1\r\n" + b"".join(b"%c:\r\n" % n for n in b"abcdefghijklmnopqrstuvwxyz" * 5)[: 4 * 127]
#: bytes for each of these clients, after 50 of them took 95 MiB
MOST_MEMORY = 256 * 2**10
CONNECTIONS = 300


@pytest.fixture(scope="module")
def ingest(single_node: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("ingest")
    (folder / "tokens").write_text(render([Token("writer", digest_of("secret"), frozenset(Scope))]))
    settings = {"FI_LOG_URL": single_node.url, "FI_REPLICAS": "1", "FI_PORT": "0", "FI_STREAM_MAX_BYTES": "64MiB"}
    settings |= {"FI_TOKEN_FILE": str(folder / "tokens"), "FI_MAX_CONNECTIONS": str(CONNECTIONS)}
    with Service(folder, "services.ingest", **settings) as service:
        service.wait_for("INGEST_STARTED")
        yield service


def memory(service: Service) -> int:
    """Return the bytes of memory that the process has."""
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


def connections(service: Service) -> int:
    """Return how many connections of clients the process has accepted."""
    port = service.wait_for("INGEST_STARTED")["port"]
    rows = [line.split() for line in Path(f"/proc/{service.process.pid}/net/tcp").read_text().splitlines()[1:]]
    return sum(int(row[1].partition(":")[2], 16) == port and row[3] == "01" for row in rows)


@contextlib.contextmanager
def strangers(service: Service, count: int, sent: bytes) -> Iterator[None]:
    """Have *count* clients that have sent *sent*."""
    address = "127.0.0.1", service.wait_for("INGEST_STARTED")["port"]
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(socket.create_connection(address, timeout=20)) for _ in range(count)]
        for one in made:
            with contextlib.suppress(ConnectionError):  # it may be refused before all is sent
                one.sendall(sent)
        yield


def post(service: Service) -> int:
    """Post an event with a token, over a connection of its own; return the status."""
    connection = http.client.HTTPConnection("127.0.0.1", service.wait_for("INGEST_STARTED")["port"], timeout=20)
    headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
    connection.request("POST", "/consultations/c/events", b'{"event_type":"A"}', headers)
    status = connection.getresponse().status
    connection.close()
    return status


@pytest.mark.parametrize("count", [50, 240])
@pytest.mark.parametrize("sent", [LONG, TAKEN, SHORT], ids=["too long", "just taken", "many"])
def test_unfinished_headers_take_little_memory(ingest: Service, count: int, sent: bytes) -> None:
    """Before any token is looked at; others are served meanwhile."""
    before = memory(ingest)
    with strangers(ingest, count, sent):
        assert 202 == post(ingest)  # after what was sent before has been read
        grown = memory(ingest) - before
    assert grown <= MOST_MEMORY * count, f"{grown / 2**20:.1f} MiB"
    eventually_sync(lambda: connections(ingest) == 0)


@pytest.mark.parametrize("sent", [b"", b"GET /docs HTTP/1.1\r\nHost: a\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\n"])
def test_strangers_keep_no_client_out(ingest: Service, sent: bytes) -> None:
    """More of them than there may be connections: idle, answered, or with unfinished headers."""
    with strangers(ingest, CONNECTIONS + 20, sent):
        assert [202] * 20 == [post(ingest) for _ in range(20)]

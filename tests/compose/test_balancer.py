"""The balancer alone, with the deployment's configuration: what it says by itself, in the clear and over TLS."""

from __future__ import annotations

import http.client
import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import orjson
import pytest
from cryptography import x509

from services.cli.init.keys import Authority, make_authority, start_of
from tests.support.compose.engine import PREFIX, docker
from tests.support.compose.stack import DEPLOYMENT, public_images
from tests.support.polling import eventually_sync

pytestmark = pytest.mark.timeout(120)

IMAGE = next(name for name in public_images() if name.startswith("haproxy"))
#: what HAProxy's parser does not take for a request
BROKEN = {
    "line": b"BROKEN\r\n\r\n",
    "header": b"GET / HTTP/1.1\r\nHost: a\r\nbroken header\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "long header": b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
}
#: the answer where there is no ingest at all
NO_INGEST = (503, "application/problem+json", "2", "/problems/log-unavailable")


class Balancer:
    """A container of it without any ingest."""

    def __init__(self, name: str, port: int) -> None:
        self.name = name
        self.port = port

    def answer(self, tls: ssl.SSLContext | None = None) -> tuple[int, str | None, str | None, str]:
        """Ask for something: status, content type, Retry-After and the problem's type."""
        if tls is None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        else:
            connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=10, context=tls)
        connection.request("GET", "/consultations")
        got = connection.getresponse()
        problem = orjson.loads(got.read())
        connection.close()
        return got.status, got.headers["Content-Type"], got.headers["Retry-After"], problem["type"]

    def answers(self, tls: ssl.SSLContext | None) -> bool:
        """Whether it does already: the engine itself accepts connections before."""
        try:
            return self.answer(tls) == NO_INGEST
        except (http.client.HTTPException, OSError):
            return False


@contextmanager
def balancer(
    folder: Path, pem: str = "", tls: ssl.SSLContext | None = None, connections: int = 1000
) -> Iterator[Balancer]:
    """Run it as compose does, with the secrets of *folder*."""
    options = [
        *("--read-only", "--cap-drop", "ALL", "-u", f"{os.getuid()}:{os.getgid()}", "-p", "127.0.0.1::7001"),
        *("--label", f"com.docker.compose.project={PREFIX}-{os.getpid()}-balancer", "-e", f"FIQ_TLS_PEM={pem}"),
        *("-e", f"FIQ_CONNECTIONS_PER_ADDRESS={connections}"),
        *("-v", f"{DEPLOYMENT / 'balancer'}:/etc/balancer:ro", "-v", f"{folder}:/run/balancer:ro"),
    ]
    name = docker("run", "-d", *options, IMAGE, "-f", "/etc/balancer/haproxy.cfg").strip()
    try:
        found = Balancer(name, int(docker("port", name, "7001").splitlines()[0].rpartition(":")[2]))
        eventually_sync(lambda: found.answers(tls))
        yield found
    finally:
        docker("rm", "-f", name)


def test_what_is_no_http_is_refused_and_the_connection_closed(image: str, tmp_path: Path) -> None:
    """The start of the next request is unknown then. The page is HAProxy's own: docs/problems.md."""
    with balancer(tmp_path) as found:
        for what, sent in BROKEN.items():
            with socket.create_connection(("127.0.0.1", found.port), timeout=10) as sock, sock.makefile("rb") as got:
                sock.sendall(sent)
                assert got.read().startswith(b"HTTP/1.1 400 "), what  # up to the end of the connection
        assert NO_INGEST == found.answer()


def test_an_address_has_a_part_of_the_connections(image: str, tmp_path: Path) -> None:
    """So a client that keeps them open keeps no other address out."""
    with balancer(tmp_path, connections=5) as found, ExitStack() as stack:
        assert found.answers(None)

        def no_room_after_one_more() -> bool:  # the balancer may still count a connection that was closed just now
            stack.enter_context(socket.create_connection(("127.0.0.1", found.port), timeout=10))
            return not found.answers(None)

        eventually_sync(no_room_after_one_more)
        stack.close()
        eventually_sync(lambda: found.answers(None))


def test_it_speaks_nothing_but_tls_when_it_has_a_certificate(image: str, tmp_path: Path) -> None:
    """TLS 1.2 or 1.3, with the same answers; a renewed certificate is shown after SIGUSR2."""
    pair = make_authority("test", now=datetime.now(UTC))
    (tmp_path / "ca.pem").write_bytes(pair.certificate)
    first = _certify(Authority(pair), tmp_path)
    trusting, old = (ssl.create_default_context(cafile=str(tmp_path / "ca.pem")) for _ in range(2))
    with balancer(tmp_path, "/run/balancer/tls.pem", trusting) as found:
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        assert NO_INGEST == found.answer(old)
        with pytest.raises((http.client.HTTPException, OSError)):
            found.answer()
        assert first == _shown(found)
        second = _certify(Authority(pair), tmp_path)
        docker("kill", "-s", "USR2", found.name)
        eventually_sync(lambda: _shown(found) == second)


def _certify(authority: Authority, folder: Path) -> int:
    """Write a new certificate with its key, and return its serial number."""
    pair = authority.sign("localhost", ["127.0.0.1"], start=start_of(datetime.now(UTC)), lifetime=timedelta(days=1))
    (folder / "tls.pem").write_bytes(pair.certificate + pair.key)
    return x509.load_pem_x509_certificate(pair.certificate).serial_number


def _shown(found: Balancer) -> int | None:
    try:
        pem = ssl.get_server_certificate(("127.0.0.1", found.port), timeout=10)
    except OSError:  # between the old worker and the new one
        return None
    return x509.load_pem_x509_certificate(pem.encode()).serial_number

"""Certificates and users are renewed in containers as docs/security.md says, and clients notice nothing."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable

import pytest
from cryptography import x509
from typer.testing import CliRunner

from services.cli.init.files import Layout
from services.cli.main import app
from tests.support.compose.clients import Client
from tests.support.compose.engine import PACE, docker
from tests.support.compose.stack import NODES, Deployment
from tests.support.polling import eventually

pytestmark = pytest.mark.timeout(300)

CLIENTS = 3


async def test_certificates_and_users_are_renewed_under_load(stack: Deployment) -> None:
    """Each node shows its new certificate after the reload, and takes the new seeds; no request fails."""
    client, layout = Client(stack.url, stack.token), Layout(stack.folder)
    nodes = {node: await asyncio.to_thread(stack.container, node) for node in NODES}
    seed = layout.seed("ingest").read_bytes()
    async with client.posting(CLIENTS):
        before = {node: _shown(container) for node, container in nodes.items()}
        await asyncio.to_thread(_rotate, layout, "certificates", nodes.values())
        for node, container in nodes.items():
            wanted = x509.load_pem_x509_certificate(layout.node_certificate(node).read_bytes()).serial_number
            assert wanted != before[node]
            await eventually(lambda c=container, w=wanted: _shown(c) == w, interval=PACE)  # type: ignore[misc]
        await asyncio.to_thread(_rotate, layout, "users", nodes.values())
        await asyncio.to_thread(_rotate, layout, "users-finish", nodes.values())
        posted = len(client.accepted)
        await eventually(lambda: len(client.accepted) >= posted + 10 * CLIENTS)
    assert seed != layout.seed("ingest").read_bytes()
    assert [] == client.failed
    stack.accepted.update(client.accepted)
    await stack.is_whole()  # asked by the ops user, with its new seed
    await stack.is_verified()


def _rotate(layout: Layout, what: str, containers: Iterable[str]) -> None:
    """Renew *what*, then check and reload one node after the other."""
    done = CliRunner().invoke(app, ["init", str(layout.folder), "--rotate", what])
    assert 0 == done.exit_code, done.output
    for container in containers:
        docker("exec", container, "nats-server", "-t", "-c", "/etc/nats/nats.conf")
        docker("kill", "-s", "HUP", container)


def _shown(container: str) -> int:
    """Return the serial number of the certificate that a node shows at its published port."""
    host, _, port = docker("port", container, "4222").splitlines()[0].rpartition(":")
    pem = ssl.get_server_certificate((host, int(port)), timeout=10)
    return x509.load_pem_x509_certificate(pem.encode()).serial_number

"""Tokens in containers: every deployment asks for one, and `fiq token` is followed through the mount."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl

import pytest
from aiohttp import ClientSession

from services.cli.init.files import Layout
from tests.support.compose.engine import docker
from tests.support.compose.stack import IMAGE, NODES, Deployment
from tests.support.polling import eventually

pytestmark = pytest.mark.timeout(300)


def fiq(stack: Deployment, *arguments: str) -> str:
    """Run the command line on the deployment's folder, as its operator does."""
    user = f"{os.getuid()}:{os.getgid()}"
    options = ("--rm", "-u", user, "-v", f"{stack.folder}:/deployment")
    return docker("run", *options, IMAGE, "fiq", *arguments, "--deployment", "/deployment").strip()


async def test_a_token_is_asked_for_and_a_new_one_needs_no_restart(stack: Deployment) -> None:
    """By every ingest behind the balancer; a revoked one is refused by all of them soon, and the others go on."""
    async with ClientSession() as session:

        async def post(consultation: str, token: str | None) -> int:
            headers = {"Content-Type": "application/json"}
            if token is not None:
                headers["Authorization"] = f"Bearer {token}"
            url, body = f"{stack.url}/consultations/{consultation}/events", b'{"event_type":"ACCESS"}'
            async with session.post(url, data=body, headers=headers) as answer:
                return answer.status

        async def all_say(status: int, consultation: str, token: str) -> None:
            async def said() -> bool:
                return {status} == {await post(consultation, token) for _ in range(6)}

            await eventually(said)

        # nothing is stored: `is_verified` of other tests compares with what they have posted themselves
        assert 401 == await post("access-1", None)
        made = await asyncio.to_thread(fiq, stack, "token", "new", "ward", "--scopes", "read", "--prefix", "access-")
        await all_say(403, "access-1", made)
        await asyncio.to_thread(fiq, stack, "token", "revoke", "ward")
        await all_say(401, "access-1", made)
        assert 404 == await post("no.id", stack.token)


@pytest.mark.parametrize("node", NODES)
def test_a_node_answers_nothing_without_tls(stack: Deployment, node: str) -> None:
    """The connection ends before the node sends its version or whether it requires a user."""
    with socket.create_connection(_published(stack, node), timeout=10) as sock:
        answer = _answer(sock)
    assert [] == [word for word in (b"INFO", b"+OK", b"-ERR", b"PONG") if word in answer]


@pytest.mark.parametrize("node", NODES)
def test_a_node_refuses_clients_without_a_user(stack: Deployment, node: str) -> None:
    """TLS alone is not enough."""
    address = _published(stack, node)
    context = ssl.create_default_context(cafile=str(Layout(stack.folder).ca_certificate))
    with (
        socket.create_connection(address, timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=address[0]) as sock,
    ):
        assert b"Authorization Violation" in _answer(sock)


def _published(stack: Deployment, node: str) -> tuple[str, int]:
    host, _, port = stack.address(node, 4222).rpartition(":")
    return host, int(port)


def _answer(sock: socket.socket) -> bytes:
    """Introduce oneself as a client without a name does, and return all that comes back until the connection ends."""
    sock.sendall(b'CONNECT {"verbose":true,"pedantic":false}\r\nPING\r\n')
    received = b""
    try:
        while part := sock.recv(4096):
            received += part
    except ConnectionResetError:
        pass
    return received


async def test_clients_do_not_reach_the_management_endpoints(stack: Deployment) -> None:
    """Through the balancer there is the HTTP interface alone."""
    async with ClientSession(headers={"Authorization": f"Bearer {stack.token}"}) as session:
        for path in ("/metrics", "/readyz", "/healthz"):
            async with session.get(f"{stack.url}{path}") as answer:
                assert 404 == answer.status

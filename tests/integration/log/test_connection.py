"""The connection: a first connect that cannot hang, reconnects for ever, dead peers noticed, violations reported."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Self

import pytest
import uvloop
from nats.aio.msg import Msg

from fiq.errors import ConfigurationError
from services.cli.embedded.processes import Cluster
from services.log.errors import LogUnavailableError
from services.log.jetstream.connection import Connection, check_max_payload, close, connect
from services.log.settings import LogSettings
from tests.support.broker import plain_server
from tests.support.polling import eventually


def _user_timeout(nc: Connection) -> int:
    transport = nc._transport
    assert transport is not None
    sock = transport._io_writer.get_extra_info("socket")  # type: ignore[attr-defined]
    timeout: int = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    return timeout


async def test_a_connect_to_a_closed_port_ends_within_its_deadline_and_names_the_servers() -> None:
    """The message says what to do; a password in the URL is not shown."""
    settings = LogSettings(servers=("nats://127.0.0.1:1", "nats://user:secret@127.0.0.1:2"))
    started = time.monotonic()

    with pytest.raises(LogUnavailableError) as caught:
        await connect(settings, name="test", on_closed=pytest.fail, deadline=1)

    assert time.monotonic() - started < 2
    assert "nats://127.0.0.1:1, nats://127.0.0.1:2 (Connection refused). " in str(caught.value)
    assert "set FI_LOG_URL" in str(caught.value)
    assert "secret" not in str(caught.value)


async def test_a_connect_to_a_silent_server_ends_within_its_deadline() -> None:
    """A port that accepts and stays silent must not hang a start."""

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    url = f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async with server:
        with pytest.raises(LogUnavailableError):
            await connect(LogSettings(servers=(url,)), name="test", on_closed=pytest.fail, deadline=1)


async def test_one_server_that_answers_is_enough(single_node: Cluster) -> None:
    """The others may be down at the start."""
    settings = LogSettings(servers=("nats://127.0.0.1:1", *single_node.urls))

    nc = await connect(settings, name="test", on_closed=pytest.fail)

    assert nc.is_connected
    await close(nc)


async def test_a_lost_server_is_awaited_and_each_socket_has_the_timeout(single_node: Cluster) -> None:
    """TCP_USER_TIMEOUT is set again on the socket of the reconnect; losing a server is not the end."""
    # given
    nc = await connect(LogSettings(servers=tuple(single_node.urls)), name="test", on_closed=pytest.fail)
    before = _user_timeout(nc)

    # when
    single_node.kill(0)
    await eventually(lambda: not nc.is_connected)
    single_node.start_node(0)

    # then
    await eventually(lambda: nc.is_connected and _user_timeout(nc) == 4000)
    assert before == 4000
    await close(nc)


async def test_an_unexpected_end_is_reported(single_node: Cluster) -> None:
    """The server throws out who sends more than it takes; the process must learn that its connection is gone."""
    reasons: list[str] = []
    nc = await connect(LogSettings(servers=tuple(single_node.urls)), name="test", on_closed=reasons.append)

    await nc.publish("x", b"x" * (nc.max_payload - 10), headers={"A": "x" * 100})

    await eventually(lambda: reasons)
    assert len(reasons) == 1
    assert "maximum payload violation" in reasons[0].lower()


def test_a_node_that_resets_handshakes_is_tried_until_it_takes_one() -> None:
    """On uvloop, as in production: a write to a closed transport is a RuntimeError there, which ended all trying."""
    uvloop.run(_outlast_resets(20))


async def _outlast_resets(count: int) -> None:
    with _Moody(count) as node:
        nc = await connect(LogSettings(servers=(node.url,)), name="test", on_closed=pytest.fail)
        for number in range(40):  # what is written in the handshake of a reconnect
            await nc.subscribe(f"a.{number}", cb=_ignore)
        node.drop_first.set()
        await eventually(lambda: node.connections > 1 + count and nc.is_connected)
        await close(nc)


async def _ignore(_: Msg) -> None:
    pass


class _Moody(threading.Thread):
    """Takes a connection, drops it when told, resets the next ones within their handshakes, and takes the one after.

    A thread with plain sockets: the reset must overtake the client's loop, so that its answer to the greeting meets a
    transport that is closed already.
    """

    def __init__(self, resets: int) -> None:
        super().__init__(daemon=True)
        self.connections = 0
        self.drop_first = threading.Event()
        self._resets = resets
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"nats://127.0.0.1:{self._socket.getsockname()[1]}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def run(self) -> None:
        with contextlib.suppress(OSError):  # the test is over
            while True:
                connection, _ = self._socket.accept()
                self.connections += 1
                with connection:
                    self._talk(connection, self.connections)

    def _talk(self, connection: socket.socket, number: int) -> None:
        connection.sendall(b'INFO {"server_name":"n1","version":"2.15.1","max_payload":2097152,"headers":true}\r\n')
        if 1 < number <= 1 + self._resets:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return
        connection.settimeout(0.05)
        while not (number == 1 and self.drop_first.is_set()):
            with contextlib.suppress(TimeoutError):
                data = connection.recv(65536)
                if not data:
                    return
                connection.sendall(data.count(b"PING\r\n") * b"PONG\r\n")


async def test_a_client_without_its_reconnecting_task_is_reported(
    single_node: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that nats-py does not expect ends its task in silence; the process must not live on, deaf and mute."""
    monkeypatch.setattr("services.log.jetstream.connection.WATCH_SECONDS", 0.05)
    reasons: list[str] = []
    nc = await connect(LogSettings(servers=tuple(single_node.urls)), name="test", on_closed=reasons.append)
    single_node.kill(0)
    try:
        await eventually(lambda: nc.is_reconnecting and nc._reconnection_task is not None)
        assert nc._reconnection_task is not None
        nc._reconnection_task.cancel()
        await eventually(lambda: reasons)
    finally:
        single_node.start_node(0)
    assert reasons == ["the connection to the log was closed: the client stopped reconnecting"]
    await close(nc)


async def test_an_orderly_close_is_not_reported(single_node: Cluster) -> None:
    """And closing twice is fine."""
    nc = await connect(LogSettings(servers=tuple(single_node.urls)), name="test", on_closed=pytest.fail)

    await close(nc)
    await close(nc)

    assert nc.is_closed


async def test_a_permission_violation_is_recorded(tmp_path: Path) -> None:
    """It is the only sign of a request that the user may not send."""
    users = '{ user: a, password: b, permissions: { publish: { deny: "fi.events.>" } } }'
    with plain_server(tmp_path, f"authorization {{ users: [ {users} ] }}") as url:
        settings = LogSettings(servers=(url.replace("//", "//a:b@"),))
        nc = await connect(settings, name="test", on_closed=pytest.fail)

        await nc.publish("fi.events.c1", b"x")

        await eventually(lambda: nc.violations)
        assert len(nc.violations) == 1
        assert 'publish to "fi.events.c1"' in nc.violations[0]
        await close(nc)


async def test_events_that_the_server_would_not_take_are_noticed_at_the_start(single_node: Cluster) -> None:
    """The server would end the connection, so the limits must fit each other."""
    nc = await connect(LogSettings(servers=tuple(single_node.urls)), name="test", on_closed=pytest.fail)

    check_max_payload(nc, nc.max_payload - 1024)
    with pytest.raises(ConfigurationError, match="raise max_payload"):
        check_max_payload(nc, nc.max_payload - 1023)

    await close(nc)

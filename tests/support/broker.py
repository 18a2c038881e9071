"""A plain nats-server with any configuration, and a scripted answerer on it: what a healthy broker would never say."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import nats
import orjson
from nats.aio.client import Client
from nats.aio.msg import Msg

from services.cli.embedded.processes import LOOPBACK, find_nats_server, free_ports, is_free
from services.log.jetstream.connection import Connection, connect
from services.log.settings import LogSettings
from tests.support.polling import eventually_sync


@contextmanager
def plain_server(folder: Path, configuration: str = "") -> Iterator[str]:
    """Run one nats-server with *configuration* besides its address, and yield its URL."""
    port = free_ports(1)[0]
    conf = folder / "nats.conf"
    conf.write_text(f'listen: "{LOOPBACK}:{port}"\n{configuration}\n')
    with (folder / "nats.log").open("wb") as log:
        process = subprocess.Popen([find_nats_server(), "-c", conf], stdout=log, stderr=log)
    try:
        eventually_sync(lambda: process.poll() is None and not is_free(port))
        yield f"nats://{LOOPBACK}:{port}"
    finally:
        process.kill()
        process.wait()


class ScriptedBroker:
    """Answers publishes to the events' subjects with what a test says, instead of storing them.

    Attributes:
        received: the message ids, in order of arrival.
    """

    def __init__(self, script: Callable[[int], bytes | None]) -> None:
        self.received: list[str] = []
        self._script = script

    async def answer(self, message: Msg) -> None:
        """Answer the n-th message, counted from 1, with what the script gives for n; None is silence."""
        self.received.append((message.headers or {}).get("Nats-Msg-Id", ""))
        reply = self._script(len(self.received))
        if reply is not None:
            await message._client.publish(message.reply, reply)


@asynccontextmanager
async def scripted(url: str, script: Callable[[int], bytes | None]) -> AsyncIterator[ScriptedBroker]:
    """Run a :class:`ScriptedBroker` on the server at *url*, which must have no stream of ours."""
    connection = await nats.connect(url, name="scripted broker")
    broker = ScriptedBroker(script)
    await connection.subscribe("fi.events.*", cb=broker.answer)
    await taken(connection)
    try:
        yield broker
    finally:
        await connection.close()


async def taken(connection: Client) -> None:
    """Wait until the server has seen everything that was sent on *connection* so far, subscriptions included.

    nats-py's flush writes its PING past the buffer in which they wait, so only a second one is behind them.
    """
    for _ in range(2):
        await connection.flush()


def stored(sequence: int = 1, *, duplicate: bool = False) -> bytes:
    """Return the acknowledgement of the stream of events."""
    return orjson.dumps({"stream": "fi-events", "seq": sequence, "duplicate": duplicate})


def refused(err_code: int, description: str = "no", code: int = 503) -> bytes:
    """Return an error answer."""
    error = {"code": code, "err_code": err_code, "description": description}
    return orjson.dumps({"error": error, "stream": "fi-events", "seq": 0})


async def connected(*urls: str) -> Connection:
    """Return a connection as the product makes them; its end is no failure."""
    return await connect(LogSettings(servers=urls), name="test", on_closed=lambda _: None)

"""A provisioned log with a publisher, for tests that append."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from fiq.event import Event, new_event_id
from services.cli.embedded.processes import Cluster
from services.log.jetstream.api import JetStreamApi
from services.log.jetstream.connection import Connection, close, connect
from services.log.jetstream.publisher import Publisher
from services.log.jetstream.stream import STREAM, provision
from services.log.settings import LogSettings

BODY = b'{"event_type": "MESSAGE_RECEIVED", "payload": {}}'


@dataclass
class Log:
    """A provisioned log with a publisher."""

    cluster: Cluster
    nc: Connection
    publisher: Publisher

    async def message_ids(self) -> Counter[str]:
        """Return how often each message id is stored."""
        api = JetStreamApi(self.nc)
        info = await api.stream_info(STREAM)
        assert info is not None
        found: Counter[str] = Counter()
        for sequence in range(1, info["state"]["last_seq"] + 1):
            message = await api.get_message(STREAM, sequence)
            assert message is not None
            found[message["headers"]["Nats-Msg-Id"]] += 1
        return found


def new_event(consultation: str = "c1", body: bytes = BODY) -> Event:
    return Event(consultation, new_event_id(), 1, body)


@asynccontextmanager
async def open_log(
    cluster: Cluster, *, deadline: float = 20, max_in_flight: int = 500, **settings: Any
) -> AsyncIterator[Log]:
    wanted = LogSettings(servers=tuple(cluster.urls), **{"max_bytes": 64 * 2**20, **settings})
    nc = await connect(wanted, name="test", on_closed=pytest.fail)
    await provision(nc, wanted)
    publisher = Publisher(nc, deadline=deadline, max_in_flight=max_in_flight)
    await publisher.start()
    try:
        yield Log(cluster, nc, publisher)
    finally:
        await publisher.close()
        await close(nc)

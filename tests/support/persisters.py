"""Persister processes on a real cluster, the events that they get, and what they made of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import orjson

from fiq.corpus import CorpusError, open_corpus
from fiq.event import Event, new_event_id
from services.cli import monitoring
from services.cli.embedded.processes import Cluster
from services.log.jetstream.api import JetStreamApi
from services.log.jetstream.connection import Connection, close, connect
from services.log.jetstream.publisher import Publisher
from services.log.jetstream.stream import STREAM, provision
from services.log.protocol import LogIdentity
from services.log.settings import LogSettings
from tests.support.polling import eventually
from tests.support.service import Service

#: few, so that starting and stopping is quick
PARTITIONS = 4

#: consultation -> its event ids, in order
Contents = dict[str, list[UUID]]


class Persister(Service):
    """``python -m services.persister`` on *cluster* with its data in *data*."""

    def __init__(self, folder: Path, cluster: Cluster, data: Path, *arguments: str, **settings: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        own = {
            "FI_LOG_URL": cluster.url,
            "FI_PARTITIONS": str(PARTITIONS),
            "FI_STREAM_MAX_BYTES": "64MiB",
            "FI_REPLICAS": str(cluster.size),
            "FI_DATA_DIR": str(data),
            "FI_PERSISTER_PORT": "0",
        }
        super().__init__(folder, "services.persister", *arguments, **{**own, **settings})

    async def port(self) -> int:
        """Wait until it has reached the cluster and return its port."""
        line = await asyncio.to_thread(self.wait_for, "PERSISTER_STARTED")
        return int(line["port"])

    async def ask(self, path: str) -> tuple[int, str]:
        """Return the status and the body of an endpoint."""
        status, body = await asyncio.to_thread(monitoring.get, await self.port(), path)
        return status, body.decode()

    async def samples(self) -> dict[str, float]:
        """Return its metrics, by name with labels."""
        _, text = await self.ask("/metrics")
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    async def ready(self) -> Persister:
        """Wait until it is ready."""

        async def check() -> bool:
            status, body = await self.ask("/readyz")
            assert status == 200, body
            return True

        await eventually(check)
        return self

    async def not_ready(self, reason: str) -> str:
        """Wait until /readyz names *reason*, and return all of it."""

        async def check() -> str:
            status, body = await self.ask("/readyz")
            assert status == 503, body
            assert reason in body, body
            return body

        return await eventually(check)

    async def end(self) -> int:
        """Ask it to stop and return its exit code."""
        self.terminate()
        return await asyncio.to_thread(self.wait)


@dataclass
class Log:
    """A provisioned log to publish on."""

    cluster: Cluster
    nc: Connection
    settings: LogSettings
    identity: LogIdentity
    publisher: Publisher

    @property
    def api(self) -> JetStreamApi:
        return JetStreamApi(self.nc)

    async def publish(
        self, count: int, *, consultations: int | Sequence[str] = 12, at: int = 1, size: int = 0, batch: int = 1
    ) -> Contents:
        """Publish new events and return them.

        Args:
            count: how many.
            consultations: those that they are spread over, or how many.
            at: when they were accepted, nanoseconds since 1970.
            size: bytes of each, about.
            batch: how many are published together.
        """
        names = [f"c{n}" for n in range(consultations)] if isinstance(consultations, int) else consultations
        body = b'{"event_type":"T","payload":%*d}'
        events = [Event(names[n % len(names)], new_event_id(), at, body % (size, n)) for n in range(count)]
        for start in range(0, count, batch):
            await self.publisher.append_batch(events[start : start + batch])
        made: Contents = {}
        for event in events:
            made.setdefault(event.consultation, []).append(event.event_id)
        return made

    async def state(self) -> dict[str, Any]:
        """Return the state of the stream."""
        info = await self.api.stream_info(STREAM)
        assert info is not None
        return dict(info["state"])

    async def dead(self) -> list[dict[str, str]]:
        """Return the headers of all dead letters."""
        info = await self.api.stream_info("fi-dead")
        assert info is not None
        found = [await self.api.get_message("fi-dead", s + 1) for s in range(info["state"]["last_seq"])]
        return [message["headers"] for message in found if message is not None]


@asynccontextmanager
async def provisioned(cluster: Cluster, **changes: Any) -> AsyncIterator[Log]:
    """Provision the log on *cluster*, which has none."""
    own = {"partitions": PARTITIONS, "max_bytes": 64 * 2**20, "replicas": cluster.size}
    settings = LogSettings(servers=tuple(cluster.urls), **{**own, **changes})
    nc = await connect(settings, name="test", on_closed=lambda _: None)
    identity = await provision(nc, settings)
    publisher = Publisher(nc, deadline=20, max_in_flight=100)
    await publisher.start()
    yield Log(cluster, nc, settings, identity, publisher)
    await publisher.close()
    await close(nc)


def corpus_of(data: Path) -> Contents:
    """Return what the partition files in *data* hold; nothing while there are none."""
    try:
        with open_corpus(data) as corpus:
            return {name: [record.event_id for record in corpus[name]] for name in corpus}
    except CorpusError:
        return {}


async def persisted(data: Path, *published: Contents) -> None:
    """Wait until *data* holds exactly what was *published*, each consultation in order."""
    expected = joined(published)
    await eventually(lambda: {name: len(ids) for name, ids in corpus_of(data).items()} == _sizes(expected))
    assert expected == corpus_of(data)


def joined(parts: Iterable[Contents]) -> Contents:
    """Return several publications as one."""
    result: Contents = {}
    for part in parts:
        for name, ids in part.items():
            result[name] = result.get(name, []) + ids
    return result


def _sizes(contents: Contents) -> dict[str, int]:
    return {name: len(ids) for name, ids in contents.items()}


async def service_infos(nc: Connection) -> list[dict[str, Any]]:
    """Return what the persisters say of themselves in the NATS service API.

    A second of silence counts as the end, so one that is slow may be missing: ask again until it is there.
    """
    inbox = nc.new_inbox()
    subscription = await nc.subscribe(inbox)
    await nc.publish("$SRV.INFO.fi-persister", b"", reply=inbox)
    found = []
    try:
        while True:
            answer = await subscription.next_msg(timeout=1)
            if answer.data:  # without a subscriber: an empty message with a status
                found.append(orjson.loads(answer.data))
    except TimeoutError:
        await subscription.unsubscribe()
        return found

"""A whole pipeline of real processes on one of the logs: ingest, persisters, their data directory, and clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout

from fiq.corpus import CorpusError, open_corpus
from services.cli import monitoring
from tests.support.persisters import PARTITIONS
from tests.support.polling import eventually
from tests.support.racing import Edge
from tests.support.service import Service


class Client:
    """Posts to one ingest process, and reads from it."""

    def __init__(self, session: ClientSession, edge: Edge) -> None:
        self.edge = edge
        self.url = f"http://127.0.0.1:{edge.port}"
        #: how connections of followers ended that were not ended in an orderly way
        self.cuts: list[Exception] = []
        self._session = session

    async def post(
        self, path: str, body: bytes, key: str = "", kind: str = "application/json"
    ) -> tuple[int, dict[str, Any]]:
        headers = {"Content-Type": kind} | ({"Idempotency-Key": key} if key else {})
        return await self.post_headers(path, body, headers)

    async def post_headers(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
        async with self._session.post(self.url + path, data=body, headers=headers) as response:
            if response.status in {409, 429, 503}:
                assert int(response.headers["Retry-After"]) > 0
            return response.status, json.loads(await response.read())

    async def accepted(self, path: str, body: bytes, key: str, kind: str = "application/json") -> dict[str, Any]:
        """Post until it is accepted, and return the answer."""

        async def done() -> dict[str, Any]:
            status, answer = await self.post(path, body, key, kind)
            assert status == 202, answer
            return answer

        return await eventually(done, timeout=60)

    async def get(self, path: str) -> tuple[int, dict[str, Any]]:
        async with self._session.get(self.url + path) as response:
            return response.status, orjson.loads(await response.read())

    def get_stream(self, path: str) -> AbstractAsyncContextManager[ClientResponse]:
        """Ask for an answer without an end."""
        return self._session.get(self.url + path, timeout=ClientTimeout(total=None))

    async def follow(self, consultation: str, seen: list[int]) -> None:
        """Append the ids of all events to *seen*, as :func:`follow` does."""
        await follow(self._session, self.url, consultation, seen, self.cuts)


async def follow(session: ClientSession, url: str, consultation: str, seen: list[int], cuts: list[Exception]) -> None:
    """Append the ids of all events to *seen*, for ever, as a browser does it: connect again with the last one.

    Args:
        session: used for the requests.
        url: of ingest.
        consultation: that is followed.
        seen: ids so far.
        cuts: gets how connections ended that were not ended in an orderly way.
    """
    while True:
        headers = {"Last-Event-ID": str(seen[-1])} if seen else {}
        path = f"{url}/consultations/{consultation}/events?follow=1"
        try:
            async with session.get(path, headers=headers, timeout=ClientTimeout(total=None)) as response:
                if response.status == 200:
                    while line := await response.content.readline():
                        if line.startswith(b"id: "):
                            seen.append(int(line[4:]))
        except (ClientError, ConnectionError) as error:
            cuts.append(error)
        await asyncio.sleep(0.05)


@dataclass
class Pipeline:
    """Starts the processes of a pipeline.

    Attributes:
        folder: for everything.
        settings: of the log, for all of its processes.
    """

    folder: Path
    settings: dict[str, str]
    _count: int = 0

    @property
    def data(self) -> Path:
        """The data directory."""
        return self.folder / "data"

    @contextmanager
    def persister(self, **settings: str) -> Iterator[Service]:
        """Run a persister."""
        own = {"FI_DATA_DIR": str(self.data), "FI_PERSISTER_PORT": "0"}
        with Service(self._own_folder(), "services.persister", **(self.settings | own | settings)) as service:
            yield service

    @asynccontextmanager
    async def ready_persister(self, **settings: str) -> AsyncIterator[Service]:
        """Run a persister, and wait until it is ready."""
        with self.persister(**settings) as service:
            await self.is_ready(service)
            yield service

    async def is_ready(self, service: Service) -> None:
        """Wait until a persister is ready."""
        line = await asyncio.to_thread(service.wait_for, "PERSISTER_STARTED")

        async def check() -> bool:
            status, body = await asyncio.to_thread(monitoring.get, int(line["port"]), "/readyz")
            assert status == 200, body
            return True

        await eventually(check)

    @asynccontextmanager
    async def ingest(self, **settings: str) -> AsyncIterator[tuple[Client, Service]]:
        """Run an ingest process, and yield a client of it."""
        own = {"FI_PORT": "0", "FI_PUBLISH_DEADLINE": "15"}
        with Service(self._own_folder(), "services.ingest", **(self.settings | own | settings)) as service:
            line = await asyncio.to_thread(service.wait_for, "INGEST_STARTED")
            async with ClientSession() as session:
                yield Client(session, Edge(line["port"], line["management_port"])), service

    @asynccontextmanager
    async def running(self, ingests: int = 1, persisters: int = 1, **settings: str) -> AsyncIterator[list[Client]]:
        """Run processes, wait until they are ready, and yield a client for each ingest."""
        async with AsyncExitStack() as stack:
            owners = [stack.enter_context(self.persister(**settings)) for _ in range(persisters)]
            for owner in owners:
                await self.is_ready(owner)
            clients = [(await stack.enter_async_context(self.ingest(**settings)))[0] for _ in range(ingests)]
            for client in clients:
                await taking_events(client)
            yield clients

    def stored(self, consultation: str) -> list[tuple[int, bytes]]:
        """Return the sequences and the bodies that the corpus holds of *consultation*, in its order."""
        try:
            with open_corpus(self.data) as corpus:
                return [(event.sequence, event.raw) for event in corpus[consultation]]
        except (CorpusError, KeyError):
            return []

    async def holds(self, consultation: str, count: int) -> list[tuple[int, bytes]]:
        """Wait until the corpus holds *count* events of *consultation*, and return them."""
        await eventually(lambda: len(self.stored(consultation)) >= count)
        found = self.stored(consultation)
        assert count == len(found)
        return found

    def _own_folder(self) -> Path:
        self._count += 1
        folder = self.folder / str(self._count)
        folder.mkdir()
        return folder


async def taking_events(client: Client) -> None:
    """Wait until an ingest process says that it is ready."""

    async def check() -> bool:
        status, body = await asyncio.to_thread(monitoring.get, client.edge.management_port, "/readyz")
        assert status == 200, body
        return True

    await eventually(check)


#: settings of a small log, whichever it is
SMALL = {"FI_PARTITIONS": str(PARTITIONS), "FI_STREAM_MAX_BYTES": "64MiB", "FI_DEAD_MAX_BYTES": "1MiB"}

"""The log without a broker in the test's own process: links as ingest has them, and owners that keep a list."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import zmq
import zmq.auth

from fiq.event import Event
from services.log.protocol import Outcome, PersisterRole, Position
from services.log.zeromq.links import Links
from services.log.zeromq.log import Owner, ZeroMqFollower
from services.log.zeromq.sockets import Address, KeyCheck, Keys

PARTITIONS = 2


def event(consultation: str = "c-1", body: bytes = b'{"event_type":"A"}') -> Event:
    return Event(consultation, uuid4(), 1, body)


def make_keys(folder: Path) -> tuple[Keys, Keys, Keys]:
    """Make keys in *folder*; return those of owners, of a client that they let in, and of one that they do not."""
    pairs = []
    for name in ("server", "client", "stranger"):
        zmq.auth.create_certificates(folder, name)
        public, secret = zmq.auth.load_certificate(folder / f"{name}.key_secret")
        assert secret is not None
        pairs.append((public, secret))
    server, client, stranger = pairs
    owner = Keys(*server, server[0], frozenset({client[0]}))
    return owner, Keys(*client, server[0]), Keys(*stranger, server[0])


@dataclass
class OneOwner:
    """The owner of one partition. While *commits* is set it acknowledges whatever comes.

    Attributes:
        follower: of the partition.
        outcomes: what becomes of events, by sequence.
        commits: cleared, nothing is acknowledged.
        stored: bodies that were acknowledged.
    """

    follower: ZeroMqFollower
    arrived: asyncio.Event
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    commits: asyncio.Event = field(default_factory=asyncio.Event)
    stored: list[bytes] = field(default_factory=list)

    async def run(self) -> None:
        while True:
            await self.arrived.wait()
            await self.commits.wait()
            self.arrived.clear()
            while taken := self.follower.take(max_events=100, max_bytes=1 << 20):
                self.stored += [delivery.body for delivery in taken]
                await self.follower.acknowledge(taken[-1], self.outcomes)


@asynccontextmanager
async def owner_of(
    address: Address,
    partition: int = 0,
    *,
    after: int = 0,
    keys: Keys | None = None,
    buffer_events: int = 1000,
    buffer_bytes: int = 1 << 20,
) -> AsyncIterator[OneOwner]:
    """Run an owner of one partition in a ZeroMQ context of its own."""
    role = PersisterRole("p", "v-1", Path(), 1, 0.0, buffer_events, buffer_bytes)
    with zmq.Context() as context:
        check = None if keys is None else KeyCheck(context, keys.clients)
        owner = Owner(context, address, PARTITIONS, role, keys=keys)
        arrived = asyncio.Event()
        follower = ZeroMqFollower(owner, partition, on_events=arrived.set)
        await follower.start(Position(after))
        one = OneOwner(follower, arrived)
        one.commits.set()
        tasks = [asyncio.create_task(one.run()), asyncio.create_task(owner.run())]
        try:
            yield one
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await follower.close()
            if check is not None:
                check.close()


@asynccontextmanager
async def links_to(
    address: Address, *, partitions: int = PARTITIONS, keys: Keys | None = None, watches: bool = False
) -> AsyncIterator[Links]:
    """Run the links of one process."""
    with zmq.Context() as context:
        links = Links(context, address, partitions, keys=keys, watches=watches)
        task = asyncio.create_task(links.run())
        try:
            yield links
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            links.close()

"""Placement without a broker: what several volumes see and claim."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import replace

from services.log.errors import PlacementError
from services.log.protocol import Placements
from services.log.status import Placement, StorePlacement
from tests.support.persister import LOG


def placed(partition: int, volume: str, epoch: int = 1, *, committed: int = 0, begins: int = 1) -> Placement:
    """Return a placement as it is after a claim."""
    return Placement(partition, volume, epoch, committed, begins, revision=1)


class MemoryPlacements(Placements):
    """Keys in memory, one winner each.

    Attributes:
        placed: where partitions live.
        deleted: partitions whose key was deleted.
        formed: whether the store is.
        created: creation time of the stream of events.
        first: its first sequence.
        reconnects: how often the connection was lost.
        on_change: what tells the reader that something is new.
    """

    reconnects = 0
    fence_seconds = 0.0

    def __init__(self, *given: Placement) -> None:
        self.placed = {one.partition: one for one in given}
        self.deleted: set[int] = set()
        self.volumes: tuple[str, ...] = ()
        self.formed = False
        self.created = LOG.created
        self.first = 1
        self.on_change: Callable[[], None] = lambda: None

    def record_of(self, partition: int) -> str:
        return f"key main.{partition:02d} of bucket fi-partitions"

    async def read(self) -> StorePlacement:
        return StorePlacement(
            "main", self.formed, self.volumes, dict(self.placed), frozenset(self.deleted), self.created, self.first
        )

    async def claim(self, partition: int, volume: str, epoch: int, *, begins: int) -> Placement:
        await asyncio.sleep(0)  # others get a chance, as at a broker
        return self.placed.setdefault(partition, placed(partition, volume, epoch, committed=begins - 1, begins=begins))

    async def begin(self) -> bool:
        return False

    async def form(self, volumes: Collection[str]) -> None:
        self.formed, self.volumes = True, tuple(sorted(volumes))

    async def progress(
        self, placement: Placement, committed: int, message_id: str = "", *, owned: Callable[[], bool] = lambda: True
    ) -> Placement:
        found = self.placed.get(placement.partition)
        if found is None or (found.volume, found.epoch) != (placement.volume, placement.epoch):
            raise PlacementError(f"partition {placement.partition} was placed anew")
        self.placed[placement.partition] = replace(
            found, committed=committed, message_id=message_id, revision=found.revision + 1
        )
        return self.placed[placement.partition]

    @asynccontextmanager
    async def watching(self, on_change: Callable[[], None]) -> AsyncIterator[None]:
        self.on_change = on_change
        yield

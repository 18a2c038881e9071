"""Placement without a broker: what several volumes see and claim."""

from __future__ import annotations

import asyncio

from services.eventlog.errors import LogMismatchError
from services.eventlog.jetstream.placement import Placement, Placements
from services.eventlog.protocol import LogIdentity


class MemoryPlacements(Placements):
    """Claims in memory, one winner each.

    Attributes:
        placed: what :meth:`read` returns.
        recreated: the stream is another one by now.
    """

    def __init__(self, *placed: Placement) -> None:
        self.placed = {one.partition: one for one in placed}
        self.recreated = False

    async def read(self) -> dict[int, Placement]:
        return dict(self.placed)

    async def check_log(self, identity: LogIdentity) -> None:
        if self.recreated:
            raise LogMismatchError(f"stream {identity.name} was created anew")

    async def claim(self, partition: int, volume: str, epoch: int) -> Placement:
        await asyncio.sleep(0)  # others get a chance, as at a broker
        return self.placed.setdefault(partition, Placement(partition, volume, epoch))

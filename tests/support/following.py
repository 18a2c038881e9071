"""A follower on a real log, and a sink that takes from it and acknowledges."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fiq.event import message_id_at
from services.log.jetstream.api import JetStreamApi
from services.log.jetstream.connection import Connection
from services.log.jetstream.follower import Budget, JetStreamFollower
from services.log.jetstream.stream import STREAM, parse_cursor_name
from services.log.protocol import Delivery, LogIdentity, Position
from tests.support.polling import eventually


class Sink:
    """What a persister does with one partition, without a corpus.

    Attributes:
        follower: its follower.
        taken: all that was taken, in order.
        repairs: reasons of the follower's repairs.
    """

    def __init__(
        self,
        nc: Connection,
        identity: LogIdentity,
        *,
        partition: int = 0,
        store: str = "main",
        budget: Budget | None = None,
        max_events: int = 64,
        trimmable: int | None = None,
    ) -> None:
        self.taken: list[Delivery] = []
        self.repairs: list[str] = []
        self._news = asyncio.Event()
        self._api = JetStreamApi(nc)
        self._store, self._partition = store, partition
        self.follower = JetStreamFollower(
            nc,
            store,
            partition,
            identity,
            budget=budget or Budget(max_events, 0),
            trimmable=trimmable,
            on_events=self._news.set,
            on_repair=self.repairs.append,
        )

    @asynccontextmanager
    async def following(self, after: Position | int = 0) -> AsyncIterator[Sink]:
        """Follow, and keep it running until the end of the block."""
        await self.follower.start(Position(after) if isinstance(after, int) else after)
        running = asyncio.create_task(self.follower.run())
        running.add_done_callback(lambda _: self._news.set())
        self._running = running
        try:
            yield self
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await running
            await self.follower.close()

    async def take(self, count: int, *, acknowledge: bool = True, timeout: float = 40) -> list[int]:
        """Take *count* events, in whatever portions they come, and return their sequences; raise as run() does."""
        taken: list[Delivery] = []
        async with asyncio.timeout(timeout):
            while len(taken) < count:
                self._news.clear()
                portion = self.follower.take(max_events=count - len(taken), max_bytes=2**20)
                if portion:
                    taken += portion
                    if acknowledge:
                        await self.follower.acknowledge(portion[-1], {})
                    continue
                if self._running.done():
                    await self._running
                await self._news.wait()
        self.taken += taken
        return [delivery.sequence for delivery in taken]

    @property
    def position(self) -> Position:
        """What it would have committed."""
        last = self.taken[-1]
        return Position(last.sequence, message_id_at(last.headers))

    async def cursors(self) -> list[str]:
        """Return the names of the partition's cursors, of all processes."""
        names = await self._api.consumer_names(STREAM)
        return [name for name in names if (parse_cursor_name(name) or ())[:2] == (self._store, self._partition)]

    async def cursor(self) -> dict[str, Any]:
        """Return what the newest cursor says of itself."""
        await eventually(self.cursors)  # a new one may be under way
        newest = max(await self.cursors(), key=lambda name: (parse_cursor_name(name) or (0, 0, 0))[2])
        info = await self._api.consumer_info(STREAM, newest)
        assert info is not None
        return info


def until(condition: Callable[[dict[str, Any]], bool], sink: Sink) -> Callable[[], Any]:
    """Return a check of the newest cursor, for :func:`tests.support.polling.eventually`."""

    async def check() -> bool:
        return condition(await sink.cursor())

    return check

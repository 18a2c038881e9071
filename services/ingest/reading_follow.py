"""Follows consultations for clients, as Server-Sent Events: each event once, in order, from a position on.

Each client reads by itself until it has caught up. From there on all that follow one consultation share what is new of
it: one cheap question each interval, and one read when there is something. Whoever falls behind what is kept of that
reads by itself again. So nothing is buffered for a client but the page that is being sent, and one that does not take
it in time is let go; it comes back with ``Last-Event-ID``.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque

from aiohttp import web

from fiq.errors import TransientError
from services.core.logs import get_logger
from services.core.tokens import Scope
from services.ingest import problems
from services.ingest import reading_records as records
from services.ingest.access import GRANT
from services.ingest.answers import SERVER
from services.ingest.connections import Patience, allow
from services.ingest.metrics import Metrics
from services.ingest.problems import RequestRefusedError
from services.log.errors import LogRefusedError
from services.log.protocol import EventBrowser, StoredEvent

#: a client that has not taken what was sent after this is let go, seconds
SLOW_SECONDS = 10.0
#: a comment is sent after so much silence: proxies close what is silent, seconds
KEEP_ALIVE_SECONDS = 15.0
#: how soon it shows that a client has gone while there is nothing to send, seconds
GONE_SECONDS = 0.5
#: a consultation is read although the log shows nothing new: what is trimmed at once is in the corpus only, seconds
READ_ANYWAY_SECONDS = 10.0
#: pause after a read that failed, seconds
PAUSE_SECONDS = 1.0
#: events of a page, and events and bytes that are kept of each consultation
_PAGE_EVENTS, _KEPT_EVENTS, _KEPT_BYTES = 100, 256, 1 << 20
#: how long clients get to take their last bytes when the process ends, seconds
_FAREWELL_SECONDS = 1.0

_log = get_logger("ingest.following")


class Channel:
    """What is new of one consultation.

    Args:
        reader: where it is read.
        consultation: its id.
        position: up to which everybody who starts it knows all.
        interval: pause between two looks, seconds.
    """

    def __init__(self, reader: EventBrowser, consultation: str, position: int, interval: float) -> None:
        self.followers = 0
        self._reader = reader
        self._consultation = consultation
        self._interval = interval
        #: all events behind ``_base`` up to ``_head``
        self._kept: deque[StoredEvent] = deque()
        self._base = self._head = position
        self._size = 0
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._look(), name="follow")

    def behind(self, position: int) -> list[StoredEvent] | None:
        """Return the events behind *position*, or None when they are not all kept any more."""
        if position < self._base:
            return None
        return [stored for stored in self._kept if stored.sequence > position][:_PAGE_EVENTS]

    async def wait(self, seconds: float) -> None:
        """Wait for news, at most so many *seconds*."""
        changed = self._changed
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await changed.wait()

    def wake(self) -> None:
        """End all waits."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def close(self) -> None:
        """Look no more."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _look(self) -> None:
        said, read_at = "", time.monotonic()
        while True:
            await asyncio.sleep(self._interval)
            try:
                if time.monotonic() - read_at > READ_ANYWAY_SECONDS or await self._reader.has_news(
                    self._consultation, self._head
                ):
                    await self._read()
                    read_at = time.monotonic()
                said = ""
            except (TransientError, LogRefusedError) as error:  # an election, a hand-over: nothing is skipped by that
                if said != str(error):
                    said = str(error)
                    _log.warning("FOLLOWING_DELAYED", reason=said)
                await asyncio.sleep(PAUSE_SECONDS)
            except Exception as error:  # noqa: BLE001 - a fault in here must not leave followers waiting for ever
                _log.error("FOLLOWING_FAILED", error=type(error).__name__)
                await asyncio.sleep(PAUSE_SECONDS)

    async def _read(self) -> None:
        more = True
        while more:
            page = await self._reader.page(self._consultation, self._head, _PAGE_EVENTS)
            self._head, more = page.reached, page.more
            self._kept.extend(page.events)
            self._size += sum(len(stored.event.body) for stored in page.events)
            while len(self._kept) > _KEPT_EVENTS or (self._size > _KEPT_BYTES and len(self._kept) > 1):
                oldest = self._kept.popleft()
                self._base = oldest.sequence
                self._size -= len(oldest.event.body)
            if page.events:
                self.wake()


class Followers:
    """The followers of one process.

    Args:
        reader: where consultations are read.
        metrics: of the process.
        limit: how many there may be.
        interval: pause between two looks at a consultation, seconds.
        slow: a client that has not taken what was sent after so many seconds is let go.
    """

    def __init__(
        self, reader: EventBrowser, metrics: Metrics, *, limit: int, interval: float, slow: float = SLOW_SECONDS
    ) -> None:
        self._reader = reader
        self._metrics = metrics
        self._limit = limit
        self._interval = interval
        self._slow = slow
        self._channels: dict[str, Channel] = {}
        self._present = 0
        self._closing = asyncio.Event()
        self._gone = asyncio.Event()
        metrics.followers.set_function(lambda: self._present)

    async def serve(self, request: web.Request, consultation: str, after: int) -> web.StreamResponse:
        """Send the events of *consultation* behind *after* to the client of *request*, until it goes.

        Raises RequestRefusedError: there are as many followers as may be; FiqError: the first page cannot be read.
        """
        if self._present >= self._limit or self._closing.is_set():
            raise RequestRefusedError(problems.TOO_MANY_FOLLOWERS)
        self._present += 1
        try:
            page = await self._reader.page(consultation, after, _PAGE_EVENTS)
            response = web.StreamResponse(
                headers={
                    "Content-Type": records.EVENT_STREAM,
                    "Cache-Control": "no-store",
                    "Server": SERVER,
                    "X-Accel-Buffering": "no",
                }
            )
            self._metrics.requests.labels("200", "").inc()
            allow(request, Patience(self._slow, self._metrics.followers_dropped))
            await response.prepare(request)
            if request.method != "HEAD":
                _log.info("FOLLOW_STARTED", consultation_id=consultation, after=after)
                with contextlib.suppress(ConnectionError):
                    await response.write(b"retry: 2000\n\n")
                    position = await self._show(response, page.events, page.reached)
                    if page.more:
                        position = await self._catch_up(request, response, consultation, position)
                    await self._go_on(request, response, consultation, position)
            return response
        finally:
            self._present -= 1
            if not self._present:
                self._gone.set()

    async def close(self) -> None:
        """End all streams, and wait a moment until they have. Their clients connect again, elsewhere."""
        self._closing.set()
        for channel in self._channels.values():
            channel.wake()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FAREWELL_SECONDS):
                while self._present:
                    self._gone.clear()
                    await self._gone.wait()

    async def _go_on(
        self, request: web.Request, response: web.StreamResponse, consultation: str, position: int
    ) -> None:
        channel = self._channels.get(consultation)
        if channel is None:
            channel = self._channels[consultation] = Channel(self._reader, consultation, position, self._interval)
        channel.followers += 1
        spoken = time.monotonic()
        try:
            while self._goes_on(request, consultation):
                events = channel.behind(position)
                if events:
                    position = await self._show(response, events, events[-1].sequence)
                    spoken = time.monotonic()
                    continue
                before = position
                if events is None:
                    position = await self._catch_up(request, response, consultation, position)
                if position > before:
                    spoken = time.monotonic()
                    continue
                # nothing at all behind it: the channel was begun by somebody who is further on than there are events
                await channel.wait(self._interval if events is None else min(GONE_SECONDS, KEEP_ALIVE_SECONDS))
                _check_present(request)
                if time.monotonic() - spoken >= KEEP_ALIVE_SECONDS:
                    await response.write(b": nothing new\n\n")
                    spoken = time.monotonic()
        finally:
            channel.followers -= 1
            if not channel.followers:
                del self._channels[consultation]
                await channel.close()

    def _goes_on(self, request: web.Request, consultation: str) -> bool:
        """Say whether the client may get more: its token can be revoked or end while it follows."""
        return not self._closing.is_set() and request[GRANT].may(Scope.READ, consultation)

    async def _catch_up(
        self, request: web.Request, response: web.StreamResponse, consultation: str, position: int
    ) -> int:
        """Send all that there is behind *position*; return the position that is reached then."""
        while self._goes_on(request, consultation):
            try:
                page = await self._reader.page(consultation, position, _PAGE_EVENTS)
            except (TransientError, LogRefusedError):
                await response.write(b": waiting\n\n")
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PAUSE_SECONDS):
                        await self._closing.wait()
                continue
            position = await self._show(response, page.events, page.reached)
            if not page.more:
                break
        return position

    async def _show(self, response: web.StreamResponse, events: list[StoredEvent], reached: int) -> int:
        for stored in events:
            await response.write(b"id: %d\ndata: %b\n\n" % (stored.sequence, records.record(stored)))
        self._metrics.followed_events.inc(len(events))
        return reached


def _check_present(request: web.Request) -> None:
    """Raise ConnectionResetError when the client of *request* has gone: aiohttp tells its handler nothing of that."""
    if request.transport is None or request.transport.is_closing():
        raise ConnectionResetError("the client has gone")

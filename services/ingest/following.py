"""Following: Server-Sent Events of one consultation, or of all, from a position on.

A follower first reads by itself until it has caught up. From then on all followers of a source share what is new
(:class:`Channel`): one cheap question each interval, and one read when there is something. A follower that falls behind
what is kept of that reads by itself again. So no events are buffered for a client but the page that is being sent. A
client that does not read in time is cut off; it comes back with ``Last-Event-ID``.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass

from aiohttp import web

from fiq.errors import TransientError
from services.core.logs import LogThrottle, get_logger
from services.ingest import problems
from services.ingest.access import audit
from services.ingest.metrics import IngestMetrics
from services.ingest.problems import SERVER, RequestRefusedError
from services.ingest.records import EVENT_STREAM
from services.ingest.server import WriteTimeout, set_write_timeout
from services.log.errors import LogRefusedError, PositionGoneError
from services.log.protocol import Page, SequencedEvent

#: a client that has not read what was sent after this is cut off, seconds
SLOW_SECONDS = 10.0
#: a comment is sent after this silence, because proxies close silent connections, seconds
KEEP_ALIVE_SECONDS = 15.0
#: between two looks whether the client is still there while there is nothing to send, seconds
GONE_SECONDS = 0.5
#: a consultation is read although the log shows nothing new: what is trimmed at once is in the corpus only, seconds
READ_ANYWAY_SECONDS = 10.0
#: pause after a failed read, seconds
PAUSE_SECONDS = 1.0
#: events of a page; events and bytes that are kept of each source
_PAGE_EVENTS, _KEPT_EVENTS, _KEPT_BYTES = 100, 256, 1 << 20
#: for clients to read their last bytes at the end of the process, seconds
_CLOSE_SECONDS = 1.0

#: returns an event as it is sent; None if it is not sent to this client
Show = Callable[[SequencedEvent], bytes | None]

_log = get_logger("ingest.following")


@dataclass(frozen=True, slots=True)
class Source:
    """What is followed.

    Attributes:
        consultation: its id; None for all of them.
        page: returns some events after a position.
        has_news: returns whether there is something after a position; cheap, and perhaps a moment late.
    """

    consultation: str | None
    page: Callable[[int, int], Awaitable[Page]]
    has_news: Callable[[int], Awaitable[bool]]


class Channel:
    """The new events of *source*, for all of its followers.

    Args:
        source: what is followed.
        position: after which events are new.
        interval: pause between two questions, seconds.
    """

    def __init__(self, source: Source, position: int, interval: float) -> None:
        self.followers = 0
        self._source = source
        self._interval = interval
        self._throttle = LogThrottle.of_repeated()
        #: all events after ``_base`` up to ``_head``
        self._kept: deque[SequencedEvent] = deque()
        self._base = self._head = position
        self._size = 0
        self._changed = asyncio.Event()
        self._gone: PositionGoneError | None = None
        self._task = asyncio.create_task(self._run(), name="follow")

    def after(self, position: int) -> list[SequencedEvent] | None:
        """Return the events after *position*; None if not all of them are kept.

        Raises PositionGoneError: nor does the log hold them.
        """
        if self._gone is not None:
            raise self._gone
        if position < self._base:
            return None
        return [stored for stored in self._kept if stored.sequence > position][:_PAGE_EVENTS]

    async def wait(self, seconds: float) -> None:
        """Wait for new events, at most *seconds*."""
        changed = self._changed
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await changed.wait()

    def wake(self) -> None:
        """End all waits."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def close(self) -> None:
        """Stop reading."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        read_at = time.monotonic()
        while True:
            await asyncio.sleep(self._interval)
            try:
                overdue = time.monotonic() - read_at > READ_ANYWAY_SECONDS
                if overdue or await self._source.has_news(self._head):
                    await self._read()
                    read_at = time.monotonic()
                self._throttle.reset()
                continue
            except PositionGoneError as error:
                self._gone = error
                self.wake()
                return
            except (TransientError, LogRefusedError) as error:  # an election or a hand-over; nothing is skipped
                write, event, values = _log.warning, "FOLLOWING_DELAYED", {"reason": str(error)}
            except Exception as error:  # noqa: BLE001 - a bug here must not make followers wait for ever
                write, event, values = _log.error, "FOLLOWING_FAILED", {"error": type(error).__name__}
            allowed = self._throttle.allow(str(values))
            if allowed is not None:
                write(event, **values, **allowed)
            await asyncio.sleep(PAUSE_SECONDS)

    async def _read(self) -> None:
        more = True
        while more:
            page = await self._source.page(self._head, _PAGE_EVENTS)
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
        metrics: of the process.
        limit: most followers.
        interval: pause between two questions about a source, seconds.
        slow: a client that has not read what was sent after this is cut off, seconds.
    """

    def __init__(self, metrics: IngestMetrics, *, limit: int, interval: float, slow: float = SLOW_SECONDS) -> None:
        self._metrics = metrics
        self._limit = limit
        self.interval = interval
        self.sent = metrics.followed_events
        self._slow = slow
        self._channels: dict[str | None, Channel] = {}
        self._present = 0
        self._closing = asyncio.Event()
        self._gone = asyncio.Event()
        metrics.followers.set_function(lambda: self._present)

    async def serve(
        self,
        request: web.Request,
        source: Source,
        after: int,
        show: Show,
        allowed: Callable[[], bool],
        *,
        bodies: bool,
    ) -> web.StreamResponse:
        """Send the events of *source* after *after* to the client of *request* until it goes.

        Args:
            request: to answer.
            source: what is followed.
            after: position that the client has reached.
            show: makes what is sent.
            allowed: returns whether the client may get more: its token can be revoked or expire meanwhile.
            bodies: what is sent holds bodies, which the audit log records.

        Raises RequestRefusedError: the limit of followers is reached; FiqError: the first page cannot be read.
        """
        if self._present >= self._limit or self._closing.is_set():
            raise RequestRefusedError(problems.TOO_MANY_FOLLOWERS)
        self._present += 1
        try:
            page = await source.page(after, _PAGE_EVENTS)
            response = web.StreamResponse(
                headers={
                    "Content-Type": EVENT_STREAM,
                    "Cache-Control": "no-store",
                    "Server": SERVER,
                    "X-Accel-Buffering": "no",
                }
            )
            self._metrics.requests.labels("200", "").inc()
            set_write_timeout(request, WriteTimeout(self._slow, self._metrics.followers_dropped))
            await response.prepare(request)
            if request.method != "HEAD":
                _log.info("FOLLOW_STARTED", consultation_id=source.consultation, after=after)
                follower = _Follower(self, request, response, source, show, allowed, after)
                audited = _audited(request, follower) if bodies else contextlib.nullcontext()
                with contextlib.suppress(ConnectionError, PositionGoneError), audited:  # 410 at the reconnect
                    await follower.run(page)
            return response
        finally:
            self._present -= 1
            if not self._present:
                self._gone.set()

    async def close(self) -> None:
        """End all streams, and wait a moment for that. Their clients connect to another process."""
        self._closing.set()
        for channel in self._channels.values():
            channel.wake()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                while self._present:
                    self._gone.clear()
                    await self._gone.wait()

    # -- for each follower --------------------------------------------------------------------------------------------

    @property
    def closing(self) -> bool:
        """Whether the process is about to end."""
        return self._closing.is_set()

    async def pause(self, seconds: float) -> None:
        """Wait *seconds*, or until the process is about to end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._closing.wait()

    @contextlib.asynccontextmanager
    async def channel(self, source: Source, position: int) -> AsyncIterator[Channel]:
        """Share the channel of *source*; the first one to do so begins it at *position*."""
        channel = self._channels.get(source.consultation)
        if channel is None:
            channel = self._channels[source.consultation] = Channel(source, position, self.interval)
        channel.followers += 1
        try:
            yield channel
        finally:
            channel.followers -= 1
            if not channel.followers:
                del self._channels[source.consultation]
                await channel.close()


@dataclass(slots=True)
class _Follower:
    """One client; see :meth:`Followers.serve`."""

    followers: Followers
    request: web.Request
    response: web.StreamResponse
    source: Source
    show: Show
    allowed: Callable[[], bool]
    position: int
    sent_at: float = 0.0
    sent: int = 0

    async def run(self, page: Page) -> None:
        """Send *page*, and then what comes after it, until the client goes or may get no more."""
        position = b"id: %d\n" % self.position if self.source.consultation is None else b""
        await self._write(b"retry: 2000\n%b\n" % position)
        await self._send(page.events, page.reached)
        if page.more:
            await self._catch_up()
        async with self.followers.channel(self.source, self.position) as channel:
            await self._follow(channel)

    @property
    def _may_continue(self) -> bool:
        return not self.followers.closing and self.allowed()

    async def _follow(self, channel: Channel) -> None:
        while self._may_continue:
            if time.monotonic() - self.sent_at >= KEEP_ALIVE_SECONDS:
                # with the position: what is not shown to this client is not read again after a reconnect
                await self._write(b"id: %d\n: nothing new\n\n" % self.position)
            events, before = channel.after(self.position), self.position
            if events:
                await self._send(events, events[-1].sequence)
            elif events is None:
                await self._catch_up()
            if self.position == before:
                # events is None: the channel was started by a client with a position after the newest event
                pause = min(GONE_SECONDS, KEEP_ALIVE_SECONDS) if events is not None else self.followers.interval
                await channel.wait(pause)
                _check_connected(self.request)

    async def _catch_up(self) -> None:
        """Send all that there is after the position."""
        more = True
        while more and self._may_continue:
            try:
                page = await self.source.page(self.position, _PAGE_EVENTS)
            except (TransientError, LogRefusedError):
                await self._write(b": waiting\n\n")
                await self.followers.pause(PAUSE_SECONDS)
                continue
            await self._send(page.events, page.reached)
            more = page.more

    async def _send(self, events: list[SequencedEvent], reached: int) -> None:
        for stored in events:
            if (shown := self.show(stored)) is not None:
                self.sent += 1  # before it is written: a part of it may arrive
                await self._write(b"id: %d\ndata: %b\n\n" % (stored.sequence, shown))
                self.followers.sent.inc()
        self.position = reached

    async def _write(self, data: bytes) -> None:
        await self.response.write(data)
        self.sent_at = time.monotonic()


@contextlib.contextmanager
def _audited(request: web.Request, follower: _Follower) -> Iterator[None]:
    """Write a line of the audit log when a follower begins, and one with the number of events when it ends."""
    consultation = follower.source.consultation
    values = {} if consultation is None else {"consultation_id": consultation}
    audit("BODIES_SHOWN", request, follow="started", events=0, **values)
    try:
        yield
    finally:
        audit("BODIES_SHOWN", request, follow="ended", events=follower.sent, **values)


def _check_connected(request: web.Request) -> None:
    """Raise ConnectionResetError if the client has gone: aiohttp does not tell the handler."""
    if request.transport is None or request.transport.is_closing():
        raise ConnectionResetError("the client has gone")


FOLLOWERS = web.AppKey("followers", Followers)

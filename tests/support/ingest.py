"""The HTTP edge in the test's own process: the real server, over a log in memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import orjson
from aiohttp import ClientSession
from aiohttp.web import Application

from fiq.event import Event, new_event_id
from services.core.management import bind, serve_management
from services.core.tracing import Spans
from services.ingest.metrics import METRICS
from services.ingest.openapi import describe
from services.ingest.server import TLS, HttpServer
from services.ingest.service import READY, make_app
from services.ingest.settings import SETTINGS, Settings
from services.log.dead_letters import DeadLetter, message_headers, read_letter
from services.log.errors import CorpusAwayError, LogUnavailableError, PositionGoneError
from services.log.metrics import LogMetrics
from services.log.protocol import Appended, IngestLog, Page, SequencedEvent
from services.log.questions import Stored, StoredConsultation, Verification, digest_of
from services.log.settings import LogSettings
from services.log.status import Backlog, LogState
from tests.support.description import check_answer

#: how long after its reception an event is written, nanoseconds
WRITTEN_AFTER_NS = 50_000_000


@dataclass
class MemoryLog:
    """An EventWriter over a list of events, which fails or waits when it is told to; its reader shows them.

    Attributes:
        persisted: how many of the first events count as persisted.
        read_error: what every read raises.
        page_events: events of a page, at most.
        reads: pages that were read.
        looks: questions for news.
        backlog: what waits in a log that has persisters.
        state: what the status of the log says.
        has_feed: whether its partitions share an order.
        trimmed: how many of the first events the feed no longer has.
    """

    events: list[Event] = field(default_factory=list)
    error: Exception | None = None
    gate: asyncio.Event | None = None
    waiting: int = 0
    closed: bool = False
    reasons: list[str] = field(default_factory=list)
    #: how many events each batch had
    batches: list[int] = field(default_factory=list)
    reader: MemoryReader = field(init=False)
    persisted: int = 0
    read_error: Exception | None = None
    page_events: int = 1000
    reads: int = 0
    looks: int = 0
    backlog: Backlog | None = None
    state: LogState = field(default_factory=LogState)
    has_feed: bool = True
    letters: MemoryLetters = field(default_factory=lambda: MemoryLetters())
    trimmed: int = 0

    def __post_init__(self) -> None:
        self.reader = MemoryReader(self)

    async def append(self, event: Event) -> Appended:
        if self.gate is not None:
            self.waiting += 1
            try:
                await self.gate.wait()
            finally:
                self.waiting -= 1
        if self.error is not None:
            raise self.error
        for sequence, stored in enumerate(self.events, start=1):
            if stored.message_id == event.message_id:
                return Appended(sequence, duplicate=True)
        self.events.append(event)
        return Appended(len(self.events), duplicate=False)

    async def append_batch(self, events: Sequence[Event]) -> list[Appended]:
        self.batches.append(len(events))
        return [await self.append(event) for event in events]

    @asynccontextmanager
    async def open(self, _: LogMetrics) -> AsyncIterator[IngestLog]:
        yield self.opened
        self.closed = True

    @property
    def opened(self) -> IngestLog:
        feed = MemoryFeed(self) if self.has_feed else None
        return IngestLog(self, self.reader, MemoryStatus(self), self.letters, feed)


@dataclass
class MemoryLetters:
    """A DeadLetterBox over letters in memory, by their sequences."""

    letters: dict[int, DeadLetter] = field(default_factory=dict)

    async def page(self, after: int, limit: int) -> tuple[list[DeadLetter], bool]:
        found = [letter for sequence, letter in sorted(self.letters.items()) if sequence > after]
        return found[:limit], len(found) > limit

    async def get(self, sequence: int) -> DeadLetter | None:
        return self.letters.get(sequence)

    async def remove(self, sequence: int) -> bool:
        return self.letters.pop(sequence, None) is not None


def dead_letter(sequence: int, event: Event | None = None, *, stored: str = "", **headers: str) -> DeadLetter:
    """Make the dead letter of *event*, by default of one of c-1, which was at 7, with other *headers* if wanted."""
    event = event or Event("c-1", new_event_id(), 1, b'{"event_type":"T","payload":"private"}')
    made = message_headers("log/7", 7, event.consultation, event.headers(), "could not be written")
    made |= {name.replace("_", "-"): value for name, value in headers.items()}
    stored = stored or datetime.now(UTC).isoformat().replace("+00:00", "Z")
    return read_letter(sequence, stored, "fi.dead.5", made, event.body)


@dataclass
class MemoryStatus:
    """A Status that says what its log is told to say."""

    log: MemoryLog

    @property
    def state(self) -> LogState:
        return self.log.state

    def backlog(self) -> Backlog | None:
        return self.log.backlog

    async def ready(self) -> list[str]:
        return self.log.reasons


@dataclass
class MemoryReader:
    """An EventBrowser over a log in memory, and for lookups a corpus in a list, which counts what it is asked.

    Attributes:
        log: whose events it reads.
        corpus: what has been persisted.
        trimmed: positions that the log holds no more.
        silent: neither log nor corpus answers.
        gate: what the corpus waits for before it answers.
        too_many: the corpus holds too many ids for a snapshot.
        asked: names of the questions, in their order.
        stored: when the log stored each event.
        kept: events under used ids.
        verification: what the owner finds.
    """

    log: MemoryLog
    corpus: list[SequencedEvent] = field(default_factory=list)
    trimmed: set[int] = field(default_factory=set)
    silent: bool = False
    gate: asyncio.Event | None = None
    too_many: bool = False
    asked: list[str] = field(default_factory=list)
    stored: str = "2026-11-25T02:00:00.125Z"
    kept: list[SequencedEvent] = field(default_factory=list)
    verification: Verification = field(default_factory=lambda: Verification(0, 0, 0, [], 0, ""))

    async def at(self, sequence: int) -> SequencedEvent | None:
        self.asked.append("at")
        if self.silent:
            raise LogUnavailableError("silent")
        if sequence in self.trimmed or not 0 < sequence <= len(self.log.events):
            return None
        return SequencedEvent(sequence, self.log.events[sequence - 1], stored=self.stored)

    async def snapshot(self, consultation: str) -> MemorySnapshot:
        self.asked.append("snapshot")
        held = await self._held(consultation)
        return MemorySnapshot(set() if self.too_many else set(held), whole=not self.too_many)

    async def find(self, consultation: str, event_ids: Collection[UUID]) -> dict[UUID, Stored]:
        self.asked.append("find")
        held = await self._held(consultation)
        return {event_id: held[event_id] for event_id in event_ids if event_id in held}

    async def known(self, consultation: str, event_ids: Collection[UUID]) -> set[UUID]:
        return set(await self.find(consultation, event_ids))

    async def _held(self, consultation: str) -> dict[UUID, Stored]:
        if self.gate is not None:
            await self.gate.wait()
        if self.silent:
            raise CorpusAwayError("silent")
        held: dict[UUID, Stored] = {}
        for one in self.corpus:
            if one.event.consultation == consultation:
                held.setdefault(one.event.event_id, Stored(one.sequence, digest_of(one.event.body)))
        return held

    async def page(self, consultation: str, after: int, limit: int) -> Page:
        self.log.reads += 1
        if self.log.read_error is not None:
            raise self.log.read_error
        found = self._numbered(lambda one: one.event.consultation == consultation and one.sequence > after)
        shown = found[: min(limit, self.log.page_events)]
        more = len(found) > len(shown)
        return Page(shown, shown[-1].sequence if more else max(after, len(self.log.events)), more)

    async def page_before(self, consultation: str, before: int, limit: int) -> Page:
        self.log.reads += 1
        if self.log.read_error is not None:
            raise self.log.read_error
        found = self._numbered(lambda one: one.event.consultation == consultation and one.sequence < before)
        shown = found[-min(limit, self.log.page_events) :]
        return Page(shown, shown[0].sequence if shown else before, len(found) > len(shown))

    async def locate(self, consultation: str, event_id: UUID) -> SequencedEvent | None:
        if self.log.read_error is not None:
            raise self.log.read_error
        found = self._numbered(lambda one: (one.event.consultation, one.event.event_id) == (consultation, event_id))
        return found[0] if found else None

    async def conflicts(self, consultation: str, after: int, limit: int) -> Page:
        found = [one for one in self.kept if one.event.consultation == consultation and one.sequence > after]
        return Page(found[:limit], found[:limit][-1].sequence if found else after, len(found) > limit)

    async def verify(self, consultation: str) -> Verification:
        self.asked.append("verify")
        if self.gate is not None:
            await self.gate.wait()
        if self.silent:
            raise CorpusAwayError("silent")
        return self.verification

    async def has_news(self, consultation: str, after: int) -> bool:
        self.log.looks += 1
        if self.log.read_error is not None:
            raise self.log.read_error
        return bool(self._numbered(lambda one: one.event.consultation == consultation and one.sequence > after))

    async def consultations(self, prefix: str, after: str, limit: int) -> tuple[list[StoredConsultation], bool]:
        found = sorted(self._summaries(prefix), key=lambda one: one.consultation)
        found = [one for one in found if one.consultation > after]
        return found[:limit], len(found) > limit

    async def active_consultations(
        self, prefix: str, before: tuple[int, str], limit: int
    ) -> tuple[list[StoredConsultation], tuple[int, str] | None]:
        places = sorted(
            ((one.last_received_ns, one.consultation, one) for one in self._summaries(prefix)), reverse=True
        )
        found = [place for place in places if place[:2] < before]
        return [one for _, _, one in found[:limit]], found[limit - 1][:2] if len(found) > limit else None

    def _summaries(self, prefix: str) -> list[StoredConsultation]:
        if self.log.read_error is not None:
            raise self.log.read_error
        times: dict[str, list[int]] = {}
        for event in self.log.events[: self.log.persisted]:
            if event.consultation.startswith(prefix):
                times.setdefault(event.consultation, []).append(event.received_ns)
        return [StoredConsultation(name, len(found), found[0], found[-1]) for name, found in times.items()]

    def _sequenced(self, sequence: int, event: Event) -> SequencedEvent:
        written_ns = event.received_ns + WRITTEN_AFTER_NS if sequence <= self.log.persisted else None
        return SequencedEvent(sequence, event, written_ns)

    def _numbered(self, wanted: Callable[[SequencedEvent], bool]) -> list[SequencedEvent]:
        stored = (self._sequenced(*numbered) for numbered in enumerate(self.log.events, start=1))
        return [one for one in stored if wanted(one)]


@dataclass
class MemoryFeed:
    """A Feed over a log in memory."""

    log: MemoryLog

    async def last(self) -> int:
        return len(self.log.events)

    async def page(self, after: int) -> Page:
        self.log.reads += 1
        if self.log.read_error is not None:
            raise self.log.read_error
        if after < self.log.trimmed:
            raise PositionGoneError(f"gone: after={self.log.trimmed}")
        found = [SequencedEvent(n, event) for n, event in enumerate(self.log.events, start=1)]
        shown = found[after : after + self.log.page_events]
        return Page(shown, after + len(shown), after + len(shown) < len(found))

    async def has_news(self, after: int) -> bool:
        self.log.looks += 1
        if self.log.read_error is not None:
            raise self.log.read_error
        return len(self.log.events) > after


@dataclass
class MemorySnapshot:
    """A Snapshot of some ids."""

    ids: set[UUID]
    whole: bool

    @property
    def size(self) -> int:
        return 8 * len(self.ids)

    def may_hold(self, event_id: UUID) -> bool:
        return not self.whole or event_id in self.ids


class Edge:
    """A running server and a client for it; each answer to :meth:`request` must be one that the description has."""

    def __init__(
        self, app: Application, server: HttpServer, log: MemoryLog, ports: tuple[int, int], client: ClientSession
    ) -> None:
        self.app = app
        self.server = server
        self.log = log
        self.description = describe(app[SETTINGS], "")
        self.port, self.management_port = ports
        self.client = client

    @property
    def url(self) -> str:
        scheme = "https" if TLS in self.app else "http"
        return f"{scheme}://127.0.0.1:{self.port}"

    def metric(self, name: str, /, **labels: str) -> float:
        """Return the value of a metric's sample; 0 when there is none."""
        return self.app[METRICS].registry.get_sample_value(name, labels) or 0.0

    async def post(self, consultation: str = "c-1", body: bytes = b'{"event_type":"A"}', **headers: str) -> Reply:
        """Post *body*; header names are given with underscores."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        names.setdefault("Content-Type", "application/json")
        return await self.request("POST", f"/consultations/{consultation}/events", data=body, headers=names)

    async def request(self, method: str, path: str, **options: Any) -> Reply:
        async with self.client.request(method, self.url + path, **options) as response:
            content = await response.read()
            check_answer(self.description, method, path, response, content)
            return Reply(response.status, dict(response.headers), content)

    async def manage(self, path: str, method: str = "GET") -> Reply:
        """Ask the management listener."""
        async with self.client.request(method, f"http://127.0.0.1:{self.management_port}{path}") as response:
            return Reply(response.status, dict(response.headers), await response.read())

    async def raw(self, request: bytes, *, end: bool = False, timeout: float = 15.0) -> bytes:
        """Send bytes, and return all that comes until the server closes or falls silent for a second.

        Args:
            request: what is sent.
            end: close the sending side afterwards.
            timeout: seconds within which the first byte, or the end, must come.
        """
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(request)
            if end:
                writer.write_eof()
            answer = b""
            async with asyncio.timeout(timeout):
                answer = await reader.read(65536)
            with contextlib.suppress(TimeoutError):
                while chunk := await asyncio.wait_for(reader.read(65536), 1):
                    answer += chunk
            return answer
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@dataclass(frozen=True)
class Reply:
    """An answer that has been read."""

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return orjson.loads(self.content)


@asynccontextmanager
async def running_edge(
    log: MemoryLog | None = None,
    *,
    extend: Callable[[Application], None] = lambda _: None,
    spans: Spans | None = None,
    log_settings: LogSettings | None = None,
    **settings: Any,
) -> AsyncIterator[Edge]:
    """Run the server on a free port of loopback until the block ends.

    Args:
        log: that it writes to.
        extend: may add routes to its application.
        spans: makes spans of what is posted.
        log_settings: of the log, other than the defaults.
        settings: other than the defaults.
    """
    log = log or MemoryLog()
    values = Settings(port=0, management_port=0, log=log_settings or LogSettings(), **settings)
    app = make_app(values, log.open, spans)
    extend(app)
    sock = bind(values.host, values.port, "FI_HOST, FI_PORT")
    variables = "FI_MANAGEMENT_HOST, FI_MANAGEMENT_PORT"
    management = bind(values.management_host, values.management_port, variables)
    ports = sock.getsockname()[1], management.getsockname()[1]
    server = HttpServer(app, sock, grace=values.shutdown_grace)
    async with serve_management(management, app[METRICS].registry, app[READY], variables):
        await server.start()
        try:
            async with ClientSession() as client:
                yield Edge(app, server, log, ports, client)
        finally:
            await server.stop()

"""Reads events back: what the corpus holds, then what still waits in the stream.

Nothing is skipped, shown twice or out of order, and an event is visible as soon as its client got the 202. The order of
the questions ensures that. The partition's position is asked, then the stream is read after it, then the corpus is
asked *again*: trim deletes only what is committed, so what the stream lost meanwhile is below the second position, in
rows of the second answer, and what the stream showed above it is complete.

The stream may hold an event twice, when it was retried after the broker's window; the corpus holds the first. So an
event of the stream counts only when neither the corpus nor an earlier message there has its id.

A direct get (ADR-31) is answered by any replica, and one that lags does not have the newest messages. So the stream's
leader is asked first for the last sequence of the subject: it has applied what it acknowledged. Where a direct get ends
before that, the rest is fetched from the leader, one by one. The answers of a batch are plain messages, which NATS
delivers at most once: a reconnect or a slow client loses some. Each names the sequence that was sent before it, and the
end names the last one; after a gap the rest is asked for again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import nats.errors
import orjson
from nats.aio.msg import Msg

from fiq.errors import PoisonError
from fiq.event import Event, decode
from services.log.errors import CorpusAwayError, LogUnavailableError, PositionGoneError
from services.log.jetstream.api import JetStreamApi, inbox
from services.log.jetstream.connection import Connection
from services.log.jetstream.questions import Questions
from services.log.jetstream.stream import STREAM, stored_subject
from services.log.listing import ConsultationLister
from services.log.partitions import partition_of
from services.log.protocol import PAGE_BYTES, EventBrowser, Feed, Page, SequencedEvent, StoredIds
from services.log.questions import (
    Conflicts,
    Events,
    EventsAnswer,
    Row,
    Stored,
    StoredConsultation,
    Verification,
    decode_events,
    decode_verified,
    verify,
)
from services.log.settings import LogSettings

#: how long one answer of a persister or of the broker may take, seconds
TIMEOUT_SECONDS = 4.0
#: what is read of the stream for the retry of a batch, at most: events, and bytes of their bodies
MOST_EVENTS, MOST_BYTES = 1024, 4 << 20
#: messages and bytes of one batched direct get
BATCH_MESSAGES, BATCH_BYTES = 256, 1 << 20
#: how often a batch is asked for of which not even the first message arrives
_TRIES = 3
_DIRECT_GET = f"$JS.API.DIRECT.GET.{STREAM}"
#: every subject of the stream
_ALL = ">"
#: pauses after which a leader that lacks a position is asked again, seconds
_LEADER_PAUSES = (0.2, 0.5, 1.0)

#: position in the stream, and the event there; None for poison
Numbered = tuple[int, Event | None]


@dataclass(slots=True)
class _Tail:
    """What the stream holds after a position."""

    events: list[tuple[int, Event]]
    reached: int
    more: bool


class JetStreamReader(EventBrowser):
    """The reading side of the log and of one store's corpus; see :class:`services.log.protocol.EventBrowser`.

    Args:
        nc: the connection; it stays the caller's to close.
        settings: which store is read, and the number of partitions.
        timeout: seconds for each answer.
    """

    def __init__(self, nc: Connection, settings: LogSettings, *, timeout: float = TIMEOUT_SECONDS) -> None:
        self._partitions = settings.partitions
        self._stream = StreamReading(nc, timeout=timeout)
        self._corpus = Questions(nc, settings.store, timeout=timeout)
        self._listing = ConsultationLister(self._corpus.ask, settings.partitions)

    async def at(self, sequence: int) -> SequencedEvent | None:
        return await self._stream.at(sequence)

    async def snapshot(self, consultation: str) -> StoredIds:
        return await self._corpus.ids(self._partition(consultation), consultation)

    async def find(self, consultation: str, event_ids: Collection[UUID]) -> Mapping[UUID, Stored]:
        return (await self._corpus.find(self._partition(consultation), consultation, event_ids))[0]

    async def known(self, consultation: str, event_ids: Collection[UUID]) -> set[UUID]:
        partition, wanted, committed = self._partition(consultation), set(event_ids), 0
        try:
            found, committed = await self._corpus.find(partition, consultation, event_ids)
        except CorpusAwayError:
            found = {}
        known = set(found)
        events = size = 0
        async for _, event in self._stream.tail(
            partition, consultation, committed, await self._stream.last(partition, consultation)
        ):
            if len(known) == len(wanted) or events == MOST_EVENTS or size > MOST_BYTES:
                break
            events += 1
            if event is not None:
                size += len(event.body)
                if event.event_id in wanted:
                    known.add(event.event_id)
        return known

    async def page(self, consultation: str, after: int, limit: int) -> Page:
        """Return at most *limit* events of *consultation* after *after*, and where to go on; bounded in bytes, too.

        Raises CorpusAwayError: the partition's persister does not answer, and the stream alone cannot show all.
        """
        while True:
            page = await self._page(consultation, after, limit)
            if page.events or not page.more:
                return page
            after = page.reached  # nothing but copies and poison up to there

    async def page_before(self, consultation: str, before: int, limit: int) -> Page:
        """Return the last events of *consultation* below *before*; raises as :meth:`page`."""
        while True:
            page = await self._page_before(consultation, before, limit)
            if page.events or not page.more:
                return page
            before = page.reached  # nothing but copies and poison from there on

    async def locate(self, consultation: str, event_id: UUID) -> SequencedEvent | None:
        partition = self._partition(consultation)
        try:
            found, committed = await self._corpus.find(partition, consultation, [event_id])
        except CorpusAwayError:
            event = await self._in_stream(consultation, event_id, 0)
            if event is None and await self._stream.lacks(0):
                raise
            return event
        if not found:
            event = await self._in_stream(consultation, event_id, committed)
            if event is not None:
                return event
            # it may have been committed meanwhile
            found, _ = await self._corpus.find(partition, consultation, [event_id])
        if not found:
            return None
        answer = await self._corpus.events(partition, Events(consultation, found[event_id].sequence - 1, 1))
        return persisted(consultation, answer.rows[0]) if answer.rows else None

    async def consultations(self, prefix: str, after: str, limit: int) -> tuple[list[StoredConsultation], bool]:
        return await self._listing.by_name(prefix, after, limit)

    async def active_consultations(
        self, prefix: str, before: tuple[int, str], limit: int
    ) -> tuple[list[StoredConsultation], tuple[int, str] | None]:
        return await self._listing.by_activity(prefix, before, limit)

    async def conflicts(self, consultation: str, after: int, limit: int) -> Page:
        partition, question = self._partition(consultation), Conflicts(consultation, after, limit)
        return _corpus_page(consultation, after, await self._corpus.ask(partition, question, decode_events))

    async def verify(self, consultation: str) -> Verification:
        partition = self._partition(consultation)
        return await verify(lambda question: self._corpus.ask(partition, question, decode_verified), consultation)

    async def has_news(self, consultation: str, after: int) -> bool:
        return await self._stream.has_news(self._partition(consultation), consultation, after)

    # -- a page -------------------------------------------------------------------------------------------------------

    async def _page(self, consultation: str, after: int, limit: int) -> Page:
        partition = self._partition(consultation)
        last = asyncio.ensure_future(self._stream.last(partition, consultation))
        last.add_done_callback(lambda asked: asked.cancelled() or asked.exception())  # it may not be needed in the end
        try:
            try:
                first = await self._corpus.events(partition, Events(consultation, after, limit))
            except CorpusAwayError as away:
                return await self._from_stream(consultation, after, limit, await last, away)
            if first.more:
                return _corpus_page(consultation, after, first)
            end = await last
        finally:
            last.cancel()
        if end <= max(first.committed, after):
            return _corpus_page(consultation, after, first)
        return await self._joined(consultation, after, limit, first, end)

    async def _joined(self, consultation: str, after: int, limit: int, first: EventsAnswer, end: int) -> Page:
        """Return *first*, the corpus's answer, with what came after it, up to *end*."""
        partition = self._partition(consultation)
        events = [persisted(consultation, row) for row in first.rows]
        position = events[-1].sequence if events else after
        if len(events) == limit:
            return Page(events, position, more=True)
        tail = await self._tail(consultation, first.committed, max(after, position), end, limit - len(events))
        second = await self._corpus.events(partition, Events(consultation, position, limit - len(events)))
        events += [persisted(consultation, row) for row in second.rows]
        if second.more or len(events) == limit:
            return Page(events, events[-1].sequence if events else position, more=True)
        queued = [(sequence, event) for sequence, event in tail.events if sequence > second.committed]
        new = await self._new(partition, consultation, queued)
        room = limit - len(events)
        if len(new) > room:
            new, reached, more = new[:room], new[room - 1].sequence, True
        else:
            reached, more = tail.reached, tail.more
        events += new
        return Page(events, max(reached, position, events[-1].sequence if events else 0), more)

    async def _tail(self, consultation: str, base: int, after: int, end: int, limit: int) -> _Tail:
        """Return the first *limit* new events after *after* that the stream holds; those from *base* on are known."""
        seen: set[UUID] = set()
        found = _Tail([], after, more=False)
        size = 0
        async for sequence, event in self._stream.tail(self._partition(consultation), consultation, base, end):
            if event is not None and event.event_id not in seen:
                seen.add(event.event_id)
                if sequence > after:
                    if found.events and (len(found.events) == limit or size + len(event.body) > PAGE_BYTES):
                        found.more = True
                        return found
                    found.events.append((sequence, event))
                    size += len(event.body)
            found.reached = max(found.reached, sequence)
        return found

    async def _page_before(self, consultation: str, before: int, limit: int) -> Page:
        partition, question = self._partition(consultation), Events(consultation, 0, limit, before)
        try:
            answer = await self._corpus.events(partition, question)
        except CorpusAwayError as away:
            return await self._from_end_of_stream(consultation, before, limit, away)
        end = before - 1
        if end > answer.committed:
            end = min(end, await self._stream.last(partition, consultation))
        if end <= answer.committed:
            return _backward(before, limit, [persisted(consultation, row) for row in answer.rows], more=answer.more)
        queued, more = await self._end_of_stream(consultation, answer.committed, end, limit)
        answer = await self._corpus.events(partition, question)
        waiting = [one for one in queued if one[0] > answer.committed]
        new = await self._new(partition, consultation, waiting)
        if more and len(waiting) == len(queued):  # the corpus ends before what was left out
            return _backward(queued[0][0], limit, new, more=True)
        events = [*(persisted(consultation, row) for row in answer.rows), *new]
        return _backward(before, limit, events, more=answer.more)

    async def _from_end_of_stream(self, consultation: str, before: int, limit: int, away: CorpusAwayError) -> Page:
        """Return what the stream alone holds below *before*, if it has lost nothing."""
        if await self._stream.lacks(0):
            raise away
        end = min(before - 1, await self._stream.last(self._partition(consultation), consultation))
        queued, more = await self._end_of_stream(consultation, 0, end, limit)
        if await self._stream.lacks(0):  # trimmed meanwhile: something may be missing
            raise away
        events = [SequencedEvent(sequence, event) for sequence, event in queued]
        return _backward(before, limit, events, more=more)

    async def _end_of_stream(
        self, consultation: str, base: int, end: int, limit: int
    ) -> tuple[list[tuple[int, Event]], bool]:
        """Return the last *limit* events in the stream after *base* up to *end*, and whether there are earlier ones.

        All of them are read, because a subject can be read in one direction only.
        """
        seen: set[UUID] = set()
        kept: deque[tuple[int, Event]] = deque()
        size, more = 0, False
        async for sequence, event in self._stream.tail(self._partition(consultation), consultation, base, end):
            if sequence > end:  # a batch may go beyond
                break
            if event is None or event.event_id in seen:
                continue
            seen.add(event.event_id)
            kept.append((sequence, event))
            size += len(event.body)
            while len(kept) > limit or (size > PAGE_BYTES and len(kept) > 1):
                size -= len(kept.popleft()[1].body)
                more = True
        return list(kept), more

    async def _new(self, partition: int, consultation: str, queued: list[tuple[int, Event]]) -> list[SequencedEvent]:
        """Return those of *queued* whose id the corpus does not hold from an earlier message."""
        found, _ = await self._corpus.find(partition, consultation, [event.event_id for _, event in queued])
        new = []
        for sequence, event in queued:
            first = found.get(event.event_id)
            if first is None or first.sequence == sequence:
                new.append(SequencedEvent(sequence, event, None if first is None else first.written_ns))
        return new

    async def _from_stream(self, consultation: str, after: int, limit: int, end: int, away: CorpusAwayError) -> Page:
        """Return a page of what the stream alone holds, if it has lost nothing after *after*."""
        if await self._stream.lacks(after):
            raise away
        tail = await self._tail(consultation, 0, after, end, limit)
        if await self._stream.lacks(after):  # trimmed meanwhile: something may be missing
            raise away
        events = [SequencedEvent(sequence, event) for sequence, event in tail.events]
        return Page(events, tail.reached, tail.more)

    async def _in_stream(self, consultation: str, event_id: UUID, after: int) -> SequencedEvent | None:
        partition = self._partition(consultation)
        end = await self._stream.last(partition, consultation)
        async for sequence, event in self._stream.tail(partition, consultation, after, end):
            if event is not None and event.event_id == event_id:
                return SequencedEvent(sequence, event)
        return None

    def _partition(self, consultation: str) -> int:
        return partition_of(consultation, self._partitions)


def _corpus_page(consultation: str, after: int, answer: EventsAnswer) -> Page:
    events = [persisted(consultation, row) for row in answer.rows]
    return Page(events, events[-1].sequence if events else after, answer.more)


def _backward(before: int, limit: int, events: list[SequencedEvent], *, more: bool) -> Page:
    """Return the last *limit* of *events*, which lie below *before*; *more*: there are earlier ones."""
    shown = events[-limit:]
    return Page(shown, shown[0].sequence if shown else before, more or len(shown) < len(events))


def persisted(consultation: str, row: Row) -> SequencedEvent:
    """Return what the corpus holds in *row*."""
    return SequencedEvent(row.sequence, Event(consultation, row.event_id, row.received_ns, row.body), row.written_ns)


class JetStreamFeed(Feed):
    """The stream as it is; see :class:`services.log.protocol.Feed`.

    Its sequences follow each other without gaps, unless trim has deleted some: after a gap the position is gone.

    Args:
        nc: the connection; it stays the caller's to close.
        timeout: seconds for each answer.
    """

    def __init__(self, nc: Connection, *, timeout: float = TIMEOUT_SECONDS) -> None:
        self._stream = StreamReading(nc, timeout=timeout)

    async def last(self) -> int:
        return await self._stream.end()

    async def page(self, after: int) -> Page:
        events: list[SequencedEvent] = []
        reached = after
        batch, more = await self._stream.all_after(after)
        for sequence, event in batch:
            if sequence != reached + 1:
                break
            reached = sequence
            if event is not None:
                events.append(SequencedEvent(sequence, event))
        if reached == after:
            await self._check(after)
        return Page(events, reached, more=reached > after and (more or reached < batch[-1][0]))

    async def has_news(self, after: int) -> bool:
        return await self._stream.has_any(after)

    async def _check(self, after: int) -> None:
        """Raise PositionGoneError unless the stream's leader has the event after *after*, or ends at *after*."""
        end = await self._stream.end()
        for pause in _LEADER_PAUSES:
            if after <= end:
                break
            await asyncio.sleep(pause)  # a leader that was elected just now may not have applied all of it
            end = await self._stream.end()
        if after > end:
            raise PositionGoneError(
                f"The log ends at position {end}: it is not the log that was followed before. Follow without after."
            )
        if after < end:
            held = await self._stream.next_held(after) or end + 1
            if held > after + 1:
                raise PositionGoneError(
                    "The log no longer holds all events after this position. "
                    f"Read the consultations, and follow with after={held - 1}."
                )


# -- the stream -------------------------------------------------------------------------------------------------------


class StreamReading:
    """The stream, as readers need it; raises LogUnavailableError when an answer takes longer than *timeout* seconds."""

    def __init__(self, nc: Connection, *, timeout: float) -> None:
        self._nc = nc
        self._api = JetStreamApi(nc, timeout=timeout)
        self._timeout = timeout

    async def last(self, partition: int, consultation: str) -> int:
        """Return the sequence of the consultation's last message, as the leader knows it; 0 when there is none."""
        found = await self._api.last_message(STREAM, stored_subject(partition, consultation))
        return 0 if found is None else found["seq"]

    async def lacks(self, after: int) -> bool:
        """Return whether trim may have deleted anything after *after*: in a full stream also in its middle."""
        state = await self._state()
        if state["first_seq"] > after + 1 or not state.get("num_deleted"):
            return bool(state["first_seq"] > after + 1)
        next_one = await self._api.get_message(STREAM, after + 1, next_of=">", counted=True)
        there = 0 if next_one is None else 1 + next_one.get("pending", 0)
        # asked after that: what is stored meanwhile must not make up for what is lacking
        return bool((await self._state())["last_seq"] - after > there)

    async def _state(self) -> dict[str, Any]:
        info = await self._api.stream_info(STREAM)
        if info is None:
            raise LogUnavailableError(f"there is no stream {STREAM}")
        return dict(info["state"])

    async def at(self, sequence: int) -> SequencedEvent | None:
        """Return the event at *sequence*; None when the stream holds nothing there, or no event."""
        message = await self._api.get_message(STREAM, sequence)
        if message is None:  # a replica that lags says the same as one that has trimmed it
            message = await self._api.leader_message(STREAM, sequence)
        event = None if message is None else _event(message["subject"], message["headers"], message["data"])
        if message is None or event is None:
            return None
        return SequencedEvent(sequence, event, stored=message["time"])

    async def end(self) -> int:
        """Return the sequence of the last message, as the leader knows it; 0 when there never was one."""
        return int((await self._state())["last_seq"])

    async def all_after(self, after: int) -> tuple[list[Numbered], bool]:
        """Return some messages after *after*, of all subjects, as one replica has them, and whether it has more."""
        batch = await self._batch(_ALL, after + 1)
        headers = [message.headers or {} for message in batch]
        numbered = [
            (int(own["Nats-Sequence"]), _event(own["Nats-Subject"], own, message.data))
            for own, message in zip(headers, batch, strict=True)
        ]
        return numbered, bool(headers) and headers[-1]["Nats-Num-Pending"] != "0"

    async def has_any(self, after: int) -> bool:
        """Return whether some replica has a message after *after*: cheap, and perhaps late."""
        return await self._api.get_message(STREAM, after + 1, next_of=_ALL) is not None

    async def next_held(self, after: int) -> int | None:
        """Return the sequence of the first message after *after*, as the leader knows it; None without one."""
        found = await self._api.leader_message(STREAM, after + 1, next_of=_ALL)
        return None if found is None else found["seq"]

    async def has_news(self, partition: int, consultation: str, after: int) -> bool:
        """Return whether some replica has a message of the consultation after *after*: cheap, and perhaps late."""
        subject = stored_subject(partition, consultation)
        return await self._api.get_message(STREAM, after + 1, next_of=subject) is not None

    async def tail(self, partition: int, consultation: str, after: int, last: int) -> AsyncIterator[Numbered]:
        """Yield each message of the consultation after *after* up to *last*, which the leader reported."""
        subject, position = stored_subject(partition, consultation), after
        while position < last:
            batch = await self._batch(subject, position + 1)
            if not batch:
                break
            for message in batch:
                position = int((message.headers or {})["Nats-Sequence"])
                yield position, _event(subject, message.headers, message.data)
        while position < last:  # the replica that answered lags, or what it sends gets lost
            found = await self._api.leader_message(STREAM, position + 1, next_of=subject)
            if found is None:  # trimmed meanwhile
                return
            position = found["seq"]
            yield position, _event(subject, found["headers"], found["data"])

    async def _batch(self, subject: str, start: int) -> list[Msg]:
        """Return some messages of *subject* from *start* on, as one replica has them; none when it has none."""
        for _ in range(_TRIES):
            batch, whole = await self._answers(subject, start)
            if batch or whole:
                return batch
        return []

    async def _answers(self, subject: str, start: int) -> tuple[list[Msg], bool]:
        """Ask for a batch; return its messages up to the first that was lost on its way, and whether none was."""
        wanted = {"seq": start, "next_by_subj": subject, "batch": BATCH_MESSAGES, "max_bytes": BATCH_BYTES}
        batch: list[Msg] = []
        before = "0"
        try:
            async with asyncio.timeout(self._timeout), inbox(self._nc) as (reply, answers):
                await self._nc.publish(_DIRECT_GET, orjson.dumps(wanted), reply=reply)
                while True:
                    message = await answers.get()
                    headers = message.headers or {}
                    # a stored message, too, may say "Status"
                    status = None if "Nats-Sequence" in headers else headers.get("Status", "")
                    if status == "404":
                        return batch, True
                    if status not in (None, "204"):
                        raise LogUnavailableError(f"DIRECT.GET.{STREAM}: status {status}")
                    if headers.get("Nats-Last-Sequence") != before:
                        return batch, False
                    if status == "204":
                        return batch, True
                    before = headers["Nats-Sequence"]
                    batch.append(message)
        except TimeoutError:
            self._nc.check_hearing()
            raise LogUnavailableError(f"DIRECT.GET.{STREAM}: no answer within {self._timeout:g} s") from None
        except (nats.errors.Error, OSError) as error:
            raise LogUnavailableError(f"DIRECT.GET.{STREAM}: {type(error).__name__}") from error


def _event(subject: str, headers: dict[str, str] | None, body: bytes) -> Event | None:
    try:
        return decode(subject.rpartition(".")[2], headers, body)
    except PoisonError:  # the persister sets it aside
        return None

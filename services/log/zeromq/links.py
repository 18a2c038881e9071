"""Ingest's side: one link to the owner of each partition, over which events and questions go.

A link is *up* while its owner has answered HELLO and was heard within :data:`SILENT_SECONDS`. Otherwise an append fails
at once, so the client gets 503 and may retry. While it is up an append must fit into the credit that the owner grants;
beyond it the owner cannot keep up, and the client gets 503, too.

What was sent and not answered when a connection ends is kept. It is sent again, in the same order and under the same
ids, to the next owner that answers, until the deadline of each event. The corpus drops what an earlier attempt stored.

Events are read back from the corpus, through the owners: no event waits anywhere else.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar
from uuid import UUID

import zmq

from fiq.event import Event
from services.core.logs import get_logger
from services.log.errors import (
    CorpusAwayError,
    LogFullError,
    LogRefusedError,
    LogUnavailableError,
    TooManyInFlightError,
)
from services.log.listing import ConsultationLister
from services.log.metrics import LogMetrics
from services.log.partitions import partition_name, partition_of
from services.log.protocol import Appended, Failure, Page, SequencedEvent
from services.log.questions import (
    KIND_OF,
    MAX_ITEMS,
    Events,
    EventsAnswer,
    Find,
    Ids,
    IdSnapshot,
    MalformedError,
    Question,
    Row,
    Stored,
    StoredConsultation,
    Verification,
    decode_events,
    decode_found,
    decode_ids,
    decode_verified,
    encode_question,
    verify,
)
from services.log.settings import LogSettings
from services.log.status import (
    Backlog,
    LiveProcess,
    LogState,
    PartitionProgress,
    PartitionState,
    Placement,
    StorePlacement,
    Waiting,
)
from services.log.zeromq import wire
from services.log.zeromq.sockets import Address, Keys, LoopSocket
from services.log.zeromq.wire import CODES, Done, MalformedMessageError, State

#: an owner that was not heard for this long does not take events, seconds
SILENT_SECONDS = 1.5
#: how often links are looked at, and how often HELLO is sent, seconds
_LOOK_SECONDS, _HELLO_SECONDS = 0.1, 1.0
#: bytes of the events of one message, about, at most
_MESSAGE_BYTES = 1 << 20

_log = get_logger("zeromq")
_numbers = itertools.count(1)


@dataclass(slots=True, eq=False)
class _InFlight:
    """An event that was sent and is not answered."""

    frames: tuple[bytes, ...]
    size: int
    deadline: float
    answer: asyncio.Future[Appended]


class Link:
    """The link to the owner of one partition.

    Args:
        context: of the process.
        address: where the owner is.
        partition: its number.
        partitions: how many there are.
        keys: of this process; None without encryption.
        watches: only look at its state.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: Address,
        partition: int,
        partitions: int,
        *,
        keys: Keys | None,
        watches: bool,
    ) -> None:
        self.partition = partition
        #: why the owner is not used, although it answers
        self.mismatch = ""
        self._store, self._partitions = address.store, partitions
        #: what the owner said last; None while there is none
        self.state: State | None = None
        #: what an owner said last, also when it is gone
        self.last: State | None = None
        self._hello = wire.encode_hello(f"{socket.gethostname()}/{os.getpid()}", watches=watches)
        self._heard_at = 0.0
        self._hello_at = 0.0
        self._in_flight: dict[int, _InFlight] = {}
        self._size = 0
        self._outbox: list[tuple[bytes, ...]] = []
        self._room = asyncio.Event()
        self._asked: dict[int, asyncio.Future[tuple[int, bytes]]] = {}
        self._loop = asyncio.get_running_loop()
        self._socket = LoopSocket(context, zmq.DEALER, self._take, self._connected, keys=keys)
        self._socket.socket.connect(address.endpoint(partition))

    @property
    def up(self) -> bool:
        """Whether there is an owner that answers."""
        return self.state is not None and time.monotonic() - self._heard_at < SILENT_SECONDS

    @property
    def in_flight(self) -> int:
        """How many events were sent and are not answered."""
        return len(self._in_flight)

    def append(self, event: Event, deadline: float) -> asyncio.Future[Appended]:
        """Send *event*; the future has its position once it is committed.

        Args:
            event: what is stored.
            deadline: on :func:`time.monotonic`; then the future has a LogUnavailableError.

        Raises LogUnavailableError: there is no owner; LogFullError: the credit is used up. Nothing was sent.
        """
        self.check_up()
        if not self.has_room(len(event.body)):
            raise LogFullError(f"partition {partition_name(self.partition)}: its persister cannot keep up")
        number = next(_numbers)
        frames = wire.encode_event(number, event.consultation, event.headers(), event.body)
        answer: asyncio.Future[Appended] = self._loop.create_future()
        self._in_flight[number] = _InFlight(frames, len(event.body), deadline, answer)
        self._size += len(event.body)
        if not self._outbox:
            self._loop.call_soon(self._flush)
        self._outbox.append(frames)
        return answer

    def check_up(self) -> None:
        """Raises LogUnavailableError: there is no owner, it is silent, or it is of another deployment."""
        if not self.up:
            silent = f"its persister has been silent for {SILENT_SECONDS:g} s"
            reason = self.mismatch or ("no persister has it open" if self.state is None else silent)
            raise LogUnavailableError(f"partition {partition_name(self.partition)}: {reason}")

    def has_room(self, size: int) -> bool:
        """Whether an event of *size* bytes fits into the credit; one is always allowed."""
        if not self._in_flight or self.state is None:
            return True
        return len(self._in_flight) < self.state.credit_events and self._size + size <= self.state.credit_bytes

    async def room(self, size: int, deadline: float) -> None:
        """Wait until an event of *size* bytes fits into the credit.

        Raises LogUnavailableError: there is no owner; LogFullError: it did not fit until *deadline*.
        """
        while True:
            self.check_up()
            if self.has_room(size):
                return
            self._room.clear()
            try:
                async with asyncio.timeout(min(deadline - time.monotonic(), SILENT_SECONDS)):
                    await self._room.wait()
            except TimeoutError:
                if time.monotonic() >= deadline:
                    name = partition_name(self.partition)
                    raise LogFullError(f"partition {name}: its persister cannot keep up") from None

    async def ask(self, kind: str, question: bytes, timeout: float) -> tuple[int, bytes] | None:
        """Return the code and the data of the owner's answer; None when there is no owner or no answer in time."""
        if not self.up:
            return None
        number = next(_numbers)
        answer: asyncio.Future[tuple[int, bytes]] = self._loop.create_future()
        self._asked[number] = answer
        try:
            if not self._socket.send(wire.encode_ask(number, kind, question)):
                return None
            async with asyncio.timeout(timeout):
                return await answer
        except (TimeoutError, ConnectionError):
            return None
        finally:
            del self._asked[number]

    def look(self, now: float) -> None:
        """Give up what is too late, and say HELLO when that is due; to be called every 0.1 s."""
        for number in [number for number, one in self._in_flight.items() if one.deadline <= now]:
            self._finish(number, LogUnavailableError("the owner of the partition has not answered in time"))
        if self._socket.writable and now - self._hello_at >= _HELLO_SECONDS:
            self._say_hello()

    def close(self) -> None:
        """Say goodbye; what is not answered fails."""
        if self._socket.writable:
            self._socket.send([wire.BYE])
        for number in list(self._in_flight):
            self._finish(number, LogUnavailableError("this process is stopping"))
        self._forget_questions()
        self._socket.close()

    # -- what comes ---------------------------------------------------------------------------------------------------

    def _connected(self, connected: bool) -> None:
        if connected:
            self._say_hello()
        else:
            self.state = None
            self.mismatch = ""
            self._outbox.clear()
            self._forget_questions()
            self._room.set()

    def _say_hello(self) -> None:
        self._hello_at = time.monotonic()
        self._socket.send(self._hello)

    def _take(self, frames: list[bytes]) -> None:
        self._heard_at = time.monotonic()
        try:
            match frames:
                case [wire.STATE, data]:
                    self._changed(wire.decode_state(data))
                case [wire.DONE, data]:
                    for number, sequence, outcome in wire.decode_done(data):
                        self._done(number, sequence, outcome)
                case [wire.REPLY, *_]:
                    number, code, data = wire.decode_reply(frames)
                    asked = self._asked.get(number)
                    if asked is not None and not asked.done():
                        asked.set_result((code, data))
                case _:
                    raise MalformedMessageError("an unknown kind of message")
        except MalformedMessageError as error:
            _log.warning("MESSAGE_MALFORMED", partition=partition_name(self.partition), reason=str(error))

    def _changed(self, state: State) -> None:
        if self._differs(state):
            return
        before, self.state, self.last = self.state, state, state
        if before is None or before.instance != state.instance:
            self._outbox.clear()
            self._send([one.frames for one in self._in_flight.values()])
        self._room.set()

    def _differs(self, state: State) -> bool:
        """Whether the owner is of another deployment: with another number of partitions events go to wrong ones."""
        name = partition_name(self.partition)
        found = ""
        if (state.store, state.partitions) != (self._store, self._partitions):
            found = (
                f"its persister has FI_STORE={state.store} and FI_PARTITIONS={state.partitions}, this process "
                f"FI_STORE={self._store} and FI_PARTITIONS={self._partitions}"
            )
        if found and found != self.mismatch:
            _log.error("OWNER_REFUSED", partition=name, reason=found)
        elif self.last is not None and self.last.volume != state.volume and not found:
            reason = "events that the former volume holds are not known to this one"
            _log.warning("VOLUME_CHANGED", partition=name, volume=state.volume, before=self.last.volume, reason=reason)
        self.mismatch = found
        return bool(found)

    def _done(self, number: int, sequence: int, outcome: Done) -> None:
        if outcome is Done.REFUSED:
            name = partition_name(self.partition)
            self._finish(number, LogRefusedError(f"the persister of partition {name} refuses the event; see its log"))
        else:
            self._finish(number, Appended(sequence, duplicate=outcome is Done.DUPLICATE))

    def _finish(self, number: int, result: Appended | Exception) -> None:
        one = self._in_flight.pop(number, None)
        if one is None:
            return
        self._size -= one.size
        self._room.set()
        if one.answer.done():
            return
        if isinstance(result, Appended):
            one.answer.set_result(result)
        else:
            one.answer.set_exception(result)

    def _forget_questions(self) -> None:
        for asked in self._asked.values():
            if not asked.done():
                asked.set_exception(ConnectionError())

    # -- what goes ----------------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        events, self._outbox = self._outbox, []
        self._send(events)

    def _send(self, events: Sequence[tuple[bytes, ...]]) -> None:
        """Send *events* in as few messages as fit; what cannot be sent now is sent to the next owner."""
        frames, size = [wire.EVENTS], 0
        for one in events:
            frames += one
            size += len(one[2])
            if size >= _MESSAGE_BYTES:
                self._socket.send(frames)
                frames, size = [wire.EVENTS], 0
        if len(frames) > 1:
            self._socket.send(frames)


class Links:
    """The links of one process, to all partitions.

    Args:
        context: of the process.
        address: of the owners.
        partitions: how many there are.
        keys: of this process; None without encryption.
        watches: only look at the owners' state.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: Address,
        partitions: int,
        *,
        keys: Keys | None,
        watches: bool = False,
    ) -> None:
        self.all = [Link(context, address, p, partitions, keys=keys, watches=watches) for p in range(partitions)]

    def __getitem__(self, partition: int) -> Link:
        return self.all[partition]

    async def run(self) -> None:
        """Keep the links going until cancelled."""
        while True:
            now = time.monotonic()
            for link in self.all:
                link.look(now)
            await asyncio.sleep(_LOOK_SECONDS)

    def close(self) -> None:
        """Close all links."""
        for link in self.all:
            link.close()


class ZeroMqWriter:
    """Appends events; see :class:`services.log.protocol.EventWriter`.

    Args:
        links: to the owners.
        deadline: seconds for each append, and for each batch.
        max_in_flight: single appends in flight, at most.
    """

    def __init__(self, links: Links, *, deadline: float, max_in_flight: int) -> None:
        self._links = links
        self._deadline = deadline
        self._max_in_flight = max_in_flight
        self._in_flight = 0

    async def append(self, event: Event) -> Appended:
        """Return once *event* is committed in the corpus."""
        if self._in_flight >= self._max_in_flight:
            raise TooManyInFlightError(f"{self._in_flight} events are being stored")
        self._in_flight += 1
        try:
            return await self._link(event).append(event, time.monotonic() + self._deadline)
        finally:
            self._in_flight -= 1

    async def append_batch(self, events: Sequence[Event]) -> list[Appended]:
        """Return once all *events* are committed. A crash may leave the first ones of each consultation stored."""
        deadline = time.monotonic() + self._deadline
        groups: dict[int, list[int]] = {}
        for index, event in enumerate(events):
            groups.setdefault(self._link(event).partition, []).append(index)
        for partition in groups:
            self._links[partition].check_up()
        answers = await asyncio.gather(
            *(
                self._append_all(self._links[partition], [events[index] for index in indices], deadline)
                for partition, indices in groups.items()
            ),
            return_exceptions=True,
        )
        found: dict[int, Appended] = {}
        for indices, answer in zip(groups.values(), answers, strict=True):
            if isinstance(answer, BaseException):
                raise answer
            found.update(zip(indices, answer, strict=True))
        return [found[index] for index in range(len(events))]

    async def _append_all(self, link: Link, events: Sequence[Event], deadline: float) -> list[Appended]:
        """Append *events* in order, as fast as the owner's credit allows."""
        answers: list[asyncio.Future[Appended]] = []
        try:
            for event in events:
                await link.room(len(event.body), deadline)
                answers.append(link.append(event, deadline))
        except BaseException:
            for sent in answers:  # nothing waits for them any more
                sent.cancel()
            raise
        done = await asyncio.gather(*answers, return_exceptions=True)
        for answer in done:
            if isinstance(answer, BaseException):
                raise answer
        return [answer for answer in done if isinstance(answer, Appended)]

    def _link(self, event: Event) -> Link:
        return self._links[partition_of(event.consultation, len(self._links.all))]


# -- reading back -----------------------------------------------------------------------------------------------------

T = TypeVar("T")

#: how long one answer of a persister may take, seconds
_ANSWER_SECONDS = 4.0
#: pause before a question is asked again that could not be answered just then, seconds
_ASK_AGAIN_SECONDS = 0.02


class ZeroMqReader:
    """Asks the owners; see :class:`~services.log.protocol.EventBrowser`.

    Args:
        links: to the owners.
        settings: of the log.
    """

    def __init__(self, links: Links, settings: LogSettings) -> None:
        self._links = links
        self._partitions = settings.partitions
        self._listing = ConsultationLister(self._ask, settings.partitions)

    async def at(self, sequence: int) -> SequencedEvent | None:
        """Return None: no event waits in the log."""
        return None

    async def snapshot(self, consultation: str) -> IdSnapshot:
        """Return which ids the corpus holds of *consultation*."""
        return await self._ask(self._partition(consultation), Ids(consultation), decode_ids)

    async def find(self, consultation: str, event_ids: Collection[UUID]) -> Mapping[UUID, Stored]:
        """Return what the corpus holds under *event_ids*."""
        partition = self._partition(consultation)
        found: dict[UUID, Stored] = {}
        left = list(dict.fromkeys(event_ids))
        while left:
            asked, left = left[:MAX_ITEMS], left[MAX_ITEMS:]
            answer = await self._ask(partition, Find(consultation, asked), decode_found)
            if len(answer.rest) >= len(asked):
                raise _away(partition, "it answers nothing")
            found.update(answer.found)
            left += answer.rest
        return found

    async def known(self, consultation: str, event_ids: Collection[UUID]) -> set[UUID]:
        """Return those of *event_ids* that the corpus holds."""
        return set(await self.find(consultation, event_ids))

    async def page(self, consultation: str, after: int, limit: int) -> Page:
        """Return at most *limit* events of *consultation* after *after*, and where to go on."""
        answer = await self._events(consultation, after, limit)
        events = [_stored(consultation, row) for row in answer.rows]
        last = events[-1].sequence if events else after
        return Page(events, last if answer.more else max(last, answer.committed), answer.more)

    async def page_before(self, consultation: str, before: int, limit: int) -> Page:
        """Return the last events of *consultation* below *before*."""
        question = Events(consultation, 0, limit, before)
        answer = await self._ask(self._partition(consultation), question, decode_events)
        events = [_stored(consultation, row) for row in answer.rows]
        return Page(events, events[0].sequence if events else before, answer.more)

    async def locate(self, consultation: str, event_id: UUID) -> SequencedEvent | None:
        """Return the event, or None when the corpus does not hold it."""
        found = (await self.find(consultation, [event_id])).get(event_id)
        if found is None:
            return None
        answer = await self._events(consultation, found.sequence - 1, 1)
        return _stored(consultation, answer.rows[0]) if answer.rows else None

    async def has_news(self, consultation: str, after: int) -> bool:
        """Return whether the corpus has something of *consultation* after *after*; a question only if it may have."""
        last = self._links[self._partition(consultation)].last
        if last is not None and last.committed <= after:
            return False
        return bool((await self._events(consultation, after, 1)).rows)

    async def conflicts(self, consultation: str, after: int, limit: int) -> Page:
        """Return nothing: a client is told at once that its key is used, and the event is not kept."""
        return Page([], after, more=False)

    async def verify(self, consultation: str) -> Verification:
        """Have the owner verify the consultation."""
        partition = self._partition(consultation)
        return await verify(lambda question: self._ask(partition, question, decode_verified), consultation)

    async def consultations(self, prefix: str, after: str, limit: int) -> tuple[list[StoredConsultation], bool]:
        """Return consultations that begin with *prefix*, sorted by id, and whether there are more."""
        return await self._listing.by_name(prefix, after, limit)

    async def active_consultations(
        self, prefix: str, before: tuple[int, str], limit: int
    ) -> tuple[list[StoredConsultation], tuple[int, str] | None]:
        """Return the consultations with the newest events, newest first, and the place to go on at."""
        return await self._listing.by_activity(prefix, before, limit)

    async def _events(self, consultation: str, after: int, limit: int) -> EventsAnswer:
        return await self._ask(self._partition(consultation), Events(consultation, after, limit), decode_events)

    async def _ask(self, partition: int, question: Question, decode: Callable[[bytes], T]) -> T:
        """Ask the owner of *partition* until it answers.

        Raises CorpusAwayError: nobody answers, or not in time; LogRefusedError: it does not understand the question.
        """
        link, end = self._links[partition], time.monotonic() + _ANSWER_SECONDS
        while (left := end - time.monotonic()) > 0:
            answer = await link.ask(KIND_OF[type(question)], encode_question(question, left), left)
            if answer is None:
                raise _away(partition, "no persister answers")
            code, data = answer
            if not code:
                try:
                    return decode(data)
                except MalformedError:
                    raise _away(partition, "its answer is malformed") from None
            if code == CODES[Failure.MALFORMED]:
                raise LogRefusedError("the persister does not understand the question: is it of another version?")
            if code == CODES[Failure.TOO_LARGE]:
                raise LogRefusedError(f"partition {partition_name(partition)} holds an event that is too large to read")
            if code != CODES[Failure.NOT_NOW]:
                raise _away(partition, "its file cannot be read; the persister's log says why")
            await asyncio.sleep(_ASK_AGAIN_SECONDS)
        raise _away(partition, f"no answer within {_ANSWER_SECONDS:g} s")

    def _partition(self, consultation: str) -> int:
        return partition_of(consultation, self._partitions)


def _stored(consultation: str, row: Row) -> SequencedEvent:
    return SequencedEvent(row.sequence, Event(consultation, row.event_id, row.received_ns, row.body), row.written_ns)


def _away(partition: int, reason: str) -> CorpusAwayError:
    return CorpusAwayError(f"partition {partition_name(partition)}: {reason}")


# -- status -----------------------------------------------------------------------------------------------------------

#: how often the status is renewed, seconds
_STATUS_SECONDS = 1.0


class ZeroMqStatus:
    """What the owners say of their partitions; see :class:`services.log.protocol.Status`.

    There is no stream, so a snapshot has none, and no dead letters.

    Args:
        links: to the owners.
        settings: of the log.
        metrics: where it is shown; None for a look by itself.
    """

    def __init__(self, links: Links, settings: LogSettings, metrics: LogMetrics | None) -> None:
        self.state = LogState()
        self._links = links
        self._settings = settings
        self._metrics = metrics

    async def run(self) -> None:
        """Renew the snapshot each second until cancelled."""
        while True:
            self.state = self.look()
            if self._metrics is not None:
                self._show(self._metrics, self.state)
            await asyncio.sleep(_STATUS_SECONDS)

    def look(self) -> LogState:
        """Return a snapshot."""
        store = self._settings.store
        processes: dict[tuple[str, ...], LiveProcess] = {}
        placed: dict[int, Placement] = {}
        partitions = []
        for link in self._links.all:
            p, last = link.partition, link.last
            if last is not None:
                placed[p] = Placement(p, last.volume, 1, last.committed, 1, 0)
            if last is not None and link.up:
                key = (last.volume, last.about.get("host", ""), last.about.get("pid", ""))
                one = processes.get(key) or LiveProcess(store, last.volume, frozenset(), {}, metadata=last.about)
                progress = {**one.progress, p: PartitionProgress(last.committed, last.waiting)}
                processes[key] = replace(one, partitions=one.partitions | {p}, progress=progress)
            committed, events = (0, 0) if last is None else (last.committed, last.waiting)
            waiting = Waiting(events, committed, stalled=not link.up)
            partitions.append(PartitionState(p, placed.get(p), int(link.up), committed, waiting, None))
        volumes = tuple(sorted({one.volume for one in placed.values()}))
        formed = len(placed) == self._settings.partitions
        placement = StorePlacement(store, formed, volumes, placed, frozenset(), volumes[0] if volumes else "", 1)
        return LogState(
            at=time.monotonic(),
            has_stream=False,
            placements={store: placement} if placed else {},
            processes=tuple(processes.values()),
            stores={store: tuple(partitions)},
        )

    def backlog(self) -> Backlog | None:
        """Return what the owners have received and not committed.

        Sequences are those of partitions, and all that was answered is committed. So the sum of all partitions stands
        for the position of the log.
        """
        partitions = self.state.partitions(self._settings.store)
        if not any(one.owners for one in partitions):
            return None
        total = sum(one.committed + one.waiting.events for one in partitions)
        return Backlog(self.state.at, total, tuple(replace(one.waiting, sequence=total) for one in partitions))

    async def ready(self) -> list[str]:
        """Return why events cannot be stored just now; nothing when they can."""
        mismatches = {link.mismatch for link in self._links.all if link.mismatch}
        if mismatches:
            return sorted(mismatches)
        missing = [partition_name(link.partition) for link in self._links.all if not link.up]
        if not missing:
            return []
        return [
            f"no persister answers for partitions {', '.join(missing)} at {self._settings.url}: start the persisters"
        ]

    def _show(self, metrics: LogMetrics, state: LogState) -> None:
        up = [link.up for link in self._links.all]
        metrics.connected.set(any(up))
        metrics.available.set(all(up))
        metrics.stores(state)

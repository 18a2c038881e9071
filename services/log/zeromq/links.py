"""Ingest's side: one link to the owner of each partition, over which events and questions go.

A link is *up* while its owner has answered HELLO and was heard within :data:`SILENT_SECONDS`. Otherwise an append fails
at once, so the client gets 503 and may retry. While it is up an append must fit into the credit that the owner grants;
beyond it the owner cannot keep up, and the client gets 503, too.

What was sent and not answered when a connection ends is kept. It is sent again, in the same order and under the same
ids, to the next owner that answers, until the deadline of each event. The corpus drops what an earlier attempt stored.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

import zmq

from fiq.event import Event
from services.core.logs import get_logger
from services.log.errors import LogFullError, LogRefusedError, LogUnavailableError, TooManyInFlightError
from services.log.partitions import partition_name, partition_of
from services.log.protocol import Appended
from services.log.zeromq import wire
from services.log.zeromq.sockets import Address, Keys, LoopSocket
from services.log.zeromq.wire import Done, MalformedMessageError, State

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

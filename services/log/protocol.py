"""What ingest and the persisters need of the log, whatever keeps it.

Ingest *appends* and gets a position. A persister *follows* a partition from a position, *takes* what has come and
*acknowledges* up to one. The acknowledgement informs operators only: the sink holds the offset (DESIGN, section 5).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

from fiq.event import MESSAGE_ID_HEADER, Event


@dataclass(frozen=True, slots=True)
class LogIdentity:
    """Which log this is: a re-created one starts at position 1 again and must not be mistaken for the old one.

    Attributes:
        name: of the stream.
        created: when it was created, RFC 3339 in UTC, exactly as the broker says it.
    """

    name: str
    created: str


@dataclass(frozen=True, slots=True)
class Appended:
    """Where an event stands in the log.

    Attributes:
        sequence: position in the log, from 1.
        duplicate: the log held an event with this message id already; *sequence* is the first one's.
    """

    sequence: int
    duplicate: bool


#: characters of a message id that a :class:`Position` records as it is
MAX_MESSAGE_ID = 200


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the log that a sink has reached.

    Attributes:
        sequence: up to which the sink has everything; 0: nothing yet.
        message_id: of the message at *sequence*, as :func:`message_id_at` returns it; empty when it is not known,
            and then not compared. The message may be of another partition.
    """

    sequence: int
    message_id: str = ""


def message_id_at(headers: Mapping[str, str] | None) -> str:
    """Return a message's id as a :class:`Position` records it.

    Empty without one; a hash of one that is longer than :data:`MAX_MESSAGE_ID` or not printable ASCII.
    """
    found = (headers or {}).get(MESSAGE_ID_HEADER, "")
    if len(found) <= MAX_MESSAGE_ID and found.isascii() and found.isprintable():
        return found
    return "blake2b:" + hashlib.blake2b(found.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message as the log delivers it: not decoded, perhaps poison.

    Attributes:
        sequence: position in the log; rising within a partition, with gaps.
        consultation: the consultation's token of the subject, not checked.
        headers: of the message, or None.
        body: of the message.
        token: opaque; what :meth:`Follower.acknowledge` needs.
    """

    sequence: int
    consultation: str
    headers: Mapping[str, str] | None
    body: bytes
    token: str


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """One event with its place, read from the log or from the corpus.

    Attributes:
        sequence: position in the log, from 1.
        event: as it was stored.
        persisted: read from the corpus; otherwise it still waits in the log.
    """

    sequence: int
    event: Event
    persisted: bool


@dataclass(frozen=True, slots=True)
class Stored:
    """What the corpus holds under an id, without its body.

    Attributes:
        sequence: position in the log, from 1.
        digest: :func:`digest_of` its body.
    """

    sequence: int
    digest: bytes


def digest_of(body: bytes) -> bytes:
    """Return 8 bytes that tell a body from another one."""
    return hashlib.blake2b(body, digest_size=8).digest()


class Snapshot(Protocol):
    """Which ids the corpus held of a consultation at one moment."""

    @property
    def whole(self) -> bool:
        """Whether it can tell the ids that were not held; otherwise there were too many."""
        ...

    @property
    def size(self) -> int:
        """How much memory it takes, bytes."""
        ...

    def may_hold(self, event_id: UUID) -> bool:
        """Return False when *event_id* was not held for certain."""
        ...


class EventWriter(Protocol):
    """The appending side."""

    async def append(self, event: Event) -> Appended:
        """Store *event* on a quorum of nodes and return its position.

        Raises LogFullError: the log takes no more until it is drained; nothing was stored; LogUnavailableError: no
        answer within the deadline; the event may or may not be stored, and appending the same event again is safe;
        DuplicateInFlightError: the same message id is being stored by somebody else just now; TooManyInFlightError:
        this process has its limit of appends under way; nothing was sent; LogRefusedError: the log refuses for good; an
        operator must act.
        """
        ...

    async def append_batch(self, events: Sequence[Event]) -> list[Appended]:
        """Store *events*, all with message ids of their own, and return their positions in the same order.

        At once or not at all while each of them is new. When the log holds some of them already, the others are stored
        one by one. ``duplicate`` also marks an event that an earlier attempt of this very call stored.

        Raises Exception: as :meth:`append`; then any of them may be stored, and appending all of them again is safe.
        """
        ...


class EventReader(Protocol):
    """The reading side of the HTTP edge: the corpus through the persisters, then what still waits in the log."""

    async def at(self, sequence: int) -> StoredEvent | None:
        """Return the event at *sequence* of the log, or None when the log holds it no more.

        Raises LogUnavailableError: no answer in time.
        """
        ...

    async def snapshot(self, consultation: str) -> Snapshot:
        """Return which ids the corpus holds of *consultation*.

        Raises CorpusAwayError: the partition's persister does not answer; LogUnavailableError: there is no connection;
        LogRefusedError: an operator must act.
        """
        ...

    async def find(self, consultation: str, event_ids: Collection[UUID]) -> Mapping[UUID, Stored]:
        """Return what the corpus holds under *event_ids*; raises as :meth:`snapshot` does."""
        ...

    async def known(self, consultation: str, event_ids: Collection[UUID]) -> set[UUID]:
        """Return those of *event_ids* that are stored for certain, in the corpus or in the log; perhaps not all.

        Raises CorpusAwayError, LogUnavailableError, LogRefusedError: as :meth:`snapshot`.
        """
        ...


@dataclass(frozen=True, slots=True)
class Page:
    """Some events of a consultation.

    Attributes:
        events: in stream order.
        reached: position up to which they are complete: the next page comes after it.
        more: whether there may be further ones behind it.
    """

    events: list[StoredEvent]
    reached: int
    more: bool


class EventBrowser(EventReader, Protocol):
    """What serves readers beyond the comparison of a retry. Each method raises as :meth:`EventReader.snapshot` does."""

    async def page(self, consultation: str, after: int, limit: int) -> Page:
        """Return at most *limit* events of *consultation* behind *after*, perhaps fewer, and where to go on."""
        ...

    async def locate(self, consultation: str, event_id: UUID) -> StoredEvent | None:
        """Return the event wherever it is, or None when neither the corpus nor the log holds it."""
        ...

    async def has_news(self, consultation: str, after: int) -> bool:
        """Return whether the log has something of *consultation* behind *after*; cheap, and perhaps a moment late."""
        ...

    async def consultations(self, prefix: str, after: str, limit: int) -> tuple[list[str], bool]:
        """Return sorted ids of persisted consultations that begin with *prefix*, and whether there are more."""
        ...


class Follower(Protocol):
    """One partition, from a position on, in order, without gaps or repeats.

    :meth:`run` keeps it going; :meth:`take` and the properties never wait.
    """

    async def start(self, after: Position) -> None:
        """Deliver everything after *after*, once the log is known to be the one that the position belongs to.

        May be called again to go back.

        Raises LogMismatchError: it is another log, or this one was set back or lacks events after the position;
        LogUnavailableError: no answer in time.
        """
        ...

    async def run(self) -> None:
        """Keep the events coming until cancelled. Gaps, repeats and silence are repaired inside.

        Raises Exception: what :meth:`interrupt` was called with; LogMismatchError or LogRefusedError when the partition
        cannot be followed any more.
        """
        ...

    def take(self, *, max_events: int, max_bytes: int) -> list[Delivery]:
        """Return what has come and was not taken: at most *max_events* and about *max_bytes*, perhaps nothing.

        What was taken before counts as done: its memory is free for others.
        """
        ...

    @property
    def ready(self) -> int:
        """How many events :meth:`take` could return now."""
        ...

    @property
    def waiting(self) -> int:
        """How many events of the partition the log holds after the acknowledged position, as far as is known."""
        ...

    @property
    def delivered(self) -> int:
        """How many events were delivered and are not acknowledged."""
        ...

    @property
    def in_doubt(self) -> bool:
        """Whether the log is just now not known to be the one that the position belongs to."""
        ...

    async def acknowledge(self, delivery: Delivery) -> None:
        """Tell the log that everything up to *delivery*, which was taken, is safe in the sink."""
        ...

    async def empty_up_to(self) -> Position:
        """Return a position up to which it is proven that nothing of the partition waits for the sink.

        That is the acknowledged position itself when nothing beyond it is proven.

        Raises LogUnavailableError: no answer in time.
        """
        ...

    def advance(self, position: Position) -> None:
        """Note that the sink has reached *position*, which :meth:`empty_up_to` returned."""
        ...

    def interrupt(self, error: Exception) -> None:
        """Make :meth:`run` raise *error*."""
        ...

    async def close(self) -> None:
        """Deliver no more. Operators still see how much waits. Idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class Waiting:
    """What waits in one partition.

    Attributes:
        events: that were stored up to *sequence* and are not committed.
        sequence: of the stream's youngest event that *events* counts.
        still: nothing of it is being committed: no process runs it, or its file has not moved for a while.
    """

    events: int
    sequence: int
    still: bool


@dataclass(frozen=True, slots=True)
class Backlog:
    """What waits in the store that has most of it.

    Attributes:
        at: when it was looked at, on :func:`time.monotonic`.
        sequence: of the stream's youngest event then.
        partitions: by number.
    """

    at: float
    sequence: int
    partitions: tuple[Waiting, ...]

    @property
    def events(self) -> int:
        """Of all partitions together."""
        return sum(one.events for one in self.partitions)

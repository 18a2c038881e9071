"""What ingest and the persisters need of the log, whatever keeps it.

Ingest *appends* and gets a position. A persister *follows* a partition from a position in batches and *acknowledges* up
to one. The acknowledgement informs operators and trim only: the sink holds the offset (DESIGN, section 5).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol
from uuid import UUID

from services.contract.event import MESSAGE_ID_HEADER, Event


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
class Position:
    """A place in the log that a sink has reached.

    Attributes:
        sequence: of the last message that is done; 0 when there is none.
        message_id: found there; empty when none was ever recorded, and then it is not compared.
    """

    sequence: int
    message_id: str = ""


def message_id_at(headers: Mapping[str, str] | None) -> str:
    """Return the message id in *headers* as a :class:`Position` records it: at most 200 printable ASCII characters."""
    found = (headers or {}).get(MESSAGE_ID_HEADER, "")
    if len(found) <= 200 and found.isascii() and found.isprintable():
        return found
    return f"blake2b:{blake2b(found.encode('utf-8', 'surrogateescape'), digest_size=16).hexdigest()}"


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
class Held:
    """What is stored under some ids.

    Attributes:
        events: the first event under each id that one was found for.
        complete: there is none under the others, and none before those; otherwise nobody could say.
    """

    events: Mapping[UUID, StoredEvent]
    complete: bool


class EventWriter(Protocol):
    """The appending side."""

    async def append(self, event: Event) -> Appended:
        """Store *event* on a quorum of nodes and return its position.

        Raises:
            LogFullError: the log takes no more until it is drained; nothing was stored.
            LogUnavailableError: no answer within the deadline; the event may or may not be stored, and appending the
                same event again is safe.
            DuplicateInFlightError: the same message id is being stored by somebody else just now.
            TooManyInFlightError: this process has its limit of appends under way; nothing was sent.
            LogRefusedError: the log refuses for good; an operator must act.
        """
        ...

    async def append_batch(self, events: Sequence[Event]) -> list[Appended]:
        """Store *events*, all with message ids of their own, and return their positions in the same order.

        At once or not at all while each of them is new. When the log holds some of them already, the others are stored
        one by one. ``duplicate`` also marks an event that an earlier attempt of this very call stored.

        Raises:
            Exception: as :meth:`append`; then any of them may be stored, and appending all of them again is safe.
        """
        ...


class EventReader(Protocol):
    """The reading side of the HTTP edge: the corpus through the persisters, then what still waits in the log."""

    async def at(self, sequence: int) -> StoredEvent | None:
        """Return the event at *sequence* of the log, or None when the log holds it no more.

        Raises:
            LogUnavailableError: no answer in time.
        """
        ...

    async def find(self, consultation: str, event_id: UUID) -> StoredEvent | None:
        """Return the event that the corpus holds under *event_id*, or None when it holds none.

        Raises:
            CorpusAwayError: the partition's persister does not answer.
        """
        ...

    async def held(self, consultation: str, event_ids: Collection[UUID], before: int | None) -> Held:
        """Return what is stored under *event_ids*, in the corpus or in the log behind it, of which it reads some only.

        Args:
            consultation: of all the ids.
            event_ids: one at least.
            before: the log need not be read from this position on; None: all that waits in it is to be read.

        Raises:
            CorpusAwayError: the partition's persister stopped to answer.
            LogUnavailableError: the log does not answer in time.
            LogRefusedError: an operator must act.
        """
        ...

    async def read(self, consultation: str, after: int, limit: int) -> list[StoredEvent]:
        """Return at most *limit* events of *consultation* with positions above *after*, in order, without gaps.

        Raises:
            CorpusAwayError: the partition's persister does not answer, and the log alone cannot show that it has all.
            LogUnavailableError: the log does not answer in time.
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
    """What serves readers beyond the comparison of a retry. Each method raises as :meth:`EventReader.read` does."""

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
    """One partition, from a position on, in order, without gaps or repeats."""

    async def start(self, after: Position) -> None:
        """Begin to receive everything behind *after*, once it is sure that the log is the one that *after* is of."""
        ...

    async def run(self) -> None:
        """Keep it so, whatever happens to the log, until cancelled; raise what ends it."""
        ...

    def take(self, *, max_events: int, max_bytes: int) -> list[Delivery]:
        """Return what has come and was not taken, at most *max_events* and about *max_bytes*; perhaps nothing."""
        ...

    @property
    def ready(self) -> int:
        """How many events :meth:`take` could hand out now."""
        ...

    @property
    def waiting(self) -> int:
        """Events of the partition in the log that are not acknowledged, as far as known."""
        ...

    async def acknowledge(self, delivery: Delivery) -> None:
        """Tell the log that everything up to *delivery* is safe in the sink."""
        ...

    def advance(self, position: Position) -> None:
        """Note that the sink has reached *position*: nothing of the partition lies between its last event and there."""
        ...

    def interrupt(self, error: Exception) -> None:
        """Make :meth:`run` raise *error*."""
        ...

    async def close(self) -> None:
        """Receive no more. Idempotent."""
        ...

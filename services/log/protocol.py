"""The seam between the services and the log: all that ingest, persister and CLI need of a log, whatever keeps it.

:func:`services.log.open_log` opens the log that FI_LOG_URL names, in one of two roles:

- ingest gets an :class:`IngestLog`: a writer, a reader, and the status;
- a persister gets a :class:`PersisterLog`: followers, placements, questions to answer, dead letters, trim, the status.

What every log guarantees
    - **Stored.** ``append`` returns after the event is safe: on a quorum of the nodes, or, in a log without a broker,
      after the persister's commit. An event with the same message id is kept once however often it is appended.
    - **Order.** Sequences rise within a partition, perhaps with gaps. Events of one consultation that are appended one
      after the other are delivered in that order.
    - **Nothing skipped.** A follower delivers everything after the position that the sink holds. What the sink did not
      commit before a crash is delivered again, or its ``append`` did not return.
    - **The same log.** A log that was replaced or set back is refused (LogMismatchError), never followed in silence.
    - **One owner.** A partition has one file, on one volume. A process whose partition was given to another volume
      learns that at its next :meth:`Placements.progress`.
    - **Errors.** A TransientError says that the operation may be repeated as it is, a PermanentError that an operator
      must act. No message holds anything of a payload.

What a log may lack: trim, dead letters, replicas. The sink holds the offset, so acknowledgements need no durability
(DESIGN, section 5).

The data that pass through the seam are here, in :mod:`services.log.questions` and in :mod:`services.log.status`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol
from uuid import UUID

from fiq.event import Event
from services.log.dead_letters import DeadLetter
from services.log.questions import Answer, Question, Stored, StoredConsultation, Verification
from services.log.status import Backlog, LogState, PartitionProgress, Placement, StorePlacement

#: name of the log of events: JetStream's stream, and the destination in traces
EVENT_LOG = "fi-events"
#: name of the log of dead letters
DEAD_LETTER_LOG = "fi-dead"
#: events of a page take this at most, but for a single one, bytes
PAGE_BYTES = 1 << 20

# -- events and positions ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LogIdentity:
    """Which log this is. One that was made anew begins at position 1 again and must not be mistaken for the old one.

    Attributes:
        name: of the log.
        created: RFC 3339 in UTC, exactly as the log states it.
    """

    name: str
    created: str


@dataclass(frozen=True, slots=True)
class Appended:
    """The position of an event in the log.

    Attributes:
        sequence: from 1.
        duplicate: the log already held an event with this message id; *sequence* is that one's.
    """

    sequence: int
    duplicate: bool


@dataclass(frozen=True, slots=True)
class Position:
    """How far a sink has come.

    Attributes:
        sequence: up to which the sink has everything; 0: nothing yet.
        message_id: of the message at *sequence*, as :func:`message_id_at` returns it; empty when it is not known, and
            then not compared. The message may be of another partition.
    """

    sequence: int
    message_id: str = ""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message as the log delivers it: not decoded, perhaps poison.

    Attributes:
        sequence: position in the log.
        consultation: as the log has it, not checked.
        headers: of the message, or None.
        body: of the message.
        token: for the follower that delivered it.
    """

    sequence: int
    consultation: str
    headers: Mapping[str, str] | None
    body: bytes
    token: str


class Fate(StrEnum):
    """What became of a delivery that was not stored as a new event."""

    DUPLICATE = "duplicate"
    CONFLICT = "conflict"
    POISON = "poison"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one delivery.

    Attributes:
        fate: DUPLICATE: the consultation holds the same event; CONFLICT: it holds another body under this id; POISON:
            it cannot be stored.
        first: sequence of the event that holds the id; 0 for poison.
    """

    fate: Fate
    first: int = 0


@dataclass(frozen=True, slots=True)
class SequencedEvent:
    """An event read from the log or from the corpus.

    Attributes:
        sequence: position in the log, from 1.
        event: as it was stored.
        written_ns: when the persister wrote it into the corpus, nanoseconds since the Unix epoch; None: it still waits
            in the log.
        stored: when the log stored it, RFC 3339 in UTC; empty unless it was asked for by its sequence.
    """

    sequence: int
    event: Event
    written_ns: int | None = None
    stored: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """Some events of a consultation.

    Attributes:
        events: in log order.
        reached: position up to which they are complete, and after which the next page comes; of a page that was read
            backwards, position from which they are complete.
        more: whether there may be further events.
    """

    events: list[SequencedEvent]
    reached: int
    more: bool


# -- ingest: writing and reading --------------------------------------------------------------------------------------


class EventWriter(Protocol):
    """Appends events."""

    async def append(self, event: Event) -> Appended:
        """Store *event* safely and return its position.

        Raises LogFullError: the log takes no more until it is drained; nothing was stored; LogUnavailableError: no
        answer within the deadline; the event may or may not be stored, and appending the same event again is safe;
        DuplicateInFlightError: another writer is storing the same message id just now; TooManyInFlightError: this
        process has its limit of appends in flight; nothing was sent; LogRefusedError: an operator must act.
        """

    async def append_batch(self, events: Sequence[Event]) -> list[Appended]:
        """Store *events*, each with a message id of its own, and return their positions in the same order.

        All or none while each of them is new. When the log holds some of them already, the others are stored one by
        one. ``duplicate`` also marks an event that an earlier attempt of this very call stored.

        Raises Exception: as :meth:`append`; then any of them may be stored, and appending all of them again is safe.
        """


class StoredIds(Protocol):
    """Which ids the corpus held of a consultation at one moment."""

    @property
    def whole(self) -> bool:
        """Whether all ids are known; otherwise there were too many, and each may be held."""

    @property
    def size(self) -> int:
        """Memory that it takes, bytes."""

    def may_hold(self, event_id: UUID) -> bool:
        """Return False only when *event_id* was certainly not held."""


class EventReader(Protocol):
    """Looks up what is stored, to compare a retry with it."""

    async def at(self, sequence: int) -> SequencedEvent | None:
        """Return the event at *sequence* of the log, or None when the log no longer holds it.

        Raises LogUnavailableError: no answer in time.
        """

    async def snapshot(self, consultation: str) -> StoredIds:
        """Return which ids the corpus holds of *consultation*.

        Raises CorpusAwayError: the partition's persister does not answer; LogUnavailableError: there is no connection;
        LogRefusedError: an operator must act.
        """

    async def find(self, consultation: str, event_ids: Collection[UUID]) -> Mapping[UUID, Stored]:
        """Return what the corpus holds under *event_ids*; raises as :meth:`snapshot`."""

    async def known(self, consultation: str, event_ids: Collection[UUID]) -> set[UUID]:
        """Return those of *event_ids* that are certainly stored, in corpus or log; perhaps not all of them.

        Raises CorpusAwayError, LogUnavailableError, LogRefusedError: as :meth:`snapshot`.
        """


class EventBrowser(EventReader, Protocol):
    """Reads events back. Each method raises as :meth:`EventReader.snapshot` does.

    A reader sees each event once, in log order, as soon as its ``append`` has returned.
    """

    async def page(self, consultation: str, after: int, limit: int) -> Page:
        """Return at most *limit* events of *consultation* after *after*, perhaps fewer, and where to go on."""

    async def page_before(self, consultation: str, before: int, limit: int) -> Page:
        """Return the last events of *consultation* below *before*, at most *limit*, perhaps fewer, in log order.

        ``reached`` is where the page begins: the one before it ends below that.
        """

    async def locate(self, consultation: str, event_id: UUID) -> SequencedEvent | None:
        """Return the event, or None when neither the corpus nor the log holds it."""

    async def has_news(self, consultation: str, after: int) -> bool:
        """Return whether the log has something of *consultation* after *after*; cheap, and perhaps a moment late."""

    async def conflicts(self, consultation: str, after: int, limit: int) -> Page:
        """Return at most *limit* events under used ids that the corpus keeps of *consultation*, as :meth:`page`."""

    async def verify(self, consultation: str) -> Verification:
        """Have the owner of *consultation* verify what the corpus holds of it."""

    async def consultations(self, prefix: str, after: str, limit: int) -> tuple[list[StoredConsultation], bool]:
        """Return persisted consultations, sorted by id, and whether there are more.

        Args:
            prefix: their ids begin with it.
            after: their ids sort after it.
            limit: most of them.
        """

    async def active_consultations(
        self, prefix: str, before: tuple[int, str], limit: int
    ) -> tuple[list[StoredConsultation], tuple[int, str] | None]:
        """Return the persisted consultations with the newest events, newest first, and the place to go on at.

        Only the newest 1,000 or so of each partition are known. A consultation's place is when its last event was
        accepted, nanoseconds since the Unix epoch, and its id.

        Args:
            prefix: their ids begin with it.
            before: their places are below it; :data:`services.log.listing.NEWEST` begins.
            limit: most of them.
        """


class Feed(Protocol):
    """The events of all consultations in the log's one order. Each method raises as :meth:`EventReader.snapshot` does.

    A copy of an event that the log holds twice, because it was retried when its id had been forgotten, is shown twice.
    """

    async def last(self) -> int:
        """Return the position of the newest event."""

    async def page(self, after: int) -> Page:
        """Return some events after *after*, about 1 MiB at most, and where to go on.

        Raises PositionGoneError: the log does not hold all of them.
        """

    async def has_news(self, after: int) -> bool:
        """Return whether the log has something after *after*; cheap, and perhaps a moment late."""


# -- persister: following ---------------------------------------------------------------------------------------------


class Follower(Protocol):
    """Delivers one partition from a position on, in order, without gaps or repeats.

    :meth:`run` keeps it going; :meth:`take` and the properties never wait.
    """

    async def start(self, after: Position) -> None:
        """Deliver everything after *after*, once this is known to be the log that the position belongs to.

        May be called again to go back.

        Raises LogMismatchError: it is another log, or this one was set back or lacks events after the position;
        LogUnavailableError: no answer in time; LogRefusedError: an operator must act.
        """

    async def run(self) -> None:
        """Keep the events coming until cancelled. Gaps, repeats and silence are repaired inside.

        Raises Exception: what :meth:`interrupt` was called with; LogMismatchError or LogRefusedError when the partition
        can no longer be followed.
        """

    def take(self, *, max_events: int, max_bytes: int) -> list[Delivery]:
        """Return what has come and was not taken: at most *max_events* and about *max_bytes*, perhaps nothing.

        What was taken before counts as done: its memory is free for others.
        """

    @property
    def ready(self) -> int:
        """How many events :meth:`take` could return now."""

    @property
    def waiting(self) -> int:
        """How many events of the partition the log holds after the acknowledged position, as far as is known."""

    @property
    def delivered(self) -> int:
        """How many events were delivered and are not acknowledged."""

    @property
    def writers_wait(self) -> bool:
        """Whether ``append`` returns only after :meth:`acknowledge`.

        Rounds then begin at once. An event under a used key is not kept, because its client is told.
        """

    @property
    def in_doubt(self) -> bool:
        """Whether the log is at present not known to be the one that the position belongs to."""

    async def acknowledge(self, delivery: Delivery, outcomes: Mapping[int, Outcome]) -> None:
        """Report that everything taken up to *delivery* is committed in the sink.

        Args:
            delivery: the last one of a commit.
            outcomes: by sequence, what became of those since the last acknowledgement that were not stored as new
                events. A log that answers its writers only now needs it; others ignore it.
        """

    async def empty_up_to(self) -> Position:
        """Return a position up to which it is proven that nothing of the partition waits for the sink.

        That is the acknowledged position itself when nothing after it is proven.

        Raises LogUnavailableError: no answer in time.
        """

    def advance(self, position: Position) -> None:
        """Note that the sink has reached *position*, which :meth:`empty_up_to` returned."""

    def interrupt(self, error: Exception) -> None:
        """Make :meth:`run` raise *error*."""

    async def close(self) -> None:
        """Deliver no more. Operators still see how much waits. Idempotent."""


# -- persister: placement ---------------------------------------------------------------------------------------------


class Placements(Protocol):
    """Who holds each partition of one store: claims, progress, fencing.

    Of several claims of a partition exactly one wins. :meth:`progress` is the fence: a process whose partition was
    placed anew learns it there. A log without a broker takes what the volume's files and their locks say.
    """

    @property
    def reconnects(self) -> int:
        """Rises when changes may have been missed by :meth:`watching`."""

    @property
    def fence_seconds(self) -> float:
        """For how long after a change of a record the log may still trim by what it said before, seconds."""

    def record_of(self, partition: int) -> str:
        """Return how an operator finds the record of *partition*, for messages."""

    async def read(self) -> StorePlacement:
        """Return where the partitions are.

        Raises LogMismatchError: the log is gone; PlacementError: the records are gone; LogUnavailableError: no answer.
        """

    async def claim(self, partition: int, volume: str, epoch: int, *, begins: int) -> Placement:
        """Place *partition* on *volume* unless it is placed already; return where it is now.

        Raises PlacementError: its record was deleted; LogUnavailableError: the outcome is not known; call again.
        """

    async def begin(self) -> bool:
        """Note that the store is about to begin, and return whether other stores exist, which now trim nothing more.

        Raises LogUnavailableError: the outcome is not known; call again.
        """

    async def form(self, volumes: Collection[str]) -> None:
        """Note that every partition of the store is placed, on *volumes*. Idempotent.

        Raises LogUnavailableError: the outcome is not known; call again.
        """

    async def progress(
        self, placement: Placement, committed: int, message_id: str = "", *, owned: Callable[[], bool] = lambda: True
    ) -> Placement:
        """Report that the file of *placement* has reached *committed*; return the placement as it is now.

        Args:
            owned: whether the caller still has the file; what another process reported is only overwritten then.

        Raises PlacementError: another process may have the partition; stop writing it; LogUnavailableError: the outcome
        is not known, call again; or the file was released and its next owner reports.
        """

    def watching(self, on_change: Callable[[], None]) -> AbstractAsyncContextManager[None]:
        """Call *on_change* whenever it is worth reading again, while the body runs."""


# -- persister: questions about the corpus ----------------------------------------------------------------------------


class Failure(StrEnum):
    """Why a question gets no answer."""

    #: it is not a question
    MALFORMED = "malformed"
    #: a single event is larger than the log can carry
    TOO_LARGE = "too large"
    #: ask again soon
    NOT_NOW = "not now"
    #: the corpus cannot be read
    FAULT = "fault"


class AskedQuestion(Protocol):
    """A question that has arrived at the partition's owner."""

    @property
    def kind(self) -> str:
        """What is asked, a :class:`~services.log.questions.Kind`; ``unknown`` when it is malformed."""

    @property
    def question(self) -> Question | None:
        """The question; None when it is malformed."""

    @property
    def within(self) -> float:
        """For how long after its arrival the asker waits, seconds."""

    @property
    def room(self) -> int:
        """How large the answer may be, bytes."""

    async def answer(self, answer: Answer) -> bool:
        """Send *answer*; False when it cannot be sent now: the asker asks again."""

    async def fail(self, failure: Failure, reason: str) -> bool:
        """Send that there is no answer, and why; False as :meth:`answer`."""


class Answering(Protocol):
    """Brings the questions of others to the process that has the partition's file open.

    A question about a partition that no process has open fails at once where it was asked.
    """

    async def open(self, partition: int, take: Callable[[AskedQuestion], None]) -> None:
        """Have *take* called with each question about *partition* from now on.

        Raises LogUnavailableError: there is no connection.
        """

    async def close(self, partition: int) -> None:
        """Take no more questions about *partition*. Idempotent; raises nothing."""


# -- persister: dead letters and trim ---------------------------------------------------------------------------------


class DeadLetterStore(Protocol):
    """Keeps messages that cannot be stored as events."""

    @property
    def max_bytes(self) -> int:
        """How large a dead letter may be, headers included, bytes."""

    async def store(self, partition: int, body: bytes, headers: dict[str, str]) -> None:
        """Store a dead letter of *partition*; the same ``Nats-Msg-Id`` is kept once.

        Raises TransientError: it may not be stored; call again.
        """


class DeadLetterBox(Protocol):
    """Reads dead letters, and removes those that an operator is done with.

    Each method raises LogUnavailableError: no answer in time; LogRefusedError: an operator must act.
    """

    async def page(self, after: int, limit: int) -> tuple[list[DeadLetter], bool]:
        """Return at most *limit* letters after *after*, without their bodies, and whether there are more."""

    async def get(self, sequence: int) -> DeadLetter | None:
        """Return the letter at *sequence*; None when there is none."""

    async def remove(self, sequence: int) -> bool:
        """Remove the letter at *sequence* for good; return False when there is none."""


@dataclass(frozen=True, slots=True)
class Trimmed:
    """What one round of trim did.

    Attributes:
        committed: sequence up to which every store has committed everything.
        purged: messages deleted.
        fullness: share of the log's limit in use after that, 0 to 1.
    """

    committed: int
    purged: int
    fullness: float


# -- status -----------------------------------------------------------------------------------------------------------


class Status(Protocol):
    """The log as this process sees it, renewed about once a second; shown in the metrics, too."""

    @property
    def state(self) -> LogState:
        """The newest snapshot."""

    def backlog(self) -> Backlog | None:
        """Return what waits to be committed; None while that is not known."""

    async def ready(self) -> list[str]:
        """Return why events cannot be stored and persisted just now; nothing when they can."""


# -- the log as a whole -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class IngestRole:
    """Opens the log to append and to read.

    Attributes:
        name: of the process, for operators.
        max_event_bytes: size of the largest event's body; a log that cannot carry it is refused.
        deadline: seconds for each append, retries included, and for each batch.
        max_in_flight: single appends in flight; one more fails at once.
    """

    name: str
    max_event_bytes: int
    deadline: float
    max_in_flight: int


@dataclass(frozen=True, slots=True)
class PersisterRole:
    """Opens the log to write partitions into the files of one volume.

    Attributes:
        name: of the process, for operators.
        volume: UUID of the volume.
        directory: where its partition files are.
        volumes: how many volumes the store is meant to have.
        retention: seconds for which committed events stay in the log while there is room.
        buffer_events: events that the followers of this process hold together, at most.
        buffer_bytes: the same in bytes, about.
    """

    name: str
    volume: str
    directory: Path
    volumes: int
    retention: float
    buffer_events: int
    buffer_bytes: int


@dataclass(frozen=True, slots=True)
class IngestLog:
    """The log as ingest uses it.

    Attributes:
        writer: appends events.
        reader: reads them back.
        status: the log as this process sees it.
        dead_letters: what persisters could not store.
        feed: reads those of all consultations; None for a log whose partitions share no order.
        remembers_ids: ``append`` finds every duplicate, however old: ids need not be looked up before.
    """

    writer: EventWriter
    reader: EventBrowser
    status: Status
    dead_letters: DeadLetterBox
    feed: Feed | None = None
    remembers_ids: bool = False


class PersisterLog(Protocol):
    """The log as a persister uses it."""

    @property
    def identity(self) -> LogIdentity:
        """Which log this is; partition files name it."""

    @property
    def placements(self) -> Placements:
        """Who holds the partitions of the store of the settings."""

    @property
    def answering(self) -> Answering:
        """Brings the questions of others."""

    @property
    def dead_letters(self) -> DeadLetterStore:
        """Keeps what cannot be stored as an event."""

    @property
    def status(self) -> Status:
        """The log as this process sees it."""

    def follower(
        self,
        partition: int,
        *,
        trimmable: int,
        on_events: Callable[[], None],
        on_repair: Callable[[str], None],
    ) -> Follower:
        """Return a follower of *partition*; the files of all partitions that it follows are open.

        Args:
            partition: its number.
            trimmable: up to which sequence trim may have deleted the partition's events: what its record says.
            on_events: called when there is something new to take.
            on_repair: called with a short reason at each repair, for a counter.
        """

    async def check(self, after: Position, *, trimmable: int) -> None:
        """Check that the log can be followed from *after*.

        Raises LogMismatchError: it cannot, as :meth:`Follower.start` says; LogUnavailableError: no answer.
        """

    def announced(
        self,
        about: Mapping[str, str],
        partitions: Callable[[], Collection[int]],
        progress: Callable[[], Mapping[int, PartitionProgress]],
    ) -> AbstractAsyncContextManager[Callable[[], None]]:
        """Let others see this process while the body runs: operators, and those who read the status.

        Args:
            about: what it says of itself, such as ``worker``, ``host``, ``pid`` and ``address``; values may change.
            partitions: returns those that it runs.
            progress: returns how far each is.

        Returns:
            a context manager that gives a function to call when *partitions* have changed; the rest is renewed about
            twice a second.
        """

    async def trim(self, own: Callable[[], Collection[int]], on_round: Callable[[Trimmed], None]) -> None:
        """Delete what every store has committed, until cancelled. A log that needs no trim does nothing.

        Args:
            own: returns the partitions that this process runs; one process of all of them trims.
            on_round: called after each round.
        """

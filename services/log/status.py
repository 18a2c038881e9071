"""What is known of a log and of the partitions: placements, live processes, backlog, and the snapshot of all of it.

Metrics, readiness, back-pressure, trim, ``fiq status`` and the doctor all read one :class:`LogState`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime


@dataclass(frozen=True, slots=True)
class Placement:
    """Which volume has a partition.

    Attributes:
        partition: its number.
        volume: UUID of the volume that holds its file.
        epoch: how often it was placed, from 1; the file must say the same.
        committed: sequence that the file had reached when its owner last reported it.
        begins: first sequence that the file may hold; above 1 for a store that began after a trim.
        revision: of the record; the next update expects it.
        message_id: of the message at *committed*, as a Position has it; empty when it is not known.
        writer: which process reported this progress; empty when none did.
    """

    partition: int
    volume: str
    epoch: int
    committed: int
    begins: int
    revision: int
    message_id: str = ""
    writer: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class StorePlacement:
    """Which volumes have the partitions of a store.

    Attributes:
        store: its name.
        formed: all of its partitions were placed once; one without a record has lost it, and is not claimed again.
        volumes: that had partitions then.
        partitions: the placed ones.
        deleted: partitions whose record was deleted or made unreadable.
        stream_created: creation time of the log in which the sequences count.
        first_sequence: of that log now: a file that is made now begins there.
    """

    store: str
    formed: bool
    volumes: tuple[str, ...]
    partitions: Mapping[int, Placement]
    deleted: frozenset[int]
    stream_created: str
    first_sequence: int


#: a replica that the leader heard of within this time counts as up, though it may lag, seconds
ALIVE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class PartitionProgress:
    """How far a partition is.

    Attributes:
        committed: sequence that its file has reached.
        waiting: events of the partition in the log after that one.
    """

    committed: int
    waiting: int


@dataclass(frozen=True, slots=True)
class Verified:
    """What ``fiq verify`` found in a volume.

    Attributes:
        at: when it ended, RFC 3339 in UTC.
        events: how many it checked.
        problems: how many it found.
    """

    at: str
    events: int
    problems: int

    def show(self) -> str:
        """Return it as the metadata of a process hold it."""
        return json.dumps(asdict(self))


def read_verified(text: str) -> Verified | None:
    """Undo :meth:`Verified.show`; None for anything else."""
    try:
        found = json.loads(text)
        at = datetime.fromisoformat(found["at"]).astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        return Verified(at, int(found["events"]), int(found["problems"]))
    except (ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True, slots=True)
class LiveProcess:
    """A persister process that answered.

    Attributes:
        store: the store that it writes.
        volume: UUID of its volume.
        partitions: numbers of those that it runs, whatever state they are in.
        progress: of those that it follows.
        stream_sequence: highest sequence of the log that it had seen when it answered; 0 when it did not say.
        metadata: all that it says of itself: ``worker``, ``host``, ``pid``, ``address``, ``version`` and so on.
    """

    store: str
    volume: str
    partitions: frozenset[int]
    progress: Mapping[int, PartitionProgress]
    stream_sequence: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def verified(self) -> Verified | None:
        """What the last ``fiq verify`` of its volume found; None if there was none, or it does not say."""
        return read_verified(self.metadata.get("verified", ""))

    @property
    def conflicts(self) -> int:
        """Events under used ids in the files that it has open."""
        text = self.metadata.get("conflicts", "")
        return int(text) if text.isascii() and text.isdecimal() else 0


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """A copy of the log that does not lead.

    Attributes:
        name: of the node.
        current: has everything that the leader has stored.
        offline: the cluster considers the node down.
        lag: entries of the raft log that it still misses; no count of events.
        seen_seconds: since the leader heard of it; None when it never did in this term.
    """

    name: str
    current: bool
    offline: bool
    lag: int
    seen_seconds: float | None

    @property
    def alive(self) -> bool:
        """Whether it counts for the quorum, as far as the leader knows."""
        heard = self.seen_seconds is not None and self.seen_seconds < ALIVE_SECONDS
        return heard and not self.offline


@dataclass(frozen=True, slots=True)
class StreamReport:
    """What a log holds, and where.

    Attributes:
        created: RFC 3339 in UTC; another value means another log.
        partitions: of the log; 0 when it was not made by fiq.
        leader: name of the leading node; empty during an election.
        replicas: the other nodes that hold it; empty on a single one.
        messages: that it holds.
        bytes: what they take, headers and index included.
        max_bytes: its limit.
        first_sequence: of the oldest event; one above the last when it is empty.
        last_sequence: of the newest event.
    """

    created: str
    partitions: int
    leader: str
    replicas: tuple[ReplicaReport, ...]
    messages: int
    bytes: int
    max_bytes: int
    first_sequence: int
    last_sequence: int

    @property
    def copies(self) -> int:
        """Nodes that hold the log, up or not."""
        return len(self.replicas) + 1

    @property
    def has_quorum(self) -> bool:
        """Whether a majority of its nodes is up, the leader included."""
        return 2 * (1 + sum(replica.alive for replica in self.replicas)) > self.copies


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What a node says of its resources.

    Attributes:
        name: in the cluster.
        memory: resident, bytes.
        memory_limit: what Go's garbage collector keeps to (GOMEMLIMIT), bytes; 0 without a limit.
        jetstream: whether it stores messages at all; off after a write to its disk failed, until a restart.
        storage: what its streams take, bytes.
        storage_limit: what they may take, bytes.
    """

    name: str
    memory: int
    memory_limit: int
    jetstream: bool
    storage: int
    storage_limit: int


@dataclass(frozen=True, slots=True)
class CertificateExpiry:
    """A certificate and when it expires.

    Attributes:
        kind: ``node`` for the one that the connected node showed, ``ca`` for the authority that signed it.
        name: its common name.
        expires: Unix time.
    """

    kind: str
    name: str
    expires: float


@dataclass(frozen=True, slots=True)
class Waiting:
    """What waits in one partition.

    Attributes:
        events: that were stored up to *sequence* and are not committed.
        sequence: of the log's newest event that *events* counts.
        stalled: nothing of it is being committed: no process runs it, or its file has not moved for a while.
    """

    events: int
    sequence: int
    stalled: bool


@dataclass(frozen=True, slots=True)
class Backlog:
    """What waits in the store that has most of it.

    Attributes:
        at: when it was counted, on :func:`time.monotonic`.
        sequence: of the log's newest event then.
        partitions: by number.
    """

    at: float
    sequence: int
    partitions: tuple[Waiting, ...]

    @property
    def events(self) -> int:
        """Of all partitions together."""
        return sum(one.events for one in self.partitions)


@dataclass(frozen=True, slots=True)
class PartitionState:
    """One partition of one store.

    Attributes:
        partition: its number.
        placement: which volume has it; None when no record says so.
        owners: live processes that run it: one, except for a moment.
        committed: sequence that its file has reached, as far as owner or record say; 0 when neither does.
        waiting: what waits after that.
        oldest: when the oldest waiting event was stored, by the clock of the log's leader, seconds since 1970; None
            when nothing waits or it is not known.
    """

    partition: int
    placement: Placement | None
    owners: int
    committed: int
    waiting: Waiting
    oldest: float | None


@dataclass(frozen=True, slots=True)
class LogState:
    """A snapshot of the log; parts that are not known are None.

    Attributes:
        at: when the log was last seen, on :func:`time.monotonic`.
        stream: the log of events.
        stream_exists: False when it certainly does not exist.
        has_stream: False in a log without a broker, which keeps no events.
        dead: the dead letters.
        placements: the records of each store.
        processes: the persisters that answer.
        stores: the partitions of each store that has a record or a process.
        clock_offset: own clock minus the clock of the log's leader, seconds.
        troubles: by part (:data:`services.log.metrics.PARTS`), why the last look at it failed.
        server_version: of the node that this process is connected to; empty without a broker.
    """

    at: float = 0.0
    stream: StreamReport | None = None
    stream_exists: bool = True
    has_stream: bool = True
    dead: StreamReport | None = None
    placements: Mapping[str, StorePlacement] | None = None
    processes: tuple[LiveProcess, ...] | None = None
    stores: Mapping[str, tuple[PartitionState, ...]] | None = None
    clock_offset: float = 0.0
    troubles: Mapping[str, str] = field(default_factory=dict)
    server_version: str = ""

    def partitions(self, store: str) -> tuple[PartitionState, ...]:
        """Return the partitions of *store*; none while they are not known."""
        return (self.stores or {}).get(store, ())

    def backlog(self) -> Backlog | None:
        """Return what waits in the store that has most of it; None while that is not known."""
        if self.stream is None or not self.stores:
            return None
        most = max(self.stores.values(), key=lambda found: sum(one.waiting.events for one in found))
        return Backlog(self.at, self.stream.last_sequence, tuple(one.waiting for one in most))

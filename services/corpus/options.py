"""The limits of a store, and what it tells of itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.corpus.ids import KnownIds
from services.corpus.storage import StorageIO


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """Limits of a store.

    Attributes:
        open_consultations: how many consultations stay open in HDF5, about 35 KB each.
        ids: keeps the ids of consultations in memory; files that one thread writes may share it.
        checkpoint_bytes: size of the journal from which :meth:`EventStore.maybe_checkpoint` copies it. While nothing
            holds checkpoints back the journal takes about twice that on the disk.
        checkpoint_seconds: age of the oldest commit in the journal from which it does, so that stock readers see it.
        metadata_cache_bytes: HDF5's metadata cache, as large as it is on the disk; in memory it takes 20 times as much,
            since HDF5 keeps some 10 KB for each object header of a few hundred bytes.
        journal_limit: size of the journal from which it is compacted while a reader holds checkpoints back.
        cached_pages: committed pages of 4 KiB kept in memory; more are read from the journal.
        io: the seam for every write.
    """

    open_consultations: int = 2000
    ids: KnownIds = field(default_factory=KnownIds)
    checkpoint_bytes: int = 32 << 20
    checkpoint_seconds: float = 5.0
    metadata_cache_bytes: int = 512 << 10
    journal_limit: int = 512 << 20
    cached_pages: int = 8192
    io: StorageIO = field(default_factory=StorageIO)


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What a store has done since it was opened, and what it holds now.

    Attributes:
        commits: commits done.
        events: events in them.
        checkpoints: checkpoints done.
        checkpoint_running: whether one is being made beside the commits.
        checkpoints_deferred: checkpoints put off: a reader held the file, or the disk lacked the room.
        checkpoint_deferred_because: why the last one was; empty when it was done.
        checkpoint_waiting_seconds: for how long checkpoints have been put off; 0 when they are not.
        compactions: how often the journal was compacted since it had outgrown its limit.
        journal_bytes: bytes of the journal that wait for a checkpoint.
        journaled_bytes: bytes written to the journal in all.
        records_recovered: commits found in the journal at the open.
        torn_records: commits that a crash had cut short, dropped at the open (never acknowledged).
        open_consultations: consultations open in HDF5.
        uncommitted_events: events appended since the last commit.
        memory_bytes: memory of changed pages.
        commit_seconds: duration of the last commit.
        checkpoint_seconds: duration of the last checkpoint.
    """

    commits: int
    events: int
    checkpoints: int
    checkpoint_running: bool
    checkpoints_deferred: int
    checkpoint_deferred_because: str
    checkpoint_waiting_seconds: float
    compactions: int
    journal_bytes: int
    journaled_bytes: int
    records_recovered: int
    torn_records: int
    open_consultations: int
    uncommitted_events: int
    memory_bytes: int
    commit_seconds: float
    checkpoint_seconds: float

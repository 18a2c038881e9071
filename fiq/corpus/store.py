"""The event store: one partition file, open for writing.

A caller appends events, then commits them with the stream sequence that it has reached: all of it becomes durable, or
nothing. A commit costs one write and one sync of the journal; checkpoints, which show the events to stock readers, run
in a thread. What the file holds can be looked up between appends, in the same thread.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from fiq.corpus.consultation import Consultation, StoredRow
from fiq.corpus.errors import AppendRefusedError, StoreFailedError
from fiq.corpus.format import Identity, Record, empty_file
from fiq.corpus.ids import IdHashes, KnownIds
from fiq.corpus.partition import HDF5_ERRORS, ConsultationGroups, WritablePartition, hdf5_error, hdf5_errors
from fiq.corpus.wal.file import AtomicFile
from fiq.corpus.wal.journal import refuse_archive
from fiq.corpus.wal.recovery import create_pair
from fiq.corpus.wal.storage import StorageIO, check_file_system

#: how long after a deferred checkpoint the next one is tried, seconds
_DEFERRED_RETRY = 1.0


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """Limits of a store."""

    #: consultations that stay open in HDF5, about 35 KB each
    open_consultations: int = 2000
    #: keeps the ids of consultations in memory; files that one thread writes may share it
    ids: KnownIds = field(default_factory=KnownIds)
    #: size of the journal from which :meth:`EventStore.maybe_checkpoint` copies it into the file. While nothing defers
    #: checkpoints the journal takes about twice that on the disk
    checkpoint_bytes: int = 32 << 20
    #: age of the oldest commit in the journal from which it does, so that stock readers see it
    checkpoint_seconds: float = 5.0
    #: HDF5's metadata cache, as large as it is on the disk; in memory it takes 20 times as much, since HDF5 keeps some
    #: 10 KB for each object header of a few hundred bytes
    metadata_cache_bytes: int = 512 << 10
    #: size of the journal from which it is compacted while a reader holds checkpoints back
    journal_limit: int = 512 << 20
    #: committed pages of 4 KiB kept in memory; others are read from the journal
    cached_pages: int = 8192
    #: the seam for every write
    io: StorageIO = field(default_factory=StorageIO)


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What a store has done since it was opened, and what it holds now."""

    commits: int
    events: int  #: in them
    checkpoints: int
    checkpoint_running: bool
    checkpoints_deferred: int  #: because a reader held the file, or the disk lacked the room
    checkpoint_deferred_because: str  #: empty when the last one was done
    checkpoint_waiting_seconds: float  #: for how long checkpoints have been deferred; 0 when they are not
    compactions: int  #: of a journal that had outgrown its limit
    journal_bytes: int  #: that wait for a checkpoint
    journaled_bytes: int  #: written to the journal in all
    records_recovered: int  #: commits found in the journal at the open
    torn_records: int  #: commits that a crash had cut short, dropped at the open (never acknowledged)
    open_consultations: int  #: in HDF5
    uncommitted_events: int
    memory_bytes: int  #: of changed pages
    commit_seconds: float  #: duration of the last commit
    checkpoint_seconds: float  #: duration of the last checkpoint


class _CheckpointPolicy:
    """Decides when to make checkpoints and compactions of one open file."""

    def __init__(self, file: AtomicFile, options: StoreOptions) -> None:
        self._file = file
        self._options = options
        self._oldest_in_journal: float | None = None
        self._next_attempt = 0.0
        self._deferred_since: float | None = None
        self._deferred = 0
        self._compactions = 0
        self._compact_from = options.journal_limit

    @property
    def waiting_seconds(self) -> float:
        """For how long checkpoints have been deferred; 0 when they are not."""
        since = self._deferred_since
        return 0.0 if since is None else time.monotonic() - since

    def note_commit(self, moment: float) -> None:
        """Note a commit that was begun at *moment*."""
        self._oldest_in_journal = self._oldest_in_journal or moment

    def make(self) -> bool:
        """Make a checkpoint and wait for it; return False when it is deferred."""
        done = self._file.checkpoint()
        if done:
            self._oldest_in_journal = None
        self._note_deferrals()
        return done

    def begin(self, *, now: bool) -> bool:
        """Begin one in a thread when it is due, or *now*; return whether one was begun."""
        self._file.collect()
        self._note_deferrals()
        if (now or self.is_due()) and self._file.start_checkpoint():
            self._oldest_in_journal = None
            return True
        self._note_deferrals()
        self._bound_journal()
        return False

    def is_due(self) -> bool:
        """Return whether the journal is long or old enough."""
        if not self._file.journal_bytes or self._file.busy:
            return False
        moment = time.monotonic()
        old = self._oldest_in_journal is None or moment - self._oldest_in_journal >= self._options.checkpoint_seconds
        long = self._file.journal_bytes >= self._options.checkpoint_bytes
        return (old or long) and moment >= self._next_attempt

    def _note_deferrals(self) -> None:
        """Note a deferred checkpoint, so that the next one is not tried at every commit."""
        stats = self._file.stats
        if stats.checkpoints_deferred > self._deferred:
            self._deferred = stats.checkpoints_deferred
            self._next_attempt = time.monotonic() + _DEFERRED_RETRY
            self._deferred_since = self._deferred_since or time.monotonic()
        elif not stats.checkpoint_deferred_because:
            self._deferred_since = None

    def _bound_journal(self) -> None:
        """Compact a journal that outgrows its limit while a reader holds checkpoints back."""
        size, limit = self._file.journal_bytes, self._options.journal_limit
        if self._file.stats.compactions > self._compactions or self._deferred_since is None:
            self._compactions = self._file.stats.compactions
            # a journal that cannot be made shorter must not be compacted again soon
            self._compact_from = max(limit, 2 * size)
        elif size >= self._compact_from and self._file.start_compaction():
            self._compact_from = 2 * size


class Lookup:
    """What an open store holds, uncommitted events included.

    Args:
        partition: the store's file.
        consultations: its groups, those of consultations or of conflicts.
        ids: those in memory.
    """

    def __init__(self, partition: WritablePartition, consultations: ConsultationGroups, ids: KnownIds) -> None:
        self._partition = partition
        self._consultations = consultations
        self._ids = ids

    def consultation(self, name: str) -> Consultation | None:
        """Return a consultation; None when the file has no such."""
        return self._consultations.consultation(name)

    def held(self, name: str, ids: Collection[bytes]) -> dict[bytes, StoredRow]:
        """Return the rows of those of *ids* that a consultation holds."""
        return self._ids.held(self._consultations, name, ids, lambda: self.consultation(name))

    def id_hashes(self, name: str, most: int) -> IdHashes | None:
        """Return the hashes of a consultation's ids, none when it does not exist; None when there are over *most*."""
        return self._ids.hashes(self._consultations, name, most, lambda: self.consultation(name))

    def names(self, start: str = "") -> Iterator[str]:
        """Yield the ids of the consultations from *start* on, sorted; use it before the next append."""
        for name in self._partition.names.scan(start.encode()):
            yield name.decode()

    def newest(self) -> list[tuple[int, str]]:
        """Return at most 1,000 consultations with the newest events, newest first.

        Each has the time when its last event was accepted, nanoseconds since the Unix epoch, and its id. After a crash
        those are missing that got their last events in the last seconds before it.
        """
        return self._partition.active.newest()

    def __len__(self) -> int:
        return len(self._consultations)


class _Guard:
    """A context that refuses after a failure, remembers the block's, and replaces h5py's errors by the corpus's.

    Not a generator: such a context costs as much as an append.
    """

    __slots__ = ("_file", "failure")

    def __init__(self, file: AtomicFile) -> None:
        self._file = file
        self.failure: BaseException | None = None

    def check(self) -> None:
        """Raise StoreFailedError after a failure."""
        if self.failure is not None:
            raise StoreFailedError(
                f"{self._file.name}: the store failed before ({self.failure}); abandon it and open it again"
            ) from self.failure

    def __enter__(self) -> None:
        self.check()

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if error is None:
            return
        is_hdf5 = isinstance(error, HDF5_ERRORS)
        self.failure = hdf5_error(self._file, error) if is_hdf5 else error
        if is_hdf5:
            raise self.failure from error


class EventStore:
    """One partition file, open for writing by one thread of one process.

    After an error of :meth:`append`, :meth:`commit` or a checkpoint every further call is refused:
    :meth:`abandon` the store and open it again. It then holds exactly what was committed.
    """

    def __init__(self, path: Path, expected: Identity | None, options: StoreOptions) -> None:
        #: the partition file
        self.path = path
        #: events that were appended since the last commit
        self.uncommitted = 0
        self._events = self._highest = 0
        self._commit_seconds = 0.0
        self._file = AtomicFile(
            path, io=options.io, cached_pages=options.cached_pages, wrap_bytes=options.checkpoint_bytes
        )
        self._guard = _Guard(self._file)
        self._checkpoints = _CheckpointPolicy(self._file, options)
        try:
            limit, cache = options.open_consultations, options.metadata_cache_bytes
            self._partition = WritablePartition(self._file, expected, limit=limit, metadata_cache=cache)
        except BaseException:
            self._file.close()
            raise
        self._ids = options.ids
        self._lookup = Lookup(self._partition, self._partition.consultations, self._ids)
        self._conflicts = Lookup(self._partition, self._partition.conflicts, self._ids)
        #: stream sequence that the last commit reached, and the message id there; 0 and empty when there is none
        self.committed, self.committed_id = self._partition.committed, self._partition.committed_id
        try:
            # recovery ends with a file that stock readers can open; if that is deferred, work goes on without
            self.checkpoint()
        except BaseException:
            self.abandon()
            raise

    @classmethod
    def create(cls, path: Path, identity: Identity, options: StoreOptions | None = None, *, begins: int = 1) -> Self:
        """Create a partition file and its journal, and open it.

        Args:
            begins: first stream sequence that the file may hold; everything before counts as committed.

        Raises CorpusExistsError: the file exists; JournalError: a journal with commits is there without its file;
        UnsupportedFileSystemError: the directory is on a remote file system; CorpusNotFoundError: there is no such
        directory; CorpusIOError: the system refused.
        """
        options = options or StoreOptions()
        if path.parent.is_dir():
            check_file_system(path.parent)
        create_partition(path, identity, options.io, begins=begins)
        return cls(path, identity, options)

    @classmethod
    def open(cls, path: Path, *, expected: Identity | None, options: StoreOptions | None = None) -> Self:
        """Open a partition file: lock it, find its last commit, compare its identity.

        Args:
            expected: what the file must state about itself; None accepts anything.

        Raises CorpusNotFoundError: the file is missing; CorpusLockedError: another process writes it;
        ArchivedFileError: it is an archive; JournalError: its journal is missing, damaged or of another file;
        CorpusFormatError: it is no partition file, or damaged; IdentityMismatchError: it belongs to another store,
        volume, partition or stream; UnsupportedFileSystemError: it is on a remote file system; CorpusIOError: the
        system refused.
        """
        if path.parent.is_dir():
            check_file_system(path.parent)
        refuse_archive(path)
        return cls(path, expected, options or StoreOptions())

    @property
    def identity(self) -> Identity:
        """What the file states about itself."""
        return self._partition.identity

    @property
    def begins(self) -> int:
        """First stream sequence that the file may hold: above 1 when the store began after the stream was trimmed."""
        return self._partition.begins

    @property
    def conflicts(self) -> int:
        """Events under used ids that the file keeps, committed or not yet."""
        return self._partition.conflicts.events

    @property
    def in_place(self) -> bool:
        """Whether the open file and journal are still those at their paths; commits to deleted ones go nowhere."""
        return self._file.in_place

    @property
    def stats(self) -> StoreStats:
        """What the store has done and holds, as of now."""
        return StoreStats(
            **asdict(self._file.stats),
            events=self._events,
            checkpoint_running=self._file.checkpoint_running,
            checkpoint_waiting_seconds=self._checkpoints.waiting_seconds,
            journal_bytes=self._file.journal_bytes,
            open_consultations=self._partition.consultations.open_count,
            uncommitted_events=self.uncommitted,
            memory_bytes=self._file.memory_bytes,
            commit_seconds=self._commit_seconds,
        )

    def held(self, consultation: str, ids: Collection[bytes]) -> dict[bytes, StoredRow]:
        """Return the rows of those of *ids* that the consultation holds, committed or not yet.

        Raises CorpusError: abandon the store.
        """
        with self._guard:
            return self._lookup.held(consultation, ids)

    def held_conflicts(self, consultation: str, ids: Collection[bytes]) -> dict[bytes, StoredRow]:
        """Return a row of those of *ids* that the consultation's conflicts hold, committed or not yet."""
        with self._guard:
            return self._conflicts.held(consultation, ids)

    @contextmanager
    def reading(self, *, conflicts: bool = False) -> Iterator[Lookup]:
        """Read from the store, or with *conflicts* from its conflicts, within the block.

        An error in the block leaves the store usable, unless the file under HDF5 failed.

        Raises CorpusFormatError: HDF5 does not accept the content; CorpusIOError: the system refused; abandon the
        store.
        """
        self._guard.check()
        with hdf5_errors(self._file):
            yield self._conflicts if conflicts else self._lookup

    def append(self, consultation: str, records: Sequence[Record]) -> bool:
        """Append events to a consultation; they become durable with the next :meth:`commit`.

        Args:
            consultation: its id; the group is created when it is new.
            records: sequences rise, above those before and above :attr:`committed`.

        Returns:
            Whether the consultation is new.

        Raises AppendRefusedError: a record is malformed or out of order; CorpusError: anything else; abandon the store.
        """
        return self._append(self._partition.consultations, consultation, records)

    def append_conflicts(self, consultation: str, records: Sequence[Record]) -> None:
        """Append events under ids that the consultation holds with another body to its conflicts, as :meth:`append`."""
        self._append(self._partition.conflicts, consultation, records)

    def _append(self, groups: ConsultationGroups, consultation: str, records: Sequence[Record]) -> bool:
        if not records:
            return False
        with self._guard:
            first = groups.append(consultation, records, self.committed)
            self._ids.appended(groups, consultation, first, [one.event_id for one in records])
            self.uncommitted += len(records)
            self._highest = max(self._highest, records[-1].sequence)
            return not first

    def commit(self, sequence: int, message_id: str = "") -> None:
        """Make the appended events durable together with *sequence*, in one step: all of it, or nothing.

        Args:
            sequence: up to which the stream was handled; not below that of any event or of an earlier commit.
            message_id: of the stream's message there, at most 200 ASCII characters; empty when it has none.

        Raises:
            AppendRefusedError: *sequence* is too low.
            CorpusIOError: the system refused. Abandon the store; the next open shows whether the commit counts.
        """
        with self._guard:
            if sequence < self.committed or sequence < self._highest:
                lowest = max(self.committed, self._highest)
                raise AppendRefusedError(f"{self.path.name}: cannot commit {sequence}, below {lowest}")
            self._commit(sequence, message_id)

    def _commit(self, sequence: int, message_id: str) -> None:
        started = time.monotonic()
        self._partition.flush(sequence, message_id)
        self._file.commit()
        self._commit_seconds = time.monotonic() - started
        self.committed, self.committed_id = sequence, message_id
        self._events += self.uncommitted
        self.uncommitted = 0
        self._checkpoints.note_commit(started)

    def _save_active(self) -> None:
        """Commit which consultations are active; without events in between."""
        if self._partition.active.save():
            self._commit(self.committed, self.committed_id)

    def place(self, epoch: int, *, store: str | None = None, volume: str | None = None) -> None:
        """Make durable that the file belongs to the partition's placement *epoch*, and to *store* and *volume*.

        Raises CorpusIOError: the system refused; abandon the store.
        """
        with self._guard:
            own = self.identity
            self._partition.place(store or own.store, volume or own.volume, epoch)
        self.commit(self.committed, self.committed_id)

    def rebuild_names(self) -> None:
        """Write the index of names anew, from the groups of the consultations.

        Raises CorpusIOError: the system refused; abandon the store.
        """
        with self._guard:
            self._partition.rebuild_names()
        self.commit(self.committed, self.committed_id)

    def checkpoint(self) -> bool:
        """Copy what is committed into the file, where stock readers see it, and wait for it.

        Returns:
            False when it is deferred: a reader holds the file, or the disk lacks the room.

        Raises CorpusUsageError: events are appended and not committed; CorpusIOError: the system refused; abandon the
        store.
        """
        with self._guard:
            return self._checkpoints.make()

    def maybe_checkpoint(self, *, now: bool = False) -> bool:
        """Begin a checkpoint when the journal is long or old enough; call it after commits and when idle.

        It runs in a thread while commits go on. The next call of any method that writes raises its error.

        Args:
            now: whatever its length and age.

        Returns:
            Whether one was begun.
        """
        with self._guard:
            if self.uncommitted:
                return False
            if now or self._checkpoints.is_due():
                self._save_active()
            return self._checkpoints.begin(now=now)

    def abandon(self) -> None:
        """Drop what is not committed and release everything; writes nothing to the disk."""
        for groups in (self._partition.consultations, self._partition.conflicts):
            self._ids.forget(groups)
        self._file.discard()
        self._partition.close()
        self._file.close()
        self._guard.failure = self._guard.failure or StoreFailedError("the store is closed")

    def close(self) -> None:
        """Drop what is not committed, make a last checkpoint, and release everything.

        Raises CorpusIOError: the checkpoint failed; everything is released, and the journal holds the commits.
        """
        if self._guard.failure is not None:
            self.abandon()
            return
        try:
            if not self.uncommitted:
                with self._guard:
                    self._save_active()
            # what HDF5 writes when it closes is not needed: the last commit is complete without it
            self._file.discard()
            self._partition.close()
            self._file.rollback()
            self._file.checkpoint()
        finally:
            self.abandon()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


def create_partition(path: Path, identity: Identity, io: StorageIO, *, begins: int = 1) -> None:
    """Create an empty partition file and its journal; arguments and errors as of :meth:`EventStore.create`."""
    create_pair(path, lambda uuid: empty_file(identity, str(uuid), begins=begins), io)


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a recovery did."""

    file: str  #: name of the partition file
    committed: int  #: stream sequence of the last commit
    replayed: int  #: commits that only the journal held
    torn: int  #: commits that a crash had cut short, dropped; they were never acknowledged
    held_back: str  #: why the journal could not be copied into the file yet; empty when it was. Nothing is lost


def recover_partition(path: Path, *, names: bool = False) -> Recovered:
    """Open a partition file as its writer does, copy what its journal holds into it, and close it.

    Stock tools see everything that was committed afterwards. A persister does the same when it opens the file.

    Args:
        path: the file.
        names: write its index of names anew, which ``fiq verify`` has found damaged.

    Raises CorpusLockedError: a writer has it open; and has recovered it; CorpusError: it cannot be
    recovered; the message says what to do.
    """
    with EventStore.open(path, expected=None) as store:
        if names:
            store.rebuild_names()
        done = store.checkpoint()
        stats = store.stats
        return Recovered(
            file=path.name,
            committed=store.committed,
            replayed=stats.records_recovered,
            torn=stats.torn_records,
            held_back="" if done else stats.checkpoint_deferred_because,
        )

"""The event store: the writer's side of one partition file."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Self

import h5py
import numpy as np

from fiq.corpus.errors import AppendRefusedError, CorpusFormatError, StoreFailedError
from fiq.corpus.format import (
    BEGINS,
    CHUNK_SLOTS,
    COMMITTED,
    COMMITTED_CONFLICTS,
    COMMITTED_EVENTS,
    COMMITTED_ID,
    CONFLICTS,
    CONSULTATIONS,
    LIBVER,
    MESSAGE_ID_BYTES,
    Identity,
    Record,
    bound_metadata,
    check_identity,
    empty_file,
    read_identity,
)
from fiq.corpus.groups import ChunkedTail, OpenConsultations
from fiq.corpus.ids import KnownIds, Lookup, StoredRow
from fiq.corpus.wal.file import AtomicFile
from fiq.corpus.wal.journal import refuse_archive
from fiq.corpus.wal.recovery import create_pair
from fiq.corpus.wal.storage import StorageIO, check_file_system

#: consultations whose conflicts stay open: they are rare
_OPEN_CONFLICTS = 16
#: how long after a checkpoint that had to wait the next one is tried, seconds
_DEFERRED_RETRY = 1.0


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


class OpenPartition:
    """A partition file open in HDF5 through its journaled file.

    Args:
        name: the file's name, for messages.
        journaled: the file object; not closed here.
        expected: the identity that the file must state; None accepts any.
        limit: how many consultations stay open.
        metadata_cache: limit of HDF5's metadata cache, in bytes of the file.

    Raises:
        CorpusFormatError: it is no partition file, or damaged.
        IdentityMismatchError: its identity is another.
        CorpusIOError: the system refused.
    """

    def __init__(
        self,
        name: str,
        journaled: AtomicFile,
        expected: Identity | None,
        *,
        limit: int,
        metadata_cache: int,
    ) -> None:
        with hdf5_errors(name, journaled):
            self._file = h5py.File(journaled, "r+", libver=LIBVER, rdcc_nslots=CHUNK_SLOTS)
        try:
            with hdf5_errors(name, journaled):
                bound_metadata(self._file, metadata_cache)
                self.identity = read_identity(self._file, name)
                if expected is not None:
                    check_identity(name, expected, self.identity)
                if self._file.attrs.get("journal") != str(journaled.uuid):
                    raise CorpusFormatError(f"{name}: its user block and its HDF5 content are of two files")
                self.begins = int(self._file.attrs[BEGINS])
                self.committed = int(self._file.attrs[COMMITTED])
                self.committed_id = bytes(self._file.attrs[COMMITTED_ID]).decode("ascii")
                counted = (COMMITTED, COMMITTED_ID, COMMITTED_EVENTS, COMMITTED_CONFLICTS)
                self._attributes = [h5py.h5a.open(self._file.id, name.encode()) for name in counted]
                self.consultations, self.conflicts = (
                    OpenConsultations(
                        self._file.id,
                        group,
                        partial(ChunkedTail, journaled),
                        self.identity,
                        events=int(self._file.attrs[counter]),
                        limit=most,
                    )
                    for group, counter, most in (
                        (CONSULTATIONS, COMMITTED_EVENTS, limit),
                        (CONFLICTS, COMMITTED_CONFLICTS, _OPEN_CONFLICTS),
                    )
                )
        except BaseException:
            journaled.discard()
            self._file.close()
            raise

    def place(self, store: str, volume: str, epoch: int) -> None:
        """Let the file say that it is *store*'s, and the one of the partition's placement *epoch* on *volume*."""
        for name, value in (("store", store), ("volume", volume)):
            if getattr(self.identity, name) != value:
                self._file.attrs[name] = value
        h5py.h5a.open(self._file.id, b"epoch").write(np.array(epoch, np.uint32))
        self.identity = replace(self.identity, store=store, volume=volume, epoch=epoch)

    def flush(self, sequence: int, message_id: str) -> None:
        """Hand everything to the journaled file, with *sequence* and the *message_id* there as what is reached."""
        values = (
            np.array(sequence, np.uint64),
            np.array(message_id.encode("ascii"), f"S{MESSAGE_ID_BYTES}"),
            np.array(self.consultations.events, np.uint64),
            np.array(self.conflicts.events, np.uint64),
        )
        for attribute, value in zip(self._attributes, values, strict=True):
            attribute.write(value)
        self._file.flush()

    def close(self) -> None:
        """Close every handle. HDF5 may want to write then: the journaled file must discard that."""
        self.consultations.clear()
        self.conflicts.clear()
        self._attributes.clear()
        try:
            self._file.close()
        except (OSError, RuntimeError, ValueError):
            # HDF5 could not read what it needs for writing what is dropped anyway
            return


@contextmanager
def hdf5_errors(name: str, journaled: AtomicFile) -> Iterator[None]:
    """Turn an error of h5py inside the block into the corpus's own.

    Raises CorpusIOError: the journaled file failed underneath; CorpusFormatError: HDF5 does not accept the content.
    """
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise (journaled.failure or CorpusFormatError(f"{name}: HDF5: {error}")) from error


class CheckpointPolicy:
    """Decides for one open file.

    Args:
        journaled: the file.
        options: its limits.
    """

    def __init__(self, journaled: AtomicFile, options: StoreOptions) -> None:
        self._journaled = journaled
        self._options = options
        self._oldest_in_journal: float | None = None
        self._next_attempt = 0.0
        self._deferred_since: float | None = None
        self._deferred = 0
        self._compactions = 0
        self._compact_from = options.journal_limit

    @property
    def waiting_seconds(self) -> float:
        """For how long checkpoints have been put off; 0 when they are not."""
        since = self._deferred_since
        return 0.0 if since is None else time.monotonic() - since

    def note_commit(self, moment: float) -> None:
        """Take note of a commit that was begun at *moment*."""
        self._oldest_in_journal = self._oldest_in_journal or moment

    def make(self) -> bool:
        """Make a checkpoint now and wait for it; False when it is put off."""
        done = self._journaled.checkpoint()
        if done:
            self._oldest_in_journal = None
        self._note_deferrals()
        return done

    def begin(self, *, now: bool) -> bool:
        """Begin one beside the commits when it is due, or *now*; return whether one was begun."""
        self._journaled.collect()
        self._note_deferrals()
        if (now or self._is_due()) and self._journaled.start_checkpoint():
            self._oldest_in_journal = None
            return True
        self._note_deferrals()
        self._bound_journal()
        return False

    def _is_due(self) -> bool:
        if not self._journaled.journal_bytes or self._journaled.busy:
            return False
        moment = time.monotonic()
        old = self._oldest_in_journal is None or moment - self._oldest_in_journal >= self._options.checkpoint_seconds
        long = self._journaled.journal_bytes >= self._options.checkpoint_bytes
        return (old or long) and moment >= self._next_attempt

    def _note_deferrals(self) -> None:
        """Take note of a checkpoint that was put off, so that the next one is not tried at every commit."""
        stats = self._journaled.stats
        if stats.checkpoints_deferred > self._deferred:
            self._deferred = stats.checkpoints_deferred
            self._next_attempt = time.monotonic() + _DEFERRED_RETRY
            self._deferred_since = self._deferred_since or time.monotonic()
        elif not stats.deferred_because:
            self._deferred_since = None

    def _bound_journal(self) -> None:
        """Compact a journal that has outgrown its limit since a reader holds checkpoints back."""
        size, limit = self._journaled.journal_bytes, self._options.journal_limit
        if self._journaled.stats.compactions > self._compactions or self._deferred_since is None:
            self._compactions = self._journaled.stats.compactions
            # what it cannot make shorter must not be tried again soon
            self._compact_from = max(limit, 2 * size)
        elif size >= self._compact_from and self._journaled.start_compaction():
            self._compact_from = 2 * size


class EventStore:
    """One partition file, open for writing by one thread of one process.

    After an error of :meth:`append`, :meth:`commit` or a checkpoint every further call is refused:
    :meth:`abandon` the store and open it again. What was committed is safe then, and nothing else is there.
    """

    def __init__(self, path: Path, expected: Identity | None, options: StoreOptions) -> None:
        self._path = path
        self._options = options
        self._events = self._uncommitted = self._highest = 0
        self._commit_seconds = 0.0
        self._failure: BaseException | None = None
        self._guarded = _Guard(self)
        self._journaled = AtomicFile(
            path, io=options.io, cached_pages=options.cached_pages, wrap_bytes=options.checkpoint_bytes
        )
        self._checkpoints = CheckpointPolicy(self._journaled, options)
        try:
            self._partition = OpenPartition(
                path.name,
                self._journaled,
                expected,
                limit=options.open_consultations,
                metadata_cache=options.metadata_cache_bytes,
            )
        except BaseException:
            self._journaled.close()
            raise
        self._ids = options.ids
        self._lookup = Lookup(self._partition.consultations, self._ids)
        self._conflicts = Lookup(self._partition.conflicts, self._ids)
        #: stream sequence that the last commit reached, and the message id there; 0 and nothing when there is none
        self.committed, self.committed_id = self._partition.committed, self._partition.committed_id
        try:
            # recovery ends with a file that stock readers can open; where that has to wait, work goes on without
            self.checkpoint()
        except BaseException:
            self.abandon()
            raise

    @classmethod
    def create(cls, path: Path, identity: Identity, options: StoreOptions | None = None, *, begins: int = 1) -> Self:
        """Create a partition file and its journal, and open it.

        Args:
            begins: first stream sequence that the file may hold; everything before counts as committed.

        Raises CorpusExistsError: the file exists; JournalError: a journal with commits stands there without its file;
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
            expected: what the file must say of itself; None accepts whatever it says.

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
        """What the file says of itself."""
        return self._partition.identity

    @property
    def begins(self) -> int:
        """First stream sequence that the file may hold: above 1 when the store began after the stream was trimmed."""
        return self._partition.begins

    @property
    def path(self) -> Path:
        """The partition file."""
        return self._path

    @property
    def in_place(self) -> bool:
        """Whether the open file and journal are still those at their paths; commits to deleted ones go nowhere."""
        return self._journaled.in_place

    @property
    def stats(self) -> StoreStats:
        """What the store has done and holds, as of now."""
        file = self._journaled.stats
        return StoreStats(
            commits=file.commits,
            events=self._events,
            checkpoints=file.checkpoints,
            checkpoint_running=self._journaled.checkpoint_running,
            checkpoints_deferred=file.checkpoints_deferred,
            checkpoint_deferred_because=file.deferred_because,
            checkpoint_waiting_seconds=self._checkpoints.waiting_seconds,
            compactions=file.compactions,
            journal_bytes=self._journaled.journal_bytes,
            journaled_bytes=file.journaled_bytes,
            records_recovered=file.records_recovered,
            torn_records=file.torn_records,
            open_consultations=len(self._partition.consultations),
            uncommitted_events=self._uncommitted,
            memory_bytes=self._journaled.memory_bytes,
            commit_seconds=self._commit_seconds,
            checkpoint_seconds=file.checkpoint_seconds,
        )

    def held(self, consultation: str, ids: Collection[bytes]) -> dict[bytes, StoredRow]:
        """Return the rows of those of *ids* that the consultation holds, committed or not yet.

        Raises CorpusError: abandon the store.
        """
        with self._guarded:
            return self._lookup.held(consultation, ids)

    def held_conflicts(self, consultation: str, ids: Collection[bytes]) -> dict[bytes, StoredRow]:
        """Return a row of those of *ids* that the consultation's conflicts hold, committed or not yet."""
        with self._guarded:
            return self._conflicts.held(consultation, ids)

    @property
    def uncommitted(self) -> int:
        """Events that were appended since the last commit."""
        return self._uncommitted

    @contextmanager
    def reading(self, *, conflicts: bool = False) -> Iterator[Lookup]:
        """Look into the store, or with *conflicts* into what stands beside its events, for the time of the block.

        Nothing that goes wrong in there spoils the store, unless it is an error of the file beneath.

        Raises CorpusFormatError: HDF5 does not accept the content; CorpusIOError: the system refused; abandon the
        store.
        """
        self._check_usable()
        with hdf5_errors(self._path.name, self._journaled):
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

    def _append(self, groups: OpenConsultations, consultation: str, records: Sequence[Record]) -> bool:
        if not records:
            return False
        with self._guarded:
            appender = groups.find_or_create(consultation)
            first = appender.length
            appender.append(records, self.committed)
            self._ids.appended(groups, consultation, first, [one.event_id for one in records])
            self._uncommitted += len(records)
            self._highest = max(self._highest, records[-1].sequence)
            return not first

    def commit(self, sequence: int, message_id: str = "") -> None:
        """Make the appended events durable together with *sequence*, in one step: all of it, or nothing.

        Args:
            sequence: what the stream has been handled up to; not below that of any event, and never going back.
            message_id: of the stream's message there, at most 200 ASCII characters; empty when it has none.

        Raises:
            AppendRefusedError: *sequence* is too low.
            CorpusIOError: the system refused. Abandon the store; whether the commit counts shows when it is opened.
        """
        with self._guarded:
            if sequence < self.committed or sequence < self._highest:
                lowest = max(self.committed, self._highest)
                raise AppendRefusedError(f"{self._path.name}: cannot commit {sequence}, below {lowest}")
            started = time.monotonic()
            self._partition.flush(sequence, message_id)
            self._journaled.commit()
            self._commit_seconds = time.monotonic() - started
            self.committed, self.committed_id = sequence, message_id
            self._events += self._uncommitted
            self._uncommitted = 0
            self._checkpoints.note_commit(started)

    def place(self, epoch: int, *, store: str | None = None, volume: str | None = None) -> None:
        """Make durable that this is the file of the partition's placement *epoch*, and whose it is from now on.

        Raises CorpusIOError: the system refused; abandon the store.
        """
        with self._guarded:
            own = self.identity
            self._partition.place(store or own.store, volume or own.volume, epoch)
        self.commit(self.committed, self.committed_id)

    def checkpoint(self) -> bool:
        """Copy what is committed into the file, where stock readers see it, and wait for it.

        Returns:
            False when it must wait: a reader holds the file, or the disk lacks the room.

        Raises CorpusUsageError: events are appended and not committed; CorpusIOError: the system refused; abandon the
        store.
        """
        with self._guarded:
            return self._checkpoints.make()

    def maybe_checkpoint(self, *, now: bool = False) -> bool:
        """Begin a checkpoint when the journal is long or old enough; call it after commits and when idle.

        It runs in a thread beside the commits. An error of it is raised by the next call of any method that writes.

        Args:
            now: whatever its length and age.

        Returns:
            Whether one was begun.
        """
        with self._guarded:
            return not self._uncommitted and self._checkpoints.begin(now=now)

    def abandon(self) -> None:
        """Drop what is not committed and release everything; writes nothing to the disk."""
        for groups in (self._partition.consultations, self._partition.conflicts):
            self._ids.forget(groups)
        self._journaled.discard()
        self._partition.close()
        self._journaled.close()
        self._failure = self._failure or StoreFailedError("the store is closed")

    def close(self) -> None:
        """Drop what is not committed, make a last checkpoint, and release everything.

        Raises CorpusIOError: the checkpoint failed; everything is released all the same, and the journal holds it.
        """
        if self._failure is not None:
            self.abandon()
            return
        # what HDF5 writes when it closes is not needed: the last commit is complete without it
        self._journaled.discard()
        self._partition.close()
        try:
            self._journaled.rollback()
            self._journaled.checkpoint()
        finally:
            self.abandon()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise StoreFailedError(
                f"{self._path.name}: the store failed before ({self._failure}); abandon it and open it again"
            ) from self._failure


class _Guard:
    """Refuses after a failure; remembers the block's, and tells what HDF5 made of an error of the file.

    A class of its own, since a generator's context costs as much as an append.
    """

    __slots__ = ("_store",)

    def __init__(self, store: EventStore) -> None:
        self._store = store

    def __enter__(self) -> None:
        self._store._check_usable()

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if error is None:
            return
        told = error
        if isinstance(error, (OSError, RuntimeError, ValueError, KeyError)):
            journaled = self._store._journaled
            told = journaled.failure or CorpusFormatError(f"{self._store._path.name}: HDF5: {error}")
        self._store._failure = told
        if told is not error:
            raise told from error


def create_partition(path: Path, identity: Identity, io: StorageIO, *, begins: int = 1) -> None:
    """Create an empty partition file and its journal; arguments and errors as of :meth:`EventStore.create`."""
    create_pair(path, lambda uuid: empty_file(identity, str(uuid), begins=begins), io)


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a recovery did.

    Attributes:
        file: name of the partition file.
        committed: stream sequence of the last commit.
        replayed: commits that only the journal held.
        torn: commits that a crash had cut short and that were dropped; they were never acknowledged.
        held_back: why the journal could not be copied into the file yet, though nothing is lost; empty when it was.
    """

    file: str
    committed: int
    replayed: int
    torn: int
    held_back: str


def recover_partition(path: Path) -> Recovered:
    """Open a partition file as its writer does, copy what its journal holds into it, and close it.

    Stock tools see everything that was committed then. A persister does the same when it opens the file.

    Raises CorpusLockedError: a writer has it open; there is nothing to recover then; CorpusError: it cannot be
    recovered; the message says what to do.
    """
    with EventStore.open(path, expected=None) as store:
        done = store.checkpoint()
        stats = store.stats
        return Recovered(
            file=path.name,
            committed=store.committed,
            replayed=stats.records_recovered,
            torn=stats.torn_records,
            held_back="" if done else stats.checkpoint_deferred_because,
        )

"""The event store: one partition file, open for writing.

A caller appends events, then commits them with the stream sequence that it has reached: all of it becomes durable, or
nothing. A commit costs one write and one sync of the journal; checkpoints, which show the events to stock readers, run
in a thread. What the file holds can be looked up between appends, in the same thread.

::

    EventStore                 what a caller sees; refuses everything after an error
      WritablePartition        the file in HDF5, its identity and the committed sequence
        ConsultationGroups     the groups below /consultations and /conflicts; keeps the last used ones open
          Appender             the datasets of one consultation: a row and a body for each event, chained
            GrowingDataset     one dataset, which grows at its end
        NamePages              the pages of /names, which list the consultations in order
        ActiveConsultations    the table /active: the consultations with the newest events
    AtomicFile (wal/file.py)   the bytes under HDF5, which become durable all at once
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np
from h5py import h5d, h5g, h5p, h5s, h5t

from fiq.corpus.consultation import Consultation, StoredRow, open_datasets
from fiq.corpus.errors import AppendRefusedError, CorpusFormatError, CorpusIOError, StoreFailedError, hdf5_says
from fiq.corpus.format import (
    ACTIVE,
    ACTIVE_DTYPE,
    COMMIT_ATTRIBUTES,
    CONFLICTS,
    CONSULTATIONS,
    EVENT_DTYPE,
    EVENT_HEAD,
    EVENT_ID_BYTES,
    EVENT_ROW,
    EVENT_TAIL,
    EVENTS,
    EVENTS_CHUNK,
    LIBVER,
    MAX_BODY_BYTES,
    MOST_ACTIVE,
    NAMES,
    PAYLOAD,
    PAYLOAD_CHUNK,
    SHORT_PAYLOAD_CHUNK,
    Identity,
    Record,
    bound_metadata,
    chain_next,
    chain_start,
    check_identity,
    commit_values,
    empty_file,
    is_consultation_id,
    read_attributes,
)
from fiq.corpus.ids import IdHashes, KnownIds
from fiq.corpus.names import CHUNK_PAGES, PAGE_BYTES, NameTree
from fiq.corpus.wal.file import AtomicFile
from fiq.corpus.wal.journal import refuse_archive
from fiq.corpus.wal.recovery import create_pair
from fiq.corpus.wal.storage import StorageIO, check_file_system

#: how long after a deferred checkpoint the next one is tried, seconds
_DEFERRED_RETRY = 1.0
#: consultations whose conflicts stay open: they are rare
_OPEN_CONFLICTS = 16
_MAX_SIGNED = 2**63 - 1
#: what h5py raises; the last one when it overlooks that a method of the file has raised (h5py 3.16)
_HDF5_ERRORS = (OSError, RuntimeError, ValueError, KeyError, MemoryError, SystemError)
#: what HDF5 says when malloc(3) fails
_NO_MEMORY = "memory allocation failed"
#: makes a growing dataset, given as h5py's low-level ``DatasetID`` with its element's and chunk's size
DatasetFactory = Callable[..., "GrowingDataset"]


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
        with _hdf5_errors(self._file):
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
        is_hdf5 = isinstance(error, _HDF5_ERRORS)
        self.failure = _hdf5_error(self._file, error) if is_hdf5 else error
        if is_hdf5:
            raise self.failure from error


# -- The file in HDF5 -------------------------------------------------------------------------------------------------


@contextmanager
def _hdf5_errors(file: AtomicFile) -> Iterator[None]:
    """Turn an error of h5py inside the block into the corpus's own.

    Raises CorpusIOError: the *file* under HDF5 failed; CorpusFormatError: HDF5 does not accept the content.
    """
    try:
        yield
    except _HDF5_ERRORS as error:
        raise _hdf5_error(file, error) from error


def _hdf5_error(file: AtomicFile, error: BaseException) -> BaseException:
    """Return the corpus's error for one of h5py, which hides what its *file* raised."""
    if isinstance(error, SystemError) and file.failure is None:
        return error
    if file.failure is None and (isinstance(error, MemoryError) or _NO_MEMORY in str(error)):
        return CorpusIOError(f"{file.name}: out of memory")
    return file.failure or CorpusFormatError(f"{file.name}: {hdf5_says(error)}")


class WritablePartition:
    """A partition file open in HDF5.

    Args:
        file: the file under HDF5; not closed here.
        expected: the identity that the file must state; None accepts any.
        limit: how many consultations stay open.
        metadata_cache: limit of HDF5's metadata cache, in bytes of the file.

    Raises:
        CorpusFormatError: it is no partition file, or damaged.
        IdentityMismatchError: its identity is another.
        CorpusIOError: the system refused.
    """

    def __init__(self, file: AtomicFile, expected: Identity | None, *, limit: int, metadata_cache: int) -> None:
        with _hdf5_errors(file):
            # no cache of chunks: they are written past HDF5, and a cached one would be stale
            self._file = h5py.File(file, "r+", libver=LIBVER, rdcc_nbytes=0)
        try:
            with _hdf5_errors(file):
                bound_metadata(self._file, metadata_cache)
                stated = read_attributes(self._file, file.name)
                self.identity, self.begins = stated.identity, stated.begins
                self.committed, self.committed_id = stated.committed, stated.committed_id
                if expected is not None:
                    check_identity(file.name, expected, self.identity)
                if stated.journal != str(file.uuid):
                    raise CorpusFormatError(f"{file.name}: its user block and its HDF5 content are of two files")
                self._attributes = [h5py.h5a.open(self._file.id, name.encode()) for name in COMMIT_ATTRIBUTES]
                make_dataset = partial(GrowingDataset, file)
                #: the sorted ids of the consultations
                self._name_pages = NamePages(file, h5d.open(self._file.id, NAMES.encode()), make_dataset)
                self.names = NameTree(self._name_pages)
                self.active = ActiveConsultations(h5d.open(self._file.id, ACTIVE.encode()))
                root, own = self._file.id, self.identity
                self.consultations = ConsultationGroups(
                    root,
                    CONSULTATIONS,
                    make_dataset,
                    own,
                    events=stated.events,
                    limit=limit,
                    names=self.names,
                    active=self.active,
                )
                self.conflicts = ConsultationGroups(
                    root, CONFLICTS, make_dataset, own, events=stated.conflicts, limit=_OPEN_CONFLICTS
                )
        except BaseException:
            file.discard()
            self._file.close()
            raise

    def place(self, store: str, volume: str, epoch: int) -> None:
        """Let the file state that it belongs to *store*, and to the partition's placement *epoch* on *volume*."""
        for name, value in (("store", store), ("volume", volume)):
            if getattr(self.identity, name) != value:
                self._file.attrs[name] = value
        h5py.h5a.open(self._file.id, b"epoch").write(np.array(epoch, np.uint32))
        self.identity = replace(self.identity, store=store, volume=volume, epoch=epoch)

    def rebuild_names(self) -> None:
        """Write the index of names anew, from the groups."""
        self._name_pages.clear()
        for name in self.consultations.group_names():
            self.names.insert(name)

    def flush(self, sequence: int, message_id: str) -> None:
        """Write everything into the file under HDF5, with *sequence* and the *message_id* there as committed."""
        values = commit_values(sequence, message_id, self.consultations.events, self.conflicts.events)
        for attribute, value in zip(self._attributes, values, strict=True):
            attribute.write(value)
        self._file.flush()

    def close(self) -> None:
        """Close every handle. HDF5 may write then: the file under it must discard that."""
        self.consultations.clear()
        self.conflicts.clear()
        self._attributes.clear()
        try:
            self._file.close()
        except (OSError, RuntimeError, ValueError):
            # HDF5 could not read what it needs for writing what is dropped anyway
            return


class ConsultationGroups:
    """The consultations below one group; keeps a bounded number open, and closes the least recently used one first.

    Args:
        root: low-level id of the root group.
        group: name of the group in it that holds them.
        make_dataset: makes a growing dataset of a low-level one.
        identity: what the file states about itself.
        events: how many it holds.
        limit: how many consultations stay open; each takes about 35 KB in HDF5.
        names: gets the name of each new one; None for none.
        active: is told of each append; None for none.
    """

    def __init__(
        self,
        root: Any,
        group: str,
        make_dataset: DatasetFactory,
        identity: Identity,
        *,
        events: int,
        limit: int,
        names: NameTree | None = None,
        active: ActiveConsultations | None = None,
    ) -> None:
        #: how many events the consultations hold, uncommitted ones included
        self.events = events
        self._group = h5g.open(root, group.encode())
        self._name = group
        # "in" on the group looks a name up twice, in an index that does not stay in HDF5's cache when it is large
        self._links = self._group.links
        self._make_dataset = make_dataset
        self._identity = identity
        self._limit = limit
        self._names = names
        self._active = active
        self._open: OrderedDict[str, Appender] = OrderedDict()
        self._events_plan = _chunked(EVENTS_CHUNK)
        self._short_plan, self._payload_plan = _chunked(SHORT_PAYLOAD_CHUNK), _chunked(PAYLOAD_CHUNK)
        self._empty = h5s.create_simple((0,), (h5s.UNLIMITED,))
        self._row_type = h5t.py_create(EVENT_DTYPE)

    def __len__(self) -> int:
        """Return the number of consultations, uncommitted ones included."""
        return int(self._group.get_num_objs())

    @property
    def open_count(self) -> int:
        """How many are open for appending."""
        return len(self._open)

    def append(self, consultation: str, records: Sequence[Record], committed: int) -> int:
        """Append *records* to a consultation, creating its group when it has none.

        Args:
            committed: the sequence that the file has reached; those of the records are above it.

        Returns:
            The number of the row of the first one.

        Raises AppendRefusedError: the id cannot name a group, a sequence does not rise, or an id or a body is
        malformed. Nothing was appended.
        """
        appender = self._open.get(consultation)
        if appender is None:
            appender = self._open_appender(consultation, records)
        else:
            self._open.move_to_end(consultation)
        first = appender.length
        appender.append(records, committed)
        self.events += len(records)
        if self._active is not None:
            self._active.note(consultation, records[-1].received_ns)
        return first

    def consultation(self, name: str) -> Consultation | None:
        """Return a consultation for reading; None when the file has no such."""
        group = self._group_of(name)
        return None if group is None else Consultation(name, *open_datasets(group), plain=True)

    def group_names(self) -> list[bytes]:
        """Return the sorted names of the groups that can be consultations; all in memory."""
        found: list[bytes] = []
        self._links.iterate(found.append)
        return sorted(name for name in found if is_consultation_id(name.decode()))

    def clear(self) -> None:
        """Close all."""
        self._open.clear()

    def _group_of(self, name: str) -> Any | None:
        link = name.encode()
        return h5g.open(self._group, link) if is_consultation_id(name) and self._links.exists(link) else None

    def _open_appender(self, name: str, first: Sequence[Record]) -> Appender:
        group = self._group_of(name)
        if group is not None:
            events, payload = open_datasets(group)
        else:
            if not is_consultation_id(name):
                raise AppendRefusedError("a consultation id is 1 to 128 characters of A-Z a-z 0-9 _ -")
            created = h5g.create(self._group, name.encode())
            events = h5d.create(created, EVENTS.encode(), self._row_type, self._empty, self._events_plan)
            short = sum(len(record.body) + 1 for record in first) <= SHORT_PAYLOAD_CHUNK
            plan = self._short_plan if short else self._payload_plan
            payload = h5d.create(created, PAYLOAD.encode(), h5t.STD_U8LE, self._empty, plan)
            if self._names is not None:
                self._names.insert(name.encode())
        start = chain_start(self._identity, name, of=self._name)
        appender = Appender(name, events, payload, self._make_dataset, start=start, new=group is None)
        self._open[name] = appender
        if len(self._open) > self._limit:
            self._open.popitem(last=False)
        return appender


def _chunked(elements: int) -> Any:
    plan = h5p.create(h5p.DATASET_CREATE)
    plan.set_chunk((elements,))
    plan.set_fill_time(h5d.FILL_TIME_NEVER)
    plan.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    plan.set_obj_track_times(False)
    return plan


class Appender:
    """The open datasets of one consultation.

    Args:
        name: the consultation's id, for messages.
        events: low-level id of its ``events`` dataset.
        payload: low-level id of its ``payload`` dataset.
        make_dataset: makes growing datasets of the two.
        start: what its first event is chained to.
        new: whether both were just created.
    """

    __slots__ = ("_chain", "_events", "_last_sequence", "_name", "_payload")

    def __init__(
        self, name: str, events: Any, payload: Any, make_dataset: DatasetFactory, *, start: bytes, new: bool
    ) -> None:
        self._name = name
        self._chain = start
        self._events = make_dataset(events, item=EVENT_ROW.size, chunk=EVENTS_CHUNK, empty=new)
        (chunk,) = payload.get_create_plist().get_chunk()
        self._payload = make_dataset(payload, item=1, chunk=chunk, empty=new)
        self._last_sequence = 0
        if self._events.length:
            self._read_last_row()

    @property
    def length(self) -> int:
        """How many events the consultation holds, appended ones included."""
        return self._events.length

    def append(self, records: Sequence[Record], committed: int) -> None:
        """Append as :meth:`ConsultationGroups.append` does."""
        rows: list[bytes] = []
        bodies: list[bytes] = []
        offset, last, chain = self._payload.length, max(self._last_sequence, committed), self._chain
        for record in records:
            body = record.body
            if record.sequence <= last:
                raise AppendRefusedError(f"{self._name}: sequence {record.sequence} does not rise above {last}")
            self._check(record)
            length = len(body)
            head = EVENT_HEAD.pack(record.sequence, record.received_ns, offset, length, 0, record.event_id)
            chain = chain_next(chain, head, body)
            rows += (head, EVENT_TAIL.pack(chain, record.written_ns))
            bodies.append(body)
            offset += length + 1
            last = record.sequence
        bodies.append(b"")
        self._payload.append(b"\n".join(bodies))
        self._events.append(b"".join(rows))
        self._last_sequence, self._chain = last, chain

    def _check(self, record: Record) -> None:
        if len(record.event_id) != EVENT_ID_BYTES:
            raise AppendRefusedError(f"{self._name}: an event id has 16 bytes, not {len(record.event_id)}")
        if b"\n" in record.body or not 0 < len(record.body) <= MAX_BODY_BYTES:
            raise AppendRefusedError(f"{self._name}: a body is one line and not empty (sequence {record.sequence})")
        times = record.received_ns, record.written_ns
        if min(times) < -_MAX_SIGNED or max(*times, record.sequence) > _MAX_SIGNED:
            raise AppendRefusedError(f"{self._name}: a number is out of range (sequence {record.sequence})")

    def _read_last_row(self) -> None:
        sequence, _, offset, length, _, _, chain, _ = EVENT_ROW.unpack(self._events.last())
        if offset + length + 1 != self._payload.length:
            raise CorpusFormatError(
                f"{self._name}: the last row ends at byte {offset + length + 1} of the payload, "
                f"which has {self._payload.length}: the file is damaged, restore it from a backup"
            )
        self._last_sequence, self._chain = sequence, chain


class GrowingDataset:
    """Grows a dataset at its end, past most of HDF5.

    ``Dataset.resize`` and slicing cost 300 to 590 µs an append, ``set_extent`` and ``write_direct_chunk`` 18 to 28.
    Here HDF5 only learns the new extent, for which it allocates the chunks, and the content goes straight to its place
    in the file. That is safe: a chunk without filters never moves, and HDF5 keeps no chunks in memory
    (``rdcc_nbytes=0``).

    Args:
        file: the file under HDF5.
        dataset: h5py's low-level ``DatasetID``: one dimension, chunks without filters.
        item: bytes of an element.
        chunk: elements of a chunk.
        empty: whether it was just created.
    """

    __slots__ = ("_chunk", "_dataset", "_file", "_filled", "_item", "_offset", "length")

    def __init__(self, file: AtomicFile, dataset: Any, *, item: int, chunk: int, empty: bool) -> None:
        self._file = file
        self._dataset = dataset
        self._item = item
        self._chunk = chunk * item
        #: elements
        self.length = 0 if empty else int(dataset.shape[0])
        #: bytes in use of the last chunk, and its byte offset
        self._filled = self._offset = 0
        if self.length:
            first = self.length - 1 - (self.length - 1) % chunk
            self._filled = (self.length - first) * item
            self._offset = self.find(first)

    def append(self, data: bytes) -> None:
        """Append whole elements."""
        start, self.length = self.length, self.length + len(data) // self._item
        self._dataset.set_extent((self.length,))
        room = self._chunk - self._filled if self._filled else 0
        if len(data) <= room:
            self._file.write_at(self._offset + self._filled, data)
            self._filled += len(data)
            return
        if room:
            self._file.write_at(self._offset + self._filled, data[:room])
        for low in range(room, len(data), self._chunk):
            part = data[low : low + self._chunk]
            self._offset, self._filled = self.find(start + low // self._item), len(part)
            self._file.write_at(self._offset, part)

    def clear(self) -> None:
        """Remove all elements."""
        self._dataset.set_extent((0,))
        self.length = self._filled = self._offset = 0

    def last(self) -> bytes:
        """Return the last element; the dataset is not empty."""
        return self._file.read_at(self._offset + self._filled - self._item, self._item)

    def find(self, element: int) -> int:
        """Return the byte offset of the chunk that begins with *element*.

        HDF5's own function for that goes through all chunks of a dataset; the offset of a read is known at once.
        """
        return self._file.locate(lambda: self._dataset.read_direct_chunk((element,)), self._chunk)


class NamePages:
    """The pages of :mod:`fiq.corpus.names` in a partition file.

    Args:
        file: the file under HDF5.
        dataset: low-level id of ``/names``.
        make_dataset: makes a growing dataset of it.
    """

    def __init__(self, file: AtomicFile, dataset: Any, make_dataset: DatasetFactory) -> None:
        self._file = file
        self._pages = make_dataset(dataset, item=PAGE_BYTES, chunk=CHUNK_PAGES, empty=False)
        #: byte offsets of the chunks that were used
        self._offsets: dict[int, int] = {}

    def __len__(self) -> int:
        return self._pages.length

    def read(self, number: int) -> bytes:
        return self._file.read_at(self._offset(number), PAGE_BYTES).rstrip(b"\0")

    def write(self, number: int, at: int, data: bytes) -> None:
        self._file.write_at(self._offset(number) + at, data)

    def add(self, content: bytes) -> int:
        self._pages.append(content.ljust(PAGE_BYTES, b"\0"))
        return self._pages.length - 1

    def clear(self) -> None:
        """Remove all pages."""
        self._pages.clear()
        self._offsets.clear()

    def _offset(self, number: int) -> int:
        first = number - number % CHUNK_PAGES
        offset = self._offsets.get(first)
        if offset is None:
            offset = self._offsets[first] = self._pages.find(first)
        return offset + PAGE_BYTES * (number - first)


class ActiveConsultations:
    """The consultations with the newest events; written into the file with a checkpoint, not with each commit.

    After a crash it lacks what was appended since. A consultation keeps its row, so that a checkpoint copies little.

    Args:
        dataset: low-level id of ``/active``.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._type = h5t.py_create(ACTIVE_DTYPE)
        rows = np.empty(int(dataset.shape[0]), ACTIVE_DTYPE)
        dataset.read(h5s.ALL, h5s.ALL, rows, self._type)
        entries = [(bytes(one["consultation"]).decode(), int(one["received_ns"]), row) for row, one in enumerate(rows)]
        #: when the last event of each was accepted, nanoseconds since the Unix epoch, and its row; oldest append first
        self._entries = {name: (received, row) for name, received, row in sorted(entries, key=lambda entry: entry[1])}
        self._changed = False

    def note(self, consultation: str, received_ns: int) -> None:
        """Note an append, whose last event was accepted at *received_ns*."""
        before = self._entries.pop(consultation, None)
        if before is not None:
            row = before[1]
        elif len(self._entries) < MOST_ACTIVE:
            row = len(self._entries)
        else:
            _, row = self._entries.pop(next(iter(self._entries)))
        self._entries[consultation] = received_ns, row
        self._changed = True

    def newest(self) -> list[tuple[int, str]]:
        """Return when the last event of each was accepted, and its name; newest first."""
        return sorted(((received, name) for name, (received, _) in self._entries.items()), reverse=True)

    def save(self) -> bool:
        """Write the table into HDF5; return False if nothing has changed."""
        if not self._changed:
            return False
        rows = np.empty(len(self._entries), ACTIVE_DTYPE)
        for name, (received, row) in self._entries.items():
            rows[row] = received, name
        self._dataset.set_extent((len(rows),))
        self._dataset.write(h5s.ALL, h5s.ALL, rows, self._type)
        self._changed = False
        return True

"""The event store: the writer's side of one partition file."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from services.corpus.archive import refuse_archive
from services.corpus.atomic_file import JournaledFile
from services.corpus.checkpoint_policy import CheckpointPolicy
from services.corpus.creation import create_pair
from services.corpus.errors import AppendRefusedError, CorpusFormatError, StoreFailedError
from services.corpus.filesystems import check_file_system
from services.corpus.groups import OpenConsultations
from services.corpus.ids import StoredRow
from services.corpus.lookup import Lookup
from services.corpus.options import StoreOptions, StoreStats
from services.corpus.partition import OpenPartition, hdf5_errors
from services.corpus.records import Identity, Record


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
        self._journaled = JournaledFile(
            path, io=options.io, cached_pages=options.cached_pages, turn_bytes=options.checkpoint_bytes
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

        Raises:
            CorpusExistsError: the file exists.
            JournalError: a journal with commits stands there without its file.
            UnsupportedFileSystemError: the directory is on a remote file system.
            CorpusNotFoundError: there is no such directory.
            CorpusIOError: the system refused.
        """
        options = options or StoreOptions()
        if path.parent.is_dir():
            check_file_system(path.parent)
        create_pair(path, identity, options.io, begins=begins)
        return cls(path, identity, options)

    @classmethod
    def open(cls, path: Path, *, expected: Identity | None, options: StoreOptions | None = None) -> Self:
        """Open a partition file: lock it, find its last commit, compare its identity.

        Args:
            expected: what the file must say of itself; None accepts whatever it says.

        Raises:
            CorpusNotFoundError: the file is missing.
            CorpusLockedError: another process writes it.
            ArchivedFileError: it is an archive.
            JournalError: its journal is missing, damaged or of another file.
            CorpusFormatError: it is no partition file, or damaged.
            IdentityMismatchError: it belongs to another store, volume, partition or stream.
            UnsupportedFileSystemError: it is on a remote file system.
            CorpusIOError: the system refused.
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

        Raises:
            CorpusError: abandon the store.
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

        Raises:
            CorpusFormatError: HDF5 does not accept the content.
            CorpusIOError: the system refused; abandon the store.
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

        Raises:
            AppendRefusedError: a record is malformed or out of order.
            CorpusError: anything else; abandon the store.
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

        Raises:
            CorpusIOError: the system refused; abandon the store.
        """
        with self._guarded:
            own = self.identity
            self._partition.place(store or own.store, volume or own.volume, epoch)
        self.commit(self.committed, self.committed_id)

    def checkpoint(self) -> bool:
        """Copy what is committed into the file, where stock readers see it, and wait for it.

        Returns:
            False when it must wait: a reader holds the file, or the disk lacks the room.

        Raises:
            CorpusUsageError: events are appended and not committed.
            CorpusIOError: the system refused; abandon the store.
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

        Raises:
            CorpusIOError: the checkpoint failed; everything is released all the same, and the journal holds it.
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

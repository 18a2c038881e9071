"""Opens a corpus for reading: all partition files of a data directory, or one of them; and writes their index.

Each partition file is read through a snapshot of its last commit, which is taken when the file is first needed.
"""

from __future__ import annotations

import errno
import inspect
import io as memory
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import h5py
import numpy as np
import numpy.typing as npt

from fiq.corpus.consultation import Consultation, Table, documents, open_datasets, to_frame
from fiq.corpus.errors import (
    CorpusError,
    CorpusFormatError,
    CorpusIOError,
    CorpusNotFoundError,
    CorpusUsageError,
    DamagedPartitionError,
    DamagedPartitionWarning,
    UnknownConsultationError,
    hdf5_says,
)
from fiq.corpus.format import (
    CHUNK_SLOTS,
    CONFLICTS,
    CONSULTATIONS,
    LIBVER,
    NAMES,
    READER_METADATA_BYTES,
    Identity,
    bound_metadata,
    is_consultation_id,
    read_attributes,
)
from fiq.corpus.names import DatasetPages, NameTree
from fiq.corpus.wal.journal import RECORDS_START
from fiq.corpus.wal.recovery import Snapshot
from fiq.corpus.wal.storage import StorageIO, locked_directory, reason_of, replace_file, system_errors
from fiq.words import count

if TYPE_CHECKING:
    import pandas as pd

#: name of the index in a data directory
INDEX_NAME = "corpus.h5"
#: what its attribute ``format`` says
INDEX_FORMAT = "fiq-corpus-index"
#: the group of its links
INDEX_GROUP = "partitions"
#: file names of partitions
_PARTITION_FILE = re.compile(r"[0-9]+\.h5", re.ASCII)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PartitionInfo:
    """What one partition file states about itself."""

    path: Path
    identity: Identity  #: the store, volume, partition and stream that it belongs to
    begins: int  #: first stream sequence that it may hold: above 1 when the store began after the stream was trimmed
    committed: int  #: stream sequence of its last commit
    committed_id: str  #: message id of the stream's message there; empty when it had none
    consultations: int  #: how many it holds
    events: int  #: as the last commit counted them
    conflicts: int  #: events that came under a used id with another body
    archived: bool  #: whether it is a compact copy that ``fiq repack`` made: complete without a journal, and read-only
    has_journal: bool  #: whether its journal is there; without one, the content is that of the last checkpoint
    journal_records: int  #: commits that only the journal holds


@dataclass(frozen=True, slots=True)
class DamagedPartition:
    """A partition file that cannot be read."""

    path: Path
    error: CorpusError

    def __str__(self) -> str:
        look = self.path if self.path.exists() else self.path.parent
        return (
            f"{self.path} is damaged: {self.error}; `fiq verify {look}` shows what is wrong, then restore it and "
            f"its journal from a backup"
        )


class Corpus(Mapping[str, Consultation]):
    """Consultations by their id, as of the moment when each partition file was first read.

    ``corpus["id"]`` is a consultation, ``len(corpus)`` their number, ``"id" in corpus`` and iteration work on ids. An
    open partition file holds back its writer's checkpoints, never its commits. :meth:`refresh` or the end of the
    ``with`` block closes all.

    Damaged files are in :attr:`damaged`, and what is damaged in them is left out with a DamagedPartitionWarning; asking
    for a consultation that no other file holds raises DamagedPartitionError. If all files are damaged, the error of the
    last one is raised.

    Args:
        paths: the partition files.
        strict: raise the error of the first damaged file instead.
        missing: partition files that are gone; they are damaged, too.
    """

    def __init__(
        self, paths: Sequence[Path], *, strict: bool = False, missing: Sequence[DamagedPartition] = ()
    ) -> None:
        #: the partition files
        self.paths = tuple(paths)
        #: the partition files that are gone
        self.missing = tuple(missing)
        self._strict = strict
        self._open: dict[Path, _Partition] = {}
        self._damaged: dict[Path, DamagedPartition] = {}
        self._closed = False

    def __repr__(self) -> str:
        return f"Corpus({self._where()!r}, {'closed' if self._closed else self._files()})"

    @property
    def partitions(self) -> tuple[PartitionInfo, ...]:
        """What each partition file that can be read states about itself."""
        return tuple(partition.info() for partition in self._partitions())

    @property
    def damaged(self) -> tuple[DamagedPartition, ...]:
        """The partition files that cannot be read as a whole, and why; opens all of them.

        Damage within a consultation is found when :meth:`read` or :meth:`to_frame` comes to it.
        """
        for _ in self._partitions():
            pass
        return tuple(self._damaged.values())

    def __iter__(self) -> Iterator[str]:
        """Yield the ids of all consultations, partition after partition, sorted within each."""
        return self.ids()

    def ids(self, prefix: str = "", *, after: str = "") -> Iterator[str]:
        """Yield the ids that begin with *prefix* and sort after *after*, partition after partition, sorted within each.

        They are read from the index of each file as they are needed, in bounded memory.

        Raises CorpusUsageError: *prefix* or *after* is not a str.
        """
        _check_text(prefix=prefix, after=after)
        for partition in self._partitions():
            try:
                yield from partition.names(prefix, after)
            except CorpusFormatError as error:
                self._leave_out(partition.path, error)

    def read(self, each: Callable[[Consultation], Iterable[T]], *, prefix: str = "") -> Iterator[T]:
        """Yield what *each* makes of the consultations whose ids begin with *prefix*, partition after partition.

        A damaged consultation is read up to the damage.

        Raises CorpusUsageError: *prefix* is not a str.
        """
        _check_text(prefix=prefix)
        for partition in self._partitions():
            try:
                for name in partition.names(prefix):
                    try:
                        yield from each(partition.consultation(name))
                    except CorpusFormatError as error:
                        self._leave_out(partition.path, error)
            except CorpusFormatError as error:
                self._leave_out(partition.path, error)

    def __len__(self) -> int:
        return sum(partition.count() for partition in self._partitions())

    def __contains__(self, consultation: object) -> bool:
        if not isinstance(consultation, str):
            return False
        if any(consultation in partition for partition in self._partitions()):
            return True
        self._check_complete(consultation)
        return False

    def __getitem__(self, consultation: str) -> Consultation:
        """Return a consultation.

        Raises UnknownConsultationError: no partition file holds it; DamagedPartitionError: nor any that can be read;
        CorpusError: a partition file cannot be read; TypeError: *consultation* is not a str.
        """
        if not isinstance(consultation, str):
            raise TypeError(f"a corpus is indexed by consultation id (str), not by {type(consultation).__name__}")
        for partition in self._partitions():
            if consultation in partition:
                return partition.consultation(consultation)
        self._check_complete(consultation)
        raise UnknownConsultationError(f"no consultation {consultation!r} in {self._where()} ({self._files()})")

    def conflicts(self) -> Iterator[Consultation]:
        """Yield, for each consultation that has any, the events that came under a used id with another body.

        They are in stream order and not part of the consultation, which holds the first event under that id.
        """
        for partition in self._partitions():
            yield from partition.conflicts()

    def to_frame(
        self,
        *,
        prefix: str = "",
        since: datetime | None = None,
        until: datetime | None = None,
        expand: bool = True,
    ) -> pd.DataFrame:
        """Return the events of all consultations as one pandas frame, a row an event.

        The columns are those of :meth:`Consultation.to_frame`, after ``consultation``. Consultations come partition
        after partition, sorted within each; the events of one in stream order. All that the filters choose is held in
        memory, about a kilobyte for a short event.

        Args:
            prefix: only consultations whose id starts with it.
            since: only events received at this time or later; with a time zone.
            until: only events received before this time; with a time zone.
            expand: False for the whole parsed payloads in one column ``payload``.

        Raises CorpusUsageError: pandas is not installed, *prefix* is not a str, or a time is not a datetime with a time
        zone.
        """
        first = -(2**63) if since is None else _nanoseconds("since", since)
        end = 2**63 - 1 if until is None else _nanoseconds("until", until)

        def in_time(rows: Table) -> npt.NDArray[np.bool_]:
            return (rows["received_ns"] >= first) & (rows["received_ns"] < end)

        keep = None if since is None and until is None else in_time
        events = self.read(lambda consultation: documents(consultation.records(keep=keep)), prefix=prefix)
        return to_frame(events, expand=expand, consultation=True)

    def refresh(self) -> None:
        """Close all partition files; they are opened again, with what was committed since, when they are needed."""
        for partition in self._open.values():
            partition.close()
        self._open.clear()
        self._damaged.clear()

    def close(self) -> None:
        """Close all partition files for good."""
        self._closed = True
        self.refresh()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _where(self) -> str:
        return str(self.paths[0] if len(self.paths) == 1 else self.paths[0].parent)

    def _files(self) -> str:
        return count(len(self.paths), "partition file")

    def _partitions(self) -> Iterator[_Partition]:
        for one in self.missing:
            self._leave_out(one.path, one.error)
        for path in self.paths:
            if self._closed:
                raise CorpusUsageError("the corpus is closed: open it again with open_corpus()")
            partition = self._open.get(path)
            if partition is None:
                if path in self._damaged:
                    continue
                try:
                    partition = self._open[path] = _Partition(path)
                except CorpusFormatError as error:
                    self._leave_out(path, error)
                    continue
                except CorpusIOError as error:
                    if getattr(error.__cause__, "errno", None) != errno.EIO:
                        raise  # permissions, limits of the process: not the file's trouble
                    self._leave_out(path, error)
                    continue
            yield partition

    def _leave_out(self, path: Path, error: CorpusError) -> None:
        """Go on without what is damaged in a file. Raises *error*: all files are damaged, or the corpus is strict."""
        if path in self._damaged:
            return
        self._damaged[path] = damaged = DamagedPartition(path, error)
        if self._strict or all(one in self._damaged for one in self.paths):
            del self._damaged[path]
            raise error
        message = f"{damaged}; the corpus is read without what is damaged"
        warnings.warn(message, DamagedPartitionWarning, stacklevel=_level_of_caller())

    def _check_complete(self, consultation: str) -> None:
        """Raise DamagedPartitionError if a damaged file may hold *consultation*."""
        if self._damaged:
            damaged = "; ".join(map(str, self._damaged.values()))
            raise DamagedPartitionError(f"no consultation {consultation!r} in the files that can be read. {damaged}")


def _level_of_caller() -> int:
    """Return the level, for the caller's :func:`warnings.warn`, of the first function that is not the library's."""
    level, frame = 0, inspect.currentframe()
    while frame is not None and str(frame.f_globals.get("__name__")).startswith("fiq."):
        level, frame = level + 1, frame.f_back
    return level


def _check_text(**arguments: object) -> None:
    for name, value in arguments.items():
        if not isinstance(value, str):
            raise CorpusUsageError(f"{name} must be a str, as in {name}='ward-7-', not {type(value).__name__}")


def _nanoseconds(name: str, moment: datetime) -> int:
    if not isinstance(moment, datetime):
        raise CorpusUsageError(
            f"{name} must be a datetime, as in datetime(2026, 11, 27, tzinfo=UTC), not a {type(moment).__name__}"
        )
    if moment.tzinfo is None:
        raise CorpusUsageError(f"{name} needs a time zone, as in datetime(2026, 11, 27, tzinfo=UTC)")
    return (moment - _EPOCH) // timedelta(microseconds=1) * 1000


def open_corpus(path: str | PathLike[str], *, strict: bool = False) -> Corpus:
    """Open a corpus for reading; it sees everything committed, while the writers work, and never writes.

    Args:
        path: a data directory with its ``<pp>.h5`` files (or the ``corpus.h5`` in it), or one partition file.
        strict: a damaged partition file is an error; by default the others are read, see :attr:`Corpus.damaged`.

    Raises:
        CorpusNotFoundError: there is no such path, or no partition file in the directory.
        CorpusIOError: the system refused to look there.
    """
    found = Path(path)
    with system_errors(f"open {found}"):
        if found.name == INDEX_NAME and found.is_file():
            found = found.parent
        if found.is_file():
            if found.suffix == ".wal":
                raise CorpusNotFoundError(f"{found} is a journal: open {found.stem}, which is read together with it")
            return Corpus([found], strict=strict)
        if not found.is_dir():
            raise CorpusNotFoundError(f"there is no corpus at {found}")
        paths = partition_files(found)
        if not paths:
            below = found / "corpus"
            instead = f": open {below}" if below.is_dir() and partition_files(below) else ""
            raise CorpusNotFoundError(f"there are no partition files (00.h5, 01.h5, ...) in {found}{instead}")
        return Corpus(paths, strict=strict, missing=list(_missing_files(found)))


def partition_files(directory: Path) -> list[Path]:
    """Return the partition files of a data directory, in order of their numbers."""
    found = (path for path in directory.iterdir() if _PARTITION_FILE.fullmatch(path.name))
    return sorted(found, key=lambda path: (int(path.stem), path.name))


def _missing_files(directory: Path) -> Iterator[DamagedPartition]:
    """Find partition files that a journal with commits, or the index, shows to have been there."""
    gone = {}
    for journal in directory.glob("*.h5.wal"):
        # creation writes the journal first: a crash may leave an empty one alone. One with commits had a file before
        # them, so the file is looked for after the journal
        if journal.stat().st_size > RECORDS_START and not (file := journal.with_suffix("")).exists():
            gone[file] = f"its journal {journal.name} holds commits"
    try:
        links = read_links(directory / INDEX_NAME)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        links = {}  # `fiq verify` says what is wrong with the index
    for found in links.values():
        if _PARTITION_FILE.fullmatch(found[0]) and not (file := directory / found[0]).exists():
            gone.setdefault(file, f"{INDEX_NAME} links it")
    for file, why in sorted(gone.items()):
        yield DamagedPartition(file, CorpusFormatError(f"{file.name} is missing, but {why}"))


def group_names(corpus: Corpus) -> list[str]:
    """Return the sorted names of all groups of consultations, whatever the index of names says; all in memory."""
    return sorted(name for partition in corpus._partitions() for name in partition.group_names())


class _Partition:
    """One partition file, open for reading."""

    def __init__(self, path: Path) -> None:
        #: the file
        self.path = path
        self._closed = False
        self._snapshot = Snapshot(path)
        try:
            with self._errors():
                self._file: Any = h5py.File(self._snapshot, "r", rdcc_nslots=CHUNK_SLOTS)
                bound_metadata(self._file, READER_METADATA_BYTES)
                self._attributes = read_attributes(self._file, path.name)
                self._group, self._conflicts = self._file[CONSULTATIONS], self._file[CONFLICTS]
                self._names = NameTree(DatasetPages(h5py.h5d.open(self._file.id, NAMES.encode())))
        except BaseException:
            self._snapshot.close()
            raise

    def info(self) -> PartitionInfo:
        stated = self._attributes
        with self._errors():
            return PartitionInfo(
                path=self.path,
                identity=stated.identity,
                begins=stated.begins,
                committed=stated.committed,
                committed_id=stated.committed_id,
                consultations=len(self._group),
                events=stated.events,
                conflicts=stated.conflicts,
                archived=bool(stated.archived),
                has_journal=self._snapshot.has_journal,
                journal_records=self._snapshot.journal_records,
            )

    def names(self, prefix: str = "", after: str = "") -> Iterator[str]:
        names = self._names.scan(max(prefix, after).encode())
        while True:
            with self._errors():
                name = next(names, None)
            if name is None or not name.startswith(prefix.encode()):
                return
            if name > after.encode():
                yield name.decode()

    def group_names(self) -> list[str]:
        with self._errors():
            return list(self._group)

    def conflicts(self) -> Iterator[Consultation]:
        with self._errors():
            names = sorted(self._conflicts)
        for name in names:
            yield self._open(self._conflicts, name)

    def count(self) -> int:
        with self._errors():
            return len(self._group)

    def __contains__(self, consultation: str) -> bool:
        with self._errors():
            return is_consultation_id(consultation) and consultation.encode() in self._group.id

    def consultation(self, name: str) -> Consultation:
        return self._open(self._group, name)

    def close(self) -> None:
        self._closed = True
        self._file.close()
        self._snapshot.close()

    def _open(self, parent: Any, name: str) -> Consultation:
        with self._errors():
            return Consultation(name, *open_datasets(h5py.h5g.open(parent.id, name.encode())), self._errors)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Distinguish errors of the disk from those of the content: h5py raises the same for both."""
        if self._closed:
            raise CorpusUsageError(
                f"{self.path.name} was closed by refresh() or close(): get the consultation again, from an open corpus"
            )
        try:
            yield
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, IndexError, MemoryError) as error:
            failure = error if isinstance(error, MemoryError) else self._snapshot.failure
            if failure is not None:
                raise CorpusIOError(f"cannot read {self.path.name}: {reason_of(failure)}") from error
            raise CorpusFormatError(f"{self.path.name}: {hdf5_says(error)}") from error


# -- The index: corpus.h5 ---------------------------------------------------------------------------------------------


def write_index(directory: Path, io: StorageIO | None = None) -> None:
    """Write ``corpus.h5`` with an external link to every partition file, in one durable step, unless it is current.

    Each ``<pp>.h5`` appears as ``/partitions/<pp>``. The links are relative: the directory can be moved and copied.

    Raises CorpusNotFoundError: there is no such directory; CorpusLockedError: another process creates files there;
    CorpusIOError: the system refused.
    """
    with locked_directory(directory), system_errors(f"write {INDEX_NAME}"):
        io = StorageIO() if io is None else io
        path, partitions = directory / INDEX_NAME, partition_files(directory)
        if _is_current(path, partitions):
            # the sync of the directory may have failed for the process that wrote it
            io.sync_directory(directory)
        else:
            replace_file(path, _image(partitions), io)


def read_links(path: Path) -> dict[str, tuple[str, str] | str]:
    """Return what an index links, by name: file and path within it, or the kind of a link that is not external.

    Raises:
        OSError, RuntimeError, ValueError, KeyError, TypeError: it is no index, or damaged.
    """
    with h5py.File(path, "r") as file:
        if file.attrs.get("format") != INDEX_FORMAT:
            raise ValueError("the attribute format is missing")
        group = file[INDEX_GROUP]
        return {name: _target(group.get(name, getlink=True)) for name in group}


def _is_current(path: Path, partitions: list[Path]) -> bool:
    try:
        return read_links(path) == {file.stem: (file.name, "/") for file in partitions}
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        return False


def _target(link: Any) -> tuple[str, str] | str:
    return (link.filename, link.path) if isinstance(link, h5py.ExternalLink) else type(link).__name__


def _image(paths: list[Path]) -> bytes:
    buffer = memory.BytesIO()
    with h5py.File(buffer, "w", libver=LIBVER) as file:
        file.attrs["format"] = INDEX_FORMAT
        links = file.create_group(INDEX_GROUP)
        for path in paths:
            links[path.stem] = h5py.ExternalLink(path.name, "/")
    return buffer.getvalue()

"""Opens a corpus for reading: all partition files of a data directory, or one of them."""

from __future__ import annotations

import io as memory
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Self

import h5py

from fiq.corpus.errors import (
    CorpusFormatError,
    CorpusIOError,
    CorpusNotFoundError,
    CorpusUsageError,
    UnknownConsultationError,
    system_errors,
)
from fiq.corpus.events import Consultation
from fiq.corpus.format import (
    ARCHIVED,
    BEGINS,
    CHUNK_SLOTS,
    COMMITTED,
    COMMITTED_CONFLICTS,
    COMMITTED_EVENTS,
    COMMITTED_ID,
    CONFLICTS,
    CONSULTATIONS,
    LIBVER,
    READER_METADATA_BYTES,
    Identity,
    bound_metadata,
    is_consultation_id,
    read_identity,
)
from fiq.corpus.wal.recovery import Snapshot
from fiq.corpus.wal.storage import StorageIO, locked_directory, replace_file

#: name of the index in a data directory
INDEX_NAME = "corpus.h5"
#: what its attribute ``format`` says
INDEX_FORMAT = "fiq-corpus-index"
#: the group of its links
INDEX_GROUP = "partitions"
#: file names of partitions
_PARTITION_FILE = re.compile(r"[0-9]+\.h5", re.ASCII)
_INDEX_FILE = "corpus.h5"


@dataclass(frozen=True, slots=True)
class PartitionInfo:
    """What one partition file says of itself.

    Attributes:
        path: the file.
        identity: the store, volume, partition and stream that it belongs to.
        begins: first stream sequence that it may hold: above 1 when the store began after the stream was trimmed.
        committed: stream sequence of its last commit.
        committed_id: message id of the stream's message there; empty when it had none.
        consultations: how many it holds.
        events: how many events, as the last commit counted them.
        conflicts: how many events under an id that their consultation holds with another body.
        archived: whether it is a compact copy that ``fiq repack`` made: complete without a journal, and read-only.
        has_journal: whether its journal stood beside it; without one, the content is that of the last checkpoint.
        journal_records: commits that only the journal holds.
    """

    path: Path
    identity: Identity
    begins: int
    committed: int
    committed_id: str
    consultations: int
    events: int
    conflicts: int
    archived: bool
    has_journal: bool
    journal_records: int


class Corpus(Mapping[str, Consultation]):
    """Consultations by their id, as of the moment when each partition file was first looked into.

    A partition file that is open holds back its writer's checkpoints, never its commits. :meth:`refresh` or the end of
    the ``with`` block lets go of all.

    Args:
        paths: the partition files.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self._open: dict[Path, _Partition] = {}
        self._closed = False

    @property
    def paths(self) -> tuple[Path, ...]:
        """The partition files."""
        return tuple(self._paths)

    @property
    def partitions(self) -> tuple[PartitionInfo, ...]:
        """What each partition file says of itself."""
        return tuple(partition.info() for partition in self._partitions())

    def consultations(self) -> Iterator[str]:
        """Yield the ids of all consultations, partition after partition, sorted within each."""
        for partition in self._partitions():
            yield from partition.names()

    def __iter__(self) -> Iterator[str]:
        return self.consultations()

    def __len__(self) -> int:
        return sum(partition.count() for partition in self._partitions())

    def __contains__(self, consultation: object) -> bool:
        return isinstance(consultation, str) and any(consultation in part for part in self._partitions())

    def __getitem__(self, consultation: str) -> Consultation:
        """Return a consultation.

        Raises:
            UnknownConsultationError: no partition file holds it.
            CorpusError: a partition file cannot be read.
        """
        for partition in self._partitions():
            if consultation in partition:
                return partition.consultation(consultation)
        raise UnknownConsultationError(f"no consultation {consultation!r} in {len(self._paths)} partition file(s)")

    def conflicts(self) -> Iterator[Consultation]:
        """Yield, for each consultation that has any, the events that came under an id that it holds with another body.

        They are kept apart, in stream order, and are no part of the consultation: its own event is the first one.
        """
        for partition in self._partitions():
            yield from partition.conflicts()

    def refresh(self) -> None:
        """Let go of all partition files; they are opened anew, with what was committed since, when they are needed."""
        for partition in self._open.values():
            partition.close()
        self._open.clear()

    def close(self) -> None:
        """Let go of all partition files for good."""
        self._closed = True
        self.refresh()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _partitions(self) -> Iterator[_Partition]:
        for path in self._paths:
            if self._closed:
                raise CorpusUsageError("the corpus is closed")
            partition = self._open.get(path)
            if partition is None:
                partition = self._open[path] = _Partition(path)
            yield partition


def open_corpus(path: str | PathLike[str]) -> Corpus:
    """Open a corpus for reading; it sees everything committed, while the writers work, and never writes.

    Args:
        path: a data directory with its ``<pp>.h5`` files (or the ``corpus.h5`` in it), or one partition file.

    Raises:
        CorpusNotFoundError: there is no such path, or no partition file in the directory.
    """
    place = Path(path)
    if place.name == _INDEX_FILE and place.is_file():
        place = place.parent
    if place.is_file():
        return Corpus([place])
    if not place.is_dir():
        raise CorpusNotFoundError(f"there is no corpus at {place}")
    paths = partition_files(place)
    if not paths:
        raise CorpusNotFoundError(f"there are no partition files (<pp>.h5) in {place}")
    return Corpus(paths)


def partition_files(directory: Path) -> list[Path]:
    """Return the partition files of a data directory, in order of their numbers."""
    found = (path for path in directory.iterdir() if _PARTITION_FILE.fullmatch(path.name))
    return sorted(found, key=lambda path: (int(path.stem), path.name))


class _Partition:
    """One partition file, open for reading."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._closed = False
        self._snapshot = Snapshot(path)
        try:
            with self._errors():
                self._file: Any = h5py.File(self._snapshot, "r", rdcc_nslots=CHUNK_SLOTS)
                bound_metadata(self._file, READER_METADATA_BYTES)
                self._identity = read_identity(self._file, path.name)
                self._group, self._conflicts = self._file[CONSULTATIONS], self._file[CONFLICTS]
        except BaseException:
            self._snapshot.close()
            raise

    def info(self) -> PartitionInfo:
        with self._errors():
            return PartitionInfo(
                path=self._path,
                identity=self._identity,
                begins=int(self._file.attrs[BEGINS]),
                committed=int(self._file.attrs[COMMITTED]),
                committed_id=bytes(self._file.attrs[COMMITTED_ID]).decode("ascii"),
                consultations=len(self._group),
                events=int(self._file.attrs[COMMITTED_EVENTS]),
                conflicts=int(self._file.attrs[COMMITTED_CONFLICTS]),
                archived=ARCHIVED in self._file.attrs,
                has_journal=self._snapshot.has_journal,
                journal_records=self._snapshot.journal_records,
            )

    def names(self) -> list[str]:
        with self._errors():
            return sorted(self._group)

    def conflicts(self) -> Iterator[Consultation]:
        with self._errors():
            names = sorted(self._conflicts)
        for name in names:
            with self._errors():
                found = Consultation(name, h5py.h5g.open(self._conflicts.id, name.encode()), self._errors)
            yield found

    def count(self) -> int:
        return len(self._group)

    def __contains__(self, consultation: str) -> bool:
        return is_consultation_id(consultation) and consultation.encode() in self._group.id

    def consultation(self, name: str) -> Consultation:
        with self._errors():
            return Consultation(name, h5py.h5g.open(self._group.id, name.encode()), self._errors)

    def close(self) -> None:
        self._closed = True
        self._file.close()
        self._snapshot.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Tell an error of the disk from one of the content: h5py raises the same for both."""
        if self._closed:
            raise CorpusUsageError(f"{self._path.name} was closed: ask the corpus for the consultation again")
        try:
            yield
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            if self._snapshot.failure is not None:
                raise CorpusIOError(f"cannot read {self._path.name}: {self._snapshot.failure}") from error
            raise CorpusFormatError(f"{self._path.name}: HDF5: {error}") from error


def write_index(directory: Path, io: StorageIO | None = None) -> None:
    """Write ``corpus.h5`` with an external link to every partition file, in one durable step; one that has them stays.

    Each ``<pp>.h5`` appears as ``/partitions/<pp>``, whose ``consultations/<id>`` holds ``events`` and ``payload``. The
    links are relative: the directory can be moved and copied. In Python::

        with h5py.File("corpus/corpus.h5") as corpus:
            for partition in corpus["partitions"].values():
                table = partition["consultations"][consultation]["events"][:]

    Raises:
        CorpusNotFoundError: there is no such directory.
        CorpusLockedError: another process creates files there.
        CorpusIOError: the system refused.
    """
    with locked_directory(directory), system_errors(f"write {INDEX_NAME}"):
        io = StorageIO() if io is None else io
        path, partitions = directory / INDEX_NAME, partition_files(directory)
        if _is_current(path, partitions):
            # it may have been put there by one whose sync of the directory failed
            io.sync_directory(directory)
        else:
            replace_file(path, _image(partitions), io)


def read_links(path: Path) -> dict[str, tuple[str, str] | str]:
    """Return what an index links, by name: file and path within it; of what is no external link, the kind.

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
        return read_links(path) == {place.stem: (place.name, "/") for place in partitions}
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

"""Copies a corpus while its writer works: exactly, for a backup, or compactly, for an archive.

An exact copy (:func:`copy_pair`) is a partition file and its journal as of the last commit, from which a writer may
continue. An archive (:func:`repack`) is compressed, in chunks that suit reading, and compared with the original event
by event.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import h5py
import numpy as np
import numpy.typing as npt
from h5py import h5d, h5g, h5p, h5s, h5t

from fiq.corpus.consultation import Consultation
from fiq.corpus.errors import (
    CorpusExistsError,
    CorpusFormatError,
    CorpusIOError,
    CorpusLockedError,
    CorpusNotFoundError,
)
from fiq.corpus.format import (
    CONFLICTS,
    CONSULTATIONS,
    EVENT_DTYPE,
    EVENTS,
    LIBVER,
    NAMES,
    PAYLOAD,
    PORTABLE_EVENT_DTYPE,
    PORTABLE_LIBVER,
    Attributes,
    write_attributes,
)
from fiq.corpus.names import DatasetPages, NameTree, create_names
from fiq.corpus.reader import Corpus, PartitionInfo, open_corpus, write_index
from fiq.corpus.tools.verify import CorpusProblem, verify_partition
from fiq.corpus.wal.journal import (
    USER_BLOCK,
    AbsorbedState,
    empty_journal,
    journal_path,
    new_user_block,
    refuse_archive,
    write_state,
)
from fiq.corpus.wal.recovery import Snapshot, missing_journal
from fiq.corpus.wal.storage import FILE_MODE, StorageIO, system_errors, write_all

#: how long a copy waits for the writer's checkpoints, seconds; one takes some 0.1 s
_CHECKPOINT_WAIT = 60.0
_PIECE_BYTES = 4 << 20


def copy_pair(
    source: Path, target: Path, *, io: StorageIO | None = None, on_progress: Callable[[float], None] | None = None
) -> None:
    """Copy the pair at *source*, as of its last commit, to *target* and a journal beside it.

    The copy is what a checkpoint would have made of the original: the file holds everything that was committed, the
    journal is empty, and a writer may continue from there. The two belong together as the original's do: one that is
    mixed up with an older or newer one is refused. The writer keeps committing meanwhile; its checkpoints wait.

    Args:
        source: a partition file with its journal.
        target: the partition file to make.
        io: the seam through which everything is written.
        on_progress: called with the fraction that is done.

    Raises CorpusExistsError: *target* or its journal exists; CorpusNotFoundError: there is no partition file *source*;
    CorpusLockedError: checkpoints, or another program, kept the file busy for a minute; ArchivedFileError: it is an
    archive, which any program can copy; JournalError: its journal is damaged, missing, or of another file;
    CorpusFormatError: it is no partition file; CorpusIOError: the system refused.
    """
    io = StorageIO() if io is None else io
    journal = journal_path(target)
    if os.path.lexists(target) or os.path.lexists(journal):
        raise CorpusExistsError(f"{target} or its journal exists: a copy never replaces anything")
    if source.is_file():
        refuse_archive(source)
    snapshot = _snapshot(source)
    try:
        if not snapshot.has_journal:
            raise missing_journal(source)
        with system_errors(f"copy {source.name}"):
            _put(io, target, lambda fd: _put_file(io, fd, snapshot, on_progress))
            empty = empty_journal(snapshot.uuid, number=snapshot.end.number, link=snapshot.end.link)
            _put(io, journal, lambda fd: write_all(io, fd, empty, 0))
    finally:
        snapshot.close()


def _snapshot(path: Path) -> Snapshot:
    deadline = time.monotonic() + _CHECKPOINT_WAIT
    while True:
        try:
            return Snapshot(path)  # waits for some seconds itself
        except CorpusLockedError:
            if time.monotonic() >= deadline:
                raise


def _put(io: StorageIO, path: Path, write: Callable[[int], object]) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    try:
        write(fd)
        io.fsync(fd)
    finally:
        os.close(fd)


def _put_file(io: StorageIO, fd: int, snapshot: Snapshot, on_progress: Callable[[float], None] | None) -> None:
    buffer = memoryview(bytearray(_PIECE_BYTES))
    offset = 0
    while offset < snapshot.size:
        piece = buffer[: min(len(buffer), snapshot.size - offset)]
        snapshot.seek(offset)
        snapshot.readinto(piece)
        offset = write_all(io, fd, piece, offset)
        if on_progress is not None:
            on_progress(offset / snapshot.size)
    number = snapshot.end.number
    write_state(io, fd, AbsorbedState(snapshot.state.generation + 1, number, number, snapshot.end.link))


# -- a compact copy, for archives -------------------------------------------------------------------------------------

#: largest chunk of ``events``, rows; a shorter consultation is one chunk
_EVENTS_CHUNK = 2048
#: largest chunk of ``payload``, bytes
_PAYLOAD_CHUNK = 256 << 10
#: what is copied at once: whole chunks
_ROWS, _BYTES = 4 * _EVENTS_CHUNK, 32 * _PAYLOAD_CHUNK
#: datasets up to this size are not chunked in an archive for small readers
_WHOLE_BYTES = 4096
#: level of gzip: higher ones take much longer and save little
_LEVEL = 6
#: owner and group: what the files hold is medical data
_DIRECTORY_MODE = 0o750
#: share of the time that each step takes
_STEPS = {"verifying": 0.25, "copying": 0.4, "verifying the copy of": 0.2, "comparing": 0.15}

OnStep = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Repacked:
    """One partition file that was copied."""

    file: str  #: its name
    consultations: int
    events: int
    bytes_before: int  #: size of the partition file
    bytes_after: int  #: size of the archive


def repack(
    source: Path, target: Path, *, portable: bool = False, on_progress: OnStep | None = None
) -> tuple[Repacked, ...]:
    """Copy a data directory or one partition file into a compact archive; writers of the original go on meanwhile.

    The archive appears under its name once it is complete, is verified itself, and equals the original as of the moment
    when it was read.

    Args:
        source: a data directory, or one partition file.
        target: the directory, or the file, to make.
        portable: for old and small readers: HDF5 1.8, without user block and opaque types.
        on_progress: called with what is being done and the fraction of the whole that is done.

    Raises CorpusExistsError: *target* exists; CorpusNotFoundError: there is no corpus at *source*, or no directory for
    *target*; CorpusFormatError: the original is damaged; nothing was written; CorpusIOError: the system refused.
    """
    with open_corpus(source) as corpus:
        paths = corpus.paths
        for missing in corpus.missing:
            raise CorpusFormatError(f"nothing was archived: {missing.error}; restore it from a backup")
    if os.path.lexists(target):
        raise CorpusExistsError(f"{target} exists: name a new file or directory for the archive")
    if not target.parent.is_dir():
        raise CorpusNotFoundError(f"there is no directory {target.parent}")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.new")
    steps = _Steps(paths, on_progress, portable=portable)
    with system_errors(f"write {target}"):
        try:
            if source.is_file() and source in paths:
                done = [_repack_partition(source, temporary, steps)]
            else:
                temporary.mkdir(_DIRECTORY_MODE)
                done = [_repack_partition(path, temporary / path.name, steps) for path in paths]
                write_index(temporary)
            _publish(temporary, target)
        finally:
            _remove(temporary)
    return tuple(done)


def _repack_partition(source: Path, target: Path, steps: _Steps) -> Repacked:
    with Corpus([source]) as original:
        report, problems = verify_partition(original, on_progress=lambda now: steps.report("verifying", now.fraction))
        _refuse(problems, f"{source.name} has a problem, so nothing was archived")
        (info,) = original.partitions
        with _writing(target):
            _copy(original, info, target, steps)
        with Corpus([target]) as copy:
            step = "verifying the copy of"
            _, problems = verify_partition(copy, on_progress=lambda now: steps.report(step, now.fraction))
            _refuse(problems, f"the copy of {source.name} is damaged, and was dropped")
            difference = first_difference(original, copy, lambda fraction: steps.report("comparing", fraction))
        if difference is not None:
            raise CorpusFormatError(f"the copy of {source.name} differs, and was dropped: {difference}")
    steps.next_file()
    assert report is not None
    return Repacked(
        file=source.name,
        consultations=report.consultations,
        events=report.events,
        bytes_before=source.stat().st_size,
        bytes_after=target.stat().st_size,
    )


def _copy(original: Corpus, info: PartitionInfo, target: Path, steps: _Steps) -> None:
    uuid = uuid4()
    attributes = Attributes(
        identity=info.identity,
        journal=str(uuid),
        begins=info.begins,
        committed=info.committed,
        committed_id=info.committed_id,
        events=info.events,
        conflicts=info.conflicts,
        archived=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE))
    libver, user_block = (PORTABLE_LIBVER, 0) if steps.portable else (LIBVER, USER_BLOCK)
    with h5py.File(target, "w", libver=libver, userblock_size=user_block) as file:
        write_attributes(file, attributes)
        writer = ArchiveWriter(file.create_group(CONSULTATIONS).id, portable=steps.portable)
        names = NameTree(DatasetPages(create_names(file.id, NAMES.encode())))
        for number, consultation in enumerate(original.values(), 1):
            writer.add(consultation)
            names.insert(consultation.id.encode())
            steps.report("copying", number / info.consultations)
        kept = ArchiveWriter(file.create_group(CONFLICTS).id, portable=steps.portable)
        for consultation in original.conflicts():
            kept.add(consultation)
    io = StorageIO()
    fd = os.open(target, os.O_RDWR | os.O_CLOEXEC)
    try:
        if not steps.portable:
            write_all(io, fd, new_user_block(uuid, archive=True), 0)
        io.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Turn the errors that h5py raises for failed writes into CorpusIOError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise CorpusIOError(f"cannot write {target.name}: {error}") from error


def _refuse(problems: list[CorpusProblem], what: str) -> None:
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CorpusFormatError(f"{what}: {problems[0]}{more}; `fiq verify` shows all")


def _publish(temporary: Path, target: Path) -> None:
    io = StorageIO()
    if temporary.is_dir():
        io.sync_directory(temporary)
        io.rename(temporary, target)  # refused if a directory with content appeared there meanwhile
    else:
        try:
            os.link(temporary, target)  # a rename would replace what appeared there meanwhile
        except FileExistsError:
            raise CorpusExistsError(f"{target} exists: name a new file or directory for the archive") from None
    io.sync_directory(target.parent)


def _remove(temporary: Path) -> None:
    if temporary.is_dir():
        shutil.rmtree(temporary)
    else:
        temporary.unlink(missing_ok=True)


class _Steps:
    """Reports how far the whole is: files by their size, the steps of each by the time that they take."""

    def __init__(self, paths: tuple[Path, ...], on_progress: OnStep | None, *, portable: bool) -> None:
        #: whether the archive is for old and small readers
        self.portable = portable
        self._files = [(path.name, path.stat().st_size) for path in paths]
        self._total = sum(size for _, size in self._files) or 1
        self._number = self._done_bytes = 0
        self._on_progress = on_progress

    def report(self, step: str, fraction: float) -> None:
        if self._on_progress is not None:
            name, size = self._files[self._number]
            steps = list(_STEPS)
            share = sum(_STEPS[earlier] for earlier in steps[: steps.index(step)]) + _STEPS[step] * min(1.0, fraction)
            self._on_progress(f"{step} {name}", (self._done_bytes + share * size) / self._total)

    def next_file(self) -> None:
        self._done_bytes += self._files[self._number][1]
        self._number += 1


# -- Writes consultations into an archive, and compares an archive with its original ---------------------------------


class ArchiveWriter:
    """Copies consultations into a group.

    Args:
        group: low-level id of the group that takes them.
        portable: for old and small readers.
    """

    def __init__(self, group: Any, *, portable: bool) -> None:
        self._group = group
        self._row_type = h5t.py_create(PORTABLE_EVENT_DTYPE if portable else EVENT_DTYPE)
        #: datasets of up to this many bytes are not chunked: the chunk index of HDF5 1.8 takes 2 KB
        self._whole = _WHOLE_BYTES if portable else 0

    def add(self, consultation: Consultation) -> None:
        """Copy one consultation, slice by slice."""
        group = h5g.create(self._group, consultation.id.encode())
        # shuffled: bytes of the same field are together, and numbers that rise slowly compress well
        rows, size = len(consultation), consultation.payload_bytes
        chunk = 0 if rows * EVENT_DTYPE.itemsize <= self._whole else _EVENTS_CHUNK
        _write(group, EVENTS, self._row_type, rows, chunk, _tables(consultation), shuffle=True)
        chunk = 0 if size <= self._whole else _PAYLOAD_CHUNK
        _write(group, PAYLOAD, h5t.STD_U8LE, size, chunk, _lines(consultation))


def first_difference(original: Corpus, copy: Corpus, on_progress: Callable[[float], None]) -> str | None:
    """Return what differs first between two corpora of one partition file each; None when they hold the same."""
    ours, theirs = original.partitions[0], copy.partitions[0]
    for field in ("identity", "committed", "committed_id", "consultations", "events", "conflicts"):
        if getattr(ours, field) != getattr(theirs, field):
            return f"{field} is {getattr(theirs, field)}, not {getattr(ours, field)}"
    for number, consultation in enumerate(original.values(), 1):
        if consultation.id not in copy:
            return f"{consultation.id} is missing"
        if not _equal(consultation, copy[consultation.id]):
            return f"{consultation.id} has other events"
        on_progress(number / ours.consultations)
    for kept, copied in zip(original.conflicts(), copy.conflicts(), strict=True):
        if kept.id != copied.id or not _equal(kept, copied):
            return f"{kept.id} has other conflicts"
    return None


def _equal(first: Consultation, second: Consultation) -> bool:
    if (len(first), first.payload_bytes) != (len(second), second.payload_bytes):
        return False
    tables = zip(_tables(first), _tables(second), strict=True)
    lines = zip(_lines(first), _lines(second), strict=True)
    return all(one.tobytes() == other.tobytes() for one, other in tables) and all(
        np.array_equal(one, other) for one, other in lines
    )


def _tables(consultation: Consultation) -> Iterator[npt.NDArray[Any]]:
    for start in range(0, len(consultation), _ROWS):
        yield consultation.table(start, start + _ROWS)


def _lines(consultation: Consultation) -> Iterator[npt.NDArray[Any]]:
    length = consultation.payload_bytes
    for start in range(0, length, _BYTES):
        yield consultation.lines(start, min(start + _BYTES, length))


def _write(
    group: Any,
    name: str,
    kind: Any,
    length: int,
    chunk: int,
    pieces: Iterator[npt.NDArray[Any]],
    *,
    shuffle: bool = False,
) -> None:
    space = h5s.create_simple((length,))
    dataset = h5d.create(group, name.encode(), kind, space, _plan(min(length, chunk), shuffle=shuffle))
    start = 0
    for piece in pieces:
        space.select_hyperslab((start,), (len(piece),))
        dataset.write(h5s.create_simple((len(piece),)), space, piece, kind)
        start += len(piece)


def _plan(chunk: int, *, shuffle: bool) -> Any:
    plan = h5p.create(h5p.DATASET_CREATE)
    if chunk:
        plan.set_chunk((chunk,))
        if shuffle:
            plan.set_shuffle()
        plan.set_deflate(_LEVEL)
    plan.set_fill_time(h5d.FILL_TIME_NEVER)
    plan.set_obj_track_times(False)
    return plan

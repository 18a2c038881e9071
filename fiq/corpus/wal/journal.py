"""The journal of a partition file, a write-ahead log, and the head of the file that ties the two together.

**The head of ``<pp>.h5``.** HDF5 leaves the first 16 KiB (the *user block*) to us; the HDF5 content starts after it,
where stock tools find it. All integers are little-endian::

    0      identity   magic, CRC, version, UUID of the pair; written once. A note in plain text follows at 512
    4096   state A    magic, CRC, link, generation, absorbed, target
    8192   state B    the same; they are written alternately, and the higher generation is valid

*absorbed* is the number of journal records that the file holds completely. While a checkpoint copies the next ones,
*target* is above *absorbed*, and the content is usable only together with the journal.

**The journal ``<pp>.h5.wal``**::

    0      slot A     magic, CRC, version, UUID of the pair, generation, start, number, link
    4096   slot B     the same; the higher generation is valid
    8192   records    each says where the next one is

The slot says where the first live record is. A checkpoint writes the other slot with a later start, and the room before
it is used again: when the front is free, an empty record, a *jump*, continues the journal there. So the journal is a
ring while checkpoints keep up, and grows at its end while they wait.

**A record** starts at a multiple of 4096 bytes, so that writing one never touches a block of another::

    0     header   80 bytes: magic, header CRC, body CRC, link, extents, number, count, next, file size, sectors, UUID
    80    table    16 bytes an extent: first sector u8, number of sectors u8; zeros up to a multiple of 512
          images   512 bytes a sector; zeros up to a multiple of 4096

The header CRC covers the header from the body CRC on, the body CRC the table with its zeros and the images. *link* is
the header CRC of the record before. *number* counts the records of the pair's whole life; a compacted record stands
for *count* of them. *next* is the byte offset of the next record.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self
from uuid import UUID

import numpy as np
import numpy.typing as npt

from fiq.corpus.errors import ArchivedFileError, CorpusFormatError, JournalError
from fiq.corpus.wal.storage import StorageIO, read_exactly, read_into, system_errors, write_all

#: size of the user block, bytes: three blocks of a disk with large sectors and one to spare (a power of two, as HDF5
#: wants)
USER_BLOCK = 16384
#: version of user block and journal
PAIR_VERSION = 2
#: bytes of a sector, the unit of the journal: what a disk writes whole or not at all
SECTOR = 512
#: records start at multiples of this, bytes
RECORD_ALIGNMENT = 4096
#: byte offset of the first record
RECORDS_START = 8192

Sectors = npt.NDArray[np.uint64]

_BLOCK = 4096
_IDENTITY = struct.Struct("<8sII16s")  # magic, CRC, version, UUID
_IDENTITY_MAGIC = b"FIQHDF5\0"
_STATE = struct.Struct("<8sIIQQQ")  # magic, CRC, link, generation, absorbed, target
_STATE_MAGIC = b"FIQSTATE"
_SLOT = struct.Struct("<8sII16sQQQI")  # magic, CRC, version, UUID, generation, start, number, link
_SLOT_MAGIC = b"FIQWAL\0\0"
_HEADER = struct.Struct("<8sIIIIQQQQQ16s")
_RECORD_MAGIC = b"FIQRECRD"
#: every CRC covers what comes after it and the magic
_SEALED_FROM = 12
_READ_BYTES = 4 << 20
#: bytes of images that are held in memory at once
SLAB_BYTES = 1 << 20

#: the first bytes of HDF5's superblock
_HDF5 = b"\x89HDF\r\n\x1a\n"
_ARCHIVE_MARK_AT, _ARCHIVE_MARK = 256, b"FIQARCHV"
_NOTE_AT, _NOTE_END = 512, 4096
_NOTE = (
    b"fiq corpus partition file. Its HDF5 content starts at byte 16384: open it read-only, with any HDF5 tool.\n"
    b"The newest commits may still be in the journal beside it (.h5.wal): keep the two together.\n"
)
_ARCHIVE_NOTE = (
    b"fiq corpus archive. Its HDF5 content starts at byte 16384: open it read-only, with any HDF5 tool.\n"
    b"It is complete: there is no journal beside it.\n"
)


def _sealed(packed: bytes) -> bytes:
    return packed[:8] + struct.pack("<I", zlib.crc32(packed[_SEALED_FROM:])) + packed[_SEALED_FROM:]


def _is_sealed(raw: bytes, magic: bytes) -> bool:
    return raw[:8] == magic and raw[8:12] == struct.pack("<I", zlib.crc32(raw[_SEALED_FROM:]))


# -- The user block ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AbsorbedState:
    """How far the partition file has absorbed its journal."""

    generation: int  #: counts the states written; odd ones are in slot B
    absorbed: int  #: number of journal records that the content holds
    target: int  #: number that it will hold after the running checkpoint; equal to *absorbed* when none runs
    link: int  #: header CRC of the last absorbed record (0: none yet); shows whether two histories diverged


def new_user_block(uuid: UUID, *, archive: bool = False) -> bytes:
    """Return the user block of a new file, or of an archive, which is complete without a journal."""
    block = bytearray(USER_BLOCK)
    block[: _IDENTITY.size] = _sealed(_IDENTITY.pack(_IDENTITY_MAGIC, 0, PAIR_VERSION, uuid.bytes))
    note = _ARCHIVE_NOTE if archive else _NOTE
    block[_NOTE_AT : _NOTE_AT + len(note)] = note
    if archive:
        block[_ARCHIVE_MARK_AT : _ARCHIVE_MARK_AT + len(_ARCHIVE_MARK)] = _ARCHIVE_MARK
    block[_BLOCK : _BLOCK + _STATE.size] = _packed_state(AbsorbedState(0, 0, 0, 0))
    return bytes(block)


def is_plain(fd: int) -> bool:
    """Return whether the file has no user block, as an archive for small readers."""
    return os.pread(fd, len(_HDF5), 0) == _HDF5


def read_uuid(fd: int, name: str) -> UUID:
    """Return the UUID of the pair that the file belongs to.

    Raises CorpusFormatError: it is no partition file, or one of another version.
    """
    head = read_exactly(fd, _IDENTITY.size, 0)
    if not _is_sealed(head, _IDENTITY_MAGIC):
        raise CorpusFormatError(f"{name} is not a partition file of a fiq corpus: its first 32 bytes differ")
    _, _, version, uuid = _IDENTITY.unpack(head)
    if version != PAIR_VERSION:
        raise CorpusFormatError(f"{name} has version {version} of the format, this program reads {PAIR_VERSION} only")
    return UUID(bytes=uuid)


def read_state(fd: int, name: str) -> AbsorbedState:
    """Return the newest state of the file. Raises CorpusFormatError: both slots are damaged."""
    states = []
    for offset in (_BLOCK, 2 * _BLOCK):
        raw = read_exactly(fd, _STATE.size, offset)
        if _is_sealed(raw, _STATE_MAGIC):
            _, _, link, generation, absorbed, target = _STATE.unpack(raw)
            states.append(AbsorbedState(generation, absorbed, target, link))
    if not states:
        raise CorpusFormatError(f"{name}: both state slots of the user block are damaged; restore the file")
    return max(states, key=lambda state: state.generation)


def write_state(io: StorageIO, fd: int, state: AbsorbedState) -> None:
    """Write *state* into its slot; the caller syncs."""
    write_all(io, fd, _packed_state(state), _BLOCK * (1 + state.generation % 2))


def _packed_state(state: AbsorbedState) -> bytes:
    return _sealed(_STATE.pack(_STATE_MAGIC, 0, state.link, state.generation, state.absorbed, state.target))


def refuse_archive(path: Path) -> None:
    """Raise ArchivedFileError if *path* is an archive; CorpusIOError: the system refused."""
    with system_errors(f"open {path.name}"):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            archived = is_plain(fd) or os.pread(fd, len(_ARCHIVE_MARK), _ARCHIVE_MARK_AT) == _ARCHIVE_MARK
        finally:
            os.close(fd)
    if archived:
        raise ArchivedFileError(
            f"{path.name} is an archive that `fiq repack` made, which is read-only: "
            "put back the partition file and journal that it was made from"
        )


# -- Slots and records ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RecordPosition:
    """Where a record belongs."""

    number: int  #: of the record
    link: int  #: header CRC of the record before it; 0 for the first of all
    offset: int  #: bytes from the start of the journal


@dataclass(frozen=True, slots=True)
class Extents:
    """The sectors of one record."""

    table: Sectors  #: shape (n, 2): first sector and number of sectors of each run, in rising order
    images: int  #: byte offset in the journal of the images of these sectors, one after another

    def sectors(self) -> Sectors:
        """Return the number of every sector, in the order of the images."""
        starts, counts = self.table[:, 0], self.table[:, 1]
        ends = np.cumsum(counts)
        total = int(ends[-1]) if len(ends) else 0
        numbers: Sectors = np.arange(total, dtype=np.uint64)
        numbers += np.repeat(starts - (ends - counts), counts.astype(np.int64))
        return numbers


@dataclass(frozen=True, slots=True)
class JournalRecord:
    """One whole record."""

    number: int
    count: int  #: how many records it stands for; more than one after a compaction
    link: int  #: its header CRC, which the next record refers to
    file_size: int  #: size of the partition file after the record, bytes
    extents: Extents  #: what it changes
    offset: int  #: byte offset of its start
    end: int  #: byte offset of its end
    next: int  #: byte offset of the next record: *end*, or elsewhere after a jump

    @property
    def length(self) -> int:
        """Bytes that it takes in the journal."""
        return self.end - self.offset

    @property
    def next_position(self) -> RecordPosition:
        """Where the next record belongs."""
        return RecordPosition(self.number + self.count, self.link, self.next)


class LiveRecords(NamedTuple):
    """The live part of a journal."""

    generation: int  #: of the valid slot
    start: RecordPosition  #: where the records begin
    records: list[JournalRecord]  #: oldest first
    torn: bool = False  #: whether a record after them was dropped that a crash had cut short

    @property
    def next(self) -> RecordPosition:
        """Where the next record belongs."""
        return self.records[-1].next_position if self.records else self.start


def write_record(
    io: StorageIO,
    fd: int,
    uuid: UUID,
    at: RecordPosition,
    file_size: int,
    table: Sectors,
    images: Iterable[memoryview],
    *,
    count: int = 1,
    jump: int | None = None,
) -> JournalRecord:
    """Write a record; the caller syncs.

    Args:
        at: where it belongs.
        file_size: size of the partition file once it is applied, bytes.
        table: the runs of sectors that it changes.
        images: their content, in pieces of whole sectors; each is used before the next one is taken.
        count: how many records it stands for.
        jump: byte offset of the next record; None: right after this one.
    """
    body = _padded_table(table)
    first_image = offset = at.offset + _HEADER.size + len(body)
    crc = zlib.crc32(body)
    for image in images:
        crc = zlib.crc32(image, crc)
        offset = write_all(io, fd, image, offset)
    end = _aligned(offset, RECORD_ALIGNMENT)
    following = end if jump is None else jump
    numbers = (len(table), at.number, count, following, file_size, (offset - first_image) // SECTOR)
    header = _sealed(_HEADER.pack(_RECORD_MAGIC, 0, crc, at.link, *numbers, uuid.bytes))
    write_all(io, fd, bytes(end - offset), offset)
    # the header goes last: without it the record does not count
    write_all(io, fd, header + body, at.offset)
    link = zlib.crc32(header[_SEALED_FROM:])
    return JournalRecord(at.number, count, link, file_size, Extents(table, first_image), at.offset, end, following)


def _padded_table(table: Sectors) -> bytes:
    content = table.tobytes()
    return content.ljust(_aligned(_HEADER.size + len(content), SECTOR) - _HEADER.size, b"\0")


def _aligned(length: int, unit: int) -> int:
    return length + -length % unit


def empty_journal(uuid: UUID, *, generation: int = 1, number: int = 0, link: int = 0) -> bytes:
    """Return the content of a journal without records, whose first one will have *number*; *generation* is odd."""
    slot = _packed_slot(uuid, generation, RecordPosition(number, link, RECORDS_START))
    return bytes(_BLOCK) + slot.ljust(_BLOCK, b"\0")


def write_start(io: StorageIO, fd: int, uuid: UUID, generation: int, start: RecordPosition) -> None:
    """Write the slot of a *generation*: the live records begin at *start*; the caller syncs."""
    write_all(io, fd, _packed_slot(uuid, generation, start), _BLOCK * (generation % 2))


def _packed_slot(uuid: UUID, generation: int, start: RecordPosition) -> bytes:
    where = (start.offset, start.number, start.link)
    return _sealed(_SLOT.pack(_SLOT_MAGIC, 0, PAIR_VERSION, uuid.bytes, generation, *where))


class Journal:
    """The writer's side of a journal: appends records, and reuses the room of those that a checkpoint has copied.

    Args:
        fd: descriptor of the journal.
        live: its live part.
        wrap_bytes: size from which the journal continues at its front when that is free.
    """

    def __init__(self, fd: int, io: StorageIO, uuid: UUID, live: LiveRecords, *, wrap_bytes: int) -> None:
        self.fd = fd
        #: of the valid slot
        self.generation = live.generation
        #: the live records, oldest first
        self.records = list(live.records)
        #: bytes of them
        self.bytes_live = sum(record.length for record in live.records)
        self._io = io
        self._uuid = uuid
        self._wrap_bytes = wrap_bytes
        self._next = live.next
        self._ceiling = self._find_ceiling()

    def append(self, file_size: int, table: Sectors, images: Iterable[memoryview]) -> JournalRecord:
        """Write one record and make it durable: after the return it survives a power cut. Arguments as of
        :func:`write_record`.

        Raises OSError: the system refused; whether the record counts is known only after the journal is read again.
        """
        length = _aligned(_HEADER.size + table.nbytes, SECTOR) + SECTOR * int(table[:, 1].sum())
        offset = self._offset_for(_aligned(length, RECORD_ALIGNMENT))
        if offset != self._next.offset:
            # durable before what comes after it, or a torn record could not be told from a damaged one
            self._write(file_size, table[:0], (), jump=offset)
            self._ceiling = self._find_ceiling()
        return self._write(file_size, table, images)

    def release(self, records: int, generation: int) -> None:
        """Forget the first *records* live ones: the slot of *generation*, which is durable, starts after them."""
        self.generation = generation
        self.bytes_live -= sum(record.length for record in self.records[:records])
        del self.records[:records]
        self._ceiling = self._find_ceiling()

    def shrink(self, size: int) -> None:
        """Truncate the journal to *size*, or to its last live record. Raises OSError: the system refused."""
        size = max(size, self._top())
        if os.fstat(self.fd).st_size > size:
            self._io.truncate(self.fd, size)

    def _write(
        self, file_size: int, table: Sectors, images: Iterable[memoryview], *, jump: int | None = None
    ) -> JournalRecord:
        record = write_record(self._io, self.fd, self._uuid, self._next, file_size, table, images, jump=jump)
        self._io.fdatasync(self.fd)
        self.records.append(record)
        self._next = record.next_position
        self.bytes_live += record.length
        return record

    def _offset_for(self, length: int) -> int:
        """Return where a record of *length* bytes goes: next in line, at the front, or after everything live."""
        at = self._next.offset
        if self._ceiling is not None:
            # after a record there must always be room for a jump
            return at if at + length + RECORD_ALIGNMENT <= self._ceiling else self._top()
        free = min((record.offset for record in self.records), default=at) - RECORDS_START
        if at + length > self._wrap_bytes and free >= max(length + RECORD_ALIGNMENT, self._wrap_bytes // 4):
            return RECORDS_START
        return at

    def _top(self) -> int:
        return max((record.end for record in self.records), default=self._next.offset)

    def _find_ceiling(self) -> int | None:
        """Return the first live byte after the next record's offset; None when there is none."""
        return min((record.offset for record in self.records if record.offset >= self._next.offset), default=None)


# -- The newest image of each sector ----------------------------------------------------------------------------------


class SectorIndex:
    """Sorted sector numbers, each with the byte offset of its newest image in the journal."""

    def __init__(self, sectors: Sectors, offsets: Sectors) -> None:
        self.sectors = sectors
        self.offsets = offsets

    @classmethod
    def of(cls, records: Sequence[Extents]) -> Self:
        """Build the index of *records*, given from the oldest to the newest."""
        return cls(np.empty(0, np.uint64), np.empty(0, np.uint64)).with_newer(records)

    def with_newer(self, records: Sequence[Extents]) -> Self:
        """Return the index of this one's sectors and of newer *records*, from the oldest to the newest."""
        if not records:
            return self
        numbers, offsets = [self.sectors], [self.offsets]
        for record in records:
            numbers.append(record.sectors())
            offsets.append(np.arange(len(numbers[-1]), dtype=np.uint64) * np.uint64(SECTOR) + np.uint64(record.images))
        # unique() keeps the first of equals: newest first. All are sorted in themselves, so they are only merged
        newest, chosen = np.unique(np.concatenate(numbers)[::-1], return_index=True)
        return type(self)(newest, np.concatenate(offsets)[::-1][chosen])

    def __len__(self) -> int:
        return len(self.sectors)

    def table(self) -> Sectors:
        """Return the runs of neighbouring sectors: shape (n, 2), first sector and number of sectors."""
        return runs_of(self.sectors)

    def patch(self, journal: int, offset: int, out: memoryview) -> None:
        """Lay the images in the *journal* over *out*, which holds the file's bytes from *offset* on."""
        end = offset + len(out)
        # of the same type: else numpy turns the whole index into floats first
        bounds = np.array((offset // SECTOR, -(-end // SECTOR)), np.uint64)
        first, last = self.sectors.searchsorted(bounds).tolist()
        for sector, image in zip(self.sectors[first:last].tolist(), self.offsets[first:last].tolist(), strict=True):
            start = sector * SECTOR
            low, high = max(start, offset), min(start + SECTOR, end)
            read_into(journal, out[low - offset : high - offset], image + low - start)

    def runs(self, journal: int) -> Iterator[tuple[int, memoryview]]:
        """Yield (byte offset in the file, content) of every run of neighbouring sectors, in rising order."""
        step = SLAB_BYTES // SECTOR
        for low in range(0, len(self), step):
            sectors, offsets = self.sectors[low : low + step], self.offsets[low : low + step]
            images = memoryview(bytearray(len(sectors) * SECTOR))
            for first, last in _neighbours(offsets, SECTOR):
                read_into(journal, images[first * SECTOR : last * SECTOR], int(offsets[first]))
            for first, last in _neighbours(sectors, 1):
                yield int(sectors[first]) * SECTOR, images[first * SECTOR : last * SECTOR]


def runs_of(sectors: Sectors) -> Sectors:
    """Return the runs of neighbours among rising *sectors*: shape (n, 2), first sector and number of sectors."""
    if not len(sectors):  # a commit that changes the size only
        return np.empty((0, 2), np.uint64)
    breaks = np.flatnonzero(np.diff(sectors) != 1) + 1
    starts = np.concatenate(([0], breaks))
    ends = np.concatenate((breaks, [len(sectors)]))
    return np.stack((sectors[starts], (ends - starts).astype(np.uint64)), axis=1)


def _neighbours(numbers: Sectors, step: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the stretches in which *numbers* rise by *step*."""
    breaks = (np.flatnonzero(np.diff(numbers) != step) + 1).tolist()
    return zip([0, *breaks], [*breaks, len(numbers)], strict=True)


# -- Reading a journal, and telling a torn tail from damage -----------------------------------------------------------


def read_journal(fd: int, uuid: UUID, state: AbsorbedState, name: str) -> LiveRecords:
    """Read the live records of a journal and check that they continue the partition file.

    Args:
        uuid: the UUID that the partition file states.
        state: what the partition file says it has absorbed.
        name: of the journal, for messages.

    Raises JournalError: the journal is damaged, of another file, or older or newer than the file.
    """
    generation, start = _read_start(fd, uuid, name)
    records, torn = _read_records(fd, uuid, start, name)
    live = LiveRecords(generation, start, records, torn)
    end = live.next.number
    if state.absorbed < start.number:
        raise JournalError(
            f"{name} starts with record {start.number} but the file has only the first {state.absorbed}: the file is "
            "older than its journal; restore both from the same backup, or move the journal away to go on from the file"
        )
    if max(state.target, state.absorbed) > end:
        raise JournalError(
            f"{name} ends before record {end} but the file has taken {state.target}: the journal is older than the "
            "file, or was cut; restore both from the same backup"
        )
    links = {start.number: start.link} | {record.number + record.count: record.link for record in records}
    if links.get(state.absorbed) != state.link:
        raise JournalError(
            f"{name} and its file share their UUID but not their history: restore both from the same backup"
        )
    return live


def _read_start(fd: int, uuid: UUID, name: str) -> tuple[int, RecordPosition]:
    found = []
    for offset in (0, _BLOCK):
        raw = read_exactly(fd, _SLOT.size, offset)
        if _is_sealed(raw, _SLOT_MAGIC):
            _, _, version, owner, generation, start, number, link = _SLOT.unpack(raw)
            if version != PAIR_VERSION:
                raise JournalError(
                    f"{name} has version {version} of the format, this program reads {PAIR_VERSION} only"
                )
            found.append((generation, RecordPosition(number, link, start), UUID(bytes=owner)))
    if not found:
        raise JournalError(
            f"{name} is not a journal, or both its headers are damaged: put back the journal that belongs to the file"
        )
    generation, position, owner = max(found, key=lambda slot: slot[0])
    if owner != uuid:
        raise JournalError(
            f"{name} belongs to another file (UUID {owner}, this one has {uuid}): "
            "files and journals were swapped; put each journal back beside its own file"
        )
    return generation, position


def _read_records(fd: int, uuid: UUID, position: RecordPosition, name: str) -> tuple[list[JournalRecord], bool]:
    """Read the whole records from *position* on; return them, and whether a torn one was dropped after them.

    A torn record was never acknowledged, so dropping it loses nothing. A damaged one that a whole later one follows is
    not a torn tail: records are written one after another, each durable before the next.
    """
    records: list[JournalRecord] = []
    while True:
        found = list(_whole_records(fd, uuid, position))
        records += found
        position = found[-1].next_position if found else position
        if not _has_later_record(fd, uuid, position):
            break
        # a writer at work may have finished this record and others since it was read
        if next(_whole_records(fd, uuid, position), None) is None:
            raise JournalError(
                f"{name}: record {position.number} at byte {position.offset} is damaged though a later one is whole; "
                "commits would be lost silently if it were skipped: restore the file and its journal from a backup"
            )
    raw = os.pread(fd, _HEADER.size, position.offset)
    header = _parse(raw)
    # anything else at this offset is of an earlier round
    return records, raw[:8] == _RECORD_MAGIC and (header is None or header.number == position.number)


@dataclass(frozen=True, slots=True)
class _Header:
    crc: int
    body_crc: int
    link: int
    extents: int
    number: int
    count: int
    next: int
    file_size: int
    sectors: int
    uuid: bytes

    @property
    def images(self) -> int:
        """Bytes from the start of the record to its images."""
        return _aligned(_HEADER.size + 16 * self.extents, SECTOR)

    @property
    def length(self) -> int:
        """Bytes from the start of the record to the end of its images."""
        return self.images + SECTOR * self.sectors


def _parse(raw: bytes) -> _Header | None:
    if len(raw) < _HEADER.size or not _is_sealed(raw, _RECORD_MAGIC):
        return None
    return _Header(*_HEADER.unpack(raw)[1:])


def _whole_records(fd: int, uuid: UUID, position: RecordPosition) -> Iterator[JournalRecord]:
    size = os.fstat(fd).st_size
    while True:
        header = _parse(os.pread(fd, _HEADER.size, position.offset))
        expected = (position.link, position.number, uuid.bytes)
        if header is None or (header.link, header.number, header.uuid) != expected:
            return
        if not _has_whole_body(fd, header, position.offset, size):
            return
        raw = os.pread(fd, 16 * header.extents, position.offset + _HEADER.size)
        table = np.frombuffer(raw, "<u8").astype(np.uint64).reshape(-1, 2)
        record = JournalRecord(
            number=header.number,
            count=header.count,
            link=header.crc,
            file_size=header.file_size,
            extents=Extents(table, position.offset + header.images),
            offset=position.offset,
            end=position.offset + _aligned(header.length, RECORD_ALIGNMENT),
            next=header.next,
        )
        yield record
        position = record.next_position


def _has_whole_body(fd: int, header: _Header, offset: int, size: int) -> bool:
    crc, at, end = 0, offset + _HEADER.size, offset + header.length
    while at < end <= size:
        piece = os.pread(fd, min(_READ_BYTES, end - at), at)
        if not piece:
            return False
        crc, at = zlib.crc32(piece, crc), at + len(piece)
    return end <= size and crc == header.body_crc


def _has_later_record(fd: int, uuid: UUID, position: RecordPosition) -> bool:
    """Return whether a whole record with a number above that of *position* is anywhere in the journal."""
    size = os.fstat(fd).st_size
    for base in range(RECORDS_START, size, _READ_BYTES):
        block = os.pread(fd, _READ_BYTES, base)
        for within in range(0, len(block), RECORD_ALIGNMENT):
            if block[within : within + 8] != _RECORD_MAGIC:
                continue
            header = _parse(os.pread(fd, _HEADER.size, base + within))
            if (
                header is not None
                and header.number > position.number
                and header.uuid == uuid.bytes
                and _has_whole_body(fd, header, base + within, size)
            ):
                return True
    return False


def journal_path(path: Path) -> Path:
    """Return the path of the journal of the partition file at *path*."""
    return path.with_name(path.name + ".wal")

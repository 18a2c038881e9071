"""The journal beside a partition file: ``<pp>.h5.wal``.

::

    0      slot A   magic, CRC, version, UUID of the pair, turn, start, number, link
    4096   slot B   the same; the one with the higher turn counts
    8192   records  see journal_records

The slots say where the first live record lies. A checkpoint moves it on by writing the other slot, and the room before
it is used again: when the front is free, an empty record sends the chain back there. So the journal is a ring while
checkpoints keep up, and grows at its end while they wait.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from uuid import UUID

import numpy as np

from fiq.corpus.errors import JournalError
from fiq.corpus.wal.overlay import SECTOR, Extents, Sectors
from fiq.corpus.wal.pair import PAIR_VERSION, State
from fiq.corpus.wal.storage import StorageIO, read_exactly, write_all

#: records start at multiples of this, bytes
RECORD_ALIGNMENT = 4096

#: how a record begins
MAGIC = b"FIQRECRD"
_HEADER = struct.Struct("<8sIIIIQQQQQ16s")
#: bytes of a header, behind which the table lies
HEADER_BYTES = _HEADER.size
_SEALED_FROM = 12
#: byte offset of the first record
RECORDS_START = 8192

_READ_BYTES = 4 << 20
_BLOCK = 4096
_MAGIC = b"FIQWAL\0\0"
_SLOT = struct.Struct("<8sII16sQQQI")  # magic, CRC of what follows it, version, UUID, turn, start, number, link
_CRC_END = 12


# -- The records of a journal: their fields, and how one is built ----------------------------------------------------
#
# A record starts at a multiple of 4096 bytes, so that writing one never touches a block of another::
#
#     0     header   80 bytes: magic, header CRC, body CRC, link, extents, number, count, next, file size, sectors, UUID
#     80    table    16 bytes an extent: first sector u8, number of sectors u8; zeros up to a multiple of 512
#           images   512 bytes a sector
#           zeros up to a multiple of 4096
#
# The header CRC covers the header from the body CRC on, the body CRC the table with its zeros and the images. *link* is
# the header CRC of the record before. *number* counts the records of the pair's whole life; a compacted record stands
# for *count* of them. *next* is where the record behind it belongs.


@dataclass(frozen=True, slots=True)
class Position:
    """Where in a journal the next record belongs.

    Attributes:
        number: number of the record.
        link: header CRC of the record before it; 0 for the first of all.
        offset: bytes from the start of the journal.
    """

    number: int
    link: int
    offset: int


@dataclass(frozen=True, slots=True)
class JournalRecord:
    """One whole record, as found in a journal.

    Attributes:
        number: its number.
        count: how many records it stands for; more than one after a compaction.
        link: its header CRC, which the next record refers to.
        file_size: size of the partition file once the record is applied, bytes.
        extents: what it changes.
        offset: where it begins, bytes from the start of the journal.
        end: byte offset behind it.
        next: byte offset of the next record: *end*, or elsewhere when the journal turns.
    """

    number: int
    count: int
    link: int
    file_size: int
    extents: Extents
    offset: int
    end: int
    next: int

    @property
    def behind(self) -> Position:
        """Where the next record belongs."""
        return Position(self.number + self.count, self.link, self.next)


@dataclass(frozen=True, slots=True)
class Header:
    """What the first bytes of a record say.

    Attributes:
        crc: CRC of the header itself.
        body_crc: CRC of what follows.
        link: header CRC of the record before.
        extents: rows of the table.
        number: number of the record.
        count: how many records it stands for.
        next: byte offset of the next record.
        file_size: size of the partition file afterwards, bytes.
        sectors: images that follow.
        uuid: of the pair, 16 bytes.
    """

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
    def table_end(self) -> int:
        """Bytes from the start of the record to its images."""
        return aligned(HEADER_BYTES + 16 * self.extents, SECTOR)

    @property
    def length(self) -> int:
        """Bytes from the start of the record to the end of its images."""
        return self.table_end + SECTOR * self.sectors


def parse(raw: bytes) -> Header | None:
    """Read the header at the beginning of *raw*; None when it is none, or damaged."""
    if len(raw) < HEADER_BYTES:
        return None
    magic, crc, *rest = _HEADER.unpack_from(raw)
    if magic != MAGIC or crc != zlib.crc32(raw[_SEALED_FROM:HEADER_BYTES]):
        return None
    return Header(crc, *rest)


def encode_jump(uuid: UUID, position: Position, file_size: int, target: int) -> tuple[bytes, JournalRecord]:
    """Build an empty record for *position* behind which the journal goes on at the byte offset *target*."""
    table: Sectors = np.empty((0, 2), np.uint64)
    body = padded_table(table)
    header, record = seal(uuid, position, file_size, table, 0, zlib.crc32(body), target=target)
    return (header + body).ljust(RECORD_ALIGNMENT, b"\0"), record


def seal(
    uuid: UUID,
    position: Position,
    file_size: int,
    table: Sectors,
    sectors: int,
    body_crc: int,
    *,
    count: int = 1,
    target: int | None = None,
) -> tuple[bytes, JournalRecord]:
    """Build the header of a record for *position*.

    Args:
        sectors: how many the images are.
        body_crc: CRC of the padded table and the images.
        count: how many records it stands for.
        target: where the next record goes; None: right behind it.

    Returns:
        The header, and the record as a scan would find it.
    """
    images = position.offset + aligned(HEADER_BYTES + table.nbytes, SECTOR)
    end = aligned(images + SECTOR * sectors, RECORD_ALIGNMENT)
    target = end if target is None else target
    sealed = _HEADER.pack(
        MAGIC,
        0,
        body_crc,
        position.link,
        len(table),
        position.number,
        count,
        target,
        file_size,
        sectors,
        uuid.bytes,
    )
    crc = zlib.crc32(sealed[_SEALED_FROM:])
    header = sealed[:8] + struct.pack("<I", crc) + sealed[_SEALED_FROM:]
    extents = Extents(table, images)
    return header, JournalRecord(position.number, count, crc, file_size, extents, position.offset, end, target)


def padded_table(table: Sectors) -> bytes:
    """Return what lies between a record's header and its images."""
    content = table.tobytes()
    return content.ljust(aligned(HEADER_BYTES + len(content), SECTOR) - HEADER_BYTES, b"\0")


def aligned(length: int, unit: int) -> int:
    """Round *length* up to a multiple of *unit*."""
    return length + -length % unit


def new_journal(uuid: UUID) -> bytes:
    """Return the content of the journal of a new file."""
    return slots(uuid, 1, Position(number=0, link=0, offset=RECORDS_START))


def slots(uuid: UUID, turn: int, start: Position) -> bytes:
    """Return the head of a journal whose only slot has an odd *turn*."""
    return bytes(_BLOCK) + _packed(uuid, turn, start).ljust(_BLOCK, b"\0")


def write_start(io: StorageIO, fd: int, uuid: UUID, turn: int, start: Position) -> None:
    """Write the slot of a *turn*, so that *start* is where the live records begin; the caller syncs."""
    write_all(io, fd, _packed(uuid, turn, start), _BLOCK * (turn % 2))


def read_start(fd: int, uuid: UUID, name: str) -> tuple[int, Position]:
    """Return the turn of a journal and where its live records begin.

    Args:
        uuid: the UUID that the partition file states.

    Raises JournalError: it is no journal, or that of another file.
    """
    found = [slot for offset in (0, _BLOCK) if (slot := _unpacked(read_exactly(fd, _SLOT.size, offset), name))]
    if not found:
        raise JournalError(
            f"{name} is no journal, or both its headers are damaged: put the journal back that belongs to the file"
        )
    owner, turn, position = max(found, key=lambda slot: slot[1])
    if owner != uuid:
        raise JournalError(
            f"{name} belongs to another file (UUID {owner}, this one has {uuid}): "
            "files and journals were swapped; put each journal back beside its own file"
        )
    return turn, position


def read_records(fd: int, uuid: UUID, state: State, name: str) -> tuple[Position, list[JournalRecord], bool]:
    """Read the live records of a journal and check that they continue the file.

    Args:
        state: what the partition file says it has absorbed.

    Returns:
        Where the records begin, the records, and whether a torn one was dropped.

    Raises JournalError: the journal is damaged, of another file, or older or newer than the file.
    """
    _, start = read_start(fd, uuid, name)
    records, torn = scan(fd, uuid, start, name)
    end = records[-1].behind.number if records else start.number
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
    links = {start.number: start.link} | {record.behind.number: record.link for record in records}
    if links.get(state.absorbed) != state.link:
        raise JournalError(
            f"{name} and its file share their UUID but not their history: restore both from the same backup"
        )
    return start, records, torn


class Journal:
    """The writer's side of a journal: appends records, takes note of what a checkpoint has made superfluous.

    Args:
        fd: descriptor of the journal.
        turn: of the slot that counts.
        start: where the live records begin.
        records: the live records.
        turn_bytes: size from which the journal goes back to its front when that is free.
    """

    def __init__(
        self,
        fd: int,
        io: StorageIO,
        uuid: UUID,
        turn: int,
        start: Position,
        records: Sequence[JournalRecord],
        *,
        turn_bytes: int,
    ) -> None:
        self.fd = fd
        self.turn = turn
        self._io = io
        self._uuid = uuid
        self._turn_bytes = turn_bytes
        #: the live records, oldest first
        self.records = list(records)
        #: where the next record belongs
        self.next = records[-1].behind if records else start
        self._bytes_live = sum(_length(record) for record in records)
        self._ceiling = self._find_ceiling()

    @property
    def bytes_live(self) -> int:
        """Bytes of the records that no checkpoint has copied yet."""
        return self._bytes_live

    def append(self, file_size: int, table: Sectors, images: Iterable[memoryview]) -> JournalRecord:
        """Write one record and make it durable; when this returns, it outlives a power cut.

        Args:
            file_size: size of the partition file once it is applied, bytes.
            table: the runs of sectors that it changes.
            images: their content, in pieces of whole sectors; each is used before the next one is taken.

        Raises OSError: the system refused; the record may or may not count, which only reading the journal anew tells.
        """
        sectors, body = int(table[:, 1].sum()), padded_table(table)
        length = aligned(HEADER_BYTES + len(body) + SECTOR * sectors, RECORD_ALIGNMENT)
        place = self._place(length)
        if place != self.next.offset:
            self._jump(place, file_size)
        crc, offset = zlib.crc32(body), self.next.offset + HEADER_BYTES + len(body)
        for image in images:
            crc = zlib.crc32(image, crc)
            offset = write_all(self._io, self.fd, image, offset)
        header, record = seal(self._uuid, self.next, file_size, table, sectors, crc)
        write_all(self._io, self.fd, bytes(record.end - offset), offset)
        # without its header the record does not count
        write_all(self._io, self.fd, header + body, record.offset)
        self._io.fdatasync(self.fd)
        self._take(record)
        return record

    def release(self, records: int) -> None:
        """Forget the first *records* live ones: the slot that is durable says so already."""
        self._bytes_live -= sum(_length(record) for record in self.records[:records])
        del self.records[:records]
        self._ceiling = self._find_ceiling()

    def shrink(self, size: int) -> None:
        """Give room behind the live records back to the disk, as far as the journal is larger than *size*.

        Raises OSError: the system refused.
        """
        size = max(size, self._top())
        if os.fstat(self.fd).st_size > size:
            self._io.truncate(self.fd, size)

    def _place(self, length: int) -> int:
        """Return where a record of *length* bytes goes: on, back to the front, or behind everything live."""
        at = self.next.offset
        if self._ceiling is not None:
            # behind a record there must always be room for a jump
            return at if at + length + RECORD_ALIGNMENT <= self._ceiling else self._top()
        free = min((record.offset for record in self.records), default=at) - RECORDS_START
        if at + length > self._turn_bytes and free >= max(length + RECORD_ALIGNMENT, self._turn_bytes // 4):
            return RECORDS_START
        return at

    def _jump(self, target: int, file_size: int) -> None:
        content, record = encode_jump(self._uuid, self.next, file_size, target)
        write_all(self._io, self.fd, content, record.offset)
        # durable before what lies behind it, or a torn one could not be told from a damaged one
        self._io.fdatasync(self.fd)
        self._take(record)
        self._ceiling = self._find_ceiling()

    def _take(self, record: JournalRecord) -> None:
        self.records.append(record)
        self.next = record.behind
        self._bytes_live += _length(record)

    def _top(self) -> int:
        return max((record.end for record in self.records), default=self.next.offset)

    def _find_ceiling(self) -> int | None:
        """Return the first live byte behind the next record's place; None when there is none."""
        return min((record.offset for record in self.records if record.offset >= self.next.offset), default=None)


def _length(record: JournalRecord) -> int:
    return record.end - record.offset


def _packed(uuid: UUID, turn: int, start: Position) -> bytes:
    sealed = _SLOT.pack(_MAGIC, 0, PAIR_VERSION, uuid.bytes, turn, start.offset, start.number, start.link)
    return sealed[:8] + struct.pack("<I", zlib.crc32(sealed[_CRC_END:])) + sealed[_CRC_END:]


def _unpacked(raw: bytes, name: str) -> tuple[UUID, int, Position] | None:
    magic, crc, version, uuid, turn, offset, number, link = _SLOT.unpack(raw)
    if magic != _MAGIC or crc != zlib.crc32(raw[_CRC_END:]):
        return None
    if version != PAIR_VERSION:
        raise JournalError(f"{name} has version {version} of the format, this program reads {PAIR_VERSION}")
    return UUID(bytes=uuid), turn, Position(number, link, offset)


# -- Reads the records of a journal, and tells a torn tail from damage -----------------------------------------------


def scan(fd: int, uuid: UUID, start: Position, name: str) -> tuple[list[JournalRecord], bool]:
    """Read the whole records from *start* on.

    Returns:
        The records, oldest first, and whether a torn one was dropped behind them: one that a crash cut short. It was
        never acknowledged, so dropping it loses nothing.

    Raises:
        JournalError: a record is damaged or missing though a later one is whole. That is no torn tail: records are
            written one after another, each durable before the next.
    """
    records: list[JournalRecord] = []
    position = start
    while True:
        found = list(_whole_records(fd, uuid, position))
        records += found
        position = found[-1].behind if found else position
        if not _later_record(fd, uuid, position):
            break
        # a writer at work may have finished this record and others since it was looked at
        if next(_whole_records(fd, uuid, position), None) is None:
            raise JournalError(
                f"{name}: record {position.number} at byte {position.offset} is damaged though a later one is whole; "
                "commits would be lost silently if it were skipped: restore the file and its journal from a backup"
            )
    return records, _is_torn(fd, position)


def _is_torn(fd: int, position: Position) -> bool:
    """Return whether the record that belongs at *position* was begun; what else lies there is of an earlier turn."""
    raw = os.pread(fd, HEADER_BYTES, position.offset)
    header = parse(raw)
    return raw[:8] == MAGIC and (header is None or header.number == position.number)


def _whole_records(fd: int, uuid: UUID, position: Position) -> Iterator[JournalRecord]:
    size = os.fstat(fd).st_size
    while True:
        header = parse(os.pread(fd, HEADER_BYTES, position.offset))
        expected = (position.link, position.number, uuid.bytes)
        if header is None or (header.link, header.number, header.uuid) != expected:
            return
        table = _sound_table(fd, header, position.offset, size)
        if table is None:
            return
        record = _record(header, table, position.offset)
        yield record
        position = record.behind


def _record(header: Header, table: Sectors, offset: int) -> JournalRecord:
    return JournalRecord(
        number=header.number,
        count=header.count,
        link=header.crc,
        file_size=header.file_size,
        extents=Extents(table, offset + header.table_end),
        offset=offset,
        end=offset + aligned(header.length, RECORD_ALIGNMENT),
        next=header.next,
    )


def _sound_table(fd: int, header: Header, offset: int, size: int) -> Sectors | None:
    """Return the table of a record when its body is whole."""
    if offset + header.length > size:
        return None
    crc, place, end = 0, offset + HEADER_BYTES, offset + header.length
    while place < end:
        piece = os.pread(fd, min(_READ_BYTES, end - place), place)
        if not piece:
            return None
        crc, place = zlib.crc32(piece, crc), place + len(piece)
    if crc != header.body_crc:
        return None
    raw = os.pread(fd, 16 * header.extents, offset + HEADER_BYTES)
    return np.frombuffer(raw, "<u8").astype(np.uint64).reshape(-1, 2)


def _later_record(fd: int, uuid: UUID, position: Position) -> bool:
    """Return whether a whole record that comes after the one at *position* lies anywhere in the journal."""
    size = os.fstat(fd).st_size
    for base in range(RECORDS_START, size, _READ_BYTES):
        block = os.pread(fd, _READ_BYTES, base)
        for within in range(0, len(block), RECORD_ALIGNMENT):
            if block[within : within + 8] == MAGIC and _is_later(fd, uuid, position, base + within, size):
                return True
    return False


def _is_later(fd: int, uuid: UUID, position: Position, offset: int, size: int) -> bool:
    header = parse(os.pread(fd, HEADER_BYTES, offset))
    return (
        header is not None
        and header.number > position.number
        and header.uuid == uuid.bytes
        and _sound_table(fd, header, offset, size) is not None
    )

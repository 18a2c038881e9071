"""The records of a journal: their fields, and how one is built.

A record starts at a multiple of 4096 bytes, so that writing one never touches a block of another::

    0     header   80 bytes: magic, header CRC, body CRC, link, extents, number, count, next, file size, sectors, UUID
    80    table    16 bytes an extent: first sector u8, number of sectors u8; zeros up to a multiple of 512
          images   512 bytes a sector
          zeros up to a multiple of 4096

The header CRC covers the header from the body CRC on, the body CRC the table with its zeros and the images. *link* is
the header CRC of the record before. *number* counts the records of the pair's whole life; a compacted record stands
for *count* of them. *next* is where the record behind it belongs.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from uuid import UUID

import numpy as np

from services.corpus.sectors import SECTOR, Extents, Sectors

#: records start at multiples of this, bytes
RECORD_ALIGNMENT = 4096

#: how a record begins
MAGIC = b"FIQRECRD"
_HEADER = struct.Struct("<8sIIIIQQQQQ16s")
#: bytes of a header, behind which the table lies
HEADER_BYTES = _HEADER.size
_SEALED_FROM = 12


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

"""Reads the records of a journal, and tells a torn tail from damage."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from uuid import UUID

import numpy as np

from services.corpus.errors import JournalError
from services.corpus.journal_records import (
    HEADER_BYTES,
    MAGIC,
    RECORD_ALIGNMENT,
    Header,
    JournalRecord,
    Position,
    aligned,
    parse,
)
from services.corpus.sectors import Extents, Sectors

#: byte offset of the first record
RECORDS_START = 8192

_READ_BYTES = 4 << 20


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

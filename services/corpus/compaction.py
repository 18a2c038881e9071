"""Rewrites a journal that has outgrown its limit, while a reader holds checkpoints back.

The new journal has one record with the newest image of every sector, and one more with what was committed while that
was written. It takes the old one's place by a rename: a crash finds the one or the other, whole. Readers that have the
old one open go on reading it.
"""

from __future__ import annotations

import os
import zlib
from contextlib import suppress
from pathlib import Path
from uuid import UUID

from services.corpus.journal import RECORDS_START, slots
from services.corpus.journal_records import HEADER_BYTES, JournalRecord, Position, padded_table, seal
from services.corpus.sectors import SectorIndex
from services.corpus.storage import FILE_MODE, StorageIO, try_lock, unlock, write_all


class Compaction:
    """A new journal, on its way to replace the old one.

    Args:
        path: the journal.
        old: its descriptor.
        turn: of its newest slot.
        number: number of the first record that the partition file lacks.
        link: header CRC of the record before that.
    """

    def __init__(self, io: StorageIO, path: Path, old: int, uuid: UUID, *, turn: int, number: int, link: int) -> None:
        self._io = io
        self._path = path
        self._old = old
        self._uuid = uuid
        self._temporary = path.with_name(path.name + ".new")
        self.fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, FILE_MODE)
        #: the slot with an odd turn is the second one
        self.turn = turn + 2 - (turn + 1) % 2
        self.start = Position(number, link, RECORDS_START)
        self.records: list[JournalRecord] = []

    def add(self, records: list[JournalRecord]) -> None:
        """Write one record that stands for *records* of the old journal; those that the file has are left out.

        Raises:
            OSError: the system refused.
        """
        records = [record for record in records if record.number >= self.start.number]
        if records:
            position = self.records[-1].behind if self.records else self.start
            index = SectorIndex.of([record.extents for record in records])
            self.records.append(self._write(position, index, records))

    def prepare(self) -> None:
        """Make the new journal durable, and lock it for the writer.

        Raises:
            OSError: the system refused.
        """
        write_all(self._io, self.fd, slots(self._uuid, self.turn, self.start), 0)
        self._io.fsync(self.fd)
        if not try_lock(self.fd, exclusive=True):
            raise BlockingIOError(f"another process has locked {self._temporary.name}")

    def install(self) -> None:
        """Put the new journal into the old one's place.

        Raises:
            OSError: the system refused; which of the two will be found is open.
        """
        self._io.rename(self._temporary, self._path)
        self._io.sync_directory(self._path.parent)

    def give_up(self) -> None:
        """Let go of the new journal, and remove it unless it has taken the old one's place already."""
        # what cannot be removed now is removed by the next open
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)
        unlock(self.fd)
        os.close(self.fd)

    def _write(self, position: Position, index: SectorIndex, records: list[JournalRecord]) -> JournalRecord:
        table = index.table()
        body = padded_table(table)
        crc = zlib.crc32(body)
        place = position.offset + HEADER_BYTES + len(body)
        for _, content in index.runs(self._old):
            crc = zlib.crc32(content, crc)
            place = write_all(self._io, self.fd, content, place)
        last = records[-1]
        count = last.number + last.count - position.number
        header, record = seal(self._uuid, position, last.file_size, table, len(index), crc, count=count)
        write_all(self._io, self.fd, header + body, position.offset)
        write_all(self._io, self.fd, bytes(record.end - place), place)
        return record


def remove_leftover(path: Path) -> None:
    """Remove what a crash left of a compaction; the caller holds the journal's lock."""
    path.with_name(path.name + ".new").unlink(missing_ok=True)

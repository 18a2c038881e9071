"""Reads what an open store holds, beside its appends and in their thread, a few chunks at a time.

Chunks are read directly: HDF5 keeps nothing of them in memory, so the writer's own handles never see an old copy, and
nothing of what the writer keeps open is closed for a reader. Sequences rise from row to row, so a position is found in
a few steps; an id is found by :mod:`services.corpus.ids`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from services.corpus.format import EVENT_DTYPE, EVENT_HEAD, EVENTS_CHUNK, PAYLOAD_CHUNK
from services.corpus.groups import OpenConsultations
from services.corpus.ids import IdHashes, KnownIds, StoredRow

#: rows of the table whose ids are read together, a multiple of a chunk's
_PIECE_ROWS = 512 * EVENTS_CHUNK


class StoredConsultation:
    """One consultation of an open store, as long as it was when this was made; valid until the store is closed.

    Args:
        events: low-level id of its ``events`` dataset.
        payload: low-level id of its ``payload`` dataset.
    """

    def __init__(self, events: Any, payload: Any) -> None:
        self._events = events
        self._payload = payload
        self._length = int(events.shape[0])
        self._chunk: tuple[int, bytes] = (-1, b"")

    def __len__(self) -> int:
        return self._length

    def row(self, index: int) -> StoredRow:
        """Return the row at *index*, from 0."""
        start = index - index % EVENTS_CHUNK
        place = (index - start) * EVENT_DTYPE.itemsize
        sequence, received, offset, length, _, event_id = EVENT_HEAD.unpack_from(self._rows(start), place)
        return StoredRow(sequence, received, offset, length, event_id)

    def behind(self, sequence: int) -> int:
        """Return the index of the first row whose sequence is above *sequence*; the length when there is none."""
        low, high = 0, self._length
        while low < high:
            middle = (low + high) // 2
            if self.row(middle).sequence > sequence:
                high = middle
            else:
                low = middle + 1
        return low

    def body(self, row: StoredRow) -> bytes:
        """Return the body of the event in *row*, byte for byte."""
        return self.bodies([row])[0]

    def bodies(self, rows: Sequence[StoredRow]) -> list[bytes]:
        """Return the bodies of the events in *rows*, which follow each other in the table."""
        if not rows:
            return []
        first = rows[0].offset - rows[0].offset % PAYLOAD_CHUNK
        end = rows[-1].offset + rows[-1].length
        chunks = [self._payload.read_direct_chunk((start,))[1] for start in range(first, end, PAYLOAD_CHUNK)]
        content = b"".join(chunks)
        return [content[row.offset - first : row.offset - first + row.length] for row in rows]

    def ids(self) -> Iterator[npt.NDArray[np.void]]:
        """Yield the ids of all rows, some thousands at a time."""
        for low in range(0, self._length, _PIECE_ROWS):
            high = min(low + _PIECE_ROWS, self._length)
            chunks = [self._events.read_direct_chunk((start,))[1] for start in range(low, high, EVENTS_CHUNK)]
            yield np.frombuffer(b"".join(chunks), EVENT_DTYPE)["event_id"][: high - low]

    def _rows(self, start: int) -> bytes:
        if self._chunk[0] != start:
            self._chunk = start, bytes(self._events.read_direct_chunk((start,))[1])
        return self._chunk[1]


class Lookup:
    """What an open store holds, events that are appended and not committed included.

    Args:
        consultations: of the store.
        ids: of them, those in memory.
    """

    def __init__(self, consultations: OpenConsultations, ids: KnownIds) -> None:
        self._consultations = consultations
        self._ids = ids

    def consultation(self, name: str) -> StoredConsultation | None:
        """Return a consultation; None when the file has no such."""
        pair = self._consultations.datasets(name)
        return None if pair is None else StoredConsultation(*pair)

    def held(self, name: str, ids: Collection[bytes]) -> dict[bytes, StoredRow]:
        """Return the rows of those of *ids* that a consultation holds."""
        return self._ids.held(self._consultations, name, ids, lambda: self.consultation(name))

    def id_hashes(self, name: str, most: int) -> IdHashes | None:
        """Return the hashes of a consultation's ids, none when it does not exist; None when there are over *most*."""
        return self._ids.hashes(self._consultations, name, most, lambda: self.consultation(name))

    def names(self, start: int, count: int) -> list[str]:
        """Return at most *count* ids of consultations from the position *start* on, in HDF5's own order.

        One that is created later may take a place before *start* and move the others up: who goes on reads some names
        again, and none of those that were there before is left out.
        """
        return self._consultations.names(start, count)

    def __len__(self) -> int:
        return self._consultations.count

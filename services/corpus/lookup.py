"""Reads what an open store holds, beside its appends and in their thread, a few chunks at a time.

Chunks are read directly: HDF5 keeps nothing of them in memory, so the writer's own handles never see an old copy, and
nothing of what the writer keeps open is closed for a reader. Sequences rise from row to row, so a position is found in
a few steps; an id is searched from the first row on, in steps between which a commit may come.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from services.corpus.format import EVENT_DTYPE, EVENT_HEAD, EVENTS_CHUNK, PAYLOAD_CHUNK
from services.corpus.groups import OpenConsultations

#: chunks of the table that are searched in one step
_STEP_CHUNKS = 64


@dataclass(frozen=True, slots=True)
class StoredRow:
    """One row of the table: where an event's body lies.

    Attributes:
        sequence: in the stream.
        received_ns: when the event was accepted, nanoseconds since the Unix epoch.
        offset: of its body in the payload, bytes.
        length: of its body, bytes.
        event_id: 16 bytes.
    """

    sequence: int
    received_ns: int
    offset: int
    length: int
    event_id: bytes


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

    def at(self, sequence: int) -> StoredRow | None:
        """Return the row of *sequence*, or None when there is none."""
        index = self.behind(sequence) - 1
        row = self.row(index) if index >= 0 else None
        return row if row is not None and row.sequence == sequence else None

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

    def search(self, ids: Collection[bytes]) -> Generator[None, None, dict[bytes, StoredRow]]:
        """Search the rows of *ids* in steps of a millisecond or less; the result is the generator's value."""
        found: dict[bytes, StoredRow] = {}
        wanted = set(ids)
        for number, start in enumerate(range(0, self._length, EVENTS_CHUNK)):
            if not wanted:
                break
            if number and not number % _STEP_CHUNKS:
                yield
            held = self._ids(start).tolist()
            if not wanted.isdisjoint(held):
                for index, event_id in enumerate(held):
                    if event_id in wanted:
                        wanted.discard(event_id)
                        found[event_id] = self.row(start + index)
        return found

    def find(self, ids: Collection[bytes]) -> dict[bytes, StoredRow]:
        """Return the rows of those of *ids* that the consultation holds, at once."""
        search = self.search(ids)
        while True:
            try:
                next(search)
            except StopIteration as ended:
                result: dict[bytes, StoredRow] = ended.value
                return result

    def _ids(self, start: int) -> npt.NDArray[np.void]:
        rows = np.frombuffer(self._rows(start), EVENT_DTYPE)[: self._length - start]
        ids: npt.NDArray[np.void] = rows["event_id"]
        return ids

    def _rows(self, start: int) -> bytes:
        if self._chunk[0] != start:
            self._chunk = start, bytes(self._events.read_direct_chunk((start,))[1])
        return self._chunk[1]


class Lookup:
    """What an open store holds, events that are appended and not committed included.

    Args:
        consultations: of the store.
    """

    def __init__(self, consultations: OpenConsultations) -> None:
        self._consultations = consultations

    def consultation(self, name: str) -> StoredConsultation | None:
        """Return a consultation; None when the file has no such."""
        pair = self._consultations.datasets(name)
        return None if pair is None else StoredConsultation(*pair)

    def known_ids(self, name: str) -> Set[bytes] | None:
        """Return the ids that a consultation holds where they are in memory, or None; asks HDF5 for nothing."""
        return self._consultations.known_ids(name)

    def names(self, start: int, count: int) -> list[str]:
        """Return at most *count* ids of consultations from the position *start* on, in HDF5's own order.

        One that is created later may take a place before *start* and move the others up: who goes on reads some names
        again, and none of those that were there before is left out.
        """
        return self._consultations.names(start, count)

    def __len__(self) -> int:
        return self._consultations.count

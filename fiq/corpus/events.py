"""Reads the events of one consultation: a slice of the table and its stretch of the payload at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING, Any
from uuid import UUID

import numpy as np
import numpy.typing as npt
import orjson
from h5py import h5d, h5s, h5t

from fiq.corpus.errors import CorpusFormatError, CorpusUsageError
from fiq.corpus.format import EVENT_DTYPE, EVENTS, PAYLOAD

if TYPE_CHECKING:
    import pandas as pd

#: rows of the table that are read at once
_ROWS = 4096
#: bytes of the payload that are read at once, unless one event is larger
_PAYLOAD_BYTES = 8 << 20
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class EventRecord:
    """One event as it is kept.

    Attributes:
        consultation: id of its consultation.
        sequence: its sequence in the stream.
        received_ns: when it was accepted, nanoseconds since the Unix epoch.
        id_bytes: the 16 bytes of its id.
        raw: its body byte for byte, without the line feed behind it.
    """

    consultation: str
    sequence: int
    received_ns: int
    id_bytes: bytes
    raw: bytes

    @property
    def event_id(self) -> UUID:
        """The id, unique within the consultation."""
        return UUID(bytes=self.id_bytes)

    @property
    def received(self) -> datetime:
        """When it was accepted, in UTC, to the microsecond."""
        return _EPOCH + timedelta(microseconds=self.received_ns // 1000)

    @property
    def event_type(self) -> str:
        """The body's ``event_type``."""
        return str(self.document().get("event_type", ""))

    @property
    def payload(self) -> Any:
        """The body's ``payload``, parsed; None when it has none."""
        return self.document().get("payload")

    def document(self) -> dict[str, Any]:
        """Parse the body. Raises CorpusFormatError: it is no JSON object."""
        try:
            document = orjson.loads(self.raw)
        except orjson.JSONDecodeError:
            document = None
        if not isinstance(document, dict):
            raise CorpusFormatError(f"{self.consultation}: the body of sequence {self.sequence} is no JSON object")
        return document


class Consultation:
    """One consultation of an open corpus; valid while the corpus is open.

    Args:
        name: its id.
        group: low-level id of its group.
        guard: makes a context in which h5py may be called, and which turns its errors into the corpus's.
    """

    def __init__(self, name: str, group: Any, guard: Callable[[], AbstractContextManager[None]]) -> None:
        self.id = name
        self._guard = guard
        # h5py's high-level objects would double the time that a short consultation takes
        self._events = h5d.open(group, EVENTS.encode())
        self._payload = h5d.open(group, PAYLOAD.encode())
        self._length = int(self._events.shape[0])
        self._payload_length = int(self._payload.shape[0])

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"Consultation({self.id!r}, {len(self)} events)"

    def __iter__(self) -> Iterator[EventRecord]:
        """Yield the events in stream order. Raises CorpusFormatError: a row points outside the payload."""
        for rows, payload in self._slices():
            first = int(rows["offset"][0])
            for sequence, received, offset, length, _, event_id, _ in rows.tolist():
                start = offset - first
                yield EventRecord(self.id, sequence, received, event_id, payload[start : start + length])

    @property
    def payload_bytes(self) -> int:
        """Length of ``payload``."""
        return self._payload_length

    def table(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.void]:
        """Return the rows of ``events`` from *start* up to *stop*, all by default, as a structured array."""
        end = len(self) if stop is None else min(stop, len(self))
        rows = np.empty(max(0, end - start), EVENT_DTYPE)
        with self._guard():
            _read(self._events, start, rows, _row_type(), whole=0 < len(rows) == len(self))
        return rows

    def lines(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Return the bytes of ``payload`` from *start* up to *stop*; both lie within it."""
        content = np.empty(stop - start, np.uint8)
        with self._guard():
            _read(self._payload, start, content, h5t.STD_U8LE, whole=0 < len(content) == self._payload_length)
        return content

    def check_layout(self) -> None:
        """Check that both datasets have the types of the format. Raises CorpusFormatError: one has not."""
        with self._guard():
            for name, dataset, kind in ((EVENTS, self._events, _row_type()), (PAYLOAD, self._payload, h5t.STD_U8LE)):
                if not dataset.get_type().equal(kind):
                    raise CorpusFormatError(f"{self.id}: the dataset {name} has another type than the format says")

    def to_frame(self) -> pd.DataFrame:
        """Return the events as a pandas frame: sequence, received (UTC), event_id, event_type, payload.

        Raises:
            CorpusUsageError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise CorpusUsageError("to_frame() needs pandas: pip install 'fiq[pandas]'") from None
        events = list(self)
        documents = [event.document() for event in events]
        return pd.DataFrame(
            {
                "sequence": np.array([event.sequence for event in events], np.uint64),
                "received": pd.to_datetime([event.received_ns for event in events], unit="ns", utc=True),
                "event_id": pd.Series([str(event.event_id) for event in events], dtype=object),
                "event_type": pd.Series([document.get("event_type") for document in documents], dtype=object),
                "payload": pd.Series([document.get("payload") for document in documents], dtype=object),
            }
        )

    def _slices(self) -> Iterator[tuple[npt.NDArray[np.void], bytes]]:
        """Yield some rows with the payload from the first one's body to the last one's."""
        for start in range(0, len(self), _ROWS):
            rows = self.table(start, start + _ROWS)
            ends = rows["offset"].astype(np.int64) + rows["length"]
            starts = rows["offset"].astype(np.int64)
            if bool((starts[1:] < ends[:-1]).any()) or int(ends[-1]) > self._payload_length:
                raise CorpusFormatError(f"{self.id}: a row from {start} on points outside its payload")
            low = 0
            while low < len(rows):
                fitting = int(np.searchsorted(ends, starts[low] + _PAYLOAD_BYTES, side="right"))
                high = max(fitting, low + 1)
                yield rows[low:high], self.lines(int(starts[low]), int(ends[high - 1])).tobytes()
                low = high


@cache
def _row_type() -> Any:
    return h5t.py_create(EVENT_DTYPE)


def _read(dataset: Any, start: int, out: npt.NDArray[Any], kind: Any, *, whole: bool) -> None:
    if whole:
        dataset.read(h5s.ALL, h5s.ALL, out, kind)  # a short consultation is read in half the time
    elif len(out):
        space = dataset.get_space()
        space.select_hyperslab((start,), (len(out),))
        dataset.read(h5s.create_simple((len(out),)), space, out, kind)

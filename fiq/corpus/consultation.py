"""The events of one consultation: the rows of its table and their bodies, for readers and for the writer itself.

Both read through HDF5, slices of rows and the stretch of the payload that belongs to them. A writer's file keeps no
chunks in HDF5's cache, so it sees its own latest appends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex, overload
from uuid import UUID

import numpy as np
import numpy.typing as npt
from h5py import h5d, h5s, h5t

from fiq.corpus.errors import CorpusFormatError, CorpusUsageError
from fiq.corpus.format import EVENT_DTYPE, EVENT_ROW, EVENTS, EVENTS_CHUNK, PAYLOAD, PORTABLE_EVENT_DTYPE
from fiq.event import parse_exactly
from fiq.words import count

if TYPE_CHECKING:
    import pandas as pd

#: rows of the table that are read at once
_ROWS = 4096
#: bytes of the payload that are read at once, unless one event is larger
_PAYLOAD_BYTES = 8 << 20
#: rows whose ids are read at once, a multiple of a chunk's
_ID_ROWS = 512 * EVENTS_CHUNK
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

Table = npt.NDArray[np.void]
#: chooses rows: True for each one that is wanted
RowFilter = Callable[[Table], npt.NDArray[np.bool_]]


@dataclass(frozen=True, slots=True, repr=False)
class EventRecord:
    """One stored event. Its ``repr`` leaves the body out: bodies are medical data."""

    consultation: str  #: its id
    sequence: int  #: in the stream
    received_ns: int  #: when it was accepted, nanoseconds since the Unix epoch
    written_ns: int  #: when the persister wrote it into this store, nanoseconds since the Unix epoch
    id_bytes: bytes  #: the 16 bytes of its id
    raw: bytes  #: its body byte for byte, without the line feed after it

    def __repr__(self) -> str:
        where = f"consultation={self.consultation!r}, sequence={self.sequence}"
        return f"EventRecord({where}, received='{self.received}', event_id='{self.event_id}')"

    @property
    def event_id(self) -> UUID:
        """The id, unique within the consultation."""
        return UUID(bytes=self.id_bytes)

    @property
    def received(self) -> datetime:
        """When it was accepted, in UTC, to the microsecond."""
        return _EPOCH + timedelta(microseconds=self.received_ns // 1000)

    @property
    def written(self) -> datetime:
        """When the persister wrote it into this store, in UTC, to the microsecond."""
        return _EPOCH + timedelta(microseconds=self.written_ns // 1000)

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
            document = parse_exactly(self.raw)
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise CorpusFormatError(f"{self.consultation}: the body of sequence {self.sequence} is no JSON object")
        return document


class StoredRow(NamedTuple):
    """One row of the table: where an event's body is."""

    sequence: int  #: in the stream
    received_ns: int  #: when the event was accepted, nanoseconds since the Unix epoch
    offset: int  #: of its body in the payload, bytes
    length: int  #: of its body, bytes
    event_id: bytes  #: 16 bytes
    written_ns: int  #: when the persister wrote it, nanoseconds since the Unix epoch


class Consultation(Sequence[EventRecord]):
    """One consultation, as long as it was when this was made: a sequence of its events in stream order.

    It is valid while its corpus, or the store that writes it, is open.

    Args:
        name: its id.
        events: low-level id of its ``events`` dataset. (h5py's high-level objects would double the time that a short
            consultation takes.)
        payload: low-level id of its ``payload`` dataset.
        guard: makes a context for calls of h5py, which turns its errors into the corpus's.
        plain: whether the table has the writer's chunks, without compression; single rows are found faster then.
    """

    def __init__(
        self,
        name: str,
        events: Any,
        payload: Any,
        guard: Callable[[], AbstractContextManager[None]] = nullcontext,
        *,
        plain: bool = False,
    ) -> None:
        self.id = name
        self._events = events
        self._payload = payload
        self._guard = guard
        self._plain = plain
        self._length = int(events.shape[0])
        #: number of the first row that was read last, and these rows
        self._chunk: tuple[int, bytes] = (-1, b"")

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"Consultation({self.id!r}, {count(len(self), 'event')})"

    def __iter__(self) -> Iterator[EventRecord]:
        """Yield the events in stream order. Raises CorpusFormatError: a row points outside the payload."""
        return self.records()

    @overload
    def __getitem__(self, index: int) -> EventRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[EventRecord]: ...
    def __getitem__(self, index: int | slice) -> EventRecord | list[EventRecord]:
        """Return the event at *index*, from the end if it is negative, or the events of a slice.

        Raises IndexError: there is none; TypeError: *index* is neither an integer nor a slice.
        """
        if not isinstance(index, (SupportsIndex, slice)):
            raise TypeError(f"a consultation is indexed by position (int) or slice, not by {type(index).__name__}")
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return list(self.records(start, stop)) if step == 1 else [self[one] for one in range(start, stop, step)]
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.id} has {count(len(self), 'event')}, none at {index}")
        row = self.row(index % len(self))
        return EventRecord(self.id, row.sequence, row.received_ns, row.written_ns, row.event_id, self.body(row))

    def records(self, start: int = 0, stop: int | None = None, keep: RowFilter | None = None) -> Iterator[EventRecord]:
        """Yield the events from *start* up to *stop*, of all by default, whose rows *keep* chooses; bounded in memory.

        Raises CorpusFormatError: a row points outside the payload.
        """
        end = len(self) if stop is None else min(stop, len(self))
        for low in range(start, end, _ROWS):
            table = self.table(low, min(low + _ROWS, end))
            for rows, payload in self._bodies(table if keep is None else table[keep(table)]):
                first = int(rows["offset"][0])
                for sequence, received, offset, length, _, event_id, _, written in rows.tolist():
                    body = payload[offset - first : offset - first + length]
                    yield EventRecord(self.id, sequence, received, written, event_id, body)

    def to_frame(self, *, expand: bool = True) -> pd.DataFrame:
        """Return the events as a pandas frame, a row an event.

        Its columns are ``sequence``, ``received`` and ``written`` (UTC), ``event_id``, ``event_type``, and
        ``payload.<member>`` for each member of the payloads; a payload that is no object is in ``payload``. Lists and
        objects within a payload stay Python objects. What an event lacks is missing (``pandas.NA``).

        Args:
            expand: False for the whole parsed payloads in one column ``payload``.

        Raises CorpusUsageError: pandas is not installed.
        """
        return to_frame(documents(self), expand=expand, consultation=False)

    # -- Rows and bytes -----------------------------------------------------------------------------------------------

    @cached_property
    def payload_bytes(self) -> int:
        """Length of ``payload``."""
        with self._guard():
            return int(self._payload.shape[0])

    @cached_property
    def _row_type(self) -> Any:
        """The type of the rows as they are read: their bytes are the same in every archive."""
        portable = not self._plain and self._events.get_type().equal(_portable_row_type())
        return _portable_row_type() if portable else _row_type()

    def table(self, start: int = 0, stop: int | None = None) -> Table:
        """Return the rows of ``events`` from *start* up to *stop*, all by default, as a structured array."""
        end = len(self) if stop is None else min(stop, len(self))
        rows = np.empty(max(0, end - start), EVENT_DTYPE)
        with self._guard():
            _read(self._events, start, rows, self._row_type, whole=0 < len(rows) == len(self))
        return rows

    def lines(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Return the bytes of ``payload`` from *start* up to *stop*; both are within it."""
        content = np.empty(stop - start, np.uint8)
        with self._guard():
            _read(self._payload, start, content, h5t.STD_U8LE, whole=0 < len(content) == self.payload_bytes)
        return content

    def row(self, index: int) -> StoredRow:
        """Return the row at *index*, from 0."""
        first = index - index % EVENTS_CHUNK
        if self._chunk[0] != first:
            if self._plain:
                with self._guard():
                    self._chunk = first, self._events.read_direct_chunk((first,))[1]
            else:
                self._chunk = first, self.table(first, first + EVENTS_CHUNK).tobytes()
        place = (index - first) * EVENT_ROW.size
        sequence, received, offset, length, _, event_id, _, written = EVENT_ROW.unpack_from(self._chunk[1], place)
        return StoredRow(sequence, received, offset, length, event_id, written)

    def first_after(self, sequence: int) -> int:
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
        return self.lines(row.offset, row.offset + row.length).tobytes()

    def bodies(self, rows: Sequence[StoredRow]) -> list[bytes]:
        """Return the bodies of the events in *rows*, which follow each other in the table."""
        if not rows:
            return []
        first = rows[0].offset
        content = self.lines(first, rows[-1].offset + rows[-1].length).tobytes()
        return [content[row.offset - first : row.offset - first + row.length] for row in rows]

    def ids(self) -> Iterator[npt.NDArray[np.void]]:
        """Yield the ids of all rows, some thousands at a time."""
        for low in range(0, len(self), _ID_ROWS):
            yield self.table(low, low + _ID_ROWS)["event_id"]

    def check_layout(self) -> None:
        """Raise CorpusFormatError if a dataset has another type than the format says."""
        with self._guard():
            for name, dataset, kind in ((EVENTS, self._events, self._row_type), (PAYLOAD, self._payload, h5t.STD_U8LE)):
                if not dataset.get_type().equal(kind):
                    raise CorpusFormatError(f"{self.id}: the dataset {name} has another type than the format says")

    def _bodies(self, rows: Table) -> Iterator[tuple[Table, bytes]]:
        """Yield some of *rows* at a time, with the payload from the first one's body to the last one's."""
        starts = rows["offset"].astype(np.int64)
        ends = starts + rows["length"]
        if len(rows) and (bool((starts[1:] < ends[:-1]).any()) or int(ends[-1]) > self.payload_bytes):
            first = int(rows["seq"][0])
            raise CorpusFormatError(f"{self.id}: a row from sequence {first} on points outside its payload")
        low = 0
        while low < len(rows):
            high = max(int(np.searchsorted(ends, starts[low] + _PAYLOAD_BYTES, side="right")), low + 1)
            yield rows[low:high], self.lines(int(starts[low]), int(ends[high - 1])).tobytes()
            low = high


@cache
def _row_type() -> Any:
    return h5t.py_create(EVENT_DTYPE)


@cache
def _portable_row_type() -> Any:
    return h5t.py_create(PORTABLE_EVENT_DTYPE)


def _read(dataset: Any, start: int, out: npt.NDArray[Any], kind: Any, *, whole: bool) -> None:
    if whole:
        dataset.read(h5s.ALL, h5s.ALL, out, kind)  # a short consultation is read in half the time
    elif len(out):
        space = dataset.get_space()
        space.select_hyperslab((start,), (len(out),))
        dataset.read(h5s.create_simple((len(out),)), space, out, kind)


def open_datasets(group: Any) -> tuple[Any, Any]:
    """Return the low-level ids of ``events`` and ``payload`` in a consultation's group."""
    return h5d.open(group, EVENTS.encode()), h5d.open(group, PAYLOAD.encode())


def documents(events: Iterable[EventRecord]) -> Iterator[tuple[EventRecord, dict[str, Any]]]:
    """Yield *events* with their parsed bodies. Raises CorpusFormatError: a body is no JSON object."""
    return ((event, event.document()) for event in events)


def to_frame(events: Iterable[tuple[EventRecord, dict[str, Any]]], *, expand: bool, consultation: bool) -> pd.DataFrame:
    """Return *events* as :meth:`Consultation.to_frame` does, with or without the column ``consultation``.

    Raises CorpusUsageError: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError:
        raise CorpusUsageError("to_frame() needs pandas: pip install 'fiq[pandas]'") from None
    names, sequences, received, written, ids, types = [], [], [], [], [], []
    payloads: dict[str, list[Any]] = {} if expand else {"payload": []}
    for number, (event, document) in enumerate(events):
        names.append(event.consultation)
        sequences.append(event.sequence)
        received.append(event.received_ns)
        written.append(event.written_ns)
        ids.append(str(event.event_id))
        event_type = document.get("event_type")
        types.append(None if event_type is None else str(event_type))
        payload = document.get("payload")
        if expand and isinstance(payload, dict):
            values = {f"payload.{member}": value for member, value in payload.items()}
        else:
            values = {} if payload is None else {"payload": payload}
        for column, value in values.items():
            held = payloads.setdefault(column, [])
            held += [None] * (number - len(held))
            held.append(value)
    columns: dict[str, Any] = {"consultation": pd.Series(names, dtype="string")} if consultation else {}
    columns["sequence"] = np.array(sequences, np.uint64)
    for column, times in (("received", received), ("written", written)):
        columns[column] = pd.to_datetime(np.array(times, np.int64), unit="ns", utc=True)
    columns["event_id"] = pd.Series(ids, dtype="string")
    columns["event_type"] = pd.Series(types, dtype="string")
    for column, held in payloads.items():
        held += [None] * (len(sequences) - len(held))
        columns[column] = _column(pd, held)
    return pd.DataFrame(columns)


def _column(pd: Any, values: list[Any]) -> Any:
    """Return the column of some members, typed by its values; None is missing."""
    held = pd.Series(values, dtype=object)
    if {int} != {type(value) for value in values if value is not None}:
        return held.convert_dtypes()
    try:  # convert_dtypes() makes floats of integers where one is missing, and drops their last digits
        whole = np.array([0 if value is None else value for value in values], np.int64)
    except OverflowError:
        return held
    return pd.arrays.IntegerArray(whole, np.array([value is None for value in values]))

"""The consultations of an open partition file: finds, creates, and keeps the recently used ones open."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from h5py import h5, h5d, h5g, h5p, h5s, h5t

from fiq.corpus.errors import AppendRefusedError, CorpusFormatError
from fiq.corpus.format import (
    CHAIN_BYTES,
    EVENT_DTYPE,
    EVENT_HEAD,
    EVENT_ID_BYTES,
    EVENTS,
    EVENTS_CHUNK,
    MAX_BODY_BYTES,
    PAYLOAD,
    PAYLOAD_CHUNK,
    Identity,
    Record,
    chain_next,
    chain_start,
    is_consultation_id,
)
from fiq.corpus.wal.file import AtomicFile

_MAX_SIGNED = 2**63 - 1
_ROW_BYTES = EVENT_HEAD.size + CHAIN_BYTES
#: makes the tail of a dataset, given as h5py's low-level ``DatasetID`` with its element's and chunk's size
Tails = Callable[..., "ChunkedTail"]


# -- Grows a dataset at its end, past most of HDF5 -------------------------------------------------------------------
#
# ``Dataset.resize`` and slicing cost 300 to 590 µs an append, ``set_extent`` and ``write_direct_chunk`` 18 to 28. Here
# HDF5 only learns the new extent, for which it allocates the chunks, and the content goes straight to its place in the
# file. That is safe: a chunk without filters never moves, and HDF5 keeps nothing of a chunk in memory that is only read
# and written directly.


class ChunkedTail:
    """A dataset of one dimension, in chunks without filters.

    Args:
        file: the file under HDF5.
        dataset: h5py's low-level ``DatasetID``.
        item: bytes of an element.
        chunk: elements of a chunk.
        empty: whether it was just created.
    """

    __slots__ = ("_chunk", "_dataset", "_file", "_filled", "_item", "_place", "length")

    def __init__(self, file: AtomicFile, dataset: Any, *, item: int, chunk: int, empty: bool) -> None:
        self._file = file
        self._dataset = dataset
        self._item = item
        self._chunk = chunk * item
        self.length = 0 if empty else int(dataset.shape[0])
        #: bytes in use of the last chunk, and its byte offset
        self._filled = self._place = 0
        if self.length:
            first = self.length - 1 - (self.length - 1) % chunk
            self._filled = (self.length - first) * item
            self._place = self._find(first)

    def append(self, data: bytes) -> None:
        """Append whole elements."""
        start, self.length = self.length, self.length + len(data) // self._item
        self._dataset.set_extent((self.length,))
        room = self._chunk - self._filled if self._filled else 0
        if len(data) <= room:
            self._file.write_at(self._place + self._filled, data)
            self._filled += len(data)
            return
        if room:
            self._file.write_at(self._place + self._filled, data[:room])
        for low in range(room, len(data), self._chunk):
            part = data[low : low + self._chunk]
            self._begin(start + low // self._item, part)

    def last(self) -> bytes:
        """Return the last element; the dataset is not empty."""
        return self._file.read_at(self._place + self._filled - self._item, self._item)

    def _begin(self, element: int, content: bytes) -> None:
        """Write the *content* of a new chunk that begins with *element*."""
        self._place, self._filled = self._find(element), len(content)
        self._file.write_at(self._place, content)

    def _find(self, element: int) -> int:
        """Return the byte offset of the chunk that begins with *element*.

        The function that tells it goes through all chunks of a dataset; the place of a read is found at once.
        """
        return self._file.locate(lambda: self._dataset.read_direct_chunk((element,)), self._chunk)


class OpenConsultations:
    """A bounded set of appenders, the least recently used of which is closed first.

    Args:
        root: low-level id of the root group.
        group: name of the group in it that holds them.
        tails: makes what grows a dataset.
        identity: what the file says of itself.
        events: how many it holds.
        limit: how many consultations stay open; each takes about 35 KB in HDF5.
    """

    def __init__(self, root: Any, group: str, tails: Tails, identity: Identity, *, events: int, limit: int) -> None:
        self._group = h5g.open(root, group.encode())
        self._name = group
        # "in" on the group looks a name up twice, in an index that does not stay in HDF5's cache when it is large
        self._links = self._group.links
        self._tails = tails
        self._identity = identity
        self._tally = Tally(events)
        self._limit = limit
        self._open: OrderedDict[str, Appender] = OrderedDict()
        self._events_plan, self._payload_plan = _chunked(EVENTS_CHUNK), _chunked(PAYLOAD_CHUNK)
        self._empty = h5s.create_simple((0,), (h5s.UNLIMITED,))
        self._row_type = h5t.py_create(EVENT_DTYPE)

    def __len__(self) -> int:
        return len(self._open)

    @property
    def events(self) -> int:
        """How many events the file holds, uncommitted ones included."""
        return self._tally.events

    def find(self, consultation: str) -> Appender | None:
        """Return the appender of a consultation; None when the file has no such."""
        appender = self._open.get(consultation)
        if appender is not None:
            self._open.move_to_end(consultation)
            return appender
        name = consultation.encode()
        if not is_consultation_id(consultation) or not self._links.exists(name):
            return None
        group = h5g.open(self._group, name)
        events, payload = h5d.open(group, EVENTS.encode()), h5d.open(group, PAYLOAD.encode())
        return self._keep(consultation, events, payload, new=False)

    def find_or_create(self, consultation: str) -> Appender:
        """Return the appender of a consultation, creating its group when it has none.

        Raises AppendRefusedError: the id cannot name a group.
        """
        found = self.find(consultation)
        if found is not None:
            return found
        if not is_consultation_id(consultation):
            raise AppendRefusedError("a consultation id is 1 to 128 characters of A-Z a-z 0-9 _ -")
        group = h5g.create(self._group, consultation.encode())
        events = h5d.create(group, EVENTS.encode(), self._row_type, self._empty, self._events_plan)
        payload = h5d.create(group, PAYLOAD.encode(), h5t.STD_U8LE, self._empty, self._payload_plan)
        return self._keep(consultation, events, payload, new=True)

    @property
    def count(self) -> int:
        """How many consultations the file holds, uncommitted ones included."""
        return int(self._group.get_num_objs())

    def datasets(self, consultation: str) -> tuple[Any, Any] | None:
        """Return the low-level ids of ``events`` and ``payload``, opened for a reader; None without such a group."""
        name = consultation.encode()
        if not is_consultation_id(consultation) or not self._links.exists(name):
            return None
        group = h5g.open(self._group, name)
        return h5d.open(group, EVENTS.encode()), h5d.open(group, PAYLOAD.encode())

    def names(self, start: int, count: int) -> list[str]:
        """Return at most *count* names of groups from the position *start* on, in the order of HDF5's own index."""
        found: list[str] = []

        def take(name: bytes) -> bool | None:
            found.append(name.decode())
            return True if len(found) == count else None

        if start < self.count:
            self._group.links.iterate(take, idx_type=h5.INDEX_NAME, order=h5.ITER_NATIVE, idx=start)
        return found

    def clear(self) -> None:
        """Close all."""
        self._open.clear()

    def _keep(self, consultation: str, events: Any, payload: Any, *, new: bool) -> Appender:
        start = chain_start(self._identity, consultation, of=self._name)
        appender = Appender(consultation, events, payload, self._tails, start=start, tally=self._tally, new=new)
        self._open[consultation] = appender
        if len(self._open) > self._limit:
            self._open.popitem(last=False)
        return appender


def _chunked(elements: int) -> Any:
    plan = h5p.create(h5p.DATASET_CREATE)
    plan.set_chunk((elements,))
    plan.set_fill_time(h5d.FILL_TIME_NEVER)
    plan.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    plan.set_obj_track_times(False)
    return plan


# -- Appends events to one consultation: a row and a body each, chained and checked ----------------------------------


class Tally:
    """Counts the events of a partition, uncommitted ones included."""

    __slots__ = ("events",)

    def __init__(self, events: int) -> None:
        self.events = events


class Appender:
    """The open datasets of one consultation.

    Args:
        name: the consultation's id, for messages.
        events: low-level id of its ``events`` dataset.
        payload: low-level id of its ``payload`` dataset.
        tails: makes what grows the two.
        start: what its first event is chained to.
        tally: counts what is appended.
        new: whether both were just created.
    """

    __slots__ = ("_chain", "_events", "_name", "_payload", "_tally", "last_sequence")

    def __init__(
        self, name: str, events: Any, payload: Any, tails: Tails, *, start: bytes, tally: Tally, new: bool
    ) -> None:
        self._name = name
        self._chain = start
        self._tally = tally
        self._events = tails(events, item=_ROW_BYTES, chunk=EVENTS_CHUNK, empty=new)
        self._payload = tails(payload, item=1, chunk=PAYLOAD_CHUNK, empty=new)
        self.last_sequence = 0
        if self._events.length:
            self._read_last_row()

    @property
    def length(self) -> int:
        """How many events the consultation holds, appended ones included."""
        return self._events.length

    def append(self, records: Sequence[Record], committed: int) -> None:
        """Append *records*.

        Args:
            committed: the sequence that the file has reached; those of the records are above it.

        Raises:
            AppendRefusedError: a sequence does not rise, or an id or a body is malformed. Nothing was appended.
        """
        rows, bodies = self._encode(records, committed)
        self._payload.append(bodies)
        self._events.append(rows)
        self.last_sequence = records[-1].sequence
        self._chain = rows[-CHAIN_BYTES:]
        self._tally.events += len(records)

    def _encode(self, records: Sequence[Record], committed: int) -> tuple[bytes, bytes]:
        rows: list[bytes] = []
        bodies: list[bytes] = []
        offset, last, chain = self._payload.length, max(self.last_sequence, committed), self._chain
        for record in records:
            body = record.body
            if record.sequence <= last:
                raise AppendRefusedError(f"{self._name}: sequence {record.sequence} does not rise above {last}")
            self._check(record)
            length = len(body)
            head = EVENT_HEAD.pack(record.sequence, record.received_ns, offset, length, 0, record.event_id)
            chain = chain_next(chain, head, body)
            rows += (head, chain)
            bodies.append(body)
            offset += length + 1
            last = record.sequence
        bodies.append(b"")
        return b"".join(rows), b"\n".join(bodies)

    def _check(self, record: Record) -> None:
        if len(record.event_id) != EVENT_ID_BYTES:
            raise AppendRefusedError(f"{self._name}: an event id has 16 bytes, not {len(record.event_id)}")
        if b"\n" in record.body or not 0 < len(record.body) <= MAX_BODY_BYTES:
            raise AppendRefusedError(f"{self._name}: a body is one line and not empty (sequence {record.sequence})")
        if not -_MAX_SIGNED <= record.received_ns <= _MAX_SIGNED or record.sequence > _MAX_SIGNED:
            raise AppendRefusedError(f"{self._name}: a number is out of range (sequence {record.sequence})")

    def _read_last_row(self) -> None:
        row = self._events.last()
        sequence, _, offset, length, _, _ = EVENT_HEAD.unpack_from(row)
        if offset + length + 1 != self._payload.length:
            raise CorpusFormatError(
                f"{self._name}: the last row ends at byte {offset + length + 1} of the payload, "
                f"which has {self._payload.length}: the file is damaged, restore it from a backup"
            )
        self.last_sequence = sequence
        self._chain = row[-CHAIN_BYTES:]

"""A partition file open in HDF5 for writing: its attributes, its consultations, and their growing datasets.

::

    WritablePartition        the file, its identity and the committed sequence
      ConsultationGroups     the groups below /consultations, and those below /conflicts; keeps the last used ones open
        Appender             the two datasets of one consultation: a row and a body for each event, chained and checked
          GrowingDataset     one dataset, which grows at its end
      NamePages              the pages of /names, which list the consultations in order
      ActiveConsultations    the table /active: the consultations with the newest events
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5g, h5p, h5s, h5t

from fiq.corpus.consultation import Consultation, open_datasets
from fiq.corpus.errors import AppendRefusedError, CorpusFormatError, CorpusIOError, hdf5_says
from fiq.corpus.format import (
    ACTIVE,
    ACTIVE_DTYPE,
    COMMIT_ATTRIBUTES,
    CONFLICTS,
    CONSULTATIONS,
    EVENT_DTYPE,
    EVENT_HEAD,
    EVENT_ID_BYTES,
    EVENT_ROW,
    EVENT_TAIL,
    EVENTS,
    EVENTS_CHUNK,
    LIBVER,
    MAX_BODY_BYTES,
    MOST_ACTIVE,
    NAMES,
    PAYLOAD,
    PAYLOAD_CHUNK,
    SHORT_PAYLOAD_CHUNK,
    Identity,
    Record,
    bound_metadata,
    chain_next,
    chain_start,
    check_identity,
    commit_values,
    is_consultation_id,
    read_attributes,
)
from fiq.corpus.names import CHUNK_PAGES, PAGE_BYTES, NameTree
from fiq.corpus.wal.file import AtomicFile

#: consultations whose conflicts stay open: they are rare
_OPEN_CONFLICTS = 16
_MAX_SIGNED = 2**63 - 1
#: what h5py raises; the last one when it overlooks that a method of the file has raised (h5py 3.16)
HDF5_ERRORS = (OSError, RuntimeError, ValueError, KeyError, MemoryError, SystemError)
#: what HDF5 says when malloc(3) fails
_NO_MEMORY = "memory allocation failed"
#: makes a growing dataset, given as h5py's low-level ``DatasetID`` with its element's and chunk's size
DatasetFactory = Callable[..., "GrowingDataset"]


@contextmanager
def hdf5_errors(file: AtomicFile) -> Iterator[None]:
    """Turn an error of h5py inside the block into the corpus's own.

    Raises CorpusIOError: the *file* under HDF5 failed; CorpusFormatError: HDF5 does not accept the content.
    """
    try:
        yield
    except HDF5_ERRORS as error:
        raise hdf5_error(file, error) from error


def hdf5_error(file: AtomicFile, error: BaseException) -> BaseException:
    """Return the corpus's error for one of h5py, which hides what its *file* raised."""
    if isinstance(error, SystemError) and file.failure is None:
        return error
    if file.failure is None and (isinstance(error, MemoryError) or _NO_MEMORY in str(error)):
        return CorpusIOError(f"{file.name}: out of memory")
    return file.failure or CorpusFormatError(f"{file.name}: {hdf5_says(error)}")


class WritablePartition:
    """A partition file open in HDF5.

    Args:
        file: the file under HDF5; not closed here.
        expected: the identity that the file must state; None accepts any.
        limit: how many consultations stay open.
        metadata_cache: limit of HDF5's metadata cache, in bytes of the file.

    Raises:
        CorpusFormatError: it is no partition file, or damaged.
        IdentityMismatchError: its identity is another.
        CorpusIOError: the system refused.
    """

    def __init__(self, file: AtomicFile, expected: Identity | None, *, limit: int, metadata_cache: int) -> None:
        with hdf5_errors(file):
            # no cache of chunks: they are written past HDF5, and a cached one would be stale
            self._file = h5py.File(file, "r+", libver=LIBVER, rdcc_nbytes=0)
        try:
            with hdf5_errors(file):
                bound_metadata(self._file, metadata_cache)
                stated = read_attributes(self._file, file.name)
                self.identity, self.begins = stated.identity, stated.begins
                self.committed, self.committed_id = stated.committed, stated.committed_id
                if expected is not None:
                    check_identity(file.name, expected, self.identity)
                if stated.journal != str(file.uuid):
                    raise CorpusFormatError(f"{file.name}: its user block and its HDF5 content are of two files")
                self._attributes = [h5py.h5a.open(self._file.id, name.encode()) for name in COMMIT_ATTRIBUTES]
                make_dataset = partial(GrowingDataset, file)
                #: the sorted ids of the consultations
                self._name_pages = NamePages(file, h5d.open(self._file.id, NAMES.encode()), make_dataset)
                self.names = NameTree(self._name_pages)
                self.active = ActiveConsultations(h5d.open(self._file.id, ACTIVE.encode()))
                root, own = self._file.id, self.identity
                self.consultations = ConsultationGroups(
                    root,
                    CONSULTATIONS,
                    make_dataset,
                    own,
                    events=stated.events,
                    limit=limit,
                    names=self.names,
                    active=self.active,
                )
                self.conflicts = ConsultationGroups(
                    root, CONFLICTS, make_dataset, own, events=stated.conflicts, limit=_OPEN_CONFLICTS
                )
        except BaseException:
            file.discard()
            self._file.close()
            raise

    def place(self, store: str, volume: str, epoch: int) -> None:
        """Let the file state that it belongs to *store*, and to the partition's placement *epoch* on *volume*."""
        for name, value in (("store", store), ("volume", volume)):
            if getattr(self.identity, name) != value:
                self._file.attrs[name] = value
        h5py.h5a.open(self._file.id, b"epoch").write(np.array(epoch, np.uint32))
        self.identity = replace(self.identity, store=store, volume=volume, epoch=epoch)

    def rebuild_names(self) -> None:
        """Write the index of names anew, from the groups."""
        self._name_pages.clear()
        for name in self.consultations.group_names():
            self.names.insert(name)

    def flush(self, sequence: int, message_id: str) -> None:
        """Write everything into the file under HDF5, with *sequence* and the *message_id* there as committed."""
        values = commit_values(sequence, message_id, self.consultations.events, self.conflicts.events)
        for attribute, value in zip(self._attributes, values, strict=True):
            attribute.write(value)
        self._file.flush()

    def close(self) -> None:
        """Close every handle. HDF5 may write then: the file under it must discard that."""
        self.consultations.clear()
        self.conflicts.clear()
        self._attributes.clear()
        try:
            self._file.close()
        except (OSError, RuntimeError, ValueError):
            # HDF5 could not read what it needs for writing what is dropped anyway
            return


class ConsultationGroups:
    """The consultations below one group; keeps a bounded number open, and closes the least recently used one first.

    Args:
        root: low-level id of the root group.
        group: name of the group in it that holds them.
        make_dataset: makes a growing dataset of a low-level one.
        identity: what the file states about itself.
        events: how many it holds.
        limit: how many consultations stay open; each takes about 35 KB in HDF5.
        names: gets the name of each new one; None for none.
        active: is told of each append; None for none.
    """

    def __init__(
        self,
        root: Any,
        group: str,
        make_dataset: DatasetFactory,
        identity: Identity,
        *,
        events: int,
        limit: int,
        names: NameTree | None = None,
        active: ActiveConsultations | None = None,
    ) -> None:
        #: how many events the consultations hold, uncommitted ones included
        self.events = events
        self._group = h5g.open(root, group.encode())
        self._name = group
        # "in" on the group looks a name up twice, in an index that does not stay in HDF5's cache when it is large
        self._links = self._group.links
        self._make_dataset = make_dataset
        self._identity = identity
        self._limit = limit
        self._names = names
        self._active = active
        self._open: OrderedDict[str, Appender] = OrderedDict()
        self._events_plan = _chunked(EVENTS_CHUNK)
        self._short_plan, self._payload_plan = _chunked(SHORT_PAYLOAD_CHUNK), _chunked(PAYLOAD_CHUNK)
        self._empty = h5s.create_simple((0,), (h5s.UNLIMITED,))
        self._row_type = h5t.py_create(EVENT_DTYPE)

    def __len__(self) -> int:
        """Return the number of consultations, uncommitted ones included."""
        return int(self._group.get_num_objs())

    @property
    def open_count(self) -> int:
        """How many are open for appending."""
        return len(self._open)

    def append(self, consultation: str, records: Sequence[Record], committed: int) -> int:
        """Append *records* to a consultation, creating its group when it has none.

        Args:
            committed: the sequence that the file has reached; those of the records are above it.

        Returns:
            The number of the row of the first one.

        Raises AppendRefusedError: the id cannot name a group, a sequence does not rise, or an id or a body is
        malformed. Nothing was appended.
        """
        appender = self._open.get(consultation)
        if appender is None:
            appender = self._open_appender(consultation, records)
        else:
            self._open.move_to_end(consultation)
        first = appender.length
        appender.append(records, committed)
        self.events += len(records)
        if self._active is not None:
            self._active.note(consultation, records[-1].received_ns)
        return first

    def consultation(self, name: str) -> Consultation | None:
        """Return a consultation for reading; None when the file has no such."""
        group = self._group_of(name)
        return None if group is None else Consultation(name, *open_datasets(group), plain=True)

    def group_names(self) -> list[bytes]:
        """Return the sorted names of the groups that can be consultations; all in memory."""
        found: list[bytes] = []
        self._links.iterate(found.append)
        return sorted(name for name in found if is_consultation_id(name.decode()))

    def clear(self) -> None:
        """Close all."""
        self._open.clear()

    def _group_of(self, name: str) -> Any | None:
        link = name.encode()
        return h5g.open(self._group, link) if is_consultation_id(name) and self._links.exists(link) else None

    def _open_appender(self, name: str, first: Sequence[Record]) -> Appender:
        group = self._group_of(name)
        if group is not None:
            events, payload = open_datasets(group)
        else:
            if not is_consultation_id(name):
                raise AppendRefusedError("a consultation id is 1 to 128 characters of A-Z a-z 0-9 _ -")
            created = h5g.create(self._group, name.encode())
            events = h5d.create(created, EVENTS.encode(), self._row_type, self._empty, self._events_plan)
            short = sum(len(record.body) + 1 for record in first) <= SHORT_PAYLOAD_CHUNK
            plan = self._short_plan if short else self._payload_plan
            payload = h5d.create(created, PAYLOAD.encode(), h5t.STD_U8LE, self._empty, plan)
            if self._names is not None:
                self._names.insert(name.encode())
        start = chain_start(self._identity, name, of=self._name)
        appender = Appender(name, events, payload, self._make_dataset, start=start, new=group is None)
        self._open[name] = appender
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


class Appender:
    """The open datasets of one consultation.

    Args:
        name: the consultation's id, for messages.
        events: low-level id of its ``events`` dataset.
        payload: low-level id of its ``payload`` dataset.
        make_dataset: makes growing datasets of the two.
        start: what its first event is chained to.
        new: whether both were just created.
    """

    __slots__ = ("_chain", "_events", "_last_sequence", "_name", "_payload")

    def __init__(
        self, name: str, events: Any, payload: Any, make_dataset: DatasetFactory, *, start: bytes, new: bool
    ) -> None:
        self._name = name
        self._chain = start
        self._events = make_dataset(events, item=EVENT_ROW.size, chunk=EVENTS_CHUNK, empty=new)
        (chunk,) = payload.get_create_plist().get_chunk()
        self._payload = make_dataset(payload, item=1, chunk=chunk, empty=new)
        self._last_sequence = 0
        if self._events.length:
            self._read_last_row()

    @property
    def length(self) -> int:
        """How many events the consultation holds, appended ones included."""
        return self._events.length

    def append(self, records: Sequence[Record], committed: int) -> None:
        """Append as :meth:`ConsultationGroups.append` does."""
        rows: list[bytes] = []
        bodies: list[bytes] = []
        offset, last, chain = self._payload.length, max(self._last_sequence, committed), self._chain
        for record in records:
            body = record.body
            if record.sequence <= last:
                raise AppendRefusedError(f"{self._name}: sequence {record.sequence} does not rise above {last}")
            self._check(record)
            length = len(body)
            head = EVENT_HEAD.pack(record.sequence, record.received_ns, offset, length, 0, record.event_id)
            chain = chain_next(chain, head, body)
            rows += (head, EVENT_TAIL.pack(chain, record.written_ns))
            bodies.append(body)
            offset += length + 1
            last = record.sequence
        bodies.append(b"")
        self._payload.append(b"\n".join(bodies))
        self._events.append(b"".join(rows))
        self._last_sequence, self._chain = last, chain

    def _check(self, record: Record) -> None:
        if len(record.event_id) != EVENT_ID_BYTES:
            raise AppendRefusedError(f"{self._name}: an event id has 16 bytes, not {len(record.event_id)}")
        if b"\n" in record.body or not 0 < len(record.body) <= MAX_BODY_BYTES:
            raise AppendRefusedError(f"{self._name}: a body is one line and not empty (sequence {record.sequence})")
        times = record.received_ns, record.written_ns
        if min(times) < -_MAX_SIGNED or max(*times, record.sequence) > _MAX_SIGNED:
            raise AppendRefusedError(f"{self._name}: a number is out of range (sequence {record.sequence})")

    def _read_last_row(self) -> None:
        sequence, _, offset, length, _, _, chain, _ = EVENT_ROW.unpack(self._events.last())
        if offset + length + 1 != self._payload.length:
            raise CorpusFormatError(
                f"{self._name}: the last row ends at byte {offset + length + 1} of the payload, "
                f"which has {self._payload.length}: the file is damaged, restore it from a backup"
            )
        self._last_sequence, self._chain = sequence, chain


class GrowingDataset:
    """Grows a dataset at its end, past most of HDF5.

    ``Dataset.resize`` and slicing cost 300 to 590 µs an append, ``set_extent`` and ``write_direct_chunk`` 18 to 28.
    Here HDF5 only learns the new extent, for which it allocates the chunks, and the content goes straight to its place
    in the file. That is safe: a chunk without filters never moves, and HDF5 keeps no chunks in memory
    (``rdcc_nbytes=0``).

    Args:
        file: the file under HDF5.
        dataset: h5py's low-level ``DatasetID``: one dimension, chunks without filters.
        item: bytes of an element.
        chunk: elements of a chunk.
        empty: whether it was just created.
    """

    __slots__ = ("_chunk", "_dataset", "_file", "_filled", "_item", "_offset", "length")

    def __init__(self, file: AtomicFile, dataset: Any, *, item: int, chunk: int, empty: bool) -> None:
        self._file = file
        self._dataset = dataset
        self._item = item
        self._chunk = chunk * item
        #: elements
        self.length = 0 if empty else int(dataset.shape[0])
        #: bytes in use of the last chunk, and its byte offset
        self._filled = self._offset = 0
        if self.length:
            first = self.length - 1 - (self.length - 1) % chunk
            self._filled = (self.length - first) * item
            self._offset = self.find(first)

    def append(self, data: bytes) -> None:
        """Append whole elements."""
        start, self.length = self.length, self.length + len(data) // self._item
        self._dataset.set_extent((self.length,))
        room = self._chunk - self._filled if self._filled else 0
        if len(data) <= room:
            self._file.write_at(self._offset + self._filled, data)
            self._filled += len(data)
            return
        if room:
            self._file.write_at(self._offset + self._filled, data[:room])
        for low in range(room, len(data), self._chunk):
            part = data[low : low + self._chunk]
            self._offset, self._filled = self.find(start + low // self._item), len(part)
            self._file.write_at(self._offset, part)

    def clear(self) -> None:
        """Remove all elements."""
        self._dataset.set_extent((0,))
        self.length = self._filled = self._offset = 0

    def last(self) -> bytes:
        """Return the last element; the dataset is not empty."""
        return self._file.read_at(self._offset + self._filled - self._item, self._item)

    def find(self, element: int) -> int:
        """Return the byte offset of the chunk that begins with *element*.

        HDF5's own function for that goes through all chunks of a dataset; the offset of a read is known at once.
        """
        return self._file.locate(lambda: self._dataset.read_direct_chunk((element,)), self._chunk)


class NamePages:
    """The pages of :mod:`fiq.corpus.names` in a partition file.

    Args:
        file: the file under HDF5.
        dataset: low-level id of ``/names``.
        make_dataset: makes a growing dataset of it.
    """

    def __init__(self, file: AtomicFile, dataset: Any, make_dataset: DatasetFactory) -> None:
        self._file = file
        self._pages = make_dataset(dataset, item=PAGE_BYTES, chunk=CHUNK_PAGES, empty=False)
        #: byte offsets of the chunks that were used
        self._offsets: dict[int, int] = {}

    def __len__(self) -> int:
        return self._pages.length

    def read(self, number: int) -> bytes:
        return self._file.read_at(self._offset(number), PAGE_BYTES).rstrip(b"\0")

    def write(self, number: int, at: int, data: bytes) -> None:
        self._file.write_at(self._offset(number) + at, data)

    def add(self, content: bytes) -> int:
        self._pages.append(content.ljust(PAGE_BYTES, b"\0"))
        return self._pages.length - 1

    def clear(self) -> None:
        """Remove all pages."""
        self._pages.clear()
        self._offsets.clear()

    def _offset(self, number: int) -> int:
        first = number - number % CHUNK_PAGES
        offset = self._offsets.get(first)
        if offset is None:
            offset = self._offsets[first] = self._pages.find(first)
        return offset + PAGE_BYTES * (number - first)


class ActiveConsultations:
    """The consultations with the newest events; written into the file with a checkpoint, not with each commit.

    After a crash it lacks what was appended since. A consultation keeps its row, so that a checkpoint copies little.

    Args:
        dataset: low-level id of ``/active``.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._type = h5t.py_create(ACTIVE_DTYPE)
        rows = np.empty(int(dataset.shape[0]), ACTIVE_DTYPE)
        dataset.read(h5s.ALL, h5s.ALL, rows, self._type)
        entries = [(bytes(one["consultation"]).decode(), int(one["received_ns"]), row) for row, one in enumerate(rows)]
        #: when the last event of each was accepted, nanoseconds since the Unix epoch, and its row; oldest append first
        self._entries = {name: (received, row) for name, received, row in sorted(entries, key=lambda entry: entry[1])}
        self._changed = False

    def note(self, consultation: str, received_ns: int) -> None:
        """Note an append, whose last event was accepted at *received_ns*."""
        before = self._entries.pop(consultation, None)
        if before is not None:
            row = before[1]
        elif len(self._entries) < MOST_ACTIVE:
            row = len(self._entries)
        else:
            _, row = self._entries.pop(next(iter(self._entries)))
        self._entries[consultation] = received_ns, row
        self._changed = True

    def newest(self) -> list[tuple[int, str]]:
        """Return when the last event of each was accepted, and its name; newest first."""
        return sorted(((received, name) for name, (received, _) in self._entries.items()), reverse=True)

    def save(self) -> bool:
        """Write the table into HDF5; return False if nothing has changed."""
        if not self._changed:
            return False
        rows = np.empty(len(self._entries), ACTIVE_DTYPE)
        for name, (received, row) in self._entries.items():
            rows[row] = received, name
        self._dataset.set_extent((len(rows),))
        self._dataset.write(h5s.ALL, h5s.ALL, rows, self._type)
        self._changed = False
        return True

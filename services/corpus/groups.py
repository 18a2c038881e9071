"""The consultations of an open partition file: finds, creates, and keeps the recently used ones open."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from h5py import h5, h5d, h5g, h5p, h5s, h5t

from services.corpus.appender import Appender, Tally
from services.corpus.chain import chain_start
from services.corpus.errors import AppendRefusedError
from services.corpus.format import (
    EVENT_DTYPE,
    EVENTS,
    EVENTS_CHUNK,
    PAYLOAD,
    PAYLOAD_CHUNK,
    is_consultation_id,
)
from services.corpus.records import Identity
from services.corpus.tails import Tails


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

        Raises:
            AppendRefusedError: the id cannot name a group.
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

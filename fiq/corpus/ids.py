"""Which events a consultation holds: exact, in about 12 bytes an event, whatever the size of the consultation.

An id is kept as an 8-byte hash in a sorted array, and the number of its row in a second one. The id in that row is
compared before an answer, so hashes that collide do no harm. Recently appended ids are in a small dictionary, which is
merged into the arrays from time to time. A consultation that was created through this store is known from its first
event on and never read; another one is read once, at its first look-up.

One :class:`KnownIds` serves all partition files of a process: when there are too many ids it drops the least recently
used consultations. A consultation with more ids than the limit is never kept: its table is searched each time, in
pieces.

The hash is keyed by a secret of the process, so that a client cannot choose ids that collide. With the key and the
hashes (:class:`IdHashes`) another process can look an id up by itself.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fiq.corpus.consultation import Consultation, StoredRow

#: appended ids are merged from this many on, or an eighth of those before, up to the second number: a merge copies all
_RECENT = (256, 16_384)
#: memory of an id in a dictionary, in ids that are in an array: some 150 bytes instead of 12
_RECENT_WEIGHT = 12
#: what a consultation takes besides its ids, in the same measure
_OWN_WEIGHT = 50

Hashes = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class IdHashes:
    """All ids of a consultation as hashes."""

    key: bytes  #: of the hash, 16 bytes
    hashes: bytes  #: 8 bytes each, little-endian, sorted; see :func:`hashes_of`


#: opens a consultation; returns None if it does not exist
OpenTable = Callable[[], Consultation | None]


class KnownIds:
    """The ids of many consultations, over all partition files of a process; used by one thread.

    Args:
        limit: ids that stay in memory; each takes 12 bytes.
    """

    def __init__(self, limit: int = 4_000_000) -> None:
        self.key = os.urandom(16)
        self._limit = limit
        self._weight = 0
        self._kept: OrderedDict[tuple[object, str], _Ids] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._kept.values()))

    def held(
        self, store: object, name: str, wanted: Collection[bytes], open_table: OpenTable
    ) -> dict[bytes, StoredRow]:
        """Return the rows of those of *wanted* that the consultation *name* of *store* holds."""
        ids = self._kept.get((store, name))
        if ids is not None:
            self._kept.move_to_end((store, name))
            candidates = list(ids.candidates(wanted))
            table = open_table() if candidates else None
        elif (table := open_table()) is not None:
            ids = self._load(store, name, table)
            candidates = list(self._search(table, wanted) if ids is None else ids.candidates(wanted))
        found = {}
        if table is not None:
            for event_id, index in sorted(candidates, key=lambda candidate: candidate[1]):  # chunk by chunk
                row = table.row(index)
                if row.event_id == event_id:
                    found[event_id] = row
        return found

    def hashes(self, store: object, name: str, most: int, open_table: OpenTable) -> IdHashes | None:
        """Return the hashes of a consultation's ids, none when it does not exist; None when there are over *most*."""
        ids = self._kept.get((store, name))
        if ids is None:
            table = open_table()
            if table is None:
                return IdHashes(self.key, b"")
            if len(table) > most:
                return None
            ids = self._load(store, name, table) or _Ids.read(self.key, table)
        return IdHashes(self.key, ids.all_hashes()) if len(ids) <= most else None

    def appended(self, store: object, name: str, first: int, ids: Sequence[bytes]) -> None:
        """Note *ids* that were appended in the rows from *first* on; with row 0 a consultation begins."""
        known = self._kept.get((store, name))
        if known is None:
            if first:
                return  # read at its first look-up
            known = self._keep(store, name, _Ids(self.key))
        before = known.weight
        known.add(first, ids)
        self._weight += known.weight - before
        self._shrink()

    def forget(self, store: object) -> None:
        """Forget all consultations of *store*, which is closed."""
        for key in [key for key in self._kept if key[0] is store]:
            self._weight -= self._kept.pop(key).weight

    def _load(self, store: object, name: str, table: Consultation) -> _Ids | None:
        if len(table) > self._limit:
            return None
        ids = self._keep(store, name, _Ids.read(self.key, table))
        self._shrink()
        return ids

    def _search(self, table: Consultation, wanted: Collection[bytes]) -> Iterator[tuple[bytes, int]]:
        """Yield the ids of *wanted* with each row that may hold one, without keeping anything."""
        hashes = hashes_of(self.key, b"".join(wanted))
        by_hash: dict[int, list[bytes]] = {}
        for hash_, event_id in zip(hashes.tolist(), wanted, strict=True):
            by_hash.setdefault(hash_, []).append(event_id)
        start = 0
        for piece in table.ids():
            in_piece = hashes_of(self.key, piece)
            for index in np.flatnonzero(np.isin(in_piece, hashes)).tolist():
                for event_id in by_hash[int(in_piece[index])]:
                    yield event_id, start + index
            start += len(piece)

    def _keep(self, store: object, name: str, ids: _Ids) -> _Ids:
        self._kept[store, name] = ids
        self._weight += ids.weight
        return ids

    def _shrink(self) -> None:
        while self._weight > self._limit and len(self._kept) > 1:
            _, ids = self._kept.popitem(last=False)
            self._weight -= ids.weight


class _Ids:
    """The ids of one consultation: sorted hashes under a *key*, and the row of each."""

    __slots__ = ("_hashes", "_key", "_recent", "_rows")

    def __init__(self, key: bytes, hashes: Hashes | None = None, rows: Rows | None = None) -> None:
        self._key = key
        self._hashes = np.empty(0, np.uint64) if hashes is None else hashes
        self._rows = np.empty(0, np.uint32) if rows is None else rows
        self._recent: dict[bytes, int] = {}

    @classmethod
    def read(cls, key: bytes, table: Consultation) -> _Ids:
        """Read all ids of *table*; meanwhile they take twice their memory."""
        hashes = np.empty(len(table), np.uint64)
        start = 0
        for piece in table.ids():
            hashes[start : start + len(piece)] = hashes_of(key, piece)
            start += len(piece)
        order = np.argsort(hashes)
        return cls(key, hashes[order], order.astype(np.uint32))

    def __len__(self) -> int:
        return len(self._hashes) + len(self._recent)

    @property
    def weight(self) -> int:
        """The memory that they take, counted in ids in an array."""
        return len(self._hashes) + _RECENT_WEIGHT * len(self._recent) + _OWN_WEIGHT

    def add(self, first: int, ids: Sequence[bytes]) -> None:
        """Add *ids*, which are in the rows from *first* on."""
        self._recent.update(zip(ids, range(first, first + len(ids)), strict=True))
        fewest, most = _RECENT
        if len(self._recent) >= max(fewest, min(len(self._hashes) // 8, most)):
            self._merge()

    def candidates(self, wanted: Collection[bytes]) -> Iterator[tuple[bytes, int]]:
        """Yield the ids of *wanted* with each row that may hold one."""
        others = []
        for event_id in wanted:
            row = self._recent.get(event_id)
            if row is not None:
                yield event_id, row
            else:
                others.append(event_id)
        if others and len(self._hashes):
            hashes = hashes_of(self._key, b"".join(others))
            low, high = self._hashes.searchsorted(hashes), self._hashes.searchsorted(hashes, "right")
            for number in np.flatnonzero(high > low).tolist():
                for row in self._rows[low[number] : high[number]].tolist():
                    yield others[number], row

    def all_hashes(self) -> bytes:
        """Return all hashes, sorted."""
        self._merge()
        return self._hashes.astype("<u8", copy=False).tobytes()

    def _merge(self) -> None:
        if not self._recent:
            return
        hashes = hashes_of(self._key, b"".join(self._recent))
        rows = np.fromiter(self._recent.values(), np.uint32, len(self._recent))
        order = np.argsort(hashes)
        positions = self._hashes.searchsorted(hashes[order])
        self._hashes = np.insert(self._hashes, positions, hashes[order])
        self._rows = np.insert(self._rows, positions, rows[order])
        self._recent.clear()


def hashes_of(key: bytes, ids: npt.NDArray[Any] | bytes) -> Hashes:
    """Return the hash of each of *ids*, 16 bytes each.

    With the two halves *a* and *b* of an id, and of the *key*, as big-endian numbers, modulo 2**64::

        x = (a ^ key_a) * (key_b | 1);  x ^= x >> 32;  x = (x ^ b) * (key_b | 1);  x ^= x >> 29
    """
    first, second = np.frombuffer(key, ">u8").astype(np.uint64)
    factor = second | np.uint64(1)
    data = ids if isinstance(ids, bytes) else ids.tobytes()
    halves = np.frombuffer(data, ">u8").reshape(-1, 2).astype(np.uint64)
    hashes: Hashes = (halves[:, 0] ^ first) * factor
    hashes ^= hashes >> np.uint64(32)
    hashes = (hashes ^ halves[:, 1]) * factor
    hashes ^= hashes >> np.uint64(29)
    return hashes

"""Checks one consultation: rows against their payload, their order, their ids, the bodies, the chain."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import orjson

from services.corpus.chain import chain_next
from services.corpus.events import Consultation
from services.corpus.format import EVENT_DTYPE, EVENT_HEAD

#: rows that are looked at together
_ROWS = 4096
#: bytes of the payload that are read at once, unless one event is larger
_PAYLOAD_BYTES = 8 << 20
_LINE_FEED = 10

_Rows = npt.NDArray[np.void]
_Mask = npt.NDArray[np.bool_]


class Finding(NamedTuple):
    """Something wrong with a row, or, where that is None, with the whole consultation."""

    kind: str
    message: str
    row: int | None = None
    sequence: int | None = None


class ConsultationCheck:
    """The check of one consultation, slice by slice: memory stays bounded however long it is, but for its ids.

    Args:
        consultation: what to check.
        start: what its first row is chained to.
        committed: the sequence that the file has reached.
        unique: whether no id may stand twice; conflicts may share one.
    """

    def __init__(self, consultation: Consultation, start: bytes, committed: int, *, unique: bool = True) -> None:
        self._consultation = consultation
        self._committed = committed
        self._unique = unique
        self._chain = start
        self._sequence = 0
        self._end = 0
        self._ids: list[npt.NDArray[np.uint64]] = []
        #: rows that were looked at so far
        self.done = 0

    def run(self) -> Iterator[list[Finding]]:
        """Check a slice after another, and yield what is wrong in it.

        Raises:
            CorpusError: the datasets cannot be read.
        """
        self._consultation.check_layout()
        while self.done < len(self._consultation):
            rows = self._consultation.table(self.done, self.done + _ROWS)
            found = [*self._order(rows), *self._bodies(rows)]
            self.done += len(rows)
            yield sorted(found, key=lambda finding: finding.row or 0)
        yield [*self._duplicates(), *self._surplus()]

    def _order(self, rows: _Rows) -> Iterator[Finding]:
        """Sequences rise and are committed; bodies lie one behind another."""
        sequences, offsets = rows["seq"], rows["offset"]
        ends = offsets + rows["length"] + np.uint64(1)
        not_rising = sequences <= _shifted(sequences, self._sequence)
        ahead = sequences > np.uint64(self._committed)
        gaps = offsets != _shifted(ends, self._end)
        self._sequence, self._end = int(sequences[-1]), int(ends[-1])
        self._ids.append(np.frombuffer(rows["event_id"].tobytes(), np.uint64).reshape(-1, 2))
        yield from self._at(rows, not_rising, "order", "the sequence does not rise above the one before")
        yield from self._at(rows, ahead, "ahead", f"the sequence is above {self._committed}, which is committed")
        yield from self._at(rows, gaps, "gap", "the body does not start where the one before ends")

    def _bodies(self, rows: _Rows) -> Iterator[Finding]:
        total = np.uint64(self._consultation.payload_bytes)
        offsets, lengths = rows["offset"], rows["length"]
        inside = (offsets < total) & (lengths < total - np.minimum(offsets, total))
        yield from self._at(rows, ~inside, "outside", "the body lies outside the payload")
        heads, chains = rows.tobytes(), rows["chain"].tolist()
        for low, high in _stretches(rows, inside):
            lines = self._consultation.lines(int(offsets[low]), int(offsets[high - 1]) + int(lengths[high - 1]) + 1)
            yield from self._lines(rows[low:high], low, lines)
            yield from self._events(rows, low, high, lines.tobytes(), heads, chains)
        self._chain = chains[-1]

    def _lines(self, rows: _Rows, low: int, lines: npt.NDArray[np.uint8]) -> Iterator[Finding]:
        """Each body is one line."""
        ends = (rows["offset"] - rows["offset"][0] + rows["length"]).astype(np.int64)
        feeds = lines == _LINE_FEED
        if int(np.count_nonzero(feeds)) == len(rows) and bool(feeds[ends].all()):
            return
        wrong = np.zeros(len(rows), np.bool_)
        wrong |= ~feeds[ends]
        feeds[ends] = False
        wrong[np.searchsorted(ends, np.flatnonzero(feeds))] = True
        yield from self._at(rows, wrong, "newline", "the body is not one line with a line feed behind it", low)

    def _events(
        self, rows: _Rows, low: int, high: int, lines: bytes, heads: bytes, chains: list[bytes]
    ) -> Iterator[Finding]:
        """The chain fits, and each body is JSON. The loop that takes the time: some 2 µs an event."""
        width, head, parse = EVENT_DTYPE.itemsize, EVENT_HEAD.size, orjson.loads
        before = chains[low - 1] if low else self._chain
        place = 0
        for number, length in enumerate(rows["length"][low:high].tolist(), low):
            body = lines[place : place + length]
            place += length + 1
            chain = chains[number]
            if chain_next(before, heads[width * number : width * number + head], body) != chain:
                yield self._finding(rows, number, "chain", "the chain breaks: it or a row before was changed or moved")
            before = chain
            try:
                parse(body)
            except orjson.JSONDecodeError:
                yield self._finding(rows, number, *_why_no_json(body))

    def _duplicates(self) -> Iterator[Finding]:
        if not self._ids or not self._unique:
            return
        ids = np.concatenate(self._ids)
        order = np.lexsort((ids[:, 1], ids[:, 0]))  # stable: of equal ids the later row comes later
        same = (ids[order[1:]] == ids[order[:-1]]).all(axis=1)
        for row, first in sorted(zip(order[1:][same].tolist(), order[:-1][same].tolist(), strict=True)):
            sequence = int(self._consultation.table(row, row + 1)["seq"][0])
            yield Finding("duplicate", f"row {first} has the same event id", row, sequence)

    def _surplus(self) -> Iterator[Finding]:
        held = self._consultation.payload_bytes
        if held > self._end:
            yield Finding("payload", f"the payload has {held - self._end} bytes behind the last row: rows are missing")

    def _at(self, rows: _Rows, mask: _Mask, kind: str, message: str, low: int = 0) -> Iterator[Finding]:
        for number in np.flatnonzero(mask).tolist():
            yield Finding(kind, message, self.done + low + number, int(rows["seq"][number]))

    def _finding(self, rows: _Rows, number: int, kind: str, message: str) -> Finding:
        return Finding(kind, message, self.done + number, int(rows["seq"][number]))


def _shifted(values: npt.NDArray[np.uint64], first: int) -> npt.NDArray[np.uint64]:
    return np.concatenate((np.array([first], np.uint64), values[:-1]))


def _stretches(rows: _Rows, inside: _Mask) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows whose bodies lie inside the payload one behind another, and are not too long together."""
    starts = rows["offset"].tolist()
    ends = [start + length + 1 for start, length in zip(starts, rows["length"].tolist(), strict=True)]
    low = 0
    for high in range(1, len(rows) + 1):
        if (
            high == len(rows)
            or starts[high] != ends[high - 1]
            or ends[high] - starts[low] > _PAYLOAD_BYTES
            or not (inside[high] and inside[low])
        ):
            if inside[low]:
                yield low, high
            low = high


def _why_no_json(body: bytes) -> tuple[str, str]:
    try:
        body.decode()
    except UnicodeDecodeError:
        return "utf-8", "the body is not UTF-8"
    return "json", "the body is not JSON"

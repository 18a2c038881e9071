"""Appends events to one consultation: a row and a body each, chained and checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.corpus.chain import CHAIN_BYTES, chain_next
from services.corpus.errors import AppendRefusedError, CorpusFormatError
from services.corpus.format import EVENT_HEAD, EVENTS_CHUNK, MAX_BODY_BYTES, PAYLOAD_CHUNK
from services.corpus.records import EVENT_ID_BYTES, Record
from services.corpus.tails import Tails

_MAX_SIGNED = 2**63 - 1
_ROW_BYTES = EVENT_HEAD.size + CHAIN_BYTES


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

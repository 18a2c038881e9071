"""Answers to questions about one partition file, made in the HDF5 thread in short turns between the batches."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass
from uuid import UUID

from services.contract.errors import TransientError
from services.corpus import EventStore, Lookup, StoredRow
from services.eventlog.jetstream import reading_wire as wire
from services.eventlog.jetstream.reading_wire import Consultations, Events, Find, Question, Row
from services.persister.partition_file import PartitionFile

#: a turn ends with the first step behind this; a step is a millisecond or less, but for the body of a huge event
TURN_SECONDS = 0.003
#: an answer is not made longer than this, but for a single event that is, bytes
ANSWER_BYTES = 512 << 10
#: more than the number of an id takes in the list of those that are to be asked for again, bytes
_INDEX_BYTES = 4
#: names of consultations that are read in one step
_NAMES_STEP = 1000

#: makes an answer in steps
Steps = Generator[None, None, bytes]


class TooLargeError(TransientError):
    """Raised when a single event is larger than the broker takes now."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How long an answer may be.

    Attributes:
        payload: what the broker takes, headers included, bytes.
    """

    payload: int

    def fits(self, size: int, body: int, *, first: bool) -> bool:
        """Return whether a row with a *body* fits behind *size* bytes of others.

        Raises:
            TooLargeError: it would not fit alone.
        """
        size += wire.ROW_BYTES + body
        if first and size + wire.HEAD_BYTES > self.payload:
            raise TooLargeError("an event is larger than the broker's max_payload")
        return first or size + wire.HEAD_BYTES <= min(self.payload, ANSWER_BYTES)


class Job:
    """One question to the open store of a partition.

    Args:
        file: of the partition.
        store: that was open when the question came.
        question: what is asked.
        bounds: of the answer.
    """

    def __init__(self, file: PartitionFile, store: EventStore, question: Question, bounds: Bounds) -> None:
        self._file = file
        self._store = store
        self._question = question
        self._bounds = bounds
        self._steps: Steps | None = None

    def turn(self) -> bytes | None:
        """Work for a while; return the answer when it is complete.

        Raises:
            NotNowError: the file was let go, or holds what is not committed.
            TooLargeError: see :class:`Bounds`.
            PlacementError: the file was deleted or replaced.
            CorpusError: it cannot be read.
        """
        end = time.perf_counter() + TURN_SECONDS
        self._file.check_askable(self._store)
        with self._store.reading() as lookup:
            if self._steps is None:
                self._steps = self._begin(lookup)
            try:
                next(self._steps)
                while time.perf_counter() < end:
                    next(self._steps)
            except StopIteration as ended:
                answer: bytes = ended.value
                return answer
        return None

    def close(self) -> None:
        """Let go of what is open in HDF5, when no more turn is to come."""
        if self._steps is not None:
            self._steps.close()

    def _begin(self, lookup: Lookup) -> Steps:
        match self._question:
            case Find():
                return _find(lookup, self._store.committed, self._question, self._bounds)
            case Events():
                return _events(lookup, self._store.committed, self._question, self._bounds)
            case Consultations():
                return _consultations(lookup, self._file, self._question)


def surely_absent(store: EventStore, question: Question) -> bytes | None:
    """Return the answer to a question that ids in memory decide, none of which is held; else None.

    Asks HDF5 for nothing, so it need not run in its thread: a set that another thread adds to can be looked into.
    """
    if not isinstance(question, Find):
        return None
    committed = store.committed
    with store.reading() as lookup:
        for consultation, event_id in question.pairs:
            known = lookup.known_ids(consultation)
            if known is None or event_id.bytes in known:
                return None
    return wire.encode_found(committed, {})


def _find(lookup: Lookup, committed: int, question: Find, bounds: Bounds) -> Steps:
    wanted: dict[str, dict[bytes, list[int]]] = {}
    for index, (consultation, asked) in enumerate(question.pairs):
        wanted.setdefault(consultation, {}).setdefault(asked.bytes, []).append(index)
    found: dict[int, Row] = {}
    rest: list[int] = []
    size = _INDEX_BYTES * len(question.pairs)
    # one after another: each one's handles are let go before the next is opened, for that takes time, too
    for consultation, indexes in wanted.items():
        known = lookup.known_ids(consultation)
        ids = indexes.keys() if known is None else indexes.keys() & known
        stored = lookup.consultation(consultation) if ids and not rest else None
        yield
        if rest:
            rest += [index for event_id in ids for index in indexes[event_id]]
            continue
        if stored is None:
            continue
        rows = yield from stored.search(ids)
        for event_id, row in rows.items():
            if rest or not bounds.fits(size, row.length * len(indexes[event_id]), first=not found):
                rest += indexes[event_id]
                continue
            found.update(dict.fromkeys(indexes[event_id], _complete(row, stored.body(row))))
            size += (wire.ROW_BYTES + row.length) * len(indexes[event_id])
            yield
    return wire.encode_found(committed, found, rest)


def _events(lookup: Lookup, committed: int, question: Events, bounds: Bounds) -> Steps:
    stored = lookup.consultation(question.consultation) if question.limit else None
    rows: list[StoredRow] = []
    if stored is None:
        return wire.encode_events(committed, [], more=False)
    index, size = stored.behind(question.after), 0
    while index < len(stored) and len(rows) < question.limit:
        row = stored.row(index)
        if not bounds.fits(size, row.length, first=not rows):
            break
        rows.append(row)
        size += wire.ROW_BYTES + row.length
        index += 1
    yield
    bodies = stored.bodies(rows)
    yield
    complete = [_complete(row, body) for row, body in zip(rows, bodies, strict=True)]
    return wire.encode_events(committed, complete, more=index < len(stored))


def _consultations(lookup: Lookup, file: PartitionFile, question: Consultations) -> Steps:
    names = file.names
    while not names.complete:
        names.feed(lookup.names(names.position, _NAMES_STEP))
        yield
    found = names.select(question.prefix, question.after, question.limit + 1)
    return wire.encode_consultations(found[: question.limit], more=len(found) > question.limit)


def _complete(row: StoredRow, body: bytes) -> Row:
    return Row(row.sequence, row.received_ns, UUID(bytes=row.event_id), body)

"""Answers questions about the partitions that this process runs, and about no others.

A partition is subscribed to after its file was opened and not any more when it is released, so a question about one
that no process runs ends at once at the broker. All that wait are answered in the HDF5 thread, in one go of some
milliseconds between two rounds: each question is bounded in what it reads, so none holds a round back for long.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from uuid import UUID

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from fiq.corpus import CorpusError, EventStore, Lookup, StoredConsultation, StoredRow
from fiq.errors import PermanentError, TransientError
from services.core.logs import get_logger
from services.log.errors import LogUnavailableError
from services.log.jetstream import questions as wire
from services.log.jetstream.connection import PENDING_BYTES
from services.log.jetstream.names import corpus_subject
from services.log.jetstream.questions import Consultations, Events, Find, Ids, MalformedError, Question, Row
from services.log.protocol import Stored, digest_of
from services.persister.errors import described
from services.persister.metrics import Metrics
from services.persister.partition_file import NotNowError, PartitionFile

#: questions that may wait; one more is turned away
MAX_WAITING = 256
#: a go ends with the first answer after this, seconds
GO_SECONDS = 0.005
#: an answer is not made longer than this, but for a single event that is; bodies that are compared, bytes
ANSWER_BYTES, COMPARED_BYTES = 512 << 10, 4 << 20
#: names of consultations that are read in one go
NAMES_A_GO = 5000
#: what the headers of an error, and of the answer's message, take at most, bytes
_HEADERS_BYTES = 256

_log = get_logger("answering")


@dataclass(frozen=True, slots=True)
class _Open:
    """A partition that is answered for."""

    file: PartitionFile
    store: EventStore
    subscription: Subscription


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question that waits."""

    partition: int
    question: Question
    message: Msg
    kind: str
    arrived: float
    within: float


@dataclass(frozen=True, slots=True)
class _Made:
    """What came of a question: an answer, or an error with its *code*; nothing is sent when it came too late."""

    outcome: str
    data: bytes = b""
    code: int = 0
    reason: str = ""
    seconds: float = 0.0


class Desk:
    """Takes the questions of one process.

    Args:
        nc: the connection.
        store: name of the store that the process writes.
        hdf5: the one thread that touches HDF5.
        metrics: of this process.
    """

    def __init__(self, nc: Client, store: str, hdf5: Executor, metrics: Metrics) -> None:
        self._nc = nc
        self._store = store
        self._hdf5 = hdf5
        self._metrics = metrics
        self._open: dict[int, _Open] = {}
        self._waiting: deque[_Asked] = deque()
        self._came = asyncio.Event()

    async def open(self, partition: int, file: PartitionFile, store: EventStore) -> None:
        """Answer for *partition* from now on, whose *store* was opened.

        Raises LogUnavailableError: there is no connection.
        """
        subject = corpus_subject(self._store, partition, "*")

        async def take(message: Msg) -> None:
            await self._take(partition, message)

        try:
            subscription = await self._nc.subscribe(subject, cb=take)
        except (nats.errors.Error, OSError) as error:
            raise LogUnavailableError(f"cannot answer on {subject}: {type(error).__name__}") from error
        self._open[partition] = _Open(file, store, subscription)

    async def close(self, partition: int) -> None:
        """Answer for *partition* no more, before its file is released. Idempotent."""
        opened = self._open.pop(partition, None)
        if opened is None:
            return
        try:
            await opened.subscription.unsubscribe()
        except (nats.errors.Error, OSError) as error:  # with the connection gone, so is the subscription
            _log.debug("UNSUBSCRIBE_FAILED", error=type(error).__name__)

    async def run(self) -> None:
        """Answer until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            while self._waiting:
                made = await loop.run_in_executor(self._hdf5, self._go, tuple(self._waiting))
                for one in made:
                    await self._answer(self._waiting.popleft(), one)
            self._came.clear()
            await self._came.wait()

    async def _take(self, partition: int, message: Msg) -> None:
        kind = message.subject.rpartition(".")[2]
        if not message.reply or partition not in self._open:
            return
        try:
            question, within = wire.decode_question(kind, message.data)
        except MalformedError as error:
            await self._send(message, "unknown", _Made("malformed", code=wire.MALFORMED, reason=str(error)))
            return
        if len(self._waiting) >= MAX_WAITING:
            await self._send(message, kind, _Made("busy", code=wire.NOT_NOW, reason="too many questions wait"))
        else:
            self._waiting.append(_Asked(partition, question, message, kind, time.monotonic(), within))
            self._came.set()

    async def _answer(self, asked: _Asked, made: _Made) -> None:
        if made.outcome == "answered":
            self._metrics.question_seconds.observe(made.seconds)
        if made.outcome == "stale":
            self._metrics.questions.labels(asked.kind, made.outcome).inc()
        else:
            await self._send(asked.message, asked.kind, made)

    async def _send(self, message: Msg, kind: str, made: _Made) -> None:
        outcome = made.outcome
        headers = {wire.ERROR_HEADER: made.reason, wire.ERROR_CODE_HEADER: str(made.code)} if made.code else None
        if self._nc.pending_data_size + len(made.data) > PENDING_BYTES // 2:
            outcome = "dropped"  # publishing would wait, and so would all other answers; the asker asks again
        else:
            try:
                await self._nc.publish(message.reply, made.data, headers=headers)
            except (nats.errors.Error, OSError):
                outcome = "dropped"
        self._metrics.questions.labels(kind, outcome).inc()

    # -- in the HDF5 thread -------------------------------------------------------------------------------------------

    def _go(self, waiting: Sequence[_Asked]) -> list[_Made]:
        """Answer the first of *waiting*, one at least, as far as a go reaches.

        Errors end here: one that came to the loop would hold handles, and to drop these takes h5py's lock, which a
        commit may have.
        """
        began = now = time.perf_counter()
        made: list[_Made] = []
        for asked in waiting:
            made.append(self._made(asked))
            now = time.perf_counter()
            if now - began > GO_SECONDS:
                break
        return made

    def _made(self, asked: _Asked) -> _Made:
        if time.monotonic() - asked.arrived > asked.within:
            return _Made("stale")
        opened = self._open.get(asked.partition)
        began = time.perf_counter()
        try:
            if opened is None:
                raise NotNowError("the partition was let go")
            opened.file.check_askable(opened.store)
            with opened.store.reading() as lookup:
                data = self._data(asked.question, opened, lookup)
            return _Made("answered", data, seconds=time.perf_counter() - began)
        except _TooLargeError as error:
            return _Made("away", code=wire.TOO_LARGE, reason=str(error))
        except (NotNowError, TransientError) as error:
            return _Made("away", code=wire.NOT_NOW, reason=str(error))
        except (CorpusError, PermanentError) as error:
            _log.warning("QUESTION_FAILED", kind=asked.kind, **described(error))
            return _Made("failed", code=wire.FAULT, reason="the corpus cannot be read")
        except Exception as error:  # noqa: BLE001 - a fault in here must not end the answering for all
            _log.error("QUESTION_FAILED", kind=asked.kind, **described(error))
            return _Made("failed", code=wire.FAULT, reason="a fault of the persister")

    def _data(self, question: Question, opened: _Open, lookup: Lookup) -> bytes:
        room = self._nc.max_payload - _HEADERS_BYTES
        match question:
            case Ids():
                most = min(wire.MAX_IDS, (room - wire.HEAD_BYTES) // 8)
                found = lookup.id_hashes(question.consultation, most)
                return wire.encode_ids(bytes(16), None) if found is None else wire.encode_ids(found.key, found.hashes)
            case Find():
                return _find(lookup, opened.store.committed, question)
            case Events():
                return _events(lookup, opened.store.committed, question, room)
            case Consultations():
                return _consultations(lookup, opened.file, question)


class _TooLargeError(TransientError):
    """Raised when a single event is larger than the broker takes now."""


def _find(lookup: Lookup, committed: int, question: Find) -> bytes:
    rows = lookup.held(question.consultation, [event_id.bytes for event_id in question.event_ids])
    found: dict[UUID, Stored] = {}
    rest: list[UUID] = []
    size = 0
    stored = lookup.consultation(question.consultation) if rows else None
    for event_id in question.event_ids:
        row = rows.get(event_id.bytes)
        if row is None or stored is None:
            continue
        if found and size + row.length > COMPARED_BYTES:
            rest.append(event_id)
            continue
        size += row.length
        found[event_id] = Stored(row.sequence, digest_of(stored.body(row)))
    return wire.encode_found(wire.FindAnswer(committed, found, rest))


def _events(lookup: Lookup, committed: int, question: Events, room: int) -> bytes:
    stored = lookup.consultation(question.consultation) if question.limit else None
    if stored is None:
        return wire.encode_events(wire.EventsAnswer(committed, [], more=False))
    index = stored.behind(question.after)
    rows = _page(stored, index, question.limit, room)
    complete = [
        Row(row.sequence, row.received_ns, UUID(bytes=row.event_id), body)
        for row, body in zip(rows, stored.bodies(rows), strict=True)
    ]
    return wire.encode_events(wire.EventsAnswer(committed, complete, more=index + len(rows) < len(stored)))


def _page(stored: StoredConsultation, index: int, limit: int, room: int) -> list[StoredRow]:
    """Return at most *limit* rows from *index* on whose bodies fit into an answer of *room* bytes.

    Raises _TooLargeError: the first one does not.
    """
    rows: list[StoredRow] = []
    size = wire.HEAD_BYTES
    for row in map(stored.row, range(index, min(index + limit, len(stored)))):
        size += wire.ROW_BYTES + row.length
        if size > room and not rows:
            raise _TooLargeError("an event is larger than the broker's max_payload")
        if rows and size > min(room, ANSWER_BYTES):
            break
        rows.append(row)
    return rows


def _consultations(lookup: Lookup, file: PartitionFile, question: Consultations) -> bytes:
    names = file.names
    if not names.complete:
        names.feed(lookup.names(names.position, NAMES_A_GO))
        if names.position < len(lookup):
            raise NotNowError("the names are being read")
        names.feed([])
    found = names.select(question.prefix, question.after, question.limit + 1)
    answer = wire.ConsultationsAnswer(found[: question.limit], more=len(found) > question.limit)
    return wire.encode_consultations(answer)

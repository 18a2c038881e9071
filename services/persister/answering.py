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

from fiq.corpus import Consultation, CorpusError, EventStore, Lookup, StoredRow
from fiq.errors import PermanentError, TransientError
from services.core.lifecycle import spawn
from services.core.logs import get_logger
from services.log.protocol import Answering, AskedQuestion, Failure
from services.log.questions import (
    HEAD_BYTES,
    MAX_IDS,
    ROW_BYTES,
    Answer,
    Consultations,
    ConsultationsAnswer,
    Events,
    EventsAnswer,
    Find,
    FindAnswer,
    Ids,
    IdsAnswer,
    Question,
    Row,
    Stored,
    digest_of,
)
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

_log = get_logger("answering")


@dataclass(frozen=True, slots=True)
class _Open:
    """A partition that is answered for."""

    file: PartitionFile
    store: EventStore


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question that waits."""

    partition: int
    asked: AskedQuestion
    question: Question
    arrived: float


@dataclass(frozen=True, slots=True)
class _Made:
    """What came of a question: an answer, or a *failure*; nothing is sent when the asker no longer waits."""

    outcome: str
    answer: Answer | None = None
    failure: Failure = Failure.FAULT
    reason: str = ""
    seconds: float = 0.0


class Desk:
    """Takes the questions of one process.

    Args:
        answering: brings the questions.
        hdf5: the one thread that touches HDF5.
        metrics: of this process.
    """

    def __init__(self, answering: Answering, hdf5: Executor, metrics: Metrics) -> None:
        self._answering = answering
        self._hdf5 = hdf5
        self._metrics = metrics
        self._open: dict[int, _Open] = {}
        self._waiting: deque[_Asked] = deque()
        self._came = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self, partition: int, file: PartitionFile, store: EventStore) -> None:
        """Answer for *partition* from now on, whose *store* was opened.

        Raises LogUnavailableError: there is no connection.
        """
        self._open[partition] = _Open(file, store)
        try:
            await self._answering.open(partition, lambda asked: self._take(partition, asked))
        except BaseException:
            del self._open[partition]
            raise

    async def close(self, partition: int) -> None:
        """Answer for *partition* no more, before its file is released. Idempotent."""
        if self._open.pop(partition, None) is not None:
            await self._answering.close(partition)

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

    def _take(self, partition: int, asked: AskedQuestion) -> None:
        if asked.question is None:
            self._fail(asked, _Made("malformed", failure=Failure.MALFORMED, reason="the question is malformed"))
        elif len(self._waiting) >= MAX_WAITING:
            self._fail(asked, _Made("busy", failure=Failure.NOT_NOW, reason="too many questions wait"))
        else:
            self._waiting.append(_Asked(partition, asked, asked.question, time.monotonic()))
            self._came.set()

    def _fail(self, asked: AskedQuestion, made: _Made) -> None:
        spawn(self._tasks, self._send(asked, made))

    async def _answer(self, waited: _Asked, made: _Made) -> None:
        if made.outcome == "answered":
            self._metrics.question_seconds.observe(made.seconds)
        if made.outcome == "stale":
            self._metrics.questions.labels(waited.asked.kind, made.outcome).inc()
        else:
            await self._send(waited.asked, made)

    async def _send(self, asked: AskedQuestion, made: _Made) -> None:
        if made.answer is not None:
            sent = await asked.answer(made.answer)
        else:
            sent = await asked.fail(made.failure, made.reason)
        self._metrics.questions.labels(asked.kind, made.outcome if sent else "dropped").inc()

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

    def _made(self, waited: _Asked) -> _Made:
        if time.monotonic() - waited.arrived > waited.asked.within:
            return _Made("stale")
        opened = self._open.get(waited.partition)
        began = time.perf_counter()
        try:
            if opened is None:
                raise NotNowError("the partition was let go")
            opened.file.check_askable(opened.store)
            with opened.store.reading() as lookup:
                answer = _answer(waited.question, opened, lookup, waited.asked.room)
            return _Made("answered", answer, seconds=time.perf_counter() - began)
        except _TooLargeError as error:
            return _Made("away", failure=Failure.TOO_LARGE, reason=str(error))
        except (NotNowError, TransientError) as error:
            return _Made("away", failure=Failure.NOT_NOW, reason=str(error))
        except (CorpusError, PermanentError) as error:
            _log.warning("QUESTION_FAILED", kind=waited.asked.kind, **described(error))
            return _Made("failed", reason="the corpus cannot be read")
        except Exception as error:  # noqa: BLE001 - a fault in here must not end the answering for all
            _log.error("QUESTION_FAILED", kind=waited.asked.kind, **described(error))
            return _Made("failed", reason="a fault of the persister")


def _answer(question: Question, opened: _Open, lookup: Lookup, room: int) -> Answer:
    match question:
        case Ids():
            found = lookup.id_hashes(question.consultation, min(MAX_IDS, (room - HEAD_BYTES) // 8))
            return IdsAnswer(bytes(16), None) if found is None else IdsAnswer(found.key, found.hashes)
        case Find():
            return _find(lookup, opened.store.committed, question)
        case Events():
            return _events(lookup, opened.store.committed, question, room)
        case Consultations():
            return _consultations(lookup, opened.file, question)


class _TooLargeError(TransientError):
    """Raised when a single event is larger than an answer may be."""


def _find(lookup: Lookup, committed: int, question: Find) -> Answer:
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
    return FindAnswer(committed, found, rest)


def _events(lookup: Lookup, committed: int, question: Events, room: int) -> Answer:
    stored = lookup.consultation(question.consultation) if question.limit else None
    if stored is None:
        return EventsAnswer(committed, [], more=False)
    index = stored.first_after(question.after)
    rows = _page(stored, index, question.limit, room)
    complete = [
        Row(row.sequence, row.received_ns, UUID(bytes=row.event_id), body)
        for row, body in zip(rows, stored.bodies(rows), strict=True)
    ]
    return EventsAnswer(committed, complete, more=index + len(rows) < len(stored))


def _page(stored: Consultation, index: int, limit: int, room: int) -> list[StoredRow]:
    """Return at most *limit* rows from *index* on whose bodies fit into an answer of *room* bytes.

    Raises _TooLargeError: the first one does not.
    """
    rows: list[StoredRow] = []
    size = HEAD_BYTES
    for row in map(stored.row, range(index, min(index + limit, len(stored)))):
        size += ROW_BYTES + row.length
        if size > room and not rows:
            raise _TooLargeError("an event is larger than the log can carry")
        if rows and size > min(room, ANSWER_BYTES):
            break
        rows.append(row)
    return rows


def _consultations(lookup: Lookup, file: PartitionFile, question: Consultations) -> Answer:
    names = file.names
    if not names.complete:
        names.feed(lookup.names(names.position, NAMES_A_GO))
        if names.position < len(lookup):
            raise NotNowError("the names are being read")
        names.feed([])
    found = names.select(question.prefix, question.after, question.limit + 1)
    return ConsultationsAnswer(found[: question.limit], more=len(found) > question.limit)

"""Answers the questions of ingest about the partitions that this process runs, and about no others.

The log brings questions about a partition from when its file was opened until it is released. Pending questions are
answered in the HDF5 thread, between two rounds and for some milliseconds at a time; each is bounded in what it reads,
so that none delays a round for long.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from uuid import UUID

from fiq.corpus import Checked, CorpusError, CorpusFormatError, Lookup, StoredRow, verify_slice
from fiq.errors import PermanentError, TransientError
from services.core.lifecycle import spawn
from services.core.logs import get_logger
from services.log.protocol import Answering, AskedQuestion, Failure
from services.log.questions import (
    HEAD_BYTES,
    MAX_IDS,
    ROW_BYTES,
    Active,
    ActiveAnswer,
    Answer,
    Conflicts,
    Consultations,
    ConsultationsAnswer,
    Damage,
    Events,
    EventsAnswer,
    Find,
    FindAnswer,
    Ids,
    IdsAnswer,
    Question,
    Row,
    Stored,
    StoredConsultation,
    Summaries,
    SummariesAnswer,
    Verify,
    VerifyAnswer,
    digest_of,
)
from services.persister.errors import NotNowError, described
from services.persister.metrics import PersisterMetrics
from services.persister.rounds import Hdf5Thread, PartitionFile

#: pending questions, at most; further ones are refused
MAX_PENDING = 256
#: a job of the HDF5 thread ends with the first answer after this, seconds
JOB_SECONDS = 0.005
#: longest answer with more than one event, bytes
ANSWER_BYTES = 512 << 10
#: bodies that are digested for one question, bytes
DIGESTED_BYTES = 4 << 20
#: consultations are looked at for one question for this long, seconds
SUMMARY_SECONDS = 0.02

_log = get_logger("answering")


@dataclass(frozen=True, slots=True)
class _Pending:
    partition: int
    asked: AskedQuestion
    question: Question
    arrived: float


@dataclass(frozen=True, slots=True)
class _Result:
    """What became of a question: an *answer* that took *seconds*, or a *failure*; neither when it came too late."""

    outcome: str
    answer: Answer | None = None
    seconds: float = 0.0
    failure: Failure | None = None
    reason: str = ""


class _TooLargeError(TransientError):
    """Raised when a single event is larger than an answer may be."""


class QuestionResponder:
    """Answers the questions about the partitions of one process.

    Args:
        answering: brings the questions.
        hdf5: the one thread that touches HDF5.
        metrics: of this process.
    """

    def __init__(self, answering: Answering, hdf5: Hdf5Thread, metrics: PersisterMetrics) -> None:
        self._answering = answering
        self._hdf5 = hdf5
        self._metrics = metrics
        self._files: dict[int, PartitionFile] = {}
        self._pending: deque[_Pending] = deque()
        self._arrived = asyncio.Event()
        self._refusals: set[asyncio.Task[None]] = set()

    async def open(self, partition: int, file: PartitionFile) -> None:
        """Start to answer questions about *partition* from *file*.

        Raises LogUnavailableError: there is no connection.
        """
        self._files[partition] = file
        await self._answering.open(partition, lambda asked: self._take(partition, asked))

    async def close(self, partition: int) -> None:
        """Stop to answer questions about *partition*, before its file is released. Idempotent."""
        if self._files.pop(partition, None) is not None:
            await self._answering.close(partition)

    async def run(self) -> None:
        """Answer until cancelled."""
        while True:
            while self._pending:
                for result in await self._hdf5.run(partial(self._answer_some, tuple(self._pending))):
                    await self._send(self._pending.popleft().asked, result)
            self._arrived.clear()
            await self._arrived.wait()

    def _take(self, partition: int, asked: AskedQuestion) -> None:
        if asked.question is None:
            refusal = _Result("malformed", failure=Failure.MALFORMED, reason="the question is malformed")
        elif len(self._pending) >= MAX_PENDING:
            refusal = _Result("busy", failure=Failure.NOT_NOW, reason="too many questions wait")
        else:
            self._pending.append(_Pending(partition, asked, asked.question, time.monotonic()))
            self._arrived.set()
            return
        spawn(self._refusals, self._send(asked, refusal))

    async def _send(self, asked: AskedQuestion, result: _Result) -> None:
        sent = True
        if result.answer is not None:
            self._metrics.question_seconds.observe(result.seconds)
            sent = await asked.answer(result.answer)
        elif result.failure is not None:
            sent = await asked.fail(result.failure, result.reason)
        self._metrics.questions.labels(asked.kind, result.outcome if sent else "dropped").inc()

    # -- in the HDF5 thread -------------------------------------------------------------------------------------------

    def _answer_some(self, pending: Sequence[_Pending]) -> list[_Result]:
        """Answer the first of *pending*, at least one, until the time is up.

        Errors end here: one that reached the event loop would hold handles, and to drop these takes h5py's lock, which
        a commit may have.
        """
        started = time.perf_counter()
        results: list[_Result] = []
        for one in pending:
            results.append(self._result(one))
            if time.perf_counter() - started > JOB_SECONDS:
                break
        return results

    def _result(self, one: _Pending) -> _Result:
        if time.monotonic() - one.arrived > one.asked.within:
            return _Result("stale")
        started = time.perf_counter()
        try:
            file = self._files.get(one.partition)
            if file is None:
                raise NotNowError("the partition was released")
            file.check_readable()
            with file.store.reading(conflicts=isinstance(one.question, Conflicts)) as lookup:
                answer = answer_to(one.question, file, lookup, one.asked.room)
            return _Result("answered", answer, time.perf_counter() - started)
        except _TooLargeError as error:
            return _Result("away", failure=Failure.TOO_LARGE, reason=str(error))
        except TransientError as error:
            return _Result("away", failure=Failure.NOT_NOW, reason=str(error))
        except (CorpusError, PermanentError) as error:
            _log.warning("QUESTION_FAILED", kind=one.asked.kind, **described(error))
            return _Result("failed", failure=Failure.FAULT, reason="the corpus cannot be read")
        except Exception as error:  # noqa: BLE001 - a fault in here must not end the answering
            _log.error("QUESTION_FAILED", kind=one.asked.kind, **described(error))
            return _Result("failed", failure=Failure.FAULT, reason="a fault of the persister")


def answer_to(question: Question, file: PartitionFile, lookup: Lookup, room: int) -> Answer:
    """Return the answer to *question* about *file*, whose content *lookup* reads, in at most *room* bytes.

    Raises TransientError: it cannot be answered now, or an event is larger than *room*; CorpusError: the file is
    damaged.
    """
    match question:
        case Ids():
            found = lookup.id_hashes(question.consultation, min(MAX_IDS, (room - HEAD_BYTES) // 8))
            return IdsAnswer(bytes(16), None) if found is None else IdsAnswer(found.key, found.hashes)
        case Find():
            return _find(lookup, file.store.committed, question)
        case Events():
            return _events(lookup, file.store.committed, question, room)
        case Conflicts(consultation, after, limit):
            return _events(lookup, file.store.committed, Events(consultation, after, limit), room)
        case Consultations():
            return _consultations(lookup, question)
        case Active():
            return _active(lookup, question)
        case Summaries():
            return _summaries(lookup, question)
        case Verify():
            return _verify(file, question)


def _find(lookup: Lookup, committed: int, question: Find) -> FindAnswer:
    rows = lookup.held(question.consultation, [event_id.bytes for event_id in question.event_ids])
    found: dict[UUID, Stored] = {}
    rest: list[UUID] = []
    size = 0
    stored = lookup.consultation(question.consultation) if rows else None
    for event_id in question.event_ids:
        row = rows.get(event_id.bytes)
        if row is None or stored is None:
            continue
        if found and size + row.length > DIGESTED_BYTES:
            rest.append(event_id)
            continue
        size += row.length
        found[event_id] = Stored(row.sequence, digest_of(stored.body(row)), row.written_ns)
    return FindAnswer(committed, found, rest)


def _events(lookup: Lookup, committed: int, question: Events, room: int) -> EventsAnswer:
    stored = lookup.consultation(question.consultation) if question.limit else None
    if stored is None:
        return EventsAnswer(committed, [], more=False)
    index = stored.first_after(question.after)
    if question.before is None:
        rows = _fitting(map(stored.row, range(index, min(index + question.limit, len(stored)))), room)
        more = index + len(rows) < len(stored)
    else:
        end = stored.first_after(question.before - 1)
        rows = _fitting(map(stored.row, range(end - 1, max(index, end - question.limit) - 1, -1)), room)[::-1]
        more = end - len(rows) > index
    events = [
        Row(row.sequence, row.received_ns, row.written_ns, UUID(bytes=row.event_id), body)
        for row, body in zip(rows, stored.bodies(rows), strict=True)
    ]
    return EventsAnswer(committed, events, more)


def _verify(file: PartitionFile, question: Verify) -> VerifyAnswer:
    """Verify some rows. What HDF5 cannot read is a problem of the consultation, and ends its verification."""
    store = file.store
    since = Checked(question.row, question.sequence, question.end, bytes.fromhex(question.chain))
    events = question.row
    try:
        with store.reading() as lookup:
            stored = lookup.consultation(question.consultation)
            if stored is None:
                return VerifyAnswer(store.committed, 0, [], None, question)
            events = len(stored)
            found, checked = verify_slice(stored, store.identity, store.committed, since)
    except CorpusFormatError:
        damage = Damage("unreadable", f"HDF5 cannot read it from row {question.row} on", 0)
        return VerifyAnswer(store.committed, events, [damage], None, question)
    problems = [Damage(one.kind, one.message, one.sequence or 0) for one in found]
    reached = Verify(question.consultation, checked.rows, checked.sequence, checked.end, checked.chain.hex())
    return VerifyAnswer(store.committed, events, problems, reached if checked.rows < events else None, reached)


def _fitting(found: Iterable[StoredRow], room: int) -> list[StoredRow]:
    """Return the first rows of *found* whose bodies fit into an answer of *room* bytes.

    Raises _TooLargeError: the first one does not.
    """
    rows: list[StoredRow] = []
    size = HEAD_BYTES
    for row in found:
        size += ROW_BYTES + row.length
        if size > room and not rows:
            raise _TooLargeError("an event is larger than an answer may be")
        if rows and size > min(room, ANSWER_BYTES):
            break
        rows.append(row)
    return rows


def _consultations(lookup: Lookup, question: Consultations) -> ConsultationsAnswer:
    prefix, after = question.prefix, question.after
    found: list[str] = []
    for name in lookup.names(max(prefix, after)):
        if not name.startswith(prefix) or len(found) > question.limit:
            break
        if name > after:
            found.append(name)
    return ConsultationsAnswer(found[: question.limit], more=len(found) > question.limit)


def _active(lookup: Lookup, question: Active) -> ActiveAnswer:
    found = [place for place in lookup.newest() if place < question.before and place[1].startswith(question.prefix)]
    return ActiveAnswer(found[: question.limit], more=len(found) > question.limit)


def _summaries(lookup: Lookup, question: Summaries) -> SummariesAnswer:
    end = time.perf_counter() + SUMMARY_SECONDS
    found: list[StoredConsultation] = []
    for number, name in enumerate(question.consultations):
        if number and time.perf_counter() > end:
            return SummariesAnswer(found, question.consultations[number:])
        stored = lookup.consultation(name)
        if stored:
            first, last = stored.row(0), stored.row(len(stored) - 1)
            found.append(StoredConsultation(name, len(stored), first.received_ns, last.received_ns))
    return SummariesAnswer(found)

"""Answers questions about the partitions that this process runs, and about no others.

A partition is subscribed to after its file was opened and not any more when it is released, so a question about one
that nobody runs ends at once at the broker. Work is done in the HDF5 thread, one question and one short turn at a time,
so that a batch waits for one turn at most; while batches wait for the thread, turns get a fifth of it.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections import deque
from concurrent.futures import Executor
from dataclasses import dataclass

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from services.contract.errors import PermanentError, TransientError
from services.contract.logs import get_logger
from services.corpus import CorpusError, EventStore
from services.eventlog.errors import LogUnavailableError
from services.eventlog.jetstream import reading_wire as wire
from services.eventlog.jetstream.connection import PENDING_BYTES
from services.eventlog.jetstream.names import corpus_subject
from services.eventlog.jetstream.reading_wire import MalformedError, Question
from services.persister.lookups import Bounds, Job, TooLargeError, surely_absent
from services.persister.metrics import Metrics
from services.persister.partition_file import NotNowError, PartitionFile
from services.persister.reasons import described

#: questions that may wait; one more is turned away
MAX_WAITING = 256
#: a turn that had to wait longer than this for the HDF5 thread stood behind a batch, seconds
_BUSY_SECONDS = 0.002
#: pause behind a turn while batches come, in turns: a fifth of the thread is left for questions
_PAUSE_TURNS = 4
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

        Raises:
            LogUnavailableError: there is no connection.
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
        while True:
            while self._waiting:
                await self._serve(self._waiting.popleft())
            self._came.clear()
            await self._came.wait()

    # -- taking -------------------------------------------------------------------------------------------------------

    async def _take(self, partition: int, message: Msg) -> None:
        kind = message.subject.rpartition(".")[2]
        opened = self._open.get(partition)
        if not message.reply or opened is None:
            return
        try:
            question, within = wire.decode_question(kind, message.data)
        except MalformedError as error:
            await self._refuse(message, "", wire.MALFORMED, str(error), "malformed")
            return
        try:
            absent = surely_absent(opened.store, question)
        except CorpusError:  # the runner is about to find that out, too
            absent = None
        if absent is not None:
            await self._send(message, absent, None, kind, "memory")
        elif len(self._waiting) >= MAX_WAITING:
            await self._refuse(message, kind, wire.NOT_NOW, "too many questions wait", "busy")
        else:
            self._waiting.append(_Asked(partition, question, message, kind, time.monotonic(), within))
            self._came.set()

    # -- answering ----------------------------------------------------------------------------------------------------

    async def _serve(self, asked: _Asked) -> None:
        opened = self._open.get(asked.partition)
        if opened is None:
            await self._refuse(asked.message, asked.kind, wire.NOT_NOW, "the partition was let go", "away")
            return
        job = Job(opened.file, opened.store, asked.question, Bounds(self._nc.max_payload - _HEADERS_BYTES))
        try:
            answer = await self._work(job, asked)
        except (NotNowError, TransientError) as error:
            code = wire.TOO_LARGE if isinstance(error, TooLargeError) else wire.NOT_NOW
            await self._refuse(asked.message, asked.kind, code, str(error), "away")
        except (CorpusError, PermanentError) as error:
            _log.warning("QUESTION_FAILED", kind=asked.kind, **described(error))
            await self._refuse(asked.message, asked.kind, wire.FAULT, "the corpus cannot be read", "failed")
        except Exception as error:  # noqa: BLE001 - a fault in here must not end the answering for all
            _log.error("QUESTION_FAILED", kind=asked.kind, **described(error))
            await self._refuse(asked.message, asked.kind, wire.FAULT, "a fault of the persister", "failed")
        else:
            if answer is not None:
                await self._send(asked.message, answer, None, asked.kind, "answered")

    async def _work(self, job: Job, asked: _Asked) -> bytes | None:
        """Return the answer, or None when its asker has stopped waiting."""
        loop = asyncio.get_running_loop()
        used = 0.0
        answer: bytes | None = None
        try:
            while answer is None:
                if time.monotonic() - asked.arrived > asked.within:
                    self._metrics.questions.labels(asked.kind, "stale").inc()
                    return None
                submitted = time.perf_counter()
                answer, started, ended = await loop.run_in_executor(self._hdf5, _timed, job)
                used += ended - started
                if started - submitted > _BUSY_SECONDS:
                    await asyncio.sleep((ended - started) * _PAUSE_TURNS)
        finally:
            if answer is None:  # given up: dropping a handle takes h5py's lock, for which the loop must not wait
                self._hdf5.submit(job.close)
        self._metrics.question_seconds.observe(used)
        return answer

    async def _refuse(self, message: Msg, kind: str, code: int, reason: str, outcome: str) -> None:
        headers = {wire.ERROR_HEADER: reason, wire.ERROR_CODE_HEADER: str(code)}
        await self._send(message, b"", headers, kind or "unknown", outcome)

    async def _send(self, message: Msg, answer: bytes, headers: dict[str, str] | None, kind: str, outcome: str) -> None:
        if self._nc.pending_data_size + len(answer) > PENDING_BYTES // 2:
            outcome = "dropped"  # publishing would wait, and so would all other answers; the asker asks again
        else:
            try:
                await self._nc.publish(message.reply, answer, headers=headers)
            except (nats.errors.Error, OSError):
                outcome = "dropped"
        self._metrics.questions.labels(kind, outcome).inc()


def _timed(job: Job) -> tuple[bytes | None, float, float]:
    """Give *job* a turn; return its answer, if it has one, and when it began and ended."""
    started = time.perf_counter()
    try:
        answer = job.turn()
    except Exception as error:
        _empty(error)
        raise
    return answer, started, time.perf_counter()


def _empty(error: BaseException | None) -> None:
    """Drop the variables of all functions that *error* came through, here and not in the thread that takes it."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__

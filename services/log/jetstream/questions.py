"""Questions about the corpus over NATS: how ingest asks a partition's owner, and how the owner answers.

A question goes to ``fi.corpus.<store>.<partition>.<kind>``, to which the owner subscribes for as long as it has the
partition's file open: when no process has, the broker says so at once. The text and code of an error are in the headers
of the NATS service API (ADR-32). :mod:`services.log.questions` has the bytes of both.

Try it: ``nats request fi.corpus.main.3.events '{"within_ms":1000,"consultation":"c-1","after":0,"limit":10}'``
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Collection
from typing import TypeVar
from uuid import UUID

import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from services.core.lifecycle import cancellable
from services.core.logs import get_logger
from services.core.retry import backoff
from services.log.errors import CorpusAwayError, LogRefusedError, LogUnavailableError
from services.log.jetstream.connection import PENDING_BYTES, Connection
from services.log.jetstream.stream import corpus_subject
from services.log.partitions import partition_name
from services.log.protocol import AskedQuestion, Failure
from services.log.questions import (
    KIND_OF,
    MAX_ITEMS,
    Answer,
    Events,
    EventsAnswer,
    Find,
    Ids,
    IdSnapshot,
    MalformedError,
    Question,
    Stored,
    decode_events,
    decode_found,
    decode_ids,
    decode_question,
    encode_answer,
    encode_question,
)

#: header with the text of an error, and header with its code
ERROR_HEADER, ERROR_CODE_HEADER = "Nats-Service-Error", "Nats-Service-Error-Code"
#: the question is malformed; an event is larger than the broker takes; not now; a fault
MALFORMED, TOO_LARGE, NOT_NOW, FAULT = 400, 413, 503, 500
_CODES = {
    Failure.MALFORMED: MALFORMED,
    Failure.TOO_LARGE: TOO_LARGE,
    Failure.NOT_NOW: NOT_NOW,
    Failure.FAULT: FAULT,
}
#: what the headers of an answer take at most, bytes
_HEADERS_BYTES = 256
#: pause before a question is asked again that could not be answered just then; doubles up to the second, seconds
_PAUSE_SECONDS = (0.01, 0.2)

T = TypeVar("T")

_log = get_logger("answering")


# -- asking -----------------------------------------------------------------------------------------------------------


class Questions:
    """Asks the persisters of one store. Each method raises as :meth:`events` does.

    Args:
        nc: the connection.
        store: its name.
        timeout: seconds for each answer, questions that are asked again included.
    """

    def __init__(self, nc: Connection, store: str, *, timeout: float) -> None:
        self._nc = nc
        self._store = store
        self._timeout = timeout

    async def events(self, partition: int, question: Events) -> EventsAnswer:
        """Return a page of events.

        Raises CorpusAwayError: no persister answers, or not in time; LogUnavailableError: there is no connection;
        LogRefusedError: an event is larger than the broker takes, or the user may not ask.
        """
        return await self.ask(partition, question, decode_events)

    async def ids(self, partition: int, consultation: str) -> IdSnapshot:
        """Return the ids that a consultation holds."""
        return await self.ask(partition, Ids(consultation), decode_ids)

    async def find(
        self, partition: int, consultation: str, event_ids: Collection[UUID]
    ) -> tuple[dict[UUID, Stored], int]:
        """Return those of *event_ids* that are held, and the sequence as of which the others are not."""
        found: dict[UUID, Stored] = {}
        committed = sys.maxsize
        left = list(dict.fromkeys(event_ids))
        while left:
            asked, left = left[:MAX_ITEMS], left[MAX_ITEMS:]
            answer = await self.ask(partition, Find(consultation, asked), decode_found)
            if len(answer.rest) >= len(asked):
                raise self._away(partition, "it answers nothing")
            found.update(answer.found)
            committed = min(committed, answer.committed)
            left += answer.rest
        return found, committed

    async def ask(self, partition: int, question: Question, decode: Callable[[bytes], T]) -> T:
        """Return what *decode* makes of the answer to *question*."""
        subject = corpus_subject(self._store, partition, KIND_OF[type(question)])
        end = time.monotonic() + self._timeout
        for pause in backoff(*_PAUSE_SECONDS):
            left = end - time.monotonic()
            if left <= 0:
                break
            message = await self._request(partition, subject, encode_question(question, left), left)
            code = (message.headers or {}).get(ERROR_CODE_HEADER)
            if code is None:
                try:
                    return decode(message.data)
                except MalformedError:
                    raise self._away(partition, "its answer is malformed") from None
            self._check(partition, int(code))
            await asyncio.sleep(pause)
        raise self._away(partition, f"no answer within {self._timeout:g} s")

    async def _request(self, partition: int, subject: str, data: bytes, within: float) -> Msg:
        try:
            return await cancellable(self._nc.request(subject, data, timeout=within))
        except nats.errors.NoRespondersError:
            raise self._away(partition, "no persister has it open") from None
        except TimeoutError:
            raise self._away(partition, f"no answer within {self._timeout:g} s") from None
        except (nats.errors.Error, OSError) as error:
            raise LogUnavailableError(f"{subject}: {type(error).__name__}") from error

    def _check(self, partition: int, code: int) -> None:
        """Raise what an error *code* means, unless asking again may help."""
        if code == NOT_NOW:
            return
        if code == TOO_LARGE:
            raise LogRefusedError(
                f"partition {partition_name(partition)} holds an event larger than the broker's max_payload"
            )
        if code == MALFORMED:
            raise LogRefusedError("the persister does not understand the question: is it of another version?")
        raise self._away(partition, "its file cannot be read; the persister's log says why")

    def _away(self, partition: int, reason: str) -> CorpusAwayError:
        return CorpusAwayError(f"partition {partition_name(partition)} of store {self._store}: {reason}")


# -- answering --------------------------------------------------------------------------------------------------------


class NatsAnswering:
    """Brings questions about the partitions of one store; see :class:`services.log.protocol.Answering`."""

    def __init__(self, nc: Connection, store: str) -> None:
        self._nc = nc
        self._store = store
        self._open: dict[int, Subscription] = {}

    async def open(self, partition: int, take: Callable[[AskedQuestion], None]) -> None:
        subject = corpus_subject(self._store, partition, "*")

        async def take_message(message: Msg) -> None:
            if message.reply and partition in self._open:
                take(_Asked(self._nc, message))

        try:
            self._open[partition] = await self._nc.subscribe(subject, cb=take_message)
        except (nats.errors.Error, OSError) as error:
            raise LogUnavailableError(f"cannot answer on {subject}: {type(error).__name__}") from error

    async def close(self, partition: int) -> None:
        subscription = self._open.pop(partition, None)
        if subscription is None:
            return
        try:
            await subscription.unsubscribe()
        except (nats.errors.Error, OSError) as error:  # the subscription ended with the connection
            _log.debug("UNSUBSCRIBE_FAILED", error=type(error).__name__)


class _Asked:
    """A question that has arrived; see :class:`services.log.protocol.AskedQuestion`."""

    def __init__(self, nc: Connection, message: Msg) -> None:
        self._nc = nc
        self._reply = message.reply
        self.question: Question | None = None
        self.kind, self.within = "unknown", 0.0
        try:
            self.question, self.within = decode_question(message.subject.rpartition(".")[2], message.data)
            self.kind = KIND_OF[type(self.question)].value
        except MalformedError:
            pass  # question stays None

    @property
    def room(self) -> int:
        return self._nc.max_payload - _HEADERS_BYTES

    async def answer(self, answer: Answer) -> bool:
        return await self._send(encode_answer(answer), None)

    async def fail(self, failure: Failure, reason: str) -> bool:
        return await self._send(b"", {ERROR_HEADER: reason, ERROR_CODE_HEADER: str(_CODES[failure])})

    async def _send(self, data: bytes, headers: dict[str, str] | None) -> bool:
        if self._nc.pending_data_size + len(data) > PENDING_BYTES // 2:
            return False  # publishing would wait, and so would all other answers; the asker asks again
        try:
            await self._nc.publish(self._reply, data, headers=headers)
        except (nats.errors.Error, OSError):
            return False
        return True

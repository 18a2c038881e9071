"""Questions about the corpus: how they and their answers look on the wire, and how ingest asks a partition's owner.

A question is a JSON object on ``fi.corpus.<store>.<partition>.<kind>``. ``within_ms`` says for how long its asker
waits, counted from its arrival: no clock of two hosts is compared, and what has waited for longer is not answered any
more. An answer is a JSON object in one line; hashes or bodies follow it, byte for byte. An error is in the headers of
the NATS service API (ADR-32).

==============  ==================================================  =================================================
kind            asks                                                answer
==============  ==================================================  =================================================
ids             which ids does this consultation hold?              8-byte hashes of all, or that there are too many
find            which of these ids does it hold?                    sequence and 8-byte digest of the body of each
events          what comes after this position?                     a page of events with their bodies
consultations   which consultations begin with this prefix?         a page of names
==============  ==================================================  =================================================

Try it: ``nats request fi.corpus.main.3.events '{"within_ms":1000,"consultation":"c-1","after":0,"limit":10}'``
"""

from __future__ import annotations

import asyncio
import sys
import time
from array import array
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar
from uuid import UUID

import nats.errors
import orjson
from nats.aio.client import Client
from nats.aio.msg import Msg

from fiq.errors import InvalidIdError
from fiq.event import check_consultation_id
from services.core.lifecycle import cancellable
from services.core.retry import backoff
from services.log.errors import CorpusAwayError, LogRefusedError, LogUnavailableError
from services.log.jetstream.names import corpus_subject
from services.log.partitions import partition_name
from services.log.protocol import Stored

#: header with the text of an error, and header with its code
ERROR_HEADER, ERROR_CODE_HEADER = "Nats-Service-Error", "Nats-Service-Error-Code"
#: the question is malformed; an event is larger than the broker takes; not now; a fault
MALFORMED, TOO_LARGE, NOT_NOW, FAULT = 400, 413, 503, 500

#: ids in one question, and rows or names in one answer, at most
MAX_ITEMS = 1000
#: a consultation with more ids than this, or than a message can hold, is asked about id by id
MAX_IDS = 100_000
#: more than an answer takes besides its rows, and than one row takes besides its body, bytes
HEAD_BYTES, ROW_BYTES = 512, 160
#: pause before a question is asked again that could not be answered just then; doubles up to the second, seconds
_PAUSE_SECONDS = (0.01, 0.2)
_64_BITS = 2**64 - 1

Answer = TypeVar("Answer")


class Kind(StrEnum):
    """What can be asked; the last token of the subject."""

    IDS = "ids"
    FIND = "find"
    EVENTS = "events"
    CONSULTATIONS = "consultations"


class MalformedError(ValueError):
    """Raised when a question or an answer is not what this module writes."""


# -- questions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ids:
    """Which ids does *consultation* hold?"""

    consultation: str


@dataclass(frozen=True, slots=True)
class Find:
    """Which of *event_ids* does *consultation* hold?"""

    consultation: str
    event_ids: Sequence[UUID]


@dataclass(frozen=True, slots=True)
class Events:
    """What does *consultation* hold after the position *after*? At most *limit* events; 0 asks for the position."""

    consultation: str
    after: int
    limit: int


@dataclass(frozen=True, slots=True)
class Consultations:
    """Which consultations begin with *prefix* and come after *after*? At most *limit*, sorted."""

    prefix: str
    after: str
    limit: int


Question = Ids | Find | Events | Consultations
KIND_OF: Mapping[type[Question], Kind] = {
    Ids: Kind.IDS,
    Find: Kind.FIND,
    Events: Kind.EVENTS,
    Consultations: Kind.CONSULTATIONS,
}


def encode_question(question: Question, within: float) -> bytes:
    """Return *question* as it is sent by somebody who waits *within* seconds."""
    fields = {name: getattr(question, name) for name in question.__slots__}
    return orjson.dumps({"within_ms": max(1, round(within * 1000)), **fields})


def decode_question(kind: str, data: bytes) -> tuple[Question, float]:
    """Return a question and for how many seconds its asker waits. Raises MalformedError: it is none."""
    try:
        fields = orjson.loads(data)
        within = _number(fields["within_ms"]) / 1000
        if kind == Kind.IDS:
            return Ids(check_consultation_id(fields["consultation"])), within
        if kind == Kind.FIND:
            ids = [UUID(event_id) for event_id in fields["event_ids"]]
            if not 0 < len(ids) <= MAX_ITEMS:
                raise MalformedError(f"1 to {MAX_ITEMS} ids")
            return Find(check_consultation_id(fields["consultation"]), ids), within
        limit = _number(fields["limit"])
        if limit > MAX_ITEMS:
            raise MalformedError(f"limit is at most {MAX_ITEMS}")
        if kind == Kind.EVENTS:
            return Events(check_consultation_id(fields["consultation"]), _number(fields["after"]), limit), within
        if kind == Kind.CONSULTATIONS:
            return Consultations(str(fields["prefix"]), str(fields["after"]), limit), within
    except (orjson.JSONDecodeError, InvalidIdError, KeyError, TypeError, AttributeError, ValueError):
        raise MalformedError("the question is malformed") from None
    raise MalformedError("there is no such question")


# -- answers ----------------------------------------------------------------------------------------------------------


class IdSnapshot:
    """The ids that a consultation held at one moment, as hashes; see :func:`fiq.corpus.hashes_of`.

    Attributes:
        whole: whether all ids are here; otherwise there were too many, and each may be held.
        size: of it in memory, bytes.
    """

    __slots__ = ("_factor", "_first", "_hashes", "size", "whole")

    def __init__(self, key: bytes, hashes: bytes, *, whole: bool = True) -> None:
        self.whole = whole
        self._first, self._factor = int.from_bytes(key[:8], "big"), int.from_bytes(key[8:], "big") | 1
        self._hashes = array("Q", hashes)
        if sys.byteorder == "big":
            self._hashes.byteswap()
        self.size = len(hashes)

    def may_hold(self, event_id: UUID) -> bool:
        """Return False when *event_id* was not held for certain; True is nearly certain where it is whole."""
        if not self.whole:
            return True
        number = event_id.int
        mixed = ((number >> 64) ^ self._first) * self._factor & _64_BITS
        mixed ^= mixed >> 32
        mixed = (mixed ^ (number & _64_BITS)) * self._factor & _64_BITS
        mixed ^= mixed >> 29
        place = bisect_left(self._hashes, mixed)
        return place < len(self._hashes) and self._hashes[place] == mixed


@dataclass(frozen=True, slots=True)
class Row:
    """One event of the corpus."""

    sequence: int
    received_ns: int
    event_id: UUID
    body: bytes


@dataclass(frozen=True, slots=True)
class FindAnswer:
    """What is *found*, as of the stream sequence *committed*; *rest* was not looked for, and is to be asked again."""

    committed: int
    found: Mapping[UUID, Stored]
    rest: Sequence[UUID] = ()


@dataclass(frozen=True, slots=True)
class EventsAnswer:
    """Events, and whether there are *more* up to *committed*, the stream sequence that the partition has reached."""

    committed: int
    rows: Sequence[Row]
    more: bool


@dataclass(frozen=True, slots=True)
class ConsultationsAnswer:
    """Names, and whether there are *more* after them."""

    names: Sequence[str]
    more: bool


def encode_ids(key: bytes, hashes: bytes | None) -> bytes:
    """Return the answer to :class:`Ids`; *hashes* is None where there are too many."""
    head = {"key": key.hex(), "whole": hashes is not None, "count": len(hashes or b"") // 8}
    return orjson.dumps(head) + b"\n" + (hashes or b"")


def encode_found(answer: FindAnswer) -> bytes:
    """Return the answer to :class:`Find`."""
    found = {str(event_id): [one.sequence, one.digest.hex()] for event_id, one in answer.found.items()}
    rest = [str(event_id) for event_id in answer.rest]
    return orjson.dumps({"committed": answer.committed, "found": found, "rest": rest})


def encode_events(answer: EventsAnswer) -> bytes:
    """Return the answer to :class:`Events`."""
    rows = [[row.sequence, row.received_ns, str(row.event_id), len(row.body)] for row in answer.rows]
    head = {"committed": answer.committed, "more": answer.more, "rows": rows}
    return b"".join([orjson.dumps(head), b"\n", *(row.body for row in answer.rows)])


def encode_consultations(answer: ConsultationsAnswer) -> bytes:
    """Return the answer to :class:`Consultations`."""
    return orjson.dumps({"names": answer.names, "more": answer.more})


def decode_ids(data: bytes) -> IdSnapshot:
    """Read the answer to :class:`Ids`; each ``decode_`` raises MalformedError when it is none."""
    with _Decoding():
        head, _, hashes = data.partition(b"\n")
        fields = orjson.loads(head)
        key = bytes.fromhex(fields["key"])
        if len(key) != 16 or len(hashes) != 8 * _number(fields["count"]):
            raise MalformedError("hashes are missing")
        return IdSnapshot(key, hashes, whole=bool(fields["whole"]))


def decode_found(data: bytes) -> FindAnswer:
    """Read the answer to :class:`Find`."""
    with _Decoding():
        fields = orjson.loads(data)
        found = {
            UUID(event_id): Stored(_number(sequence), bytes.fromhex(digest))
            for event_id, (sequence, digest) in fields["found"].items()
        }
        return FindAnswer(_number(fields["committed"]), found, [UUID(event_id) for event_id in fields["rest"]])


def decode_events(data: bytes) -> EventsAnswer:
    """Read the answer to :class:`Events`."""
    with _Decoding():
        head, _, bodies = data.partition(b"\n")
        fields = orjson.loads(head)
        rows, place = [], 0
        for sequence, received, event_id, length in fields["rows"]:
            rows.append(Row(sequence, received, UUID(event_id), bodies[place : place + length]))
            place += length
        if place != len(bodies):
            raise MalformedError("bodies are missing")
        return EventsAnswer(_number(fields["committed"]), rows, bool(fields["more"]))


def decode_consultations(data: bytes) -> ConsultationsAnswer:
    """Read the answer to :class:`Consultations`."""
    with _Decoding():
        fields = orjson.loads(data)
        return ConsultationsAnswer([str(name) for name in fields["names"]], bool(fields["more"]))


class _Decoding:
    """Calls what goes wrong inside malformed."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, (KeyError, TypeError, AttributeError, ValueError)):
            raise MalformedError("the answer is malformed") from None


def _number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise MalformedError("a number is expected")
    return value


# -- asking -----------------------------------------------------------------------------------------------------------


class Questions:
    """Asks the persisters of one store. Each method raises as :meth:`events` does.

    Args:
        nc: the connection.
        store: its name.
        timeout: seconds for each answer, questions that are asked again included.
    """

    def __init__(self, nc: Client, store: str, *, timeout: float) -> None:
        self._nc = nc
        self._store = store
        self._timeout = timeout

    async def events(self, partition: int, question: Events) -> EventsAnswer:
        """Return a page of events.

        Raises CorpusAwayError: no persister answers, or not in time; LogUnavailableError: there is no connection;
        LogRefusedError: an event is larger than the broker takes, or the user may not ask.
        """
        return await self._ask(partition, question, decode_events)

    async def consultations(self, partition: int, question: Consultations) -> ConsultationsAnswer:
        """Return a page of names."""
        return await self._ask(partition, question, decode_consultations)

    async def ids(self, partition: int, consultation: str) -> IdSnapshot:
        """Return the ids that a consultation holds."""
        return await self._ask(partition, Ids(consultation), decode_ids)

    async def find(
        self, partition: int, consultation: str, event_ids: Collection[UUID]
    ) -> tuple[dict[UUID, Stored], int]:
        """Return those of *event_ids* that are held, and the sequence as of which the others are not."""
        found: dict[UUID, Stored] = {}
        committed = sys.maxsize
        left = list(dict.fromkeys(event_ids))
        while left:
            asked, left = left[:MAX_ITEMS], left[MAX_ITEMS:]
            answer = await self._ask(partition, Find(consultation, asked), decode_found)
            if len(answer.rest) >= len(asked):
                raise self._away(partition, "it answers nothing")
            found.update(answer.found)
            committed = min(committed, answer.committed)
            left += answer.rest
        return found, committed

    async def _ask(self, partition: int, question: Question, decode: Callable[[bytes], Answer]) -> Answer:
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
        """Raise what an error *code* stands for, unless asking again may help."""
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

"""Questions about the corpus and their answers, as they are on the wire between ingest and the persisters.

A question is a JSON object. ``within_ms`` says for how long its asker waits, counted from its arrival: no clock of two
hosts is compared, and what has waited for longer is not answered any more. An answer is a JSON object in one line with
the bodies of its events behind it, one after another, byte for byte. What went wrong stands in the headers of the NATS
service API (ADR-32).

Try it: ``nats request fi.corpus.main.3.events '{"within_ms":1000,"consultation":"c-1","after":0,"limit":10}'``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from uuid import UUID

import orjson

from services.contract.errors import InvalidIdError
from services.contract.ids import check_consultation_id

#: header with the text of an error, and header with its code
ERROR_HEADER, ERROR_CODE_HEADER = "Nats-Service-Error", "Nats-Service-Error-Code"
#: the question is malformed; an event is larger than the broker takes; not now; a fault
MALFORMED, TOO_LARGE, NOT_NOW, FAULT = 400, 413, 503, 500

#: ids in one question, and rows or names in one answer, at most
MAX_ITEMS = 1000
#: more than an answer takes besides its rows, and than one row takes besides its body, bytes
HEAD_BYTES, ROW_BYTES = 512, 160


class Kind(StrEnum):
    """What can be asked; the last token of the subject."""

    FIND = "find"
    EVENTS = "events"
    CONSULTATIONS = "consultations"


class MalformedError(ValueError):
    """Raised when a question or an answer is not what this module writes."""


@dataclass(frozen=True, slots=True)
class Find:
    """Which of these events does the corpus hold? Consultations with event ids."""

    pairs: Sequence[tuple[str, UUID]]

    def fields(self) -> dict[str, Any]:
        """Return what the question says."""
        return {"events": [[consultation, str(event_id)] for consultation, event_id in self.pairs]}


@dataclass(frozen=True, slots=True)
class Events:
    """What does *consultation* hold behind the position *after*? At most *limit* events; 0 asks for the position."""

    consultation: str
    after: int
    limit: int

    def fields(self) -> dict[str, Any]:
        """Return what the question says."""
        return {"consultation": self.consultation, "after": self.after, "limit": self.limit}


@dataclass(frozen=True, slots=True)
class Consultations:
    """Which consultations begin with *prefix* and come behind *after*? At most *limit*, sorted."""

    prefix: str
    after: str
    limit: int

    def fields(self) -> dict[str, Any]:
        """Return what the question says."""
        return {"prefix": self.prefix, "after": self.after, "limit": self.limit}


Question = Find | Events | Consultations
KIND_OF: Mapping[type[Question], Kind] = {
    Find: Kind.FIND,
    Events: Kind.EVENTS,
    Consultations: Kind.CONSULTATIONS,
}


@dataclass(frozen=True, slots=True)
class Row:
    """One event of the corpus."""

    sequence: int
    received_ns: int
    event_id: UUID
    body: bytes


@dataclass(frozen=True, slots=True)
class FindAnswer:
    """What is held is in *found*, by its index in the question; *rest* was not looked for, and is to be asked again."""

    committed: int
    found: Mapping[int, Row]
    rest: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class EventsAnswer:
    """Events, and whether there are *more* up to *committed*, the stream sequence that the partition has reached."""

    committed: int
    rows: Sequence[Row]
    more: bool


@dataclass(frozen=True, slots=True)
class ConsultationsAnswer:
    """Names, and whether there are *more* behind them."""

    names: Sequence[str]
    more: bool


def encode_question(question: Question, within: float) -> bytes:
    """Return *question* as it is sent by somebody who waits *within* seconds."""
    return orjson.dumps({"within_ms": max(1, round(within * 1000)), **question.fields()})


def decode_question(kind: str, data: bytes) -> tuple[Question, float]:
    """Return a question and for how many seconds its asker waits.

    Raises:
        MalformedError: it is none.
    """
    try:
        fields = orjson.loads(data)
        within = _number(fields["within_ms"]) / 1000
        if kind == Kind.FIND:
            pairs = [(check_consultation_id(name), UUID(event_id)) for name, event_id in fields["events"]]
            if not 0 < len(pairs) <= MAX_ITEMS:
                raise MalformedError(f"1 to {MAX_ITEMS} events")
            return Find(pairs), within
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


def encode_found(committed: int, found: Mapping[int, Row], rest: Sequence[int] = ()) -> bytes:
    """Return the answer to :class:`Find`."""
    rows = [[index, row.sequence, row.received_ns, len(row.body)] for index, row in found.items()]
    return _joined({"committed": committed, "rest": rest, "found": rows}, [r.body for r in found.values()])


def encode_events(committed: int, rows: Sequence[Row], *, more: bool) -> bytes:
    """Return the answer to :class:`Events`."""
    heads = [[row.sequence, row.received_ns, str(row.event_id), len(row.body)] for row in rows]
    return _joined({"committed": committed, "more": more, "rows": heads}, [row.body for row in rows])


def encode_consultations(names: Sequence[str], *, more: bool) -> bytes:
    """Return the answer to :class:`Consultations`."""
    return _joined({"names": names, "more": more}, [])


def decode_found(question: Find, data: bytes) -> FindAnswer:
    """Read the answer to *question*.

    Raises:
        MalformedError: it is none.
    """
    try:
        head, bodies = _parted(data, 3, "found")
        found = {
            index: Row(sequence, received, question.pairs[index][1], body)
            for (index, sequence, received, _), body in zip(head["found"], bodies, strict=True)
        }
        rest = [_number(index) for index in head["rest"]]
        if rest and max(rest) >= len(question.pairs):
            raise MalformedError("an index is out of range")
        return FindAnswer(_number(head["committed"]), found, rest)
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, IndexError):
        raise MalformedError("the answer is malformed") from None


def decode_events(data: bytes) -> EventsAnswer:
    """Read the answer to :class:`Events`.

    Raises:
        MalformedError: it is none.
    """
    try:
        head, bodies = _parted(data, 3, "rows")
        rows = [
            Row(sequence, received, UUID(event_id), body)
            for (sequence, received, event_id, _), body in zip(head["rows"], bodies, strict=True)
        ]
        return EventsAnswer(_number(head["committed"]), rows, bool(head["more"]))
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError, IndexError):
        raise MalformedError("the answer is malformed") from None


def decode_consultations(data: bytes) -> ConsultationsAnswer:
    """Read the answer to :class:`Consultations`.

    Raises:
        MalformedError: it is none.
    """
    try:
        head = orjson.loads(data)
        return ConsultationsAnswer([str(name) for name in head["names"]], bool(head["more"]))
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise MalformedError("the answer is malformed") from None


def _joined(head: Mapping[str, Any], bodies: Sequence[bytes]) -> bytes:
    return b"".join([orjson.dumps(head), b"\n", *bodies])


def _parted(data: bytes, length_at: int, rows: str) -> tuple[dict[str, Any], list[bytes]]:
    end = data.index(b"\n")
    head: dict[str, Any] = orjson.loads(data[:end])
    bodies = []
    place = end + 1
    for row in head[rows]:
        bodies.append(data[place : place + row[length_at]])
        place += row[length_at]
    if place != len(data):
        raise MalformedError("bodies are missing")
    return head, bodies


def _number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise MalformedError("a number is expected")
    return value

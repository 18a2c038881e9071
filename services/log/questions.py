"""Questions that ingest asks the owner of a partition about its corpus, their answers, and both as bytes.

==============  ==================================================  =================================================
kind            asks                                                answer
==============  ==================================================  =================================================
ids             which ids does this consultation hold?              8-byte hashes of all, or that there are too many
find            which of these ids does it hold?                    sequence, digest of the body, and time of each
events          what comes after, or before, this position?         a page of events with their bodies
consultations   which consultations begin with this prefix?         a page of names, sorted
active          which of them had events last?                      a page of times and names, newest first
summaries       what do these consultations hold?                   number of events, first and last time of each
conflicts       which events under used ids come after this         as events
                position?
verify          is the consultation intact from this row on?        problems of some rows, and the next row
==============  ==================================================  =================================================

A question is a JSON object. ``within_ms`` says for how long its asker waits, counted from its arrival: no clocks of two
hosts are compared, and what has waited longer is not answered. An answer is a JSON object in one line; hashes or bodies
follow it, byte for byte.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
import time
from array import array
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from uuid import UUID

import orjson

from fiq.errors import InvalidIdError
from fiq.event import check_consultation_id

_64_BITS = 2**64 - 1


class Kind(StrEnum):
    """What can be asked."""

    IDS = "ids"
    FIND = "find"
    EVENTS = "events"
    CONSULTATIONS = "consultations"
    ACTIVE = "active"
    SUMMARIES = "summaries"
    CONFLICTS = "conflicts"
    VERIFY = "verify"


class MalformedError(ValueError):
    """Raised when a question or an answer is not what this module writes."""


#: ids in one question, and rows or names in one answer, at most
MAX_ITEMS = 1000
#: a consultation with more ids than this, or than an answer can hold, is asked about id by id
MAX_IDS = 100_000
#: what an answer takes at most without its rows, and one row without its body, bytes
HEAD_BYTES, ROW_BYTES = 512, 160


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
    """What does *consultation* hold after the position *after*? At most *limit* events; 0 asks for the position.

    With *before*, the last ones whose sequences are below it, in their order; then ``more`` says that there are earlier
    ones.
    """

    consultation: str
    after: int
    limit: int
    before: int | None = None


@dataclass(frozen=True, slots=True)
class Consultations:
    """Which consultations begin with *prefix* and come after *after*? At most *limit*, sorted."""

    prefix: str
    after: str
    limit: int


@dataclass(frozen=True, slots=True)
class Active:
    """Which consultations that begin with *prefix* had their last event before *before*? At most *limit*, newest first.

    A consultation's place is the pair of its last event's time, nanoseconds since the Unix epoch, and its id.
    """

    prefix: str
    before: tuple[int, str]
    limit: int


@dataclass(frozen=True, slots=True)
class Conflicts:
    """Which events under used ids does *consultation* keep after the position *after*? At most *limit*."""

    consultation: str
    after: int
    limit: int


@dataclass(frozen=True, slots=True)
class Summaries:
    """What do *consultations* hold?"""

    consultations: Sequence[str]


@dataclass(frozen=True, slots=True)
class Verify:
    """Is *consultation* intact from row *row* on? The others are :class:`fiq.corpus.Checked`, of the row before."""

    consultation: str
    row: int = 0
    sequence: int = 0
    end: int = 0
    chain: str = ""


Question = Ids | Find | Events | Consultations | Active | Summaries | Conflicts | Verify
KIND_OF: Mapping[type[Question], Kind] = {
    Ids: Kind.IDS,
    Find: Kind.FIND,
    Events: Kind.EVENTS,
    Consultations: Kind.CONSULTATIONS,
    Active: Kind.ACTIVE,
    Summaries: Kind.SUMMARIES,
    Conflicts: Kind.CONFLICTS,
    Verify: Kind.VERIFY,
}


@dataclass(frozen=True, slots=True)
class Stored:
    """What the corpus holds under an id, without its body.

    Attributes:
        sequence: position in the log, from 1.
        digest: :func:`digest_of` its body.
        written_ns: when the persister wrote it, nanoseconds since the Unix epoch; None: not known, or not yet.
    """

    sequence: int
    digest: bytes
    written_ns: int | None = None


def digest_of(body: bytes) -> bytes:
    """Return an 8-byte digest of *body*."""
    return hashlib.blake2b(body, digest_size=8).digest()


@dataclass(frozen=True, slots=True)
class IdsAnswer:
    """Sorted 8-byte *hashes* of all ids, made with *key* (:func:`fiq.corpus.hashes_of`); None for too many."""

    key: bytes
    hashes: bytes | None


@dataclass(frozen=True, slots=True)
class FindAnswer:
    """What is *found*, as of the sequence *committed*; *rest* was not looked up, and is to be asked again."""

    committed: int
    found: Mapping[UUID, Stored]
    rest: Sequence[UUID] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """One event of the corpus; times are nanoseconds since the Unix epoch."""

    sequence: int
    received_ns: int
    written_ns: int
    event_id: UUID
    body: bytes


@dataclass(frozen=True, slots=True)
class EventsAnswer:
    """Events, and whether there are *more* up to *committed*, the sequence that the partition has reached."""

    committed: int
    rows: Sequence[Row]
    more: bool


@dataclass(frozen=True, slots=True)
class ConsultationsAnswer:
    """Names, and whether there are *more* after them."""

    names: Sequence[str]
    more: bool


@dataclass(frozen=True, slots=True)
class ActiveAnswer:
    """The places of consultations, and whether there are *more* after them."""

    places: Sequence[tuple[int, str]]
    more: bool


@dataclass(frozen=True, slots=True)
class StoredConsultation:
    """What a consultation holds; times are nanoseconds since the Unix epoch."""

    consultation: str
    events: int
    first_received_ns: int
    last_received_ns: int


@dataclass(frozen=True, slots=True)
class SummariesAnswer:
    """What is *found*; *rest* was not looked up, and is to be asked again."""

    found: Sequence[StoredConsultation]
    rest: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is wrong: its kind and words are those of ``fiq verify``; *sequence* 0 is of no single event."""

    kind: str
    message: str
    sequence: int


@dataclass(frozen=True, slots=True)
class VerifyAnswer:
    """The *problems* of some rows, of *events* as of the sequence *committed*; *after* asks for the next rows."""

    committed: int
    events: int
    problems: Sequence[Damage]
    after: Verify | None
    checked: Verify


Answer = IdsAnswer | FindAnswer | EventsAnswer | ConsultationsAnswer | ActiveAnswer | SummariesAnswer | VerifyAnswer


# -- as bytes ----------------------------------------------------------------------------------------------------------


def encode_question(question: Question, within: float) -> bytes:
    """Return *question* as it is sent when its asker waits *within* seconds."""
    fields = {name: getattr(question, name) for name in question.__slots__}
    return orjson.dumps({"within_ms": max(1, round(within * 1000)), **fields})


def decode_question(kind: str, data: bytes) -> tuple[Question, float]:
    """Return a question and for how many seconds its asker waits. Raises MalformedError: it is malformed."""
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
        if kind == Kind.SUMMARIES:
            names = [check_consultation_id(name) for name in fields["consultations"]]
            if not 0 < len(names) <= MAX_ITEMS:
                raise MalformedError(f"1 to {MAX_ITEMS} consultations")
            return Summaries(names), within
        if kind == Kind.VERIFY:
            return _verify(fields), within
        limit = _number(fields["limit"])
        if limit > MAX_ITEMS:
            raise MalformedError(f"limit is at most {MAX_ITEMS}")
        if kind == Kind.EVENTS:
            name, before = check_consultation_id(fields["consultation"]), fields["before"]
            return Events(name, _number(fields["after"]), limit, None if before is None else _number(before)), within
        if kind == Kind.CONFLICTS:
            return Conflicts(check_consultation_id(fields["consultation"]), _number(fields["after"]), limit), within
        if kind == Kind.CONSULTATIONS:
            return Consultations(str(fields["prefix"]), str(fields["after"]), limit), within
        if kind == Kind.ACTIVE:
            received, name = fields["before"]
            return Active(str(fields["prefix"]), (_number(received), str(name)), limit), within
    except (orjson.JSONDecodeError, InvalidIdError, KeyError, TypeError, AttributeError, ValueError):
        raise MalformedError("the question is malformed") from None
    raise MalformedError("there is no such question")


def encode_answer(answer: Answer) -> bytes:
    """Return *answer* as it is sent."""
    match answer:
        case IdsAnswer(key, hashes):
            head = {"key": key.hex(), "whole": hashes is not None, "count": len(hashes or b"") // 8}
            return orjson.dumps(head) + b"\n" + (hashes or b"")
        case FindAnswer(committed, held, left):
            found = {str(key): [one.sequence, one.digest.hex(), one.written_ns] for key, one in held.items()}
            return orjson.dumps({"committed": committed, "found": found, "rest": [str(event_id) for event_id in left]})
        case EventsAnswer(committed, rows, more):
            lines = [[r.sequence, r.received_ns, r.written_ns, str(r.event_id), len(r.body)] for r in rows]
            head = {"committed": committed, "more": more, "rows": lines}
            return b"".join([orjson.dumps(head), b"\n", *(row.body for row in rows)])
        case ConsultationsAnswer(names, more):
            return orjson.dumps({"names": names, "more": more})
        case ActiveAnswer(places, more):
            return orjson.dumps({"places": places, "more": more})
        case SummariesAnswer(found_ones, left_ones):
            lists = [[o.consultation, o.events, o.first_received_ns, o.last_received_ns] for o in found_ones]
            return orjson.dumps({"found": lists, "rest": left_ones})
        case VerifyAnswer(committed, events, problems, following, checked):
            told = [[one.kind, one.message, one.sequence] for one in problems]
            head = {"committed": committed, "events": events, "problems": told, "more": following is not None}
            return orjson.dumps(head | {"checked": checked})


def decode_ids(data: bytes) -> IdSnapshot:
    """Read the answer to :class:`Ids`; each ``decode_`` function raises MalformedError."""
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
            UUID(event_id): Stored(_number(sequence), bytes.fromhex(digest), written)
            for event_id, (sequence, digest, written) in fields["found"].items()
        }
        return FindAnswer(_number(fields["committed"]), found, [UUID(event_id) for event_id in fields["rest"]])


def decode_events(data: bytes) -> EventsAnswer:
    """Read the answer to :class:`Events`."""
    with _Decoding():
        head, _, bodies = data.partition(b"\n")
        fields = orjson.loads(head)
        rows, offset = [], 0
        for sequence, received, written, event_id, length in fields["rows"]:
            rows.append(Row(sequence, received, written, UUID(event_id), bodies[offset : offset + length]))
            offset += length
        if offset != len(bodies):
            raise MalformedError("bodies are missing")
        return EventsAnswer(_number(fields["committed"]), rows, bool(fields["more"]))


def decode_consultations(data: bytes) -> ConsultationsAnswer:
    """Read the answer to :class:`Consultations`."""
    with _Decoding():
        fields = orjson.loads(data)
        return ConsultationsAnswer([str(name) for name in fields["names"]], bool(fields["more"]))


def decode_active(data: bytes) -> ActiveAnswer:
    """Read the answer to :class:`Active`."""
    with _Decoding():
        fields = orjson.loads(data)
        places = [(_number(received), str(name)) for received, name in fields["places"]]
        return ActiveAnswer(places, bool(fields["more"]))


def decode_summaries(data: bytes) -> SummariesAnswer:
    """Read the answer to :class:`Summaries`."""
    with _Decoding():
        fields = orjson.loads(data)
        found = [
            StoredConsultation(str(name), _number(events), int(first), int(last))
            for name, events, first, last in fields["found"]
        ]
        return SummariesAnswer(found, [str(name) for name in fields["rest"]])


def decode_verified(data: bytes) -> VerifyAnswer:
    """Read the answer to :class:`Verify`."""
    with _Decoding():
        fields = orjson.loads(data)
        checked = _verify(fields["checked"])
        problems = [Damage(str(kind), str(message), _number(at)) for kind, message, at in fields["problems"]]
        following = checked if fields["more"] else None
        return VerifyAnswer(_number(fields["committed"]), _number(fields["events"]), problems, following, checked)


def _verify(fields: Mapping[str, Any]) -> Verify:
    if len(bytes.fromhex(fields["chain"])) not in {0, 32}:
        raise MalformedError("a chain value has 32 bytes")
    row, sequence, end = (_number(fields[name]) for name in ("row", "sequence", "end"))
    return Verify(check_consultation_id(fields["consultation"]), row, sequence, end, fields["chain"])


class _Decoding:
    """Raises MalformedError for what goes wrong inside."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, (KeyError, TypeError, AttributeError, ValueError)):
            raise MalformedError("the answer is malformed") from None


def _number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise MalformedError("a number is expected")
    return value


# -- a verification, asked in slices -----------------------------------------------------------------------------------

#: how long a verification may take before it ends where it is, seconds
VERIFY_SECONDS = 20.0
#: the pause after a slice is as long as the slice took, at most this, seconds: clients' events come first
_LONGEST_PAUSE = 0.05
#: problems that a verification lists; the others are counted
MAX_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class Verification:
    """What the owner of a consultation found.

    Attributes:
        committed: sequence that the partition had reached.
        events: of the consultation in the corpus.
        checked: how many of them were checked: all, unless it took too long.
        problems: the first ones.
        found: how many there are.
        chain: of the last event that was checked; empty without one.
    """

    committed: int
    events: int
    checked: int
    problems: Sequence[Damage]
    found: int
    chain: str


async def verify(ask: Callable[[Verify], Awaitable[VerifyAnswer]], consultation: str) -> Verification:
    """Verify *consultation* slice by slice, so that its owner goes on with its work in between.

    Args:
        ask: brings one question to the owner.
        consultation: its id.

    Raises Exception: what *ask* raises.
    """
    end = time.monotonic() + VERIFY_SECONDS
    problems: list[Damage] = []
    found = 0
    question: Verify | None = Verify(consultation)
    while question is not None:
        asked = time.monotonic()
        answer = await ask(question)
        found += len(answer.problems)
        problems += answer.problems[: MAX_PROBLEMS - len(problems)]
        question = answer.after if time.monotonic() < end else None
        if question is not None:
            await asyncio.sleep(min(_LONGEST_PAUSE, time.monotonic() - asked))
    checked = answer.checked
    return Verification(answer.committed, answer.events, checked.row, problems, found, checked.chain)


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
        """Return False only when *event_id* was certainly not held; True is nearly certain where it is whole."""
        if not self.whole:
            return True
        number = event_id.int
        mixed = ((number >> 64) ^ self._first) * self._factor & _64_BITS
        mixed ^= mixed >> 32
        mixed = (mixed ^ (number & _64_BITS)) * self._factor & _64_BITS
        mixed ^= mixed >> 29
        index = bisect_left(self._hashes, mixed)
        return index < len(self._hashes) and self._hashes[index] == mixed

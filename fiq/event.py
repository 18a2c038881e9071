"""The event and its ids: what a client posts, what a message carries, what HDF5 keeps.

A consultation id is both one NATS subject token and one HDF5 link name. An event id is a UUID, 16 bytes in HDF5: the
client's idempotency key if that is a UUID, a UUIDv8 (RFC 9562, section 5.8) derived from any other key, or a new UUIDv7
(section 5.7) if the client sends no key. The broker's message id is ``<consultation>/<event id>``.

A body is one JSON object with an ``event_type``. It is stored byte for byte, except that raw line breaks between its
tokens become spaces, so that a payload dataset is NDJSON. The message of an event carries the trace of its request.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import orjson

from fiq.errors import InvalidIdError, PoisonError
from fiq.json_text import Part, deeper_than, parts

#: the form of a consultation id
CONSULTATION_ID = re.compile(r"[A-Za-z0-9_-]{1,128}", re.ASCII)
#: header with the broker's message id, by which the broker drops duplicates within its window
MESSAGE_ID_HEADER = "Nats-Msg-Id"
#: header with the time at which ingest received the event, nanoseconds since the Unix epoch
RECEIVED_HEADER = "Fi-Received-Ns"
#: characters of a message id that :func:`message_id_at` returns as it is
MAX_MESSAGE_ID = 200
#: headers of requests and of messages
PARENT_HEADER = "traceparent"
STATE_HEADER = "tracestate"
#: a longer tracestate is ignored, characters
MAX_STATE = 512
#: a tracestate with more members is ignored
MAX_MEMBERS = 32

#: an idempotency key
_VISIBLE_ASCII = re.compile(r"[\x21-\x7e]{1,255}", re.ASCII)
_CANONICAL_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)
#: largest time that the corpus can hold (a signed 64-bit count of nanoseconds)
_MAX_NS = 2**63 - 1
#: of what may be an integer beyond 64 bits
_LONG_INTEGER = re.compile(rb"[0-9]{19}")
#: digits of an integer, at most: Python's own limit
_MOST_DIGITS = 4300
#: a longer body is parsed in parts: a parser makes some 40 bytes of each byte of small objects
_LONG_BYTES = 2**16
_NOT_JSON = "the body is not valid JSON in UTF-8"
_LINE_BREAKS = bytes.maketrans(b"\r\n", b"  ")
_PARENT = re.compile(
    r"(?P<version>(?!ff)[0-9a-f]{2})-(?P<ids>(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16})-[0-9a-f](?P<flags>[0-9a-f])"
    r"(?P<rest>-\S*)?"
)
_MEMBER = re.compile(
    r"(?P<key>[a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13})"
    r"=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
)
#: last digits of flags with the lowest bit, ``sampled``
_SAMPLED = frozenset("13579bdf")
#: members of an event that this project reads, here and from HDF5
OWN_MEMBERS = ("event_type", "payload", "consultation_id", "event_id", "cloudevent", "data_base64")
_QUOTED_MEMBERS = tuple((name, f'"{name}"'.encode()) for name in OWN_MEMBERS)
#: an escape of a character that their names have
_ESCAPED_LETTER = re.compile(rb"\\u00(?:3[0-9]|5[fF]|[67])")


def _spelled(name: str) -> str:
    """Return a pattern for *name* in JSON, with any of its characters escaped."""
    hexadecimal = (re.sub("[a-f]", lambda digit: f"[{digit[0]}{digit[0].upper()}]", f"{ord(one):04x}") for one in name)
    return "".join(rf"(?:{one}|\\u{digits})" for one, digits in zip(name, hexadecimal, strict=True))


#: one of their names, at any level; the number of the group says which
_MEMBER_NAME = re.compile(f'"(?:{"|".join(f"({_spelled(name)})" for name in OWN_MEMBERS)})"(?=[ \t\r\n]*:)'.encode())


# -- Ids ---------------------------------------------------------------------------------------------------------------


def check_consultation_id(value: str) -> str:
    """Return *value* if it is a consultation id.

    Raises InvalidIdError: it is empty, longer than 128 characters, or has a character other than ``[A-Za-z0-9_-]``.
    """
    if CONSULTATION_ID.fullmatch(value) is None:
        raise InvalidIdError("a consultation id is 1 to 128 characters of A-Z a-z 0-9 _ -")
    return value


def event_id_from_key(key: str) -> UUID:
    """Derive the event id from an idempotency *key*: the same key always gives the same id.

    A key that is a UUID in its canonical lower-case form is the id itself. Any other key becomes a UUIDv8 of its
    SHA-256: two keys share an id only if 122 bits of their digests agree.

    Args:
        key: the value of ``Idempotency-Key``, quoted (a structured-field string, as in the IETF draft
            draft-ietf-httpapi-idempotency-key-header) or bare; 1 to 255 visible ASCII characters.

    Raises InvalidIdError: the key is empty, too long, or has white space or characters that are not visible ASCII.
    """
    bare = bare_key(key)
    if _CANONICAL_UUID.fullmatch(bare) is not None:
        return UUID(bare)
    return _derived(b"fiq idempotency key", bare.encode("ascii"))


def bare_key(key: str) -> str:
    """Return an idempotency *key* without its quotes, if it has any.

    Raises InvalidIdError: as :func:`event_id_from_key`.
    """
    bare = re.sub(r"\\([\\\"])", r"\1", key[1:-1]) if len(key) >= 2 and key[0] == key[-1] == '"' else key
    if _VISIBLE_ASCII.fullmatch(bare) is None:
        raise InvalidIdError("an idempotency key is 1 to 255 visible ASCII characters, quoted or not")
    return bare


def event_id_of_line(key: str, line: int) -> UUID:
    """Derive the event id of a line of a batch: that of the key ``<key>:<line>``.

    Args:
        key: of the batch, without quotes, as :func:`bare_key` returns it.
        line: its number, from 1.
    """
    return _derived(b"fiq idempotency key", f"{key}:{line}".encode("ascii"))


def event_id_of_cloudevent(source: str, identifier: str) -> UUID:
    """Derive the event id of a CloudEvent: a UUIDv8 of *source* and *identifier*, which are unique together."""
    length = len(source.encode())
    return _derived(b"fiq cloudevent", f"{length}:{source}{identifier}".encode())


def new_event_id() -> UUID:
    """Make a UUIDv7: 48 bits of Unix time in milliseconds, then 74 random bits."""
    milliseconds = time.time_ns() // 1_000_000
    return _uuid(milliseconds.to_bytes(6, "big") + os.urandom(10), version=7)


def message_id(consultation: str, event_id: UUID) -> str:
    """Return the broker's message id (``Nats-Msg-Id``): ``<consultation>/<event id>``."""
    return f"{consultation}/{event_id}"


def event_id_from_message_id(value: str, consultation: str) -> UUID:
    """Return the event id of a broker's message id that must belong to *consultation*.

    Raises InvalidIdError: the message id names another consultation, or its second part is not a canonical UUID.
    """
    owner, separator, event = value.partition("/")
    if not separator or owner != consultation or _CANONICAL_UUID.fullmatch(event) is None:
        raise InvalidIdError("a message id is <consultation id>/<lower-case UUID> of the subject's consultation")
    return UUID(event)


def _derived(kind: bytes, name: bytes) -> UUID:
    return _uuid(hashlib.sha256(kind + b"\0" + name).digest()[:16], version=8)


def _uuid(raw: bytes, *, version: int) -> UUID:
    number = int.from_bytes(raw, "big")
    number = number & ~(0xF << 76) | version << 76
    number = number & ~(0x3 << 62) | 0x2 << 62
    return UUID(int=number)


# -- Bodies ------------------------------------------------------------------------------------------------------------


class InvalidBodyError(PoisonError):
    """Raised when a body is not an event."""


class NotJsonError(InvalidBodyError):
    """Raised when a body is not JSON in UTF-8 (RFC 8259).

    Attributes:
        offset: of the first byte that is wrong.
    """

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset

    @classmethod
    def of(cls, message: str, raw: bytes, error: orjson.JSONDecodeError, part: Part) -> NotJsonError:
        """Make one from the parser's *error* about a *part* of *raw*. The error holds the part and must not be kept."""
        try:
            raw.decode()
        except UnicodeDecodeError as invalid:
            return cls(message, invalid.start)
        return cls(message, part.begin - part.lead + len(part.text.decode()[: error.pos].encode()))


def check_body(raw: bytes) -> bytes:
    """Return *raw* as it is stored: checked, with spaces instead of raw line breaks.

    Raises NotJsonError: it is not JSON; InvalidBodyError: it is not an object, or its ``event_type`` is missing, empty
    or not a string.
    """
    return read_body(raw)[0]


def read_body(raw: bytes) -> tuple[bytes, dict[str, Any]]:
    """Return *raw* as :func:`check_body` does, and the object that it holds; raises the same errors.

    The object of a long body has :data:`OWN_MEMBERS` only, and its arrays and objects are empty.
    """
    members, repeated = _read_whole(raw) if len(raw) <= _LONG_BYTES else _read_in_parts(raw)
    if members is None:
        raise InvalidBodyError("an event is a JSON object")
    event_type = members.get("event_type")
    if not isinstance(event_type, str) or not event_type:
        raise InvalidBodyError("event_type is required: a string that is not empty")
    for name in OWN_MEMBERS if repeated else ():
        if name in repeated:
            raise InvalidBodyError(f"{name} occurs more than once: keep one, because readers would not agree on which")
    return without_line_breaks(raw), members


def _read_whole(raw: bytes) -> tuple[dict[str, Any] | None, Collection[str]]:
    """Return the object in *raw*, None if it is something else; and which of OWN_MEMBERS it has more than once.

    Raises NotJsonError.
    """
    document = _load(raw, _NOT_JSON)
    if not isinstance(document, dict):
        return None, ()
    return document, _repeated(raw, document)


def _read_in_parts(raw: bytes) -> tuple[dict[str, Any] | None, Collection[str]]:
    """Do as :func:`_read_whole`, with what the parser makes of one part in memory at a time."""
    members: dict[str, Any] = {}
    repeated: set[str] = set()
    is_object = False
    for part in parts(raw):
        document = _load(raw, _NOT_JSON, part)
        is_object = isinstance(document, dict)
        if not is_object:
            continue
        repeated.update(_repeated(part.text, document))
        for name in OWN_MEMBERS:
            if name in document:
                if name in members:
                    repeated.add(name)
                value = document[name]
                members[name] = type(value)() if isinstance(value, list | dict) else value
    return members if is_object else None, repeated


def _repeated(raw: bytes, document: dict[str, Any]) -> Collection[str]:
    """Return which of :data:`OWN_MEMBERS` occur more than once in *raw*, the text of *document*.

    Of equal names some parsers take the last and others the first, so a reader could see another event than the one
    that was checked. Most events cost some counts. Where a name occurs twice, perhaps in a nested object, each
    occurrence gets a number of its own; then the parser finds how many are members of the event itself.
    """
    for name, quoted in _QUOTED_MEMBERS:
        if name in document and raw.count(quoted) > 1:
            break
    else:
        if b"\\u00" not in raw or _ESCAPED_LETTER.search(raw) is None:
            return ()
    numbers = itertools.count()

    def marked(match: re.Match[bytes]) -> bytes:
        return b'"%b\\u0000fiq%d"' % (OWN_MEMBERS[(match.lastindex or 1) - 1].encode(), next(numbers))

    names = (name.partition("\0fiq") for name in orjson.loads(_MEMBER_NAME.sub(marked, raw)))
    found = Counter(name for name, mark, _ in names if mark)
    return [name for name in OWN_MEMBERS if found[name] > 1]


def check_json(raw: bytes, message: str) -> None:
    """Raise NotJsonError with *message* unless *raw* is JSON in UTF-8; a long one is parsed in parts."""
    for part in parts(raw) if len(raw) > _LONG_BYTES else (None,):
        _load(raw, message, part)


def _load(raw: bytes, message: str, part: Part | None = None) -> Any:
    """Parse *raw*, or a *part* of it. Raises NotJsonError with *message*."""
    try:
        return orjson.loads(raw if part is None else part.text)
    except orjson.JSONDecodeError as error:
        # the parser's own message may quote the body; `from None` keeps its document out of tracebacks
        raise NotJsonError.of(message, raw, error, part or Part(raw, 0, 0)) from None


def parse_exactly(raw: bytes) -> Any:
    """Parse JSON and keep the digits of every integer; orjson alone reads integers beyond 64 bits as floats.

    Raises ValueError: it is not JSON.
    """
    return json.loads(raw, parse_int=_integer) if _LONG_INTEGER.search(raw) else orjson.loads(raw)


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MOST_DIGITS else float(digits)


def without_line_breaks(raw: bytes) -> bytes:
    """Return the JSON text *raw* with a space in place of each raw line break."""
    if b"\n" in raw or b"\r" in raw:
        return raw.translate(_LINE_BREAKS)
    return raw


def check_depth(body: bytes, limit: int) -> None:
    """Raise InvalidBodyError if objects and arrays of *body*, a valid event, are nested more than *limit* deep."""
    # most events have fewer brackets than the limit, and cost two counts
    if body.count(b"{") + body.count(b"[") > limit and deeper_than(body, limit):
        raise InvalidBodyError(f"more than {limit} levels deep")


# -- The trace of a request (W3C Trace Context, level 1: https://www.w3.org/TR/trace-context-1/) ----------------------
#
# Headers of requests are checked, because they go into messages and logs. Invalid values are ignored, as specified.


@dataclass(frozen=True, slots=True)
class Trace:
    """The position of a request in a trace.

    Attributes:
        parent: a valid ``traceparent`` of version 00.
        state: a valid ``tracestate``, or an empty string.
    """

    parent: str
    state: str = ""

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits."""
        return self.parent[3:35]

    @property
    def sampled(self) -> bool:
        """Whether the caller may have recorded the request."""
        return self.parent[-1] in _SAMPLED

    def headers(self) -> dict[str, str]:
        """Return the headers that carry it on."""
        return {PARENT_HEADER: self.parent, STATE_HEADER: self.state} if self.state else {PARENT_HEADER: self.parent}


def read_trace(parents: Sequence[str], states: Sequence[str]) -> Trace | None:
    """Return the trace of a request; None if it has no valid one.

    Args:
        parents: values of its ``traceparent`` headers; only a single one is valid.
        states: values of its ``tracestate`` headers, in their order.
    """
    if len(parents) != 1:
        return None
    parent = _read_parent(parents[0])
    return None if parent is None else Trace(parent, _read_state(states) if states else "")


def trace_of_message(headers: Mapping[str, str]) -> Trace | None:
    """Return the trace in a message's *headers*; None if they have no valid one."""
    parent = headers.get(PARENT_HEADER)
    if parent is None:
        return None
    state = headers.get(STATE_HEADER)
    return read_trace((parent,), () if state is None else (state,))


def _read_parent(value: str) -> str | None:
    match = _PARENT.fullmatch(value)
    if match is None:
        return None
    version, ids, flags, rest = match.groups()
    if version == "00":
        return value if rest is None else None
    # of a later version only the fields of version 00 are used, and sent on as version 00
    return f"00-{ids}-{'01' if flags in _SAMPLED else '00'}"


def _read_state(values: Sequence[str]) -> str:
    members = [stripped for value in values for member in value.split(",") if (stripped := member.strip(" \t"))]
    state = ",".join(members)
    if len(state) > MAX_STATE or len(members) > MAX_MEMBERS:
        return ""
    matches = [_MEMBER.fullmatch(member) for member in members]
    keys = {match["key"] for match in matches if match is not None}
    return state if len(keys) == len(members) else ""  # each member is valid, and no key occurs twice


# -- Events and messages -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Event:
    """One event of one consultation.

    Attributes:
        consultation: id of the consultation, ``[A-Za-z0-9_-]{1,128}``.
        event_id: unique within the consultation; 16 bytes in HDF5.
        received_ns: when ingest received it, nanoseconds since the Unix epoch.
        body: one JSON object in UTF-8 without raw line breaks, otherwise byte for byte what the client sent.
        trace: trace of the request that brought it, if any. It is not part of the event: never compared, never stored.
    """

    consultation: str
    event_id: UUID
    received_ns: int
    body: bytes
    trace: Trace | None = field(default=None, compare=False)

    @property
    def message_id(self) -> str:
        """The broker's message id."""
        return message_id(self.consultation, self.event_id)

    def headers(self) -> dict[str, str]:
        """Return the headers of the event's message."""
        headers = {MESSAGE_ID_HEADER: self.message_id, RECEIVED_HEADER: str(self.received_ns)}
        return headers if self.trace is None else headers | self.trace.headers()


def decode(consultation: str, headers: Mapping[str, str] | None, body: bytes) -> Event:
    """Build the event from a message of *consultation*.

    Raises PoisonError: ingest would not have written this message.
    """
    check_consultation_id(consultation)
    if not headers or MESSAGE_ID_HEADER not in headers:
        raise PoisonError(f"the message has no {MESSAGE_ID_HEADER} header")
    event_id = event_id_from_message_id(headers[MESSAGE_ID_HEADER], consultation)
    received = headers.get(RECEIVED_HEADER, "")
    if not (received.isascii() and received.isdigit() and len(received) <= 19 and int(received) <= _MAX_NS):
        raise PoisonError(f"{RECEIVED_HEADER} is missing or not a count of nanoseconds")
    if check_body(body) is not body:
        raise InvalidBodyError("the body holds raw line breaks")
    return Event(consultation, event_id, int(received), body, trace_of_message(headers))


def message_id_at(headers: Mapping[str, str] | None) -> str:
    """Return a message's id as the corpus records it with a commit.

    Empty without one; a hash of one that is longer than :data:`MAX_MESSAGE_ID` or not printable ASCII.
    """
    found = (headers or {}).get(MESSAGE_ID_HEADER, "")
    if len(found) <= MAX_MESSAGE_ID and found.isascii() and found.isprintable():
        return found
    return "blake2b:" + hashlib.blake2b(found.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()

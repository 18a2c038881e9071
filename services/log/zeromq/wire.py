"""What ingest and the owner of a partition say to each other: the frames of each message.

The first frame is one byte, the kind of message; numbers are big-endian.

====  ==============  ================================================================================
kind  from            further frames
====  ==============  ================================================================================
HELLO ingest          JSON: who this is. First after each connect, then once a second
EVENTS ingest         for each event: number, JSON [consultation, headers], body
ASK   ingest          number, kind of question, question
BYE   ingest          none: this process goes
STATE owner           JSON: :class:`State`. It answers HELLO, and comes after each change and twice a second
DONE  owner           for each event 17 bytes: number, sequence, :class:`Done`; one message a round
REPLY owner           number, code, answer or reason
====  ==============  ================================================================================

*number* is of the sender's choice, unique within its process. An *instance* names one opening of the partition by one
process: when it changes, the owner knows nothing of what was sent before.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import orjson

from services.log.protocol import Failure

HELLO, EVENTS, ASK, BYE = b"H", b"E", b"A", b"B"
STATE, DONE, REPLY = b"S", b"D", b"R"

_NUMBER = struct.Struct(">Q")
_CODE = struct.Struct(">H")
_DONE = struct.Struct(">QQB")


#: codes of a REPLY that is no answer; 0 is one
CODES: Mapping[Failure, int] = {
    Failure.MALFORMED: 400,
    Failure.TOO_LARGE: 413,
    Failure.FAULT: 500,
    Failure.NOT_NOW: 503,
}


class Done(IntEnum):
    """What became of an event."""

    STORED = 0
    #: the corpus held its id; the sequence is the first one's
    DUPLICATE = 1
    #: it can never be stored; the owner's log says why
    REFUSED = 2


@dataclass(frozen=True, slots=True)
class State:
    """A partition, as its owner sees it, and what the process that is told may send.

    Attributes:
        instance: of this opening of the partition.
        committed: sequence that the file has reached.
        waiting: events that are received and not committed.
        credit_events: events that the process may have sent without an answer; 0: it only watches.
        credit_bytes: bytes of their bodies.
        store: name of the owner's store.
        volume: UUID of the owner's volume.
        partitions: how many the store has.
        about: what the owner's process says of itself: ``host``, ``pid``, ``address`` and so on.
    """

    instance: str
    committed: int
    waiting: int
    credit_events: int
    credit_bytes: int
    store: str
    volume: str
    partitions: int
    about: Mapping[str, str]


_KINDS = {"str": str, "int": int, "Mapping[str, str]": dict}
_STATE_FIELDS = {one.name: _KINDS[str(one.type)] for one in fields(State)}


class MalformedMessageError(ValueError):
    """Raised when a message is not what this module writes."""


def encode_state(state: State) -> list[bytes]:
    """Return the message that tells *state*."""
    return [STATE, orjson.dumps(state)]


def decode_state(data: bytes) -> State:
    """Return the state in a message. Raises MalformedMessageError: it is none."""
    found = _object(data)
    values = {name: found.get(name) for name in _STATE_FIELDS}
    if not all(type(values[name]) is kind for name, kind in _STATE_FIELDS.items()):
        raise MalformedMessageError("a state lacks a field")
    return State(**values)  # type: ignore[arg-type]


def encode_hello(name: str, *, watches: bool) -> list[bytes]:
    """Return the first message of a process called *name*; one that only *watches* gets no credit."""
    return [HELLO, orjson.dumps({"name": name, "watches": watches})]


def decode_hello(data: bytes) -> tuple[str, bool]:
    """Undo :func:`encode_hello`. Raises MalformedMessageError."""
    found = _object(data)
    return str(found.get("name", "")), bool(found.get("watches"))


def encode_event(number: int, consultation: str, headers: Mapping[str, str], body: bytes) -> tuple[bytes, ...]:
    """Return the three frames of one event."""
    return _NUMBER.pack(number), orjson.dumps([consultation, headers]), body


def decode_events(frames: list[bytes]) -> Iterator[tuple[int, str, dict[str, str], bytes]]:
    """Yield number, consultation, headers and body of each event. Raises MalformedMessageError."""
    if len(frames) % 3 != 1:
        raise MalformedMessageError("frames are missing")
    try:
        for index in range(1, len(frames), 3):
            (number,) = _NUMBER.unpack(frames[index])
            consultation, headers = orjson.loads(frames[index + 1])
            if type(consultation) is not str or type(headers) is not dict:
                raise MalformedMessageError("an event's head is malformed")
            yield number, consultation, headers, frames[index + 2]
    except (struct.error, orjson.JSONDecodeError, TypeError, ValueError):
        raise MalformedMessageError("an event's head is malformed") from None


def encode_done(done: Iterable[tuple[int, int, Done]]) -> list[bytes]:
    """Return the message with number, sequence and outcome of each event."""
    return [DONE, b"".join(_DONE.pack(*one) for one in done)]


def decode_done(data: bytes) -> Iterator[tuple[int, int, Done]]:
    """Undo :func:`encode_done`. Raises MalformedMessageError."""
    try:
        for number, sequence, outcome in _DONE.iter_unpack(data):
            yield number, sequence, Done(outcome)
    except (struct.error, ValueError):
        raise MalformedMessageError("outcomes are malformed") from None


def encode_ask(number: int, kind: str, question: bytes) -> list[bytes]:
    """Return a question."""
    return [ASK, _NUMBER.pack(number), kind.encode(), question]


def encode_reply(number: bytes, code: int, data: bytes) -> list[bytes]:
    """Return the answer to the question with *number*, or with a *code* the reason why there is none."""
    return [REPLY, number, _CODE.pack(code), data]


def decode_reply(frames: list[bytes]) -> tuple[int, int, bytes]:
    """Return number, code and data of an answer. Raises MalformedMessageError."""
    try:
        _, number, code, data = frames
        return _NUMBER.unpack(number)[0], _CODE.unpack(code)[0], data
    except (struct.error, ValueError):
        raise MalformedMessageError("an answer is malformed") from None


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(data)
    except orjson.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise MalformedMessageError("not a JSON object")
    return found

"""The event: what a client posts, what a message carries, what HDF5 keeps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import orjson

from fiq.errors import PoisonError
from fiq.ids import check_consultation_id, event_id_from_message_id, message_id
from fiq.trace import Trace, trace_of_message

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
#: everything but brackets
_REST = bytes(set(range(256)) - set(b"[]{}"))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
#: header with the broker's message id, which it uses to drop duplicates within its window
MESSAGE_ID_HEADER = "Nats-Msg-Id"
#: header with the time at which ingest took the event, nanoseconds since the Unix epoch
RECEIVED_HEADER = "Fi-Received-Ns"

#: largest time that the corpus can hold (a signed 64-bit count of nanoseconds)
_MAX_NS = 2**63 - 1
#: raw line breaks may stand only between JSON tokens; as spaces they keep a payload dataset readable as NDJSON
_LINE_BREAKS = bytes.maketrans(b"\r\n", b"  ")


def deeper_than(raw: bytes, limit: int) -> bool:
    """Say whether objects and arrays of *raw*, a valid JSON text, are nested more than *limit* deep.

    Most events have fewer brackets in all than the limit, and cost two counts. Others are stripped of their strings,
    in which a bracket means nothing, and counted through.
    """
    if raw.count(b"{") + raw.count(b"[") <= limit:
        return False
    depth = 0
    for bracket in _STRING.sub(b"", raw).translate(None, _REST):
        depth += _STEP[bracket]
        if depth > limit:
            return True
    return False


class InvalidBodyError(PoisonError):
    """Raised when a body is no JSON, or no event."""


class NotJsonError(InvalidBodyError):
    """Raised when a body is no JSON text in UTF-8 (RFC 8259)."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event of one consultation.

    Attributes:
        consultation: id of the consultation, ``[A-Za-z0-9_-]{1,128}``.
        event_id: unique within the consultation; 16 bytes in HDF5.
        received_ns: when ingest took it, nanoseconds since the Unix epoch.
        body: one JSON object in UTF-8 without raw line breaks, byte for byte what the client sent otherwise.
        trace: that its request belongs to, if any; it is how the event came, no part of it, and never compared or kept.
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
        """Return the headers that the event's message carries."""
        headers = {MESSAGE_ID_HEADER: self.message_id, RECEIVED_HEADER: str(self.received_ns)}
        return headers if self.trace is None else headers | self.trace.headers()


def check_body(raw: bytes) -> bytes:
    """Return *raw* as it is stored: valid, and with raw line breaks as spaces.

    Raises NotJsonError: it is no JSON; InvalidBodyError: it is no object, or its ``event_type`` is missing, empty or no
    string.
    """
    return read_body(raw)[0]


def read_body(raw: bytes) -> tuple[bytes, dict[str, Any]]:
    """Return *raw* as :func:`check_body` does, and the object that it is; raises as that does."""
    document = _parse(raw)
    if not isinstance(document, dict):
        raise InvalidBodyError("an event is a JSON object")
    event_type = document.get("event_type")
    if not isinstance(event_type, str) or not event_type:
        raise InvalidBodyError("event_type is required: a string that is not empty")
    return without_line_breaks(raw), document


def without_line_breaks(raw: bytes) -> bytes:
    """Return the JSON text *raw* with a space in place of each raw line break."""
    if b"\n" in raw or b"\r" in raw:
        return raw.translate(_LINE_BREAKS)
    return raw


def check_depth(body: bytes, limit: int) -> None:
    """Let a valid *body* pass whose objects and arrays are nested at most *limit* deep.

    Raises InvalidBodyError: they are nested deeper.
    """
    if deeper_than(body, limit):
        raise InvalidBodyError(f"more than {limit} levels deep")


def decode(consultation: str, headers: Mapping[str, str] | None, body: bytes) -> Event:
    """Build the event that a message of *consultation* carries.

    Raises PoisonError: the message is none that ingest would have written.
    """
    check_consultation_id(consultation)
    if not headers or MESSAGE_ID_HEADER not in headers:
        raise PoisonError(f"the message has no {MESSAGE_ID_HEADER} header")
    event_id = event_id_from_message_id(headers[MESSAGE_ID_HEADER], consultation)
    received = headers.get(RECEIVED_HEADER, "")
    if not (received.isascii() and received.isdigit() and len(received) <= 19 and int(received) <= _MAX_NS):
        raise PoisonError(f"{RECEIVED_HEADER} is missing or no count of nanoseconds")
    if check_body(body) is not body:
        raise InvalidBodyError("the body holds raw line breaks")
    return Event(consultation, event_id, int(received), body, trace_of_message(headers))


def _parse(raw: bytes) -> Any:
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        # the parser's own message may quote the body; `from None` keeps its document out of tracebacks
        raise NotJsonError("the body is not valid JSON in UTF-8") from None

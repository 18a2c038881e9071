"""Body formats: which ones each path takes, how a body is read, and how events are found in it.

A path (:class:`Resource`) takes some media types, each a :class:`BodyFormat`: one JSON event, a batch (NDJSON or a JSON
array), or CloudEvents. :func:`read_body` reads the body within the limits of size, time and memory. Events are stored
byte for byte, so a batch is cut into the slices of its text that hold the events. A batch is valid as a whole or
refused: each of its lines is an event with an id of its own.
"""

from __future__ import annotations

import asyncio
import base64
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple
from urllib.parse import unquote
from uuid import UUID

import orjson
from aiohttp import StreamReader, web
from multidict import CIMultiDictProxy

from fiq.errors import InvalidIdError, PoisonError
from fiq.event import (
    Event,
    InvalidBodyError,
    NotJsonError,
    Trace,
    check_consultation_id,
    check_depth,
    check_json,
    event_id_from_key,
    event_id_of_cloudevent,
    event_id_of_line,
    new_event_id,
    without_line_breaks,
)
from fiq.event import read_body as read_json_object
from fiq.json_text import PAUSE_BYTES, SPACE, Slice, end_of, slice_object, slices
from services.ingest import problems
from services.ingest.admission import Reservation
from services.ingest.problems import RequestRefusedError
from services.ingest.settings import Settings

#: most events of a batch
MAX_EVENTS = 1000
#: of longer batches one is read at a time, bytes
LONG_BYTES = 128 * 2**10
#: work on a batch after which other requests go on, seconds
_TURN_SECONDS = 0.002
#: the CloudEvents header that every event in the binary mode has
VERSION_HEADER = "ce-specversion"

# -- paths and formats ------------------------------------------------------------------------------------------------


class BodyFormat(Enum):
    """How a body holds events."""

    EVENT = "event"
    LINES = "lines"
    ARRAY = "array"
    CLOUDEVENT = "cloudevent"
    CLOUDEVENT_BINARY = "cloudevent-binary"
    CLOUDEVENT_BATCH = "cloudevent-batch"

    def __init__(self, value: str) -> None:
        #: whether it may hold several events
        self.is_batch = value in ("lines", "array", "cloudevent-batch")
        #: whether the events bring their own ids, so that an Idempotency-Key would be a second one
        self.takes_no_key = value.startswith("cloudevent")

    def limit(self, settings: Settings) -> int:
        """Return the size of the largest body, bytes."""
        if not self.is_batch:
            return settings.max_event_bytes
        return min(settings.max_batch_bytes, max(settings.max_in_flight_bytes, settings.max_event_bytes))


@dataclass(frozen=True, slots=True)
class Resource:
    """A path to which events are posted.

    Attributes:
        path: as the router knows it.
        formats: that it takes, by media type.
        binary: whether it takes CloudEvents in the binary mode, which have any media type.
    """

    path: str
    formats: Mapping[str, BodyFormat]
    binary: bool = False

    def format_of(self, request: web.Request) -> BodyFormat:
        """Return the format of *request*'s body. Raises RequestRefusedError: the resource does not take it."""
        found = self.formats.get(_media_type(request.headers))
        if self.binary and VERSION_HEADER in request.headers and found in (None, BodyFormat.EVENT):
            return BodyFormat.CLOUDEVENT_BINARY
        if found is None:
            raise RequestRefusedError(problems.UNSUPPORTED_MEDIA_TYPE, self._takes(request.headers))
        return found

    def _takes(self, headers: CIMultiDictProxy[str]) -> str:
        """Say what the resource takes, and what *headers* lack for it."""
        others = ", ".join(kind for kind in self.formats if kind != _JSON)
        if _JSON in self.formats:
            taken = f"Send Content-Type: {_JSON}, in UTF-8; this resource also takes {others}."
        else:
            taken = f"This resource takes the Content-Type {others}, in UTF-8. Post plain JSON to {EVENTS.path}."
        if not self.binary or not any(name.lower().startswith(_HEADER_PREFIX) for name in headers):
            return taken
        return f"{taken} For a CloudEvent in the binary mode these headers are missing: {', '.join(_missing(headers))}."


_JSON = "application/json"
_CLOUDEVENTS = {
    "application/cloudevents+json": BodyFormat.CLOUDEVENT,
    "application/cloudevents-batch+json": BodyFormat.CLOUDEVENT_BATCH,
}
_BATCHES = {
    "application/x-ndjson": BodyFormat.LINES,
    _JSON: BodyFormat.ARRAY,
    "application/cloudevents-batch+json": BodyFormat.CLOUDEVENT_BATCH,
}
#: the events of one consultation
EVENTS = Resource("/consultations/{consultation}/events", {_JSON: BodyFormat.EVENT, **_CLOUDEVENTS}, binary=True)
RESOURCES = (
    EVENTS,
    # many events of one consultation
    Resource("/consultations/{consultation}/events/batch", _BATCHES),
    # many events, each of which names its consultation
    Resource("/events/batch", _BATCHES),
    # CloudEvents whose subjects name their consultations
    Resource("/events", _CLOUDEVENTS, binary=True),
)
#: what a body may be declared to be in; US-ASCII is a part of UTF-8
_CHARSETS = frozenset({"utf-8", "utf8", "us-ascii"})


def _media_type(headers: CIMultiDictProxy[str]) -> str:
    """Return the media type of the body in lower case, without parameters; empty without one."""
    value = headers.get("Content-Type", "")
    if value == _JSON:  # the usual one
        return value
    kind, *parameters = value.split(";")
    for parameter in parameters:
        name, _, charset = parameter.partition("=")
        if name.strip().lower() == "charset" and charset.strip().strip('"').lower() not in _CHARSETS:
            raise RequestRefusedError(problems.UNSUPPORTED_MEDIA_TYPE)
    return kind.strip().lower()


# -- reading a body ---------------------------------------------------------------------------------------------------


def check_content(request: web.Request, *, limit: int) -> None:
    """Check what the headers say of the body, other than its type.

    Raises RequestRefusedError: it is encoded, or declared larger than *limit* bytes.
    """
    headers = request.headers
    if headers.get("Content-Encoding", "identity").strip().lower() != "identity":
        raise RequestRefusedError(problems.UNSUPPORTED_CONTENT_ENCODING)
    length = request.content_length
    if length is not None and length > limit:
        raise _too_large(limit)


async def read_body(request: web.Request, reservation: Reservation, *, limit: int, timeout: float) -> bytes:
    """Read the whole body.

    Args:
        request: whose body it is.
        reservation: counts the bytes as they come.
        limit: most bytes.
        timeout: most seconds.

    Raises RequestRefusedError: it was encoded, too large, too slow, or badly framed; TooManyInFlightError: the process
    has no memory for it; ConnectionError: the client has gone.
    """
    check_content(request, limit=limit)
    content = request.content
    try:
        if content.is_eof():  # came with the headers, as most do: needs no timer
            return await _read(content, reservation, limit)
        async with asyncio.timeout(timeout) as bound:
            reservation.read_within(bound)
            return await _read(content, reservation, limit)
    except TimeoutError:
        if reservation.given_up:
            return reservation.complete()  # raises
        raise RequestRefusedError(problems.BODY_TIMEOUT) from None
    except web.RequestPayloadError:
        raise RequestRefusedError(problems.MALFORMED_REQUEST) from None


async def _read(content: StreamReader, reservation: Reservation, limit: int) -> bytes:
    while chunk := await content.readany():
        if reservation.size + len(chunk) > limit:
            raise _too_large(limit)
        reservation.take(chunk)
    return reservation.complete()


def _too_large(limit: int) -> RequestRefusedError:
    return RequestRefusedError(problems.BODY_TOO_LARGE, f"The body is larger than {limit} bytes.")


# -- batches ----------------------------------------------------------------------------------------------------------


class ParsedEvent(NamedTuple):
    """One event as it was found in a body.

    Attributes:
        body: as it is stored.
        consultation: that it names, or None.
        event_id: from the id or key that it holds, or None.
        member: that names its consultation.
    """

    body: bytes
    consultation: str | None
    event_id: UUID | None
    member: str = "consultation_id"

    def consultation_in(self, path: str | None) -> str:
        """Return the event's consultation.

        Args:
            path: the consultation in the request's path, or None.

        Raises PoisonError: neither event nor path names one, or they name two.
        """
        if path is None and self.consultation is None:
            raise PoisonError(f"{self.member} is missing: it names the consultation")
        if path is not None and self.consultation not in (None, path):
            raise PoisonError(f"{self.member} names another consultation than the path")
        return path or self.consultation or ""


@dataclass(frozen=True, slots=True)
class BatchContext:
    """What the request says about all events of a batch.

    Attributes:
        consultation: in the path; None when each event names its own.
        key: Idempotency-Key without quotes, or None.
        received_ns: when the request came, nanoseconds since the Unix epoch.
        max_event_bytes: largest event.
        max_depth: most levels of objects and arrays.
        trace: of the request.
    """

    consultation: str | None
    key: str | None
    received_ns: int
    max_event_bytes: int
    max_depth: int
    trace: Trace | None = None


class BatchEvent(NamedTuple):
    """One event of a batch.

    Attributes:
        line: its number in the batch, from 1.
        event: the event.
        keyed: its id comes from a client's key, its own one or that of the batch; otherwise it is new.
    """

    line: int
    event: Event
    keyed: bool

    @property
    def identity(self) -> tuple[str, bytes]:
        """Consultation and id: the same for lines that are one event."""
        return self.event.consultation, self.event.event_id.bytes


class _Turns:
    """Divides a long batch's work into turns, between which other requests go on."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    async def end(self) -> None:
        """Let others go on if this turn has taken its time."""
        if time.perf_counter() - self._since > _TURN_SECONDS:
            await asyncio.sleep(0)
            self._since = time.perf_counter()


async def read_batch(raw: bytes, body_format: BodyFormat, context: BatchContext) -> list[BatchEvent]:
    """Return the events of the batch *raw*, in order.

    The text is cut into events before any of them is parsed, and then one after the other is: so a batch of too many
    costs little, and what a parser makes of the text is in memory for one event only.

    Raises RequestRefusedError: it is empty, too long, or a line is not an event; the members name each such line.
    """
    turns = _Turns()
    cuts: list[Slice] = []
    for cut in _split_lines(raw) if body_format is BodyFormat.LINES else _split_array(raw):
        if cut is None:
            await turns.end()
        elif len(cuts) == MAX_EVENTS:
            raise RequestRefusedError(problems.TOO_MANY_EVENTS)
        else:
            cuts.append(cut)
    parse = parse_cloudevent if body_format is BodyFormat.CLOUDEVENT_BATCH else _parse_event
    found: list[BatchEvent] = []
    invalid: list[dict[str, object]] = []
    seen: dict[tuple[str, bytes], BatchEvent] = {}
    for line, begin, end in cuts:
        try:
            one = _batch_event(line, raw[begin:end], parse, context)
            first = seen.setdefault(one.identity, one)
            if first is not one and first.event.body != one.event.body:
                raise PoisonError(f"it has the id of line {first.line}, and another body")
            found.append(one)
        except PoisonError as error:
            if isinstance(error, NotJsonError) and body_format is not BodyFormat.LINES:
                raise not_json(raw, begin + error.offset) from None  # the array is not JSON either
            reason = str(error)
            if isinstance(error, NotJsonError):
                reason = f"it is not JSON in UTF-8, from its column {_column(raw, begin + error.offset)} on"
            invalid.append({"line": line, "reason": reason})
        await turns.end()
    if invalid:
        raise RequestRefusedError(problems.INVALID_BATCH, members={"lines": invalid})
    if not found:
        raise RequestRefusedError(problems.INVALID_BATCH, "The batch holds no event.")
    return found


def _batch_event(line: int, text: bytes, parse: Callable[[bytes], ParsedEvent], context: BatchContext) -> BatchEvent:
    if len(text) > context.max_event_bytes:
        raise PoisonError(f"the event is larger than {context.max_event_bytes} bytes")
    parsed = parse(text)
    if len(parsed.body) > context.max_event_bytes:
        raise PoisonError(f"the event as it is stored is larger than {context.max_event_bytes} bytes")
    check_depth(parsed.body, context.max_depth)
    if parsed.event_id is not None:
        event_id, keyed = parsed.event_id, True
    elif context.key is not None:
        event_id, keyed = event_id_of_line(context.key, line), True
    else:
        event_id, keyed = new_event_id(), False
    consultation = parsed.consultation_in(context.consultation)
    return BatchEvent(line, Event(consultation, event_id, context.received_ns, parsed.body, context.trace), keyed)


def parse_event(raw: bytes) -> ParsedEvent:
    """Parse an event of a request of its own; its member ``event_id`` is an ordinary one."""
    body, document = read_json_object(raw)
    return ParsedEvent(body, _named_consultation(document), None)


def _parse_event(raw: bytes) -> ParsedEvent:
    """Parse an event of a batch; its members ``consultation_id`` and ``event_id`` say where it belongs."""
    body, document = read_json_object(raw)
    consultation = _named_consultation(document)
    key = _optional_string(document, "event_id")
    try:
        return ParsedEvent(body, consultation, None if key is None else event_id_from_key(key))
    except InvalidIdError:
        raise InvalidBodyError("event_id must be 1 to 255 visible ASCII characters") from None


def _named_consultation(document: dict[str, Any]) -> str | None:
    named = _optional_string(document, "consultation_id")
    return None if named is None else check_consultation_id(named)


def _optional_string(document: dict[str, Any], name: str) -> str | None:
    value = document.get(name)
    if value is not None and not isinstance(value, str):
        raise InvalidBodyError(f"{name} must be a string")
    return value


def _split_lines(raw: bytes) -> Iterator[Slice | None]:
    """Yield the lines of NDJSON that are not empty, with their numbers; None after empty ones. LF or CR LF ends one."""
    number, position = 1, 0
    while position < len(raw):
        begin = end_of(_LINE_ENDS, raw, position, position + PAUSE_BYTES)
        if begin > position:
            number += raw.count(b"\n", position, begin)
            position = begin
            yield None
        else:
            end = raw.find(b"\n", begin)
            position = len(raw) if end < 0 else end
            yield Slice(number, begin, begin + len(raw[begin:position].rstrip(b"\r")))


def _split_array(raw: bytes) -> Iterator[Slice | None]:
    """Yield the elements of a JSON array with their numbers; None as :func:`slices` does.

    Raises RequestRefusedError: it is not an array, or does not end as one. If each element is valid JSON, it is.
    """
    if raw.lstrip(SPACE)[:1] not in (b"[", b""):
        raise RequestRefusedError(problems.INVALID_BATCH, "The body is not a JSON array.")
    try:
        yield from slices(raw)
    except ValueError as error:
        raise RequestRefusedError(problems.INVALID_JSON, f"The body is not one JSON array: {error}.") from None


_LINE_ENDS = re.compile(rb"[\r\n]*+")
#: bytes of UTF-8 that begin no character
_CONTINUATION = bytes(range(0x80, 0xC0))


def not_json(raw: bytes, offset: int) -> RequestRefusedError:
    """Return what the client gets whose body *raw* is not JSON from *offset* on: where, and nothing of the body."""
    if not raw.strip(SPACE):
        return RequestRefusedError(problems.INVALID_JSON, "The body is empty.")
    line = raw.count(b"\n", 0, offset) + 1
    return RequestRefusedError(
        problems.INVALID_JSON, f"The body is not JSON in UTF-8: see line {line}, column {_column(raw, offset)}."
    )


def _column(raw: bytes, offset: int) -> int:
    """Return the number of the character at *offset* in its line, from 1."""
    begin = raw.rfind(b"\n", 0, offset) + 1
    return len(raw[begin:offset].translate(None, _CONTINUATION)) + 1


# -- CloudEvents 1.0 over HTTP (docs/http.md) -------------------------------------------------------------------------
#
# An event's type becomes ``event_type``, its data ``payload``, byte for byte; its attributes are kept in
# ``cloudevent``. ``source`` and ``id`` are unique together, so both make the event id.

_HEADER_PREFIX = "ce-"
_VERSION = "1.0"
#: attributes that every event has
_REQUIRED = ("id", "source", "specversion", "type")
#: members of the JSON format that are not attributes
_DATA, _DATA_BASE64 = "data", "data_base64"
#: attributes and data of a CloudEvent, at most: unlike a payload they become objects
MAX_MEMBERS = 1000
#: names that are CloudEvents' own, not the client's
_OWN_NAMES = frozenset({*_REQUIRED, "subject", "time", "datacontenttype", "dataschema", _DATA, _DATA_BASE64})
_ATTRIBUTE = re.compile(r"[a-z0-9]{1,64}", re.ASCII)
_OBJECT = re.compile(rb"[ \t\r\n]*+\{")
_JSON_TYPE = re.compile(r"[^/]+/(?:[^+]+\+)?json", re.IGNORECASE)


def parse_cloudevent(raw: bytes) -> ParsedEvent:
    """Parse a CloudEvent in the JSON format.

    Raises PoisonError: it is not a CloudEvent. The message quotes nothing of it.
    """
    check_json(raw, "a CloudEvent is a JSON object in UTF-8")
    if _OBJECT.match(raw) is None:
        raise InvalidBodyError("a CloudEvent is a JSON object")
    members: dict[str, bytes] = {}
    for name, text in slice_object(raw):
        if name in members:
            raise _twice(name)
        if len(members) >= MAX_MEMBERS:
            raise InvalidBodyError(f"a CloudEvent has at most {MAX_MEMBERS} attributes")
        members[name] = text
    attributes = {name: _value(text) for name, text in members.items() if name != _DATA}
    base64_data = attributes.pop(_DATA_BASE64, None)
    if _DATA in members and base64_data is not None:
        raise InvalidBodyError("a CloudEvent has data or data_base64, not both")
    if base64_data is not None:
        return _assemble(attributes, _from_base64(base64_data, attributes))
    return _assemble(attributes, {"payload": members[_DATA]} if _DATA in members else {})


def _value(text: bytes) -> Any:
    """Return the value of the JSON *text*; an array or object, which no attribute may be, is empty."""
    return [] if text.startswith((b"[", b"{")) else orjson.loads(text)


def parse_binary_cloudevent(headers: CIMultiDictProxy[str], body: bytes) -> ParsedEvent:
    """Parse a CloudEvent with its attributes in *headers* and its data in *body*.

    Raises PoisonError: it is not a CloudEvent. The message quotes nothing of it.
    """
    attributes: dict[str, Any] = {}
    for header, value in headers.items():
        name = header.lower()
        if name.startswith(_HEADER_PREFIX):
            name = name.removeprefix(_HEADER_PREFIX)
            if name in attributes:
                raise _twice(name)
            attributes[name] = _decoded(value)
    if missing := _missing(headers):
        raise InvalidBodyError(f"a CloudEvent in the binary mode has these headers, too: {', '.join(missing)}")
    if "datacontenttype" in attributes:
        raise InvalidBodyError("datacontenttype is the Content-Type header")
    if kind := headers.get("Content-Type", "").strip():
        attributes["datacontenttype"] = _decoded(kind)
    return _assemble(attributes, _from_bytes(body, attributes) if body else {})


def _missing(headers: CIMultiDictProxy[str]) -> list[str]:
    """Return those of the headers of every CloudEvent in the binary mode that are not in *headers*."""
    return [_HEADER_PREFIX + name for name in _REQUIRED if _HEADER_PREFIX + name not in headers]


def _twice(name: str) -> InvalidBodyError:
    shown = name if name in _OWN_NAMES else "an extension attribute"
    return InvalidBodyError(f"{shown} occurs more than once: keep one, because readers would not agree on which")


def _assemble(attributes: dict[str, Any], data: Mapping[str, bytes]) -> ParsedEvent:
    """Return the event as it is stored; it does not depend on the order of *attributes*."""
    attributes = {name: value for name, value in attributes.items() if value is not None}
    _check_attributes(attributes)
    if data:
        attributes.setdefault("datacontenttype", _JSON)
    parts = {
        "event_type": orjson.dumps(attributes["type"]),
        **data,
        "cloudevent": orjson.dumps(attributes, option=orjson.OPT_SORT_KEYS),
    }
    body = b"{" + b",".join(b'"%b":%b' % (name.encode(), value) for name, value in parts.items()) + b"}"
    event_id = event_id_of_cloudevent(attributes["source"], attributes["id"])
    return ParsedEvent(
        without_line_breaks(body), attributes.get("subject"), event_id, "subject (in the binary mode ce-subject)"
    )


def _check_attributes(attributes: Mapping[str, Any]) -> None:
    for name in _REQUIRED:
        if not isinstance(attributes.get(name), str) or not attributes[name]:
            raise InvalidBodyError(f"a CloudEvent has the attribute {name}, a string that is not empty")
    if attributes["specversion"] != _VERSION:
        raise InvalidBodyError("specversion must be 1.0")
    for name, value in attributes.items():
        if _ATTRIBUTE.fullmatch(name) is None:
            raise InvalidBodyError("names of CloudEvents attributes are lower-case letters and digits")
        if not isinstance(value, str | int):  # a bool is an int
            raise InvalidBodyError("a CloudEvents attribute is a string, a number or a boolean")
    if not isinstance(attributes.get("datacontenttype", ""), str):
        raise InvalidBodyError("datacontenttype must be a string")
    subject = attributes.get("subject")
    if subject is not None:
        if not isinstance(subject, str):
            raise InvalidBodyError("subject must be a string")
        try:
            check_consultation_id(subject)
        except InvalidIdError:
            raise InvalidBodyError("subject names the consultation: 1 to 128 of A-Z a-z 0-9 _ -") from None


def is_cloudevent(attributes: object) -> bool:
    """Return whether a stored event's member ``cloudevent`` holds the attributes of a CloudEvent."""
    if not isinstance(attributes, dict):
        return False
    try:
        _check_attributes(attributes)
    except InvalidBodyError:
        return False
    return True


def _from_base64(value: Any, attributes: Mapping[str, Any]) -> dict[str, bytes]:
    try:
        data = base64.b64decode(value, validate=True) if isinstance(value, str) else None
    except ValueError:
        data = None
    if data is None:
        raise InvalidBodyError("data_base64 must be a string in Base64")
    try:
        return _from_bytes(data, attributes)
    except NotJsonError as error:  # the data, not the body
        raise InvalidBodyError(str(error)) from None


def _from_bytes(data: bytes, attributes: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the member that holds *data*: JSON byte for byte, text as a string, anything else in Base64."""
    kind = str(attributes.get("datacontenttype", _JSON)).partition(";")[0].strip().lower()
    if _JSON_TYPE.fullmatch(kind):
        check_json(data, "the data is not JSON, as its content type says")
        return {"payload": data}
    if kind.startswith("text/"):
        try:
            return {"payload": orjson.dumps(data.decode("utf-8"))}
        except UnicodeDecodeError:
            raise InvalidBodyError("text must be in UTF-8") from None
    return {_DATA_BASE64: orjson.dumps(base64.b64encode(data).decode("ascii"))}


def _decoded(value: str) -> str:
    """Return the attribute in a header's *value*: quoted or not, with percent-encoded UTF-8."""
    if len(value) >= 2 and value[0] == value[-1] == '"':
        value = re.sub(r"\\(.)", r"\1", value[1:-1])
    try:
        value = unquote(value, errors="strict")
        value.encode("utf-8")
    except UnicodeError:
        raise InvalidBodyError("an attribute's header is not percent-encoded UTF-8") from None
    return value

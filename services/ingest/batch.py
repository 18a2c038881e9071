"""A batch's lines, checked: every one of them is an event with an id of its own, or none is stored."""

from __future__ import annotations

import asyncio
import base64
import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import unquote
from uuid import UUID

import orjson
from multidict import CIMultiDictProxy

from fiq.errors import InvalidIdError, PoisonError
from fiq.event import (
    Event,
    InvalidBodyError,
    NotJsonError,
    check_consultation_id,
    check_depth,
    event_id_from_key,
    event_id_of_cloudevent,
    event_id_of_line,
    new_event_id,
    read_body,
    without_line_breaks,
)
from fiq.trace import Trace
from services.ingest import problems
from services.ingest.problems import RequestRefusedError

#: the header of the binary mode that no event lacks
VERSION_HEADER = "ce-specversion"
_PREFIX = "ce-"
_VERSION = "1.0"
#: attributes that every event has
_REQUIRED = ("id", "source", "specversion", "type")
#: members of the JSON format that are no attributes
_DATA, _DATA_BASE64 = "data", "data_base64"
_ATTRIBUTE = re.compile(r"[a-z0-9]{1,64}", re.ASCII)
_JSON_TYPE = re.compile(r"[^/]+/(?:[^+]+\+)?json", re.IGNORECASE)
_DEFAULT_TYPE = "application/json"
_STRING = rb'"(?:[^"\\]++|\\.)*+"'
#: what comes next outside strings: at the top a comma counts, inside only brackets do
_AT_TOP = re.compile(rb'[^"\[\]{},]*+(?:' + _STRING + rb'[^"\[\]{},]*+)*+([\[\]{},])', re.DOTALL)
_INSIDE = re.compile(rb'[^"\[\]{}]*+(?:' + _STRING + rb'[^"\[\]{}]*+)*+([\[\]{}])', re.DOTALL)
_NAME = re.compile(rb"[ \t\r\n]*+(" + _STRING + rb")[ \t\r\n]*+:", re.DOTALL)
_SPACE = b" \t\r\n"
#: most events of a batch
MAX_EVENTS = 1000
#: a longer body is read in a thread: meanwhile other requests go on, bytes
_LONG_BYTES = 128 * 2**10


class Draft(NamedTuple):
    """One event.

    Attributes:
        body: as it is stored.
        consultation: the consultation that it names, or None.
        event_id: the id that it brings with it, or None.
    """

    body: bytes
    consultation: str | None
    event_id: UUID | None


def read_line(raw: bytes) -> Draft:
    """Read an event of a batch: its top-level members ``consultation_id`` and ``event_id`` say where it belongs.

    Raises PoisonError: it is no event, or one of the two is not what it should be. The message quotes nothing of it.
    """
    body, document = read_body(raw)
    consultation = _text(document, "consultation_id")
    if consultation is not None:
        check_consultation_id(consultation)
    key = _text(document, "event_id")
    try:
        return Draft(body, consultation, None if key is None else event_id_from_key(key))
    except InvalidIdError:
        raise InvalidBodyError("event_id is 1 to 255 visible ASCII characters") from None


def _text(document: dict[str, Any], name: str) -> str | None:
    value = document.get(name)
    if value is not None and not isinstance(value, str):
        raise InvalidBodyError(f"{name} is a string")
    return value


@dataclass(frozen=True, slots=True)
class Place:
    """What the request says of all lines.

    Attributes:
        consultation: of the path; None when each line names its own.
        key: of the header, without quotes; None when there is none.
        received_ns: when it came, nanoseconds since the Unix epoch.
        max_event_bytes: largest event.
        max_depth: most levels of objects and arrays.
        trace: that the request belongs to.
    """

    consultation: str | None
    key: str | None
    received_ns: int
    max_event_bytes: int
    max_depth: int
    trace: Trace | None = None


class Line(NamedTuple):
    """One event of a batch.

    Attributes:
        number: in the batch, from 1.
        event: that it holds.
        keyed: a client's key gave it its id, its own one or that of the batch; otherwise the id was made here.
    """

    number: int
    event: Event
    keyed: bool

    @property
    def name(self) -> tuple[str, bytes]:
        """Consultation and id: the same for lines that are one event."""
        return self.event.consultation, self.event.event_id.bytes


#: reads one event
ReadDraft = Callable[[bytes], Draft]
#: finds the events in a body, with their numbers
Split = Callable[[bytes], Iterator[tuple[int, bytes]]]


async def read_batch(raw: bytes, split: Split, read: ReadDraft, place: Place) -> list[Line]:
    """Return the lines of the batch *raw*, in their order.

    Raises RequestRefusedError: it is empty, too long, or some line is no event; the members name each such line.
    """
    if len(raw) > _LONG_BYTES:
        return await asyncio.to_thread(_read_batch, raw, split, read, place)
    return _read_batch(raw, split, read, place)


def split_lines(raw: bytes) -> Iterator[tuple[int, bytes]]:
    """Find the events in NDJSON. A line ends with LF or CR LF; empty ones count, but are no events."""
    for number, line in enumerate(io.BytesIO(raw), start=1):
        if text := line.rstrip(b"\r\n"):
            yield number, text


def split_array(raw: bytes) -> Iterator[tuple[int, bytes]]:
    """Find the events in a JSON array, byte for byte."""
    try:
        document = orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise RequestRefusedError(problems.INVALID_JSON) from None
    if not isinstance(document, list):
        raise RequestRefusedError(problems.INVALID_BATCH, "The body is not a JSON array.")
    return enumerate(elements(raw), start=1)


def _read_batch(raw: bytes, split: Split, read: ReadDraft, place: Place) -> list[Line]:
    lines: list[Line] = []
    wrong: list[dict[str, object]] = []
    seen: dict[tuple[str, bytes], Line] = {}
    for number, text in split(raw):
        if len(lines) + len(wrong) >= MAX_EVENTS:
            raise RequestRefusedError(problems.TOO_MANY_EVENTS)
        try:
            line = _line(number, text, read, place)
            first = seen.setdefault(line.name, line)
            if first is not line and first.event.body != line.event.body:
                raise PoisonError(f"the id is that of line {first.number}, the body is not")
            lines.append(line)
        except PoisonError as error:
            wrong.append({"line": number, "reason": str(error)})
    if wrong:
        raise RequestRefusedError(problems.INVALID_BATCH, members={"lines": wrong})
    if not lines:
        raise RequestRefusedError(problems.INVALID_BATCH, "The batch holds no event.")
    return lines


def _line(number: int, text: bytes, read: ReadDraft, place: Place) -> Line:
    if len(text) > place.max_event_bytes:
        raise PoisonError(f"the event is larger than {place.max_event_bytes} bytes")
    draft = read(text)
    if len(draft.body) > place.max_event_bytes:
        raise PoisonError(f"the event as it is stored is larger than {place.max_event_bytes} bytes")
    check_depth(draft.body, place.max_depth)
    event_id, keyed = _event_id(number, draft, place.key)
    consultation = consultation_of(draft, place.consultation)
    return Line(number, Event(consultation, event_id, place.received_ns, draft.body, place.trace), keyed)


def consultation_of(draft: Draft, of_path: str | None) -> str:
    """Return the consultation of an event; event and path need not both name it, but must not disagree.

    Raises PoisonError: neither names one, or they name two.
    """
    if of_path is None and draft.consultation is None:
        raise PoisonError("the event names no consultation")
    if of_path is not None and draft.consultation not in (None, of_path):
        raise PoisonError("the event names another consultation than the path")
    return of_path or draft.consultation or ""


def _event_id(number: int, draft: Draft, key: str | None) -> tuple[UUID, bool]:
    if draft.event_id is not None:
        return draft.event_id, True
    if key is not None:
        return event_id_of_line(key, number), True
    return new_event_id(), False


# -- Where the parts of a JSON array or object begin and end, so that they can be kept byte for byte -----------------
#
# The text must have been parsed before: only then does looking for brackets, commas and strings suffice.


def elements(raw: bytes) -> Iterator[bytes]:
    """Yield the elements of the JSON array *raw*, each as it stands there, without the white space around it."""
    return _parts(raw)


def members(raw: bytes) -> dict[str, bytes]:
    """Return the members of the JSON object *raw*, each value as it stands there; of members of one name the last."""
    found: dict[str, bytes] = {}
    for part in _parts(raw):
        name = _NAME.match(part)
        assert name is not None
        found[orjson.loads(name[1])] = part[name.end() :].strip(_SPACE)
    return found


def _parts(raw: bytes) -> Iterator[bytes]:
    """Yield what stands between the commas of the outermost array or object."""
    begin = position = raw.index(raw.strip(_SPACE)[:1]) + 1
    depth = 1
    while depth:
        found = (_AT_TOP if depth == 1 else _INSIDE).match(raw, position)
        assert found is not None
        position = found.end()
        if found[1] in b"[{":
            depth += 1
        elif found[1] == b",":
            yield raw[begin : position - 1].strip(_SPACE)
            begin = position
        else:
            depth -= 1
    if last := raw[begin : position - 1].strip(_SPACE):
        yield last


# -- CloudEvents 1.0 over HTTP: what of them is stored, and under which id (docs/http.md) ----------------------------
#
# An event's type becomes ``event_type``, its data ``payload``, byte for byte; its attributes are kept beside them in
# ``cloudevent``. The specification makes ``source`` and ``id`` together unique, so both make the event id.


def read_structured(raw: bytes) -> Draft:
    """Read an event in the JSON format, with its data in it.

    Raises PoisonError: it is no CloudEvent. The message quotes nothing of it.
    """
    try:
        document = orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise NotJsonError("a CloudEvent is a JSON object in UTF-8") from None
    if not isinstance(document, dict):
        raise InvalidBodyError("a CloudEvent is a JSON object")
    attributes = {name: value for name, value in document.items() if name not in (_DATA, _DATA_BASE64)}
    if _DATA in document and document.get(_DATA_BASE64) is not None:
        raise InvalidBodyError("a CloudEvent has data or data_base64, not both")
    if document.get(_DATA_BASE64) is not None:
        return _draft(attributes, _of_base64(document[_DATA_BASE64], attributes))
    return _draft(attributes, {"payload": members(raw)[_DATA]} if _DATA in document else {})


def read_binary(headers: CIMultiDictProxy[str], body: bytes) -> Draft:
    """Read an event whose attributes are in *headers*, and whose data is *body*.

    Raises PoisonError: it is no CloudEvent. The message quotes nothing of it.
    """
    attributes: dict[str, Any] = {}
    for header, value in headers.items():
        name = header.lower()
        if name.startswith(_PREFIX):
            if name[len(_PREFIX) :] in attributes:
                raise InvalidBodyError("a CloudEvents attribute is there twice")
            attributes[name[len(_PREFIX) :]] = _decoded(value)
    if "datacontenttype" in attributes:
        raise InvalidBodyError("datacontenttype is the Content-Type header")
    if kind := headers.get("Content-Type", "").strip():
        attributes["datacontenttype"] = _decoded(kind)
    return _draft(attributes, _of_bytes(body, attributes) if body else {})


def _draft(attributes: dict[str, Any], data: Mapping[str, bytes]) -> Draft:
    """Put the event together as it is stored; the order does not depend on that in which it came."""
    attributes = {name: value for name, value in attributes.items() if value is not None}
    _check(attributes)
    subject = attributes.get("subject")
    if data:
        attributes.setdefault("datacontenttype", _DEFAULT_TYPE)
    parts = {
        "event_type": orjson.dumps(attributes["type"]),
        **data,
        "cloudevent": orjson.dumps(attributes, option=orjson.OPT_SORT_KEYS),
    }
    body = b"{" + b",".join(b'"%b":%b' % (name.encode(), value) for name, value in parts.items()) + b"}"
    event_id = event_id_of_cloudevent(attributes["source"], attributes["id"])
    return Draft(without_line_breaks(body), subject, event_id)


def _check(attributes: Mapping[str, Any]) -> None:
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
        raise InvalidBodyError("datacontenttype is a string")
    subject = attributes.get("subject")
    if subject is not None:
        if not isinstance(subject, str):
            raise InvalidBodyError("subject is a string")
        try:
            check_consultation_id(subject)
        except InvalidIdError:
            raise InvalidBodyError("subject names the consultation: 1 to 128 of A-Z a-z 0-9 _ -") from None


def _of_base64(value: Any, attributes: Mapping[str, Any]) -> dict[str, bytes]:
    try:
        data = base64.b64decode(value, validate=True) if isinstance(value, str) else None
    except ValueError:
        data = None
    if data is None:
        raise InvalidBodyError("data_base64 is a string in Base64")
    return _of_bytes(data, attributes)


def _of_bytes(data: bytes, attributes: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the member that keeps *data*: JSON as it is, text as a string, anything else in Base64."""
    kind = str(attributes.get("datacontenttype", _DEFAULT_TYPE)).partition(";")[0].strip().lower()
    if _JSON_TYPE.fullmatch(kind):
        try:
            orjson.loads(data)
        except orjson.JSONDecodeError:
            raise NotJsonError("the data is not the JSON that its content type says it is") from None
        return {"payload": data}
    if kind.startswith("text/"):
        try:
            return {"payload": orjson.dumps(data.decode("utf-8"))}
        except UnicodeDecodeError:
            raise InvalidBodyError("text must be in UTF-8") from None
    return {_DATA_BASE64: orjson.dumps(base64.b64encode(data).decode("ascii"))}


def _decoded(value: str) -> str:
    """Return the attribute that a header's *value* stands for: quoted or not, with percent-encoded UTF-8."""
    if len(value) >= 2 and value[0] == value[-1] == '"':
        value = re.sub(r"\\(.)", r"\1", value[1:-1])
    try:
        value = unquote(value, errors="strict")
        value.encode("utf-8")
    except UnicodeError:
        raise InvalidBodyError("an attribute's header is not percent-encoded UTF-8") from None
    return value

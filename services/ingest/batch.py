"""A batch's lines, checked: every one of them is an event with an id of its own, or none is stored."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from uuid import UUID

import orjson

from services.contract.errors import InvalidIdError, PoisonError
from services.contract.event import Event, InvalidBodyError, check_depth, read_body
from services.contract.ids import check_consultation_id, event_id_from_key, event_id_of_line, new_event_id
from services.contract.trace import Trace
from services.ingest import problems
from services.ingest.problems import RequestRefusedError

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

    Raises:
        PoisonError: it is no event, or one of the two is not what it should be. The message quotes nothing of it.
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

    Raises:
        RequestRefusedError: it is empty, too long, or some line is no event; the members name each such line.
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

    Raises:
        PoisonError: neither names one, or they name two.
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

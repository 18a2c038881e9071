"""A batch's lines, checked: every one of them is an event with an id of its own, or none is stored."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple
from uuid import UUID

import orjson

from services.contract.errors import PoisonError
from services.contract.event import Event, check_depth
from services.contract.ids import event_id_of_line, new_event_id
from services.contract.trace import Trace
from services.ingest import problems
from services.ingest.drafts import Draft
from services.ingest.problems import RequestRefusedError
from services.ingest.spans import elements

#: most events of a batch
MAX_EVENTS = 1000
#: a longer body is read in a thread: meanwhile other requests go on, bytes
_LONG_BYTES = 128 * 2**10


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

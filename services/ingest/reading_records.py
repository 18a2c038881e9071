"""What readers send and get: parameters of the query, the media type, records and pages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime

import orjson
from aiohttp import web

from services.ingest import problems
from services.ingest.problems import RequestRefusedError
from services.log.protocol import StoredEvent

JSON, NDJSON, EVENT_STREAM = "application/json", "application/x-ndjson", "text/event-stream"
#: most records of a page, and how many when nobody says
MAX_LIMIT, DEFAULT_LIMIT = 1000, 100

_NUMBER = re.compile(r"[0-9]{1,19}", re.ASCII)
_PREFIX = re.compile(r"[A-Za-z0-9_-]{0,128}", re.ASCII)
#: largest position that the log and the corpus can have
_MAX_POSITION = 2**63 - 1


def position(text: str, name: str) -> int:
    """Return the position in the log that *text*, the value of *name*, says. Raises RequestRefusedError: it is none."""
    if _NUMBER.fullmatch(text) is None or int(text) > _MAX_POSITION:
        raise RequestRefusedError(problems.INVALID_PARAMETER, f"{name} must be a whole number from 0 on.")
    return int(text)


def limit(request: web.Request) -> int:
    """Return how many records a page may have. Raises RequestRefusedError: the parameter is malformed."""
    text = request.query.get("limit", str(DEFAULT_LIMIT))
    if _NUMBER.fullmatch(text) is None or not 1 <= int(text) <= MAX_LIMIT:
        raise RequestRefusedError(problems.INVALID_PARAMETER, f"limit must be 1 to {MAX_LIMIT}.")
    return int(text)


def follow(request: web.Request) -> bool:
    """Return whether the events that come later are wanted, too.

    Raises RequestRefusedError: the parameter is malformed.
    """
    text = request.query.get("follow", "0")
    if text not in {"0", "1"}:
        raise RequestRefusedError(problems.INVALID_PARAMETER, "follow must be 0 or 1.")
    return text == "1"


def name_part(request: web.Request, name: str) -> str:
    """Return the parameter *name*, a consultation's id or the beginning of one; empty when it is absent.

    Raises RequestRefusedError: it cannot be.
    """
    text = request.query.get(name, "")
    if _PREFIX.fullmatch(text) is None:
        raise RequestRefusedError(
            problems.INVALID_PARAMETER, f"{name} must be at most 128 characters of A-Z a-z 0-9 _ -."
        )
    return text


def negotiate(request: web.Request, *offered: str) -> str:
    """Return that of the *offered* media types which ``Accept`` prefers; the first of equals.

    Raises RequestRefusedError: it takes none of them.
    """
    header = ",".join(request.headers.getall("Accept", ()))
    if not header.strip():
        return offered[0]
    weights = [_weight(header, media_type) for media_type in offered]
    best = max(weights)
    if best <= 0:
        raise RequestRefusedError(problems.NOT_ACCEPTABLE)
    return offered[weights.index(best)]


def _weight(header: str, media_type: str) -> float:
    """Return how much *header* wants *media_type*: the weight of the most specific range that matches."""
    ranges = {"*/*": 0, f"{media_type.partition('/')[0]}/*": 1, media_type: 2}
    found = (-1, 0.0)
    for part in header.split(","):
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        if name in ranges:
            found = max(found, (ranges[name], _quality(parameters)))
    return found[1]


def _quality(parameters: Sequence[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            match = re.fullmatch(r"[01](?:\.[0-9]{0,3})?", value.strip(), re.ASCII)
            return min(1.0, float(match[0])) if match else 0.0
    return 1.0


def record(stored: StoredEvent, *, consultation: bool = False) -> bytes:
    """Return one event as a JSON object without line breaks, its body byte for byte."""
    event = stored.event
    seconds, nanoseconds = divmod(event.received_ns, 10**9)
    received = f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{nanoseconds:09d}Z"
    status = "persisted" if stored.persisted else "queued"
    owner = f'"consultation_id":"{event.consultation}",' if consultation else ""
    head = (
        f'{{{owner}"sequence":{stored.sequence},"message_id":"{event.event_id}",'
        f'"received":"{received}","status":"{status}","event":'
    )
    return b"".join([head.encode(), event.body, b"}"])


def page(media_type: str, name: str, records: Sequence[bytes], following: str | None, **members: str) -> bytes:
    """Return a page of *records*.

    Args:
        media_type: ``application/json`` or ``application/x-ndjson``.
        name: of the member that holds them, in JSON.
        records: JSON texts.
        following: where the next page is, if there may be one.
        members: further members, in JSON.
    """
    if media_type == NDJSON:
        return b"".join(line + b"\n" for line in records)
    head = b"".join(orjson.dumps(key) + b":" + orjson.dumps(value) + b"," for key, value in members.items())
    return b'{%b"%b":[%b],"next":%b}' % (head, name.encode(), b",".join(records), orjson.dumps(following))

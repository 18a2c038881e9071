"""What may be posted where: each resource's path, and the forms in which it takes events."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from aiohttp import StreamReader, web
from multidict import CIMultiDictProxy

from services.ingest import problems
from services.ingest.admission import Share
from services.ingest.batch import VERSION_HEADER
from services.ingest.problems import RequestRefusedError

#: what a body may be declared to be in; US-ASCII is a part of UTF-8
_CHARSETS = frozenset({"utf-8", "utf8", "us-ascii"})
_JSON = "application/json"


def check_content(request: web.Request, *, limit: int) -> None:
    """Check what the headers say of the body, apart from its type.

    Raises RequestRefusedError: it is encoded, or declared larger than *limit* bytes.
    """
    headers = request.headers
    if headers.get("Content-Encoding", "identity").strip().lower() != "identity":
        raise RequestRefusedError(problems.UNSUPPORTED_CONTENT_ENCODING)
    length = request.content_length
    if length is not None and length > limit:
        raise too_large(limit)


async def read_body(request: web.Request, share: Share, *, limit: int, timeout: float) -> bytes:
    """Read the whole body.

    Args:
        request: whose body it is.
        share: takes the bytes as they come.
        limit: most bytes.
        timeout: most seconds.

    Raises RequestRefusedError: it was too large, too slow, or badly framed; TooManyInFlightError: the process has no
    memory for it; ConnectionError: the client has gone.
    """
    content = request.content
    try:
        if content.is_eof():  # came with the headers, as most do: spare the timer
            return await _read(content, share, limit)
        async with asyncio.timeout(timeout) as bound:
            share.read_within(bound)
            return await _read(content, share, limit)
    except TimeoutError:
        if share.given_up:
            return share.complete()  # which says why not
        raise RequestRefusedError(problems.BODY_TIMEOUT) from None
    except web.RequestPayloadError:
        raise RequestRefusedError(problems.MALFORMED_REQUEST) from None


async def _read(content: StreamReader, share: Share, limit: int) -> bytes:
    while chunk := await content.readany():
        if share.size + len(chunk) > limit:
            raise too_large(limit)
        share.take(chunk)
    return share.complete()


def too_large(limit: int) -> RequestRefusedError:
    """Return the refusal of a body larger than *limit* bytes."""
    return RequestRefusedError(problems.BODY_TOO_LARGE, f"The body is larger than {limit} bytes.")


def media_type(headers: CIMultiDictProxy[str]) -> str:
    """Return the media type of the body, in lower case and without parameters; empty when there is none.

    Raises RequestRefusedError: it is declared to be in another charset than UTF-8.
    """
    value = headers.get("Content-Type", "")
    if value == "application/json":  # as most write it
        return value
    kind, *parameters = value.split(";")
    for parameter in parameters:
        name, _, charset = parameter.partition("=")
        if name.strip().lower() == "charset" and charset.strip().strip('"').lower() not in {
            "utf-8",
            "utf8",
            "us-ascii",
        }:
            raise RequestRefusedError(problems.UNSUPPORTED_MEDIA_TYPE)
    return kind.strip().lower()


class Form(Enum):
    """How a body holds events."""

    EVENT = "event"
    LINES = "lines"
    ARRAY = "array"
    CLOUDEVENT = "cloudevent"
    CLOUDEVENT_BINARY = "cloudevent-binary"
    CLOUDEVENT_BATCH = "cloudevent-batch"

    @property
    def is_batch(self) -> bool:
        """Whether it may hold several."""
        return self in (Form.LINES, Form.ARRAY, Form.CLOUDEVENT_BATCH)


@dataclass(frozen=True, slots=True)
class Resource:
    """A path to which events are posted.

    Attributes:
        path: as the router knows it.
        forms: what it takes, by media type.
        binary: whether it also takes CloudEvents whose attributes are headers, whatever the media type.
    """

    path: str
    forms: Mapping[str, Form]
    binary: bool = False

    def form(self, request: web.Request) -> Form:
        """Return the form of *request*'s body. Raises RequestRefusedError: the resource does not take it."""
        kind = media_type(request.headers)
        form = self.forms.get(kind)
        if self.binary and VERSION_HEADER in request.headers and form in (None, Form.EVENT):
            return Form.CLOUDEVENT_BINARY
        if form is None:
            raise RequestRefusedError(problems.UNSUPPORTED_MEDIA_TYPE)
        return form


_CLOUDEVENTS = {
    "application/cloudevents+json": Form.CLOUDEVENT,
    "application/cloudevents-batch+json": Form.CLOUDEVENT_BATCH,
}
_BATCHES = {
    "application/x-ndjson": Form.LINES,
    _JSON: Form.ARRAY,
    "application/cloudevents-batch+json": Form.CLOUDEVENT_BATCH,
}

#: the events of one consultation
EVENTS = Resource("/consultations/{consultation}/events", {_JSON: Form.EVENT, **_CLOUDEVENTS}, binary=True)
#: many events of one consultation
BATCH = Resource("/consultations/{consultation}/events/batch", _BATCHES)
#: many events, each of which names its consultation
ANY_BATCH = Resource("/events/batch", _BATCHES)
#: CloudEvents whose subjects name their consultations
ANY_CLOUDEVENTS = Resource("/events", _CLOUDEVENTS, binary=True)

RESOURCES = (EVENTS, BATCH, ANY_BATCH, ANY_CLOUDEVENTS)

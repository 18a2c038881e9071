"""Check a request's headers, and read its body within limits of size and time."""

from __future__ import annotations

import asyncio

from aiohttp import StreamReader, web
from multidict import CIMultiDictProxy

from services.ingest import problems
from services.ingest.admission import Share
from services.ingest.problems import RequestRefusedError

#: what a body may be declared to be in; US-ASCII is a part of UTF-8
_CHARSETS = frozenset({"utf-8", "utf8", "us-ascii"})


def check_content(request: web.Request, *, limit: int) -> None:
    """Check what the headers say of the body, apart from its type.

    Raises:
        RequestRefusedError: it is encoded, or declared larger than *limit* bytes.
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

    Raises:
        RequestRefusedError: it was too large, too slow, or badly framed.
        TooManyInFlightError: the process has no memory for it.
        ConnectionError: the client has gone.
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

    Raises:
        RequestRefusedError: it is declared to be in another charset than UTF-8.
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

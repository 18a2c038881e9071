"""Check a request's headers, and read its body within limits of size and time."""

from __future__ import annotations

import asyncio

from aiohttp import web
from multidict import CIMultiDictProxy

from services.ingest import problems
from services.ingest.problems import RequestRefusedError


def check_content(request: web.Request, *, limit: int) -> None:
    """Check what the headers say of the body.

    Raises:
        RequestRefusedError: it is no JSON in UTF-8, encoded, or declared larger than *limit* bytes.
    """
    headers = request.headers
    if headers.get("Content-Type") != "application/json":
        _check_media_type(headers)
    if headers.get("Content-Encoding", "identity").strip().lower() != "identity":
        raise RequestRefusedError(problems.UNSUPPORTED_CONTENT_ENCODING)
    length = request.content_length
    if length is not None and length > limit:
        raise too_large(limit)


async def read_body(request: web.Request, *, limit: int, timeout: float) -> bytes:
    """Read the whole body.

    Args:
        request: whose body it is; its ``client_max_size`` is *limit*.
        limit: most bytes.
        timeout: most seconds.

    Raises:
        RequestRefusedError: it was too large, too slow, or badly framed.
        ConnectionError: the client has gone.
    """
    try:
        if request.content.is_eof():  # came with the headers, as most do: spare the timer
            return await request.read()
        async with asyncio.timeout(timeout):
            return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise too_large(limit) from None
    except TimeoutError:
        raise RequestRefusedError(problems.BODY_TIMEOUT) from None
    except web.RequestPayloadError:
        raise RequestRefusedError(problems.MALFORMED_REQUEST) from None


def too_large(limit: int) -> RequestRefusedError:
    """Return the refusal of a body larger than *limit* bytes."""
    return RequestRefusedError(problems.BODY_TOO_LARGE, f"The body is larger than {limit} bytes.")


def _check_media_type(headers: CIMultiDictProxy[str]) -> None:
    media_type, *parameters = headers.get("Content-Type", "").split(";")
    if media_type.strip().lower() != "application/json":
        raise RequestRefusedError(problems.UNSUPPORTED_MEDIA_TYPE)
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset" and value.strip().strip('"').lower() not in {"utf-8", "utf8"}:
            raise RequestRefusedError(problems.UNSUPPORTED_MEDIA_TYPE)

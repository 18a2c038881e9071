"""A consultation's events as they come, over any number of connections."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import orjson
from aiohttp import ClientTimeout

from services.client.errors import UnexpectedAnswerError
from services.client.exchange import Exchange, LostError, Request
from services.client.patience import Tries, retry_after
from services.client.records import Problem, StoredEvent
from services.client.server_sent import MessageReader

_MEDIA_TYPE = "text/event-stream"


async def follow(
    exchange: Exchange, consultation: str, path: str, after: int, *, silence: float
) -> AsyncGenerator[StoredEvent, None]:
    """Yield each event behind the position *after* once, in order, for ever.

    A connection that breaks, ends or falls silent is followed by another one that goes on behind the last event.

    Args:
        exchange: the connections.
        consultation: whose events.
        path: of them.
        after: a sequence; 0 for all.
        silence: seconds after which a connection without a word, be it a comment, is given up.

    Raises:
        RefusedError, UnexpectedAnswerError: going on is of no use.
        GaveUpError: the deadline has passed without a word.
    """
    tries = Tries(exchange.patience)
    while True:
        problem: Problem | None = None
        least, why = 0.0, "the stream ended"
        # sock_connect and sock_read: a stream has no end by which it could be late
        timeout = ClientTimeout(total=None, sock_connect=tries.timeout, sock_read=silence)
        request = _request(path, after)
        try:
            async with exchange.sent(request, timeout) as response:
                if response.status != request.expected:
                    body = await response.read()
                    problem = exchange.judged(request, response, body, may_be_stored=False)
                    least = retry_after(response.headers)
                elif response.content_type != _MEDIA_TYPE:
                    raise UnexpectedAnswerError("the answer is no stream of Server-Sent Events")
                else:
                    reader = MessageReader()
                    async for piece in response.content.iter_any():
                        tries.renew()
                        for data in reader.feed(piece):
                            event = _event(consultation, data)
                            if event.sequence > after:
                                after = event.sequence
                                yield event
        except LostError as lost:
            why = str(lost)  # go on with another connection
        await exchange.wait(tries, problem, least, why)


def _request(path: str, after: int) -> Request:
    headers = {"Accept": _MEDIA_TYPE, "Cache-Control": "no-store"}
    if after:
        headers["Last-Event-ID"] = str(after)
    return Request("GET", path, 200, headers, {"follow": "1", "after": str(after)})


def _event(consultation: str, data: str) -> StoredEvent:
    try:
        return StoredEvent.of(consultation, orjson.loads(data))
    except (ValueError, TypeError, KeyError):
        raise UnexpectedAnswerError("a message of the stream is no event") from None

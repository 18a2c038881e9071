"""One event as the stream of events holds it, by its position."""

from __future__ import annotations

from nats.aio.client import Client

from services.contract.errors import PoisonError
from services.contract.event import decode
from services.eventlog.jetstream.api import JetStreamApi
from services.eventlog.jetstream.names import STREAM
from services.eventlog.protocol import StoredEvent

#: how long a node may take to answer, seconds
TIMEOUT_SECONDS = 1.0


async def stored_at(nc: Client, sequence: int, *, timeout: float = TIMEOUT_SECONDS) -> StoredEvent | None:
    """Return the event at *sequence* of the stream, or None when the node that answers holds none there.

    A direct get: any replica answers, so one that lags may not have the newest events yet. A message that is no event,
    which others may have published, counts as none.

    Raises:
        LogUnavailableError: no answer within *timeout* seconds.
        LogForbiddenError: the user of the connection may not ask.
    """
    message = await JetStreamApi(nc, timeout=timeout).get_message(STREAM, sequence)
    if message is None:
        return None
    try:
        event = decode(message["subject"].rpartition(".")[2], message["headers"], message["data"])
    except PoisonError:
        return None
    return StoredEvent(message["seq"], event, persisted=False)

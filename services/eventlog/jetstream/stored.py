"""One event as the stream of events holds it, by its position; and a reader that knows the stream alone."""

from __future__ import annotations

from uuid import UUID

from nats.aio.client import Client

from services.contract.errors import PoisonError
from services.contract.event import decode
from services.eventlog.errors import CorpusAwayError
from services.eventlog.jetstream.api import JetStreamApi
from services.eventlog.jetstream.names import STREAM
from services.eventlog.protocol import EventReader, StoredEvent

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


class StreamReader(EventReader):
    """Reads single events of the stream; the corpus is away to it."""

    def __init__(self, nc: Client) -> None:
        self._nc = nc

    async def at(self, sequence: int) -> StoredEvent | None:
        """See :meth:`services.eventlog.protocol.EventReader.at`."""
        return await stored_at(self._nc, sequence)

    async def find(self, consultation: str, event_id: UUID) -> StoredEvent | None:
        """Raise CorpusAwayError."""
        raise CorpusAwayError(f"the corpus cannot be asked for event {event_id}")

    async def read(self, consultation: str, after: int, limit: int) -> list[StoredEvent]:
        """Raise CorpusAwayError."""
        raise CorpusAwayError("the corpus cannot be read")

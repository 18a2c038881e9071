"""Whether a log can be followed from a position: it is the right one, and holds everything behind it."""

from __future__ import annotations

import asyncio

from services.contract.errors import PermanentError
from services.eventlog.errors import LogMismatchError, PlacementError
from services.eventlog.jetstream.api import JetStreamApi
from services.eventlog.jetstream.names import STREAM
from services.eventlog.protocol import LogIdentity

#: how often a log that cannot be followed is looked at again before it is refused
CONFIRMATIONS = 4
#: pause between two looks, seconds
CONFIRM_PAUSE_SECONDS = 0.5


async def check_log(api: JetStreamApi, consumer: str, identity: LogIdentity, after: int) -> None:
    """Refuse a log that cannot be followed from *after*; only what stays so for a while counts.

    A leader that was elected just now may not have applied all that its predecessor had acknowledged.

    Raises:
        LogMismatchError: the stream is another one, ends before *after*, or events behind it are gone.
        PlacementError: *consumer* is gone.
        LogUnavailableError: no answer.
    """
    for _ in range(CONFIRMATIONS):
        try:
            return await _check(api, consumer, identity, after)
        except PermanentError:
            await asyncio.sleep(CONFIRM_PAUSE_SECONDS)
    return await _check(api, consumer, identity, after)


async def _check(api: JetStreamApi, consumer: str, identity: LogIdentity, after: int) -> None:
    stream = await api.stream_info(STREAM)
    if stream is None:
        raise LogMismatchError(f"stream {STREAM} does not exist: see docs/operations.md, `A lost stream`")
    if (found := LogIdentity(STREAM, stream["created"])) != identity:
        raise LogMismatchError(
            f"stream {STREAM} was created at {found.created}, but this partition's file belongs to the one "
            f"created at {identity.created}: begin a new corpus in another directory, and keep this one"
        )
    _check_range(stream["state"]["first_seq"], stream["state"]["last_seq"], after)
    if await api.consumer_info(STREAM, consumer) is None:
        raise PlacementError(
            f"consumer {consumer} is gone: if that was a mistake, restart the persister to claim it anew"
        )


def _check_range(first: int, last: int, after: int) -> None:
    if after > last:
        raise LogMismatchError(
            f"the corpus holds sequence {after} but stream {STREAM} ends at {last}: "
            "the stream lost events (restored from an older backup?)"
        )
    if 0 < after < first - 1:  # behind what was trimmed; a new file may begin anywhere
        raise LogMismatchError(
            f"the corpus ends at sequence {after} but stream {STREAM} begins at {first}: the "
            "partition file is an old copy, or somebody purged the stream; put the newest copy in its place"
        )

"""Whether a log can be followed from a position: it is the right one, and holds everything behind it."""

from __future__ import annotations

import asyncio
import time

from services.contract.errors import PermanentError
from services.eventlog.errors import LogMismatchError, PlacementError
from services.eventlog.jetstream.api import JetStreamApi
from services.eventlog.jetstream.names import STREAM
from services.eventlog.protocol import LogIdentity

#: pause between two looks at a log that cannot be followed, seconds
PAUSE_SECONDS = 0.5
#: a log is refused when it cannot be followed for this long, seconds
PATIENCE_SECONDS = 2.0
#: the same for one that ends before the file does: a leader may still be applying what it has, after a restart of all
#: nodes for as long as that takes, seconds
LAG_SECONDS = 30.0


async def check_log(api: JetStreamApi, consumer: str, identity: LogIdentity, after: int) -> None:
    """Refuse a log that cannot be followed from *after*; only what stays so for a while counts.

    A leader that was elected just now may not have applied all that its predecessor had acknowledged.

    Raises:
        LogMismatchError: the stream is another one, ends before *after*, or events behind it are gone.
        PlacementError: *consumer* is gone.
        LogUnavailableError: no answer.
    """
    started = time.monotonic()
    while True:
        try:
            return await _check(api, consumer, identity, after)
        except _EndsEarlyError as error:
            if time.monotonic() - started >= LAG_SECONDS:
                raise LogMismatchError(str(error)) from None
        except PermanentError:
            if time.monotonic() - started >= PATIENCE_SECONDS:
                raise
        await asyncio.sleep(PAUSE_SECONDS)


class _EndsEarlyError(Exception):
    """The log ends before the position: lost, or not applied yet."""


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
        raise _EndsEarlyError(
            f"the corpus holds sequence {after} but stream {STREAM} ends at {last}: "
            "the stream lost events (restored from an older backup?): begin a new corpus for it in another directory, "
            "and keep this one"
        )
    if 0 < after < first - 1:  # behind what was trimmed; a new file may begin anywhere
        raise LogMismatchError(
            f"the corpus ends at sequence {after} but stream {STREAM} begins at {first}: the "
            "partition file is an old copy, or somebody purged the stream; put the newest copy in its place"
        )

"""Whether the log is the one that a sink's position belongs to, and holds everything after it.

A stream that was deleted and created anew has another creation time. One that was set back has not: nodes whose disks
were restored from an older copy come up with the old stream, and what clients post next gets sequences under which the
sink has other events. So the sink keeps the message id beside the sequence, and the stream's leader is asked what it
has there. Only what stays so for a while counts: a leader that was elected just now may not have applied all that its
predecessor had acknowledged, and a deposed one may not know that it is.
"""

from __future__ import annotations

import asyncio
import time

from fiq.errors import PermanentError
from services.log.errors import LogMismatchError
from services.log.jetstream.api import JetStreamApi
from services.log.jetstream.names import STREAM
from services.log.protocol import LogIdentity, Position, message_id_at

#: pause between two looks at a log that cannot be followed, seconds
PAUSE_SECONDS = 0.5
#: a log is refused when it cannot be followed for this long, seconds
PATIENCE_SECONDS = 2.0
#: the same for one that ends before the file does: a leader may still be applying what it has, after a restart of all
#: nodes for as long as that takes, seconds
LAG_SECONDS = 30.0

_WAY_FORWARD = (
    "The partition stops, so nothing is skipped. To go on without losing an event of either: docs/operations.md, "
    "`A log that was set back`"
)


async def check_log(api: JetStreamApi, identity: LogIdentity, after: Position, *, trimmable: int | None) -> None:
    """Refuse a log that cannot be followed from *after*.

    Args:
        api: of a connection.
        identity: of the log that the position belongs to.
        after: what the sink has.
        trimmable: up to which sequence trim may have deleted the partition's events; None: perhaps every one that the
            stream does not hold any more.

    Raises:
        LogMismatchError: the stream is another one, was set back, or events after *after* are gone.
        LogUnavailableError: no answer.
    """
    started = time.monotonic()
    while True:
        try:
            return await _check(api, identity, after, trimmable)
        except _EndsEarlyError as error:
            if time.monotonic() - started >= LAG_SECONDS:
                raise LogMismatchError(str(error)) from None
        except _NotThereError:
            if time.monotonic() - started >= PAUSE_SECONDS:  # the second look: trimmed, or deleted by an operator
                return None
        except PermanentError:
            if time.monotonic() - started >= PATIENCE_SECONDS:
                raise
        await asyncio.sleep(PAUSE_SECONDS)


class _EndsEarlyError(Exception):
    """The log ends before the position: set back, or not applied yet."""


class _NotThereError(Exception):
    """The log holds no message at the position, although it holds earlier and later ones."""


async def _check(api: JetStreamApi, identity: LogIdentity, after: Position, trimmable: int | None) -> None:
    found = await api.leader_message(STREAM, after.sequence) if after.message_id else None
    # after the message: what was trimmed in between is then seen as trimmed
    stream = await api.stream_info(STREAM)
    if stream is None:
        raise LogMismatchError(f"stream {STREAM} does not exist: see docs/operations.md, `A lost stream`")
    if (present := LogIdentity(STREAM, stream["created"])) != identity:
        raise LogMismatchError(
            f"stream {STREAM} was created at {present.created}, but this partition's file belongs to the one "
            f"created at {identity.created}: begin a new corpus in another directory, and keep this one; "
            "see docs/operations.md, `A lost stream`"
        )
    first, last = stream["state"]["first_seq"], stream["state"]["last_seq"]
    if after.sequence > last:
        raise _EndsEarlyError(
            f"stream {STREAM} ends at sequence {last}, but this partition's file holds events up to {after.sequence}: "
            f"the stream was set back (were disks restored from an older copy?). Those after {last} are only in HDF5, "
            f"and perhaps some before. {_WAY_FORWARD}"
        )
    if _may_lack(after.sequence, trimmable, first, stream["state"].get("num_deleted", 0)):
        raise LogMismatchError(
            f"the corpus ends at sequence {after.sequence} but stream {STREAM} begins at {first}: the "
            "partition file is an old copy, or somebody purged the stream; put the newest copy in its place"
        )
    if not after.message_id:
        return
    if found is not None and message_id_at(found["headers"]) != after.message_id:
        raise LogMismatchError(
            f"sequence {after.sequence} of stream {STREAM} is not the event that this partition's file has there: "
            "the stream was set back (were disks restored from an older copy?) and has grown since. The last events "
            f"of the file, up to {after.sequence}, are only in HDF5, and what clients posted since is only in the "
            f"stream. {_WAY_FORWARD}"
        )
    if found is None and first <= after.sequence:
        raise _NotThereError


def _may_lack(sequence: int, trimmable: int | None, first: int, deleted: int) -> bool:
    """Return whether events of the partition after *sequence* may be gone.

    Trim deletes up to *trimmable*, from the stream's beginning or, around a partition that stands still, in its middle.
    A new file may begin anywhere.
    """
    if sequence == 0 or (trimmable is not None and sequence >= trimmable):
        return False
    return sequence < first - 1 or (trimmable is not None and deleted > 0)

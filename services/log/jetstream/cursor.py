"""A partition's cursor on the broker: a pull consumer with one replica, in memory, that its owner makes and replaces.

The sink holds the position, so a cursor need not survive anything. When it is in doubt, or its node is gone, the owner
makes another one at the committed position instead of waiting. A frozen node that thaws brings the old one back for a
moment, and it answers as if nothing had happened; so each cursor has a *generation* in its name and is asked through
an inbox of its own. The next generation is one more than the highest that ``CONSUMER.NAMES`` shows: the meta leader
answers that alone, so the cursors of others, or of dead nodes, delay no partition.

What is before one's own generation is deleted in the background. Only the node of a cursor answers its deletion, so one
on a dead node runs into its timeout and takes effect all the same; whatever is still there is tried again, and
``inactive_threshold`` is the net.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass

from services.core.logs import get_logger
from services.log.errors import LogRefusedError, LogUnavailableError
from services.log.jetstream.api import STREAM_NOT_FOUND, JetStreamApi, PermanentApiError
from services.log.jetstream.definitions import cursor_config
from services.log.jetstream.names import STREAM, parse_cursor_name

#: how long the making of a cursor may take, by attempt; it takes milliseconds, unless it fell to a dead node, and the
#: next one may fall to another. The last one repeats: the cluster may only be slow, seconds
CREATE_SECONDS = (1.0, 1.0, 2.0, 5.0)
#: pause before what could not be deleted is tried again, seconds; the last one repeats
_SWEEP_PAUSES_SECONDS = (2.0, 5.0, 15.0, 60.0)

#: refusals after which another attempt may succeed: a consumer of this name exists with another configuration (an
#: attempt that timed out took effect), no node can hold it now, or the stream is gone, which the next look explains
_TRY_AGAIN = frozenset({10148, 10005, STREAM_NOT_FOUND})

_log = get_logger("cursor")


@dataclass(frozen=True, slots=True)
class Cursor:
    """One cursor.

    Attributes:
        name: of the consumer.
        pending: events of the partition from its start on.
    """

    name: str
    pending: int


class Cursors:
    """Makes the cursors of one partition of one store, each under the next generation.

    What is asked during an election is never answered and must be asked again after it, so *api* must not be patient.
    """

    def __init__(self, api: JetStreamApi, store: str, partition: int) -> None:
        self._api = api
        self._store = store
        self._partition = partition
        self._generation = 0
        self._failures = 0  # cursors in a row whose making got no answer
        self._sweeping: asyncio.Task[None] | None = None

    async def make(self, after: int) -> Cursor:
        """Make a cursor that delivers what comes after sequence *after*; the previous ones go in the background.

        Raises:
            LogUnavailableError: no answer in time, or the cluster cannot now. Trying again makes one of another
                generation: this one may exist.
            PermanentApiError: the broker refuses.
        """
        try:
            self._generation = max([self._generation, *await self._generations()]) + 1
            config = cursor_config(self._store, self._partition, self._generation, after + 1)
            timeout = CREATE_SECONDS[min(self._failures, len(CREATE_SECONDS) - 1)]
            self._failures += 1
            info = await self._api.create_consumer(STREAM, config, timeout=timeout)
            self._failures = 0
        except PermanentApiError as error:
            if error.err_code in _TRY_AGAIN:
                raise LogUnavailableError(str(error)) from error
            raise
        self.stop_sweeping()
        self._sweeping = asyncio.create_task(self._sweep(), name=f"delete old cursors of {self._partition}")
        return Cursor(config["name"], int(info["num_pending"]))

    def stop_sweeping(self) -> None:
        """Leave what is not deleted yet to the next owner, or to the broker."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None

    async def _generations(self) -> dict[int, str]:
        found = {}
        for name in await self._api.consumer_names(STREAM):
            parsed = parse_cursor_name(name)
            if parsed is not None and parsed[:2] == (self._store, self._partition):
                found[parsed[2]] = name
        return found

    async def _sweep(self) -> None:
        """Delete every cursor of the partition before the newest one."""
        for attempt in itertools.count():
            try:
                for number, name in (await self._generations()).items():
                    if number < self._generation:
                        await self._api.delete_consumer(STREAM, name)
            except LogUnavailableError:
                await asyncio.sleep(_SWEEP_PAUSES_SECONDS[min(attempt, len(_SWEEP_PAUSES_SECONDS) - 1)])
            except LogRefusedError as error:  # a permission, mostly: they go by themselves in a day
                _log.warning("CURSORS_NOT_DELETED", partition=self._partition, reason=str(error))
                return
            else:
                return

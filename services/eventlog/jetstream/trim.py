"""Deletes from the stream what every store has committed: the broker itself deletes nothing (DESIGN, section 5).

What counts as committed is the acknowledgement floor of each consumer, which never runs ahead of the sink; the runner
of an idle partition moves it forward. So a partition file that is younger than the last trim never lacks an event that
is gone, and one that does is an old copy, which the follower refuses. A store whose consumers are not all there has
committed nothing of the missing partitions: nothing is trimmed until they are.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from nats.aio.client import Client

from services.eventlog.jetstream.api import JetStreamApi
from services.eventlog.jetstream.names import STREAM, parse_consumer_name

#: above this share of ``max_bytes`` committed events go whatever their age
FULLNESS_LIMIT = 0.7


@dataclass(frozen=True, slots=True)
class Trimmed:
    """What one round did.

    Attributes:
        committed: sequence up to which every store has committed everything.
        purged: messages deleted.
        fullness: share of ``max_bytes`` in use before, 0 to 1.
    """

    committed: int
    purged: int
    fullness: float


class Trimmer:
    """Trims the stream; at most one should be at work, the owner of partition 00, but several do no harm.

    Args:
        nc: a connected client.
        partitions: of the stream.
        retention: seconds for which committed events stay readable while there is room.
    """

    def __init__(self, nc: Client, *, partitions: int, retention: float) -> None:
        self._api = JetStreamApi(nc)
        self._partitions = partitions
        self._retention = retention

    async def trim(self) -> Trimmed:
        """Do one round.

        Raises:
            LogUnavailableError: the broker did not answer.
        """
        stream = await self._api.stream_info(STREAM)
        if stream is None:
            return Trimmed(0, 0, 0.0)
        state = stream["state"]
        fullness = state["bytes"] / stream["config"]["max_bytes"]
        consumers = await self._api.list_consumers(STREAM)
        committed = committed_everywhere(consumers, self._partitions)
        if committed < state["first_seq"] or state["messages"] == 0:
            return Trimmed(committed, 0, fullness)
        keep_from = committed + 1
        if fullness <= FULLNESS_LIMIT:
            keep_from = await self._first_younger(state["first_seq"], keep_from)
        if keep_from <= state["first_seq"]:
            return Trimmed(committed, 0, fullness)
        purged = await self._api.purge(STREAM, keep_from)
        return Trimmed(committed, purged, fullness)

    async def _first_younger(self, low: int, high: int) -> int:
        """Return the first sequence from *low* to *high* that is younger than the retention; bisects by time."""
        oldest_kept = time.time() - self._retention
        while low < high:
            middle = (low + high) // 2
            if await self._stored_at(middle) < oldest_kept:
                low = middle + 1
            else:
                high = middle
        return low

    async def _stored_at(self, sequence: int) -> float:
        message = await self._api.get_message(STREAM, sequence)
        if message is None:  # somebody deleted it: as good as old
            return 0.0
        return datetime.fromisoformat(message["time"]).timestamp()


def committed_everywhere(consumers: Iterable[Mapping[str, Any]], partitions: int) -> int:
    """Return the sequence up to which every store has committed every event; 0 when no store is complete.

    Args:
        consumers: the ``CONSUMER.LIST`` entries of the stream.
        partitions: how many consumers a store must have.
    """
    floors: dict[str, dict[int, int]] = defaultdict(dict)
    for info in consumers:
        parsed = parse_consumer_name(info["name"])
        if parsed is None:
            continue
        store, partition = parsed
        floors[store][partition] = info["ack_floor"]["stream_seq"]
    if not floors or any(len(found) < partitions for found in floors.values()):
        return 0
    return min(min(found.values()) for found in floors.values())

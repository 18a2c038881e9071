"""Deletes from the stream what every store has committed: the broker itself deletes nothing (DESIGN, section 5).

What counts as committed is what the partition files hold, as the processes that run them tell in the service API, and
no more than the acknowledgement floor of the consumer. The floor alone does not do: a purge moves that of a consumer
that has caught up to the last sequence it has looked at (nats-server 2.15.1), past where the file stands. So a
partition file that is younger than the last trim never lacks an event that is gone, and one that does is an old copy,
which the follower refuses. Where nobody runs a partition, nothing is trimmed until somebody does, and no more is where
a consumer of a store is missing.
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
from services.eventlog.jetstream.processes import LiveProcess, live_processes

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
        self._nc = nc
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
        if committed >= state["first_seq"] and state["messages"]:
            committed = committed_everywhere(consumers, self._partitions, await live_processes(self._nc))
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


def committed_everywhere(
    consumers: Iterable[Mapping[str, Any]], partitions: int, processes: Iterable[LiveProcess] | None = None
) -> int:
    """Return the sequence up to which every store has committed every event; 0 when that of a partition is unknown.

    Args:
        consumers: the ``CONSUMER.LIST`` entries of the stream.
        partitions: how many consumers a store must have.
        processes: the living persisters; without them an upper bound is returned, from the consumers alone.
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
    if processes is not None:
        told = _told(processes)
        for store, found in floors.items():
            for partition, floor in found.items():
                found[partition] = min(floor, told.get((store, partition), 0))
    return min(min(found.values()) for found in floors.values())


def _told(processes: Iterable[LiveProcess]) -> dict[tuple[str, int], int]:
    told: dict[tuple[str, int], int] = {}
    for process in processes:
        for partition, progress in process.progress.items():
            key = process.store, partition
            told[key] = max(progress.committed, told.get(key, 0))  # a file never goes back, so the greatest is nearest
    return told

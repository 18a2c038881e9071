"""Deletes from the stream what every store has committed: the broker itself deletes nothing (DESIGN, section 5).

What counts as committed is what the keys of all stores say (:mod:`.placement`), read from the bucket's leader before
each purge. A partition of a store without a key has committed nothing. Only a file that has less than its key says can
lack an event that is gone; such a file is an old copy. A key whose message id the stream does not have there does not
count: the stream was set back, and what clients posted since is in no file.

An event goes when it is older than the retention, or when the stream is more than 70 % full: then the oldest go first
until it is 60 % full. An event is old when it is old both by the clock of the stream's leader and by our own, and no
event counts as older than one that was stored before it: so no clock that jumps deletes what is young.

All purges are slices, with pauses between them: a purge stops publishing while the leader works on it. Measured on
three nodes: 2,000 events by sequence 6 ms, by filter 40 µs an event. Slices by sequence go up to the lowest committed
sequence of all partitions. A partition that is stopped or not running holds that back; in a full stream the committed
events of the others then go by filter, partition by partition, so it holds back only its own.

One process trims: the one that runs the lowest partition of those that are run. Several do no harm.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime

from fiq.errors import FiqError
from fiq.event import message_id_at
from services.core.logs import LogThrottle, get_logger
from services.log.jetstream.api import JetStreamApi
from services.log.jetstream.connection import Connection
from services.log.jetstream.placement import KEYS_SECONDS, read_stores
from services.log.jetstream.stream import PARTITIONS_KEY, STREAM, filter_subject, placement_key
from services.log.protocol import Trimmed
from services.log.status import LogState, Placement, StorePlacement

#: above this share of ``max_bytes`` committed events go whatever their age, down to that one
FULL, ENOUGH = 0.7, 0.6
#: sequences that one purge takes off the stream's beginning: some 6 ms of the leader
SLICE = 2_000
#: sequences over which one purge by filter reaches: about 130 events of a partition of 16, some 5 ms of the leader
FILTER_SLICE = 2_000
#: sequences between two looks at the age of a slice's events
STEP = 125
#: pause after a purge, seconds
PAUSE_SECONDS = 0.05
#: pause between two rounds, seconds
TRIM_SECONDS = 2.0

_log = get_logger("eventlog.trim")


@dataclass(frozen=True, slots=True)
class _Stream:
    """The stream before a purge, and how far each partition is committed by every store."""

    first: int
    messages: int
    last: int
    fullness: float
    now: float
    committed: Mapping[int, int]
    read_at: float

    @property
    def lowest(self) -> int:
        return min(self.committed.values(), default=0)


class Trimmer:
    """Trims the stream.

    Args:
        nc: a connected client.
        retention: seconds for which committed events stay readable while there is room.
        on_round: called with what each round of :meth:`run` did.
    """

    def __init__(
        self, nc: Connection, *, retention: float, on_round: Callable[[Trimmed], None] = lambda _: None
    ) -> None:
        self._nc = nc
        self._api = JetStreamApi(nc)
        self._retention = retention
        self._on_round = on_round
        self._latest = 0.0  # the latest time at which an event up to the stream's beginning was stored
        self._throttle = LogThrottle.of_repeated()
        self._compared: dict[tuple[str, int], tuple[int, str, int, bool]] = {}  # what was found of the keys

    async def run(self, is_turn: Callable[[], bool]) -> None:
        """Trim until cancelled, whenever it *is_turn* of this process; failures are logged and tried again."""
        while True:
            if is_turn():
                try:
                    trimmed = await self.trim()
                except Exception as error:  # noqa: BLE001 - whatever a message holds, it must not end the service
                    reason = str(error) if isinstance(error, FiqError) else type(error).__name__
                    allowed = self._throttle.allow(reason)
                    if allowed is not None:
                        _log.warning("TRIM_FAILED", reason=reason, **allowed)
                else:
                    self._throttle.reset()
                    self._on_round(trimmed)
                    if trimmed.purged:
                        _log.info("STREAM_TRIMMED", purged=trimmed.purged, committed=trimmed.committed)
            await asyncio.sleep(TRIM_SECONDS)

    async def trim(self) -> Trimmed:
        """Delete what may go, slice by slice.

        Raises LogMismatchError: there is no stream; LogUnavailableError: the broker did not answer; PlacementError: the
        placements of all stores are not known.
        """
        purged = 0
        full = False
        while True:
            stream = await self._look()
            full = stream.fullness > (ENOUGH if full else FULL)
            gone = await self._slice(stream, full) if stream.messages else 0
            purged += gone
            if not gone:
                return Trimmed(stream.lowest, purged, stream.fullness)
            await asyncio.sleep(PAUSE_SECONDS)

    async def _look(self) -> _Stream:
        read_at = time.monotonic()
        stores = await read_stores(self._nc, every=True)
        info = await self._api.request(f"STREAM.INFO.{STREAM}")
        state, config = info["state"], info["config"]
        partitions = int((config.get("metadata") or {}).get(PARTITIONS_KEY, 0))
        now = min(time.time(), datetime.fromisoformat(info["ts"]).timestamp())
        wrong = await self._wrong(stores, state["first_seq"], state["last_seq"])
        committed = {p: committed_everywhere(stores, p, state["last_seq"], wrong) for p in range(partitions)}
        fullness = state["bytes"] / config["max_bytes"]
        return _Stream(state["first_seq"], state["messages"], state["last_seq"], fullness, now, committed, read_at)

    async def _wrong(self, stores: Mapping[str, StorePlacement], first: int, last: int) -> set[tuple[str, int]]:
        """Return store and partition of each key that means another event than the stream has there."""
        keys = [(name, one) for name, store in stores.items() for one in store.partitions.values()]
        keys = [(name, one) for name, one in keys if one.message_id and first <= one.committed <= last]
        right = await asyncio.gather(*(self._is_right(name, one) for name, one in keys))
        return {(name, one.partition) for (name, one), is_right in zip(keys, right, strict=True) if not is_right}

    async def _is_right(self, store: str, one: Placement) -> bool:
        marker = one.committed, one.message_id, self._nc.reconnects  # after one it may be another log
        known = self._compared.get((store, one.partition))
        if known == (*marker, True):
            return True
        found = await self._api.leader_message(STREAM, one.committed)
        if found is None:  # deleted around a partition that stands still
            return True
        is_right = message_id_at(found["headers"]) == one.message_id
        self._compared[store, one.partition] = *marker, is_right
        if not is_right and known != (*marker, False):
            _log.error("KEY_OF_ANOTHER_LOG", key=placement_key(store, one.partition), committed=one.committed)
        return is_right

    async def _slice(self, stream: _Stream, full: bool) -> int:
        """Purge one slice and return how many messages that were."""
        end = min(stream.first + SLICE - 1, stream.lowest)
        if end >= stream.first:
            if not full:
                end = await self._last_old(stream.first, end, stream.now - self._retention)
            if end >= stream.first:
                return await self._purge(stream, end)
        return await self._around(stream) if full else 0

    async def _around(self, stream: _Stream) -> int:
        """Purge a slice of what lies after a partition that is held up, of the other partitions."""
        ahead = [p for p, committed in stream.committed.items() if committed > stream.lowest]
        found = await asyncio.gather(*(self._next(p, stream.lowest) for p in ahead))
        firsts = {p: first for p, first in zip(ahead, found, strict=True) if 0 < first <= stream.committed[p]}
        if not firsts:
            return 0
        end = min(firsts.values()) + FILTER_SLICE - 1
        purged = 0
        for partition, first in sorted(firsts.items(), key=lambda item: item[1]):
            if first <= end:
                purged += await self._purge(stream, min(end, stream.committed[partition]), partition)
                await asyncio.sleep(PAUSE_SECONDS)
                if time.monotonic() - stream.read_at > KEYS_SECONDS / 2:
                    break  # look again: the keys are about to be too old
        return purged

    async def _purge(self, stream: _Stream, end: int, partition: int | None = None) -> int:
        if time.monotonic() - stream.read_at > KEYS_SECONDS:
            return 0  # this process stood still: look again before anything is deleted
        only = None if partition is None else filter_subject(partition)
        return await self._api.purge(STREAM, end + 1, only=only)

    async def _last_old(self, first: int, end: int, before: float) -> int:
        """Return the last sequence from *first* to *end* up to which all is older than *before*: looks every 125th."""
        reached = first - 1
        for at in (*range(first, end, STEP), end):
            stored_at = await self._stored_at(at)
            if max(self._latest, stored_at) >= before:
                return await self._boundary(reached, at, before)
            reached, self._latest = at, max(self._latest, stored_at)
        return reached

    async def _boundary(self, low: int, high: int, before: float) -> int:
        """Return the last old sequence between *low*, which is old or before the first, and *high*, which is not."""
        while high - low > 1:
            middle = (low + high) // 2
            if max(self._latest, await self._stored_at(middle)) >= before:
                high = middle
            else:
                low = middle
        return low

    async def _stored_at(self, sequence: int) -> float:
        """Return when the message at *sequence* was stored; 0 when there is none."""
        message = await self._api.get_message(STREAM, sequence)
        return 0.0 if message is None else datetime.fromisoformat(message["time"]).timestamp()

    async def _next(self, partition: int, after: int) -> int:
        """Return the sequence of the partition's next message as the stream's leader has it; 0 when there is none."""
        message = await self._api.leader_message(STREAM, after + 1, next_of=filter_subject(partition))
        return 0 if message is None else message["seq"]


def committed_everywhere(
    stores: Mapping[str, StorePlacement], partition: int, last: int, wrong: Collection[tuple[str, int]] = ()
) -> int:
    """Return the sequence up to which every store has committed the events of *partition*; 0 when one has no key of it.

    Args:
        stores: the keys of all stores.
        partition: its number.
        last: sequence of the stream's youngest event. A key that is ahead of it belongs to a log that was set back:
            what the file holds is then not known.
        wrong: store and partition of keys that do not count either: what the stream has there is another event.
    """
    placed = [None if (name, partition) in wrong else store.partitions.get(partition) for name, store in stores.items()]
    if not placed or any(one is None or one.committed > last for one in placed):
        return 0
    return min(one.committed for one in placed if one is not None)


def is_turn(state: LogState, store: str, own: Collection[int]) -> bool:
    """Return whether the process that runs partitions *own* of *store* is the one that trims."""
    owned = [(partition, one.store) for one in state.processes or () for partition in one.partitions]
    return bool(own) and (min(own), store) <= min(owned, default=(min(own), store))

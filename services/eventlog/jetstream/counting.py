"""Counts each second how many events wait to be committed, for whoever pushes back by it.

A count is two requests, of the stream and of its consumers' states. What cannot be asked just now leaves what was known
for :data:`KEPT_SECONDS`; the whole look (:mod:`services.eventlog.jetstream.watch`) tells operators of it.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AbstractAsyncContextManager

from nats.aio.client import Client

from services.contract.errors import FiqError
from services.contract.lifecycle import beside
from services.contract.logs import get_logger
from services.eventlog.backlog import Backlog
from services.eventlog.jetstream.api import JetStreamApi
from services.eventlog.jetstream.names import STREAM
from services.eventlog.jetstream.report import (
    LIST_TIMEOUT_SECONDS,
    PROBE_TIMEOUT_SECONDS,
    PartitionReport,
    completed,
    read_stream,
    store_reports,
)
from services.eventlog.metrics import LogMetrics
from services.eventlog.settings import LogSettings

#: pause between two counts, seconds
COUNT_SECONDS = 1.0
#: how long the last count is worth something when no new one comes, seconds
KEPT_SECONDS = 20.0

_log = get_logger("eventlog.counting")


class BacklogCounter:
    """Keeps :attr:`LogMetrics.observed` up to date.

    Args:
        nc: the connection.
        settings: the store that is looked for while no store has a consumer.
        metrics: where the count is put.
    """

    def __init__(self, nc: Client, settings: LogSettings, metrics: LogMetrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._api = JetStreamApi(nc, timeout=PROBE_TIMEOUT_SECONDS)
        self._list_api = JetStreamApi(nc, timeout=LIST_TIMEOUT_SECONDS)
        self._stores: dict[str, tuple[PartitionReport, ...]] = {}
        self._counted = time.monotonic()

    async def run(self) -> None:
        """Count for ever."""
        while True:
            await self.count()
            await asyncio.sleep(COUNT_SECONDS)

    async def count(self) -> None:
        """Count once; what fails is never raised."""
        found = None
        try:
            found = await self._count()
        except FiqError:  # an election, an outage
            pass
        except Exception as error:  # noqa: BLE001 - a fault in here must not end the service, nor the counting
            _log.error("COUNTING_FAILED", error=type(error).__name__)
        if found is not None:
            self._metrics.observed, self._counted = found, time.monotonic()
        elif time.monotonic() - self._counted > KEPT_SECONDS:
            self._metrics.observed = None

    async def _count(self) -> Backlog | None:
        """Return the backlog of the store that has most of it; while no store has a consumer, all of it waits."""
        info = await self._api.stream_info(STREAM)
        if info is None:
            return None
        # first: what is stored between the two questions then counts twice, and not not at all
        stream = read_stream(info)
        partitions = stream.partitions or self._settings.partitions
        found = await store_reports(self._list_api, partitions, self._settings.store)
        self._stores = completed(found, self._stores)
        placed = [[report for report in reports if report.exists] for reports in self._stores.values()]
        if not any(placed):
            return Backlog(time.monotonic(), stream.last_sequence, stream.messages)
        events = (sum(report.pending + report.ack_pending for report in reports) for reports in placed)
        return Backlog(time.monotonic(), stream.last_sequence, max(events))


def counting(nc: Client, settings: LogSettings, metrics: LogMetrics) -> AbstractAsyncContextManager[None]:
    """Count the backlog beside what is done inside."""
    return beside(BacklogCounter(nc, settings, metrics).run(), "backlog count")

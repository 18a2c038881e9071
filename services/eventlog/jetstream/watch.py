"""Looks at the log every few seconds and shows it in metrics: streams, replicas, partitions, who lives.

Every service process does that for itself. So an operator sees the persisters' end from ingest, ingest's from the
persisters, and the broker's from both; in Prometheus ``max by (…)`` over the processes is what is known.

A look asks for the two streams, the consumers, the persisters' answers, and the oldest event that waits in each
partition whose end has moved: four requests and few more. What cannot be asked just now is shown as it was, for
:data:`KEPT_SECONDS`, and then not at all: an alert must neither flap with one lost answer nor rest on old news.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from datetime import datetime

from nats.aio.client import Client

from services.contract.errors import FiqError
from services.contract.lifecycle import beside
from services.contract.logs import get_logger
from services.eventlog.jetstream.api import JetStreamApi
from services.eventlog.jetstream.certificates import certificates
from services.eventlog.jetstream.names import DEAD_STREAM, STREAM, filter_subject
from services.eventlog.jetstream.processes import live_processes
from services.eventlog.jetstream.report import (
    LIST_TIMEOUT_SECONDS,
    PROBE_TIMEOUT_SECONDS,
    PartitionReport,
    StreamReport,
    completed,
    read_stream,
    store_reports,
)
from services.eventlog.metrics import PARTITIONS, PARTS, PROCESSES, STREAMS, LogMetrics
from services.eventlog.settings import LogSettings

#: pause between two looks, seconds
LOOK_SECONDS = 5.0
#: how long the last answer is shown when no new one comes, seconds
KEPT_SECONDS = 20.0

_log = get_logger("eventlog.watch")


class LogWatch:
    """Watches the log of one connection.

    Args:
        nc: the connection.
        settings: the store that is looked for while no store has a consumer.
        metrics: where it is shown.
    """

    def __init__(self, nc: Client, settings: LogSettings, metrics: LogMetrics) -> None:
        self._nc = nc
        self._settings = settings
        self._metrics = metrics
        self._api = JetStreamApi(nc, timeout=PROBE_TIMEOUT_SECONDS)
        self._list_api = JetStreamApi(nc, timeout=LIST_TIMEOUT_SECONDS)
        self._seen = dict.fromkeys(PARTS, time.monotonic())
        self._said: dict[str, str] = {}
        self._partitions = 0
        self._offset = 0.0
        self._stores: dict[str, tuple[PartitionReport, ...]] = {}
        self._oldest: dict[str, tuple[int, float]] = {}

    async def run(self) -> None:
        """Look for ever."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Look once, at everything; what fails is counted and logged, never raised."""
        connected = self._nc.is_connected
        self._metrics.connected.set(connected)
        if connected:
            self._metrics.certificates(certificates(self._nc))
        else:
            self._metrics.available.set(0)
        for part, look in ((STREAMS, self._streams), (PARTITIONS, self._backlogs), (PROCESSES, self._owners)):
            await self._part(part, look, connected=connected)

    async def _part(self, part: str, look: Callable[[], Awaitable[None]], *, connected: bool) -> None:
        if connected:
            try:
                await look()
            except FiqError as error:
                reason = str(error)
            except Exception as error:  # noqa: BLE001 - a fault in here must not end the service, nor the watch
                reason = repr(error)
            else:
                self._seen[part] = time.monotonic()
                self._said.pop(part, None)
                return
            self._metrics.failures.labels(part).inc()
            if self._said.get(part) != reason:  # once for each reason, or an outage would fill the log
                self._said[part] = reason
                _log.warning("OBSERVATION_FAILED", part=part, reason=reason)
        if time.monotonic() - self._seen[part] > KEPT_SECONDS:
            self._metrics.forget(part)

    # -- streams ------------------------------------------------------------------------------------------------------

    async def _streams(self) -> None:
        self._metrics.available.set(0 if (events := await self._events()) is None else _takes_events(events))
        dead = await self._api.stream_info(DEAD_STREAM)
        self._metrics.forget(STREAMS)
        if events is not None:
            self._partitions = events.partitions
            self._metrics.stream(STREAM, events)
        if dead is not None:
            self._metrics.stream(DEAD_STREAM, read_stream(dead))

    async def _events(self) -> StreamReport | None:
        begun, started = time.time(), time.perf_counter()
        try:
            info = await self._api.stream_info(STREAM)
        except FiqError:
            self._metrics.available.set(0)
            raise
        round_trip = time.perf_counter() - started
        if info is None:
            return None
        # the leader read its clock somewhere between question and answer: half way is the best guess
        self._offset = begun + round_trip / 2 - datetime.fromisoformat(info["ts"]).timestamp()
        self._metrics.round_trip.set(round_trip)
        self._metrics.clock_offset.set(self._offset)
        return read_stream(info)

    # -- partitions ---------------------------------------------------------------------------------------------------

    async def _backlogs(self) -> None:
        partitions = self._partitions or self._settings.partitions
        found = await store_reports(self._list_api, partitions, self._settings.store)
        self._stores = completed(found, self._stores)
        waiting = [
            (store, report, await self._age(report))
            for store, reports in self._stores.items()
            for report in reports
            if report.answered
        ]
        self._metrics.forget(PARTITIONS)
        for store, report, age in waiting:
            self._metrics.backlog(store, report.partition, report.pending + report.ack_pending, age)

    async def _age(self, report: PartitionReport) -> float:
        """Return for how long the oldest event of a partition has waited for its commit, seconds."""
        if report.pending + report.ack_pending == 0:
            return 0.0
        after, stored_at = self._oldest.get(report.consumer, (-1, 0.0))
        if after != report.acknowledged:
            subject = filter_subject(report.partition)
            message = await self._api.get_message(STREAM, report.acknowledged + 1, next_of=subject)
            if message is None:  # committed meanwhile, or a replica that has not got it yet
                return 0.0
            stored_at = datetime.fromisoformat(message["time"]).timestamp()
            self._oldest[report.consumer] = (report.acknowledged, stored_at)
        return max(0.0, time.time() - self._offset - stored_at)

    # -- processes ----------------------------------------------------------------------------------------------------

    async def _owners(self) -> None:
        processes = await live_processes(self._nc)
        self._metrics.forget(PROCESSES)
        for store, reports in self._stores.items():
            own = [process for process in processes if process.store == store]
            for report in reports:
                owners = sum(report.partition in process.partitions for process in own)
                self._metrics.owned(store, report.partition, report.volume, owners)
            for volume in {report.volume for report in reports} - {""}:
                living = sum(process.volume == volume for process in own)
                self._metrics.volume_processes.labels(store, volume).set(living)


def _takes_events(stream: StreamReport) -> bool:
    return bool(stream.leader) and stream.has_quorum


def watching(nc: Client, settings: LogSettings, metrics: LogMetrics) -> AbstractAsyncContextManager[None]:
    """Watch the log beside what is done inside."""
    return beside(LogWatch(nc, settings, metrics).run(), "log watch")

"""The backlog that ingest pushes back by, counted on a real cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from prometheus_client import CollectorRegistry
from services.eventlog.jetstream.counting import BacklogCounter

from services.cli.cluster import Cluster
from services.eventlog.backlog import Backlog
from services.eventlog.jetstream import counting as counting_module
from services.eventlog.jetstream.definitions import consumer_config
from services.eventlog.jetstream.names import STREAM
from services.eventlog.jetstream.report import PartitionReport
from services.eventlog.metrics import LogMetrics
from services.eventlog.settings import LogSettings
from services.ingest.log import open_log
from services.ingest.settings import Settings
from tests.support.persisters import Log, provisioned
from tests.support.polling import eventually


@pytest.fixture
async def log(fresh_log: Cluster) -> AsyncIterator[Log]:
    async with provisioned(fresh_log, partitions=2) as made:
        yield made


async def _place(log: Log, store: str) -> None:
    settings = LogSettings(servers=log.settings.servers, partitions=2, store=store)
    for partition in (0, 1):
        config = consumer_config(settings, partition, {"fi_volume": "v1", "fi_epoch": "1"})
        await log.api.create_consumer(STREAM, config)


async def test_the_backlog_is_that_of_the_store_that_has_most_of_it(log: Log) -> None:
    """Before any store has a consumer all events wait."""
    metrics = LogMetrics(CollectorRegistry())
    counter = BacklogCounter(log.nc, log.settings, metrics)

    async def counted() -> tuple[int, int] | None:
        await counter.count()
        found: Backlog | None = metrics.observed
        return None if found is None else (found.sequence, found.events)

    async def is_the_second_stores() -> bool:
        return await counted() == (4, 4)

    await log.publish(3, consultations=1)
    assert (3, 3) == await counted()
    for store in ("main", "second"):
        await _place(log, store)
    for name in ("fi-workers-main-00", "fi-workers-main-01"):
        await log.api.reset_consumer(STREAM, name, 4)
    await log.publish(1, consultations=1)
    await eventually(is_the_second_stores)


async def test_a_consumer_that_does_not_answer_counts_as_it_did(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """An election must not look like a backlog that is gone; nor must a fault, for a while."""
    known = PartitionReport(0, "fi-workers-main-00", exists=True, answered=True, pending=7, ack_pending=1)
    silent = PartitionReport(0, "fi-workers-main-00", exists=True, answered=False)
    answers = iter([known, silent])

    async def reports(*_: object) -> dict[str, tuple[PartitionReport, ...]]:
        return {"main": (next(answers),)}  # and from the third count on a fault

    monkeypatch.setattr(counting_module, "store_reports", reports)
    metrics = LogMetrics(CollectorRegistry())
    counter = BacklogCounter(log.nc, log.settings, metrics)
    for _ in range(3):
        await counter.count()
        assert metrics.observed is not None
        assert 8 == metrics.observed.events
    monkeypatch.setattr(counting_module, "KEPT_SECONDS", 0.0)
    await counter.count()
    assert metrics.observed is None


async def test_ingest_counts_between_two_whole_looks(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was posted by others and committed by whomever is known each second."""
    monkeypatch.setattr("services.eventlog.jetstream.watch.LOOK_SECONDS", 3600.0)
    monkeypatch.setattr(counting_module, "COUNT_SECONDS", 0.02)
    metrics = LogMetrics(CollectorRegistry())

    def waiting() -> int | None:
        found: Backlog | None = metrics.observed
        return None if found is None else found.events

    async with open_log(Settings(log=log.settings), pytest.fail) as opened:
        async with opened.watching(metrics):
            await eventually(lambda: waiting() == 0)
            await log.publish(3, consultations=1)
            await eventually(lambda: waiting() == 3)
            await _place(log, "main")
            for name in ("fi-workers-main-00", "fi-workers-main-01"):
                await log.api.reset_consumer(STREAM, name, 4)
            await eventually(lambda: waiting() == 0)
        assert not {"log watch", "backlog count"} & {task.get_name() for task in asyncio.all_tasks()}

"""Under load batches grow, to the bound of their events or of their bytes and not beyond."""

from __future__ import annotations

from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest

from services.log.partitions import partition_of
from tests.support.persisters import PARTITIONS, Contents, Log, Persister, corpus_of
from tests.support.polling import eventually


@pytest.mark.timeout(240)
async def test_a_backlog_of_small_events_is_committed_in_batches_of_up_to_8192(log: Log, tmp_path: Path) -> None:
    """The default of FI_BATCH_EVENTS. Many consultations make commits slower than what comes."""
    events = await log.publish(16_000, consultations=_consultations(2_000), batch=1_000)
    batches = await _batches(log, tmp_path, events)
    assert 4_096 < max(batch["persisted"] for batch in batches) <= 8_192


async def test_a_backlog_of_large_events_is_committed_in_batches_of_up_to_16_mib(log: Log, tmp_path: Path) -> None:
    """The default of FI_BATCH_BYTES: 83 events of 200 kB."""
    events = await log.publish(220, consultations=_consultations(20), size=200_000, batch=20)
    batches = await _batches(log, tmp_path, events)
    assert 8 * 2**20 < max(batch["bytes"] for batch in batches) <= 16 * 2**20


def _consultations(number: int) -> list[str]:
    """Return so many that belong to one partition."""
    names = (f"c{index}" for index in count())
    return list(islice((name for name in names if partition_of(name, PARTITIONS) == 0), number))


async def _batches(log: Log, folder: Path, events: Contents) -> list[dict[str, Any]]:
    """Persist the *events*, which are published, and return what the process says of each batch."""
    published = sum(map(len, events.values()))
    with Persister(folder, log.cluster, folder / "data") as persister:
        await eventually(lambda: published == sum(batch["persisted"] for batch in _told(persister)), timeout=100)
        assert 0 == await persister.end()
        assert events == corpus_of(folder / "data")
        return _told(persister)


def _told(persister: Persister) -> list[dict[str, Any]]:
    return [line for line in persister.lines if line["event"] == "EVENT_PERSISTED"]

"""An operator learns from the log and the metrics who holds back checkpoints, and for how long."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h5py
from structlog.testing import CapturingLogger

from fiq.corpus import EventStore, StoreOptions, StoreStats
from services.persister.metrics import PersisterMetrics
from services.persister.partition import CheckpointWatch
from tests.support.corpus import IDENTITY, commit_range


def _held_back(tmp_path: Path) -> StoreStats:
    path = tmp_path / "00.h5"
    with EventStore.create(path, IDENTITY, StoreOptions(checkpoint_seconds=0)) as store:
        commit_range(store, range(1, 11))
        with h5py.File(path, "r"):
            store.maybe_checkpoint()
            return store.stats


def test_a_long_wait_is_warned_of_seldom_and_its_end_is_told(tmp_path: Path) -> None:
    """At a minute, then at twice the time; the line has the reason and the journal's size, no path and no payload."""
    stats, log = _held_back(tmp_path), CapturingLogger()
    watch = CheckpointWatch(log)
    for seconds in (1.0, 59.0, 60.0, 61.0, 119.0, 121.0, 200.0, 0.0, 0.0):
        watch.update(replace(stats, checkpoint_waiting_seconds=seconds))
    assert ["CHECKPOINTS_HELD_BACK", "CHECKPOINTS_HELD_BACK", "CHECKPOINTS_GO_ON"] == [
        call.args[0] for call in log.calls
    ]
    assert {
        "reason": "a reader has the file open",
        "waiting_s": 60,
        "journal_bytes": stats.journal_bytes,
    } == log.calls[0].kwargs


def test_a_compaction_is_logged_once(tmp_path: Path) -> None:
    """It says that the journal had outgrown its limit."""
    stats, log = _held_back(tmp_path), CapturingLogger()
    watch = CheckpointWatch(log)
    for compactions in (0, 1, 1, 0, 1):
        watch.update(replace(stats, compactions=compactions))
    assert [("JOURNAL_COMPACTED", 1)] * 2 == [(call.args[0], call.kwargs["times"]) for call in log.calls]


def test_the_wait_is_a_metric(tmp_path: Path) -> None:
    """As are the number of deferrals and the journal's size."""
    metrics = PersisterMetrics()
    metrics.of(0).store(replace(_held_back(tmp_path), checkpoint_waiting_seconds=75.0, compactions=2))
    values = {
        name: metrics.registry.get_sample_value(f"fi_persister_{name}", {"partition": "00"})
        for name in ("checkpoint_waiting_seconds", "checkpoints_deferred", "journal_compactions")
    }
    assert values == {"checkpoint_waiting_seconds": 75.0, "checkpoints_deferred": 1.0, "journal_compactions": 2.0}

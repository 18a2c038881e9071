"""What is wrong in a snapshot of the log, with what to do: nothing in a healthy one, one finding for each fault."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from services.log.findings import Level, check_placement, conditions
from services.log.status import (
    LiveProcess,
    LogState,
    PartitionState,
    Placement,
    ReplicaReport,
    StorePlacement,
    StreamReport,
    Verified,
    Waiting,
)

AT = "2026-11-23T10:00:00Z"
NOW = 1_700_000_000.0
REPLICAS = tuple(ReplicaReport(name, current=True, offline=False, lag=0, seen_seconds=0.1) for name in ("n2", "n3"))
STREAM = StreamReport("2026-11-23T10:00:00Z", 2, "n1", REPLICAS, 10, 100, 1000, 1, 10)
DEAD = replace(STREAM, messages=0, bytes=0)
PLACED = {p: Placement(p, "volume", 1, 10, 1, 1) for p in range(2)}
PARTITIONS = tuple(PartitionState(p, PLACED[p], 1, 10, Waiting(0, 10, stalled=False), None) for p in range(2))
PROCESS = LiveProcess("main", "volume", frozenset({0, 1}), {}, metadata={"host": "a", "worker": "w"})


def placements(**changes: object) -> Mapping[str, StorePlacement]:
    whole = StorePlacement("main", True, ("volume",), PLACED, frozenset(), STREAM.created, 1)
    return {"main": replace(whole, **changes)}  # type: ignore[arg-type]


HEALTHY = LogState(
    at=1.0, stream=STREAM, dead=DEAD, placements=placements(), processes=(PROCESS,), stores={"main": PARTITIONS}
)


def found(state: LogState) -> list[tuple[str, str, str]]:
    return [(one.check, one.level.value, one.what) for one in conditions(state, NOW)]


def partitions(**changes: object) -> LogState:
    """Return the healthy state with another partition 01."""
    return replace(HEALTHY, stores={"main": (PARTITIONS[0], replace(PARTITIONS[1], **changes))})  # type: ignore[arg-type]


def test_a_healthy_log_has_no_conditions() -> None:
    """What is fine is not said."""
    assert [] == found(HEALTHY)


@pytest.mark.parametrize(
    ("state", "check", "level", "what"),
    [
        (replace(HEALTHY, stream_exists=False, stream=None), "stream", "error", "there is no stream fi-events"),
        (replace(HEALTHY, troubles={"streams": "no answer"}), "stream", "error", "the log does not answer"),
        (replace(HEALTHY, stream=replace(STREAM, leader="")), "replicas", "error", "has no leader"),
        (
            replace(HEALTHY, stream=replace(STREAM, replicas=(REPLICAS[0], replace(REPLICAS[1], offline=True)))),
            "replicas",
            "error",
            "the copy on n3 is offline",
        ),
        (
            replace(
                HEALTHY, stream=replace(STREAM, replicas=(REPLICAS[0], replace(REPLICAS[1], current=False, lag=7)))
            ),
            "replicas",
            "warning",
            "the copy on n3 is 7 entries behind",
        ),
        (replace(HEALTHY, stream=replace(STREAM, bytes=800)), "stream", "warning", "80% of its limit"),
        (replace(HEALTHY, stream=replace(STREAM, bytes=960)), "stream", "error", "96% of its limit"),
        (replace(HEALTHY, dead=None), "dead letters", "error", "there is no stream fi-dead"),
        (replace(HEALTHY, dead=replace(DEAD, messages=3)), "dead letters", "warning", "3 messages set aside"),
        (partitions(owners=0), "placement", "error", "no persister owns partition 01"),
        (partitions(owners=2), "placement", "warning", "2 processes say that they own partition 01"),
        (partitions(placement=None), "placement", "error", "no volume has claimed partition 01"),
        (
            partitions(placement=replace(PLACED[1], volume="other")),
            "placement",
            "error",
            "volume other is away, with partition 01",
        ),
        (partitions(oldest=NOW - 61), "backlog", "warning", "partition 01 of store main is behind"),
        (
            replace(HEALTHY, processes=(replace(PROCESS, metadata={"verified": Verified(AT, 9, 2).show()}),)),
            "verification",
            "error",
            "fiq verify found 2 problems in volume volume at 2026-11-23T10:00:00Z",
        ),
        (replace(HEALTHY, processes=()), "placement", "error", "no persister answers"),
        (replace(HEALTHY, processes=None), "placement", "unknown", "it is not known which persisters run"),
        (
            replace(HEALTHY, placements=placements(partitions={0: PLACED[0]})),
            "placement",
            "error",
            "the key of partition",
        ),
        (
            replace(HEALTHY, placements=placements(partitions={**PLACED, 1: replace(PLACED[1], begins=5)})),
            "placement",
            "warning",
            "begins at sequence 5",
        ),
    ],
)
def test_each_fault_is_a_condition_with_what_to_do(state: LogState, check: str, level: str, what: str) -> None:
    """And nothing else is."""
    (only,) = conditions(state, NOW)
    assert (check, level) == (only.check, only.level)
    assert what in only.what
    assert only.action
    assert only.meaning or only.level is Level.UNKNOWN


def test_a_partition_is_behind_only_after_a_minute() -> None:
    """Events wait for some milliseconds always."""
    assert [] == found(partitions(oldest=NOW - 59, waiting=Waiting(5, 10, stalled=False)))


def test_the_processes_of_another_store_do_not_count() -> None:
    """Two copies run every partition twice, once each."""
    other = replace(PROCESS, store="copy", volume="copy-volume")
    assert [] == found(replace(HEALTHY, processes=(PROCESS, other)))
    alone = replace(HEALTHY, processes=(other,))
    assert ["no persister answers"] == [what for _, _, what in found(alone)]


def test_what_cannot_be_read_now_is_no_fault_of_the_pipeline() -> None:
    """The dead letters are unknown, not gone."""
    assert [] == found(replace(HEALTHY, dead=None, troubles={"dead_letters": "no answer"}))


def test_a_log_without_a_broker_is_judged_by_its_partitions_alone() -> None:
    """It has no stream and no dead letters, and clients wait for the persisters."""
    state = replace(HEALTHY, has_stream=False, stream=None, dead=None)
    assert [] == found(state)
    (only,) = conditions(replace(state, processes=(), stores={"main": ()}), NOW)
    assert "placement of partitions is unknown" in only.what
    (only,) = conditions(replace(state, processes=()), NOW)
    assert ("no persister answers", "clients get 503 until one runs") == (only.what, only.meaning)


def test_the_number_of_volumes_counts_where_it_is_known() -> None:
    """The doctor knows FI_VOLUMES, ingest does not."""
    assert ["warning"] == [one.level.value for one in check_placement(HEALTHY, "main", 2)]
    assert ["ok"] == [one.level.value for one in check_placement(HEALTHY, "main", None)]

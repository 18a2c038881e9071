"""A persister whose disk is really full: it says so, acknowledges nothing more, and goes on when there is room."""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from pathlib import Path

from fiq.corpus import open_corpus
from services.log.jetstream.stream import STREAM, parse_cursor_name
from services.log.partitions import partition_name
from tests.support.cluster import consumers_of
from tests.support.persisters import PARTITIONS, Contents, Log, Persister, corpus_of, joined, persisted
from tests.support.polling import eventually
from tests.support.small_disk import fill, small_disk

#: MiB; more than the events take, twice
_DISK = 96
#: so many large events are more in each partition than the room that all files have reserved together
_EVENTS, _LARGE = 48, 500_000

_FULL = "No space left"


async def test_a_full_disk_stops_every_partition_until_there_is_room(log: Log, tmp_path: Path) -> None:
    """Nothing is acknowledged that is not committed, which can be read; each event is written once in the end."""
    with (
        small_disk("tmpfs", tmp_path / "disk", size=_DISK) as disk,
        Persister(tmp_path, log.cluster, disk / "data", FI_DISK_RESERVE="0") as persister,
    ):
        # given
        await persister.ready()
        before = await log.publish(40)
        await persisted(disk / "data", before)
        # when
        ballast = fill(disk)
        waiting = await log.publish(_EVENTS, size=_LARGE)
        # then
        await persister.not_ready(_FULL)
        floors = await eventually(lambda: _floors_that_stand(log, persister), timeout=90)
        await persister.not_ready(_FULL)
        _check_beginning(disk / "data", before, waiting)
        with open_corpus(disk / "data") as corpus:
            committed = [partition.committed for partition in corpus.partitions]
        assert all(floor <= sequence for floor, sequence in zip(floors, committed, strict=True))
        # and when there is room again
        ballast.unlink()
        await persisted(disk / "data", before, waiting)
        await persister.ready()
        assert 0 == await persister.end()
        assert "" == persister.errors


async def test_a_process_that_starts_on_a_full_disk_waits_for_room(log: Log, tmp_path: Path) -> None:
    """It takes over from one that was killed there: to recover needs no room, and what comes then waits."""
    with small_disk("tmpfs", tmp_path / "disk", size=_DISK) as disk:
        # given
        with Persister(tmp_path / "killed", log.cluster, disk / "data", FI_DISK_RESERVE="0") as killed:
            await killed.ready()
            before = await log.publish(40)
            await persisted(disk / "data", before)
            ballast = fill(disk)
            waiting = await log.publish(_EVENTS, size=_LARGE)
            await killed.not_ready(_FULL)
        # when
        with Persister(tmp_path / "next", log.cluster, disk / "data", FI_DISK_RESERVE="0") as persister:
            # then
            await persister.not_ready(_FULL)
            _check_beginning(disk / "data", before, waiting)
            ballast.unlink()
            await persisted(disk / "data", before, waiting)
            await persister.ready()
            assert 0 == await persister.end()
            assert "" == persister.errors


async def test_a_persister_leaves_the_reserve_of_its_disk_free(log: Log, tmp_path: Path) -> None:
    """Nodes may share the disk. What is committed can be read, and with room the persister goes on by itself."""
    with (
        small_disk("tmpfs", tmp_path / "disk", size=_DISK) as disk,
        Persister(tmp_path, log.cluster, disk / "data") as persister,
    ):
        # given
        await persister.ready()
        before = await log.publish(40)
        await persisted(disk / "data", before)
        # when
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(shutil.disk_usage(disk).free - (_DISK << 20) // 25))
        await persister.not_ready("FI_DISK_RESERVE is 5 %")
        waiting = await log.publish(_EVENTS)
        # then

        async def buffered() -> bool:
            return await _sum(persister, "fi_queue_pending") == _EVENTS

        await eventually(buffered)
        assert 1 == await _sum(persister, "fi_volume_held")
        assert before == corpus_of(disk / "data")
        # and when there is room again
        ballast.unlink()
        await persisted(disk / "data", before, waiting)
        await persister.ready()
        assert 0 == await _sum(persister, "fi_volume_held")
        await eventually(
            lambda: (
                ["DISK_RESERVE_REACHED", "DISK_RESERVE_FREE"]
                == [line["event"] for line in persister.lines if line["event"].startswith("DISK_RESERVE")]
            )
        )
        assert 0 == await persister.end()


async def test_a_persister_does_not_start_on_a_disk_in_memory(log: Log, tmp_path: Path) -> None:
    """The files would be gone after a restart of the machine; the message says what to do."""
    with small_disk("tmpfs", tmp_path / "disk", size=_DISK) as disk:
        with Persister(tmp_path, log.cluster, disk / "data", FI_ALLOW_EPHEMERAL="") as persister:
            assert 1 == await asyncio.to_thread(persister.wait)
        assert f"fiq-persister: the data directory {disk / 'data'} is on tmpfs" in persister.errors
        assert [] == list(disk.iterdir())


async def _sum(persister: Persister, name: str) -> float:
    return sum(value for key, value in (await persister.samples()).items() if key.startswith(f"{name}{{"))


async def _floors_that_stand(log: Log, persister: Persister) -> list[int]:
    """Return the acknowledgement floors, once every partition was refused again and none of them has moved."""
    floors, failures = await _floors(log), _failures(persister)
    names = [partition_name(number) for number in range(PARTITIONS)]
    await eventually(lambda: all(_failures(persister)[name] > failures[name] for name in names))
    assert floors == await _floors(log)
    return floors


async def _floors(log: Log) -> list[int]:
    floors: dict[int, tuple[int, int]] = {}  # by partition: the newest cursor's generation and floor
    for info in await consumers_of(log.nc, STREAM):
        parsed = parse_cursor_name(info["name"])
        assert parsed is not None
        _, partition, generation = parsed
        floors[partition] = max(floors.get(partition, (0, 0)), (generation, info["ack_floor"]["stream_seq"]))
    return [floors[partition][1] for partition in range(PARTITIONS)]


def _failures(persister: Persister) -> Counter[str]:
    """Return how often each partition said that it could not write, and why."""
    failures = [line for line in persister.lines if line["event"] == "EVENT_PERSIST_FAILED"]
    return Counter(line["partition"] for line in failures if _FULL in str(line))


def _check_beginning(data: Path, before: Contents, waiting: Contents) -> None:
    """What is committed is all that was before the disk was full, and of the rest what still found room, in order."""
    found, published = corpus_of(data), joined([before, waiting])
    for name, ids in published.items():
        assert len(before[name]) <= len(found[name])
        assert ids[: len(found[name])] == found[name]
    assert found != published

"""One partition: what is committed, acknowledged, retried, set aside, and how it stops."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import re
import shutil
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from fiq.corpus import EventStore, StorageIO
from fiq.corpus.wal.file import PageCache
from fiq.corpus.wal.storage import Buffer
from fiq.errors import PermanentError
from services.log.protocol import Position
from services.persister.dead_letters import PoisonLimit
from services.persister.partition import RunnerState
from tests.support.faulty_io import FailingIO
from tests.support.persister import Rig, Stream, conflicts, contents, delivery, poison, reusing, rig
from tests.support.polling import eventually


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.persister.partition.BACKOFF_SECONDS", (0.01,))
    monkeypatch.setattr("services.persister.rounds.LONGEST_SECONDS", 0.0)


@pytest.fixture
def stream() -> Stream:
    return Stream()


@pytest.fixture
async def part(tmp_path: Path, stream: Stream) -> AsyncIterator[Rig]:
    async with rig(tmp_path, stream) as made:
        yield made


class FullDisk(StorageIO):
    """Takes nothing while it is *full*."""

    def __init__(self) -> None:
        self.full = False

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().pwrite(fd, data, offset)


async def test_an_event_is_written_as_soon_as_it_is_there(
    part: Rig, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No timer delays the event of an idle partition, and no further event is waited for."""
    part.runner.start()
    await part.be(RunnerState.FOLLOWING)
    loop = asyncio.get_running_loop()
    for sequence in range(1, 6):
        acknowledged = asyncio.Event()
        timers: list[float] = []
        stream.on_acknowledge = lambda _, acknowledged=acknowledged: acknowledged.set()  # type: ignore[misc]
        with monkeypatch.context() as patch:
            patch.setattr(loop, "call_at", lambda when, *_, timers=timers, **__: timers.append(when))
            stream.add(delivery(sequence))
            await acknowledged.wait()
        assert [] == timers
    await part.runner.stop()
    assert {"c1": [1, 2, 3, 4, 5]} == part.content()
    assert 5 == part.metrics.registry.get_sample_value("fi_persister_batch_events_count")


async def test_an_acknowledgement_follows_its_commit(part: Rig, stream: Stream) -> None:
    """The other order would lose the events of a crash between the two."""
    committed: list[tuple[int, int]] = []
    stream.on_acknowledge = lambda sequence: committed.append((sequence, part.store.committed if part.store else 0))
    stream.add(*(delivery(sequence) for sequence in range(1, 251)))
    part.runner.start()
    await part.reach(250)
    await part.runner.stop()
    assert [(100, 100), (200, 200), (250, 250)] == committed
    assert {"c1": list(range(1, 251))} == contents(part.path)


async def test_a_partition_goes_on_from_what_its_file_holds(part: Rig, stream: Stream) -> None:
    """The acknowledgement is for operators; the position is in the file."""
    stream.add(delivery(1), delivery(2))
    part.runner.start()
    await part.reach(2)
    await part.runner.stop()
    stream.add(delivery(3))
    async with rig(part.path.parent, stream) as again:
        again.runner.start()
        await again.reach(3)
        await again.runner.stop()
    assert [2, 3] == stream.acknowledged
    assert {"c1": [1, 2, 3]} == contents(part.path)


@pytest.mark.parametrize("call", ["read_into", "write", "truncate"])
async def test_a_lack_of_memory_in_a_call_of_hdf5_is_waited_for(
    part: Rig, stream: Stream, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HDF5 says that its file is bad, which would stop the partition for good."""
    stream.add(delivery(1))
    part.runner.start()
    await part.reach(1)
    original, left = getattr(PageCache, call), 3

    def failing(*args: Any) -> Any:
        nonlocal left
        if left:
            left -= 1
            raise MemoryError
        return original(*args)

    monkeypatch.setattr(PageCache, call, failing)
    stream.add(*(delivery(sequence, consultation=f"c{sequence}") for sequence in range(2, 30)))
    await part.reach(29)
    await part.runner.stop()
    failures = [
        part.metrics.registry.get_sample_value("fi_persister_failures_total", {"partition": "00", "kind": kind}) or 0
        for kind in ("transient", "unexpected", "permanent")
    ]
    assert (0, True, [0, 0]) == (left, failures[0] > 0, failures[1:])
    assert {f"c{sequence}": [sequence] for sequence in range(1, 30)} == contents(part.path)


async def test_a_full_disk_is_shown_and_waited_for(part: Rig, stream: Stream) -> None:
    """Nothing is acknowledged meanwhile; when there is room again the batch is written once."""
    disk = part.io = FullDisk()
    stream.add(delivery(1))
    part.runner.start()
    await part.reach(1)
    disk.full = True
    stream.add(delivery(2), delivery(3))
    await eventually(lambda: (part.sample("fi_persister_failures_total", kind="transient") or 0) >= 3)
    await part.be(RunnerState.RETRYING)
    assert "No space left on device" in part.runner.reason
    assert [1] == stream.acknowledged
    disk.full = False
    await part.reach(3)
    assert (RunnerState.FOLLOWING, "") == (part.runner.state, part.runner.reason)
    await part.runner.stop()
    assert {"c1": [1, 2, 3]} == contents(part.path)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize(("kind", "after"), [("pwrite", 0), ("pwrite", 1), ("fdatasync", 0), ("fdatasync", 1)])
async def test_a_failed_write_or_sync_leads_to_the_same_events_once(
    part: Rig, stream: Stream, kind: str, after: int, code: int
) -> None:
    """Whether the failed commit counts shows when the file is opened again; in both cases each event is there once."""
    stream.add(delivery(1))
    part.runner.start()
    await part.reach(1)
    await part.runner.stop()
    async with rig(part.path.parent, stream) as again:
        failing = again.io = FailingIO(kind, after, code)
        stream.add(*(delivery(sequence) for sequence in range(2, 40)))
        again.runner.start()
        await eventually(lambda: again.store is not None and again.store.committed == 39 and failing.failed)
        stream.add(delivery(40))
        await again.reach(40)
        await again.runner.stop()
        assert failing.failed
    assert {"c1": list(range(1, 41))} == contents(part.path)


async def test_a_permanent_error_stops_the_partition_and_releases_the_file(part: Rig, stream: Stream) -> None:
    """The operator reads the reason in /readyz; nothing is tried again until the process is restarted."""
    part.runner.start()
    await part.be(RunnerState.FOLLOWING)
    part.runner.fail(PermanentError("the stream is another one"))
    await part.be(RunnerState.STOPPED)
    assert part.runner.reason == "the stream is another one"
    assert 1.0 == part.sample("fi_persister_failures_total", kind="permanent")
    EventStore.open(part.path, expected=None).close()
    await part.runner.stop()


async def test_a_message_that_breaks_its_batch_is_found_and_set_aside(part: Rig, stream: Stream) -> None:
    """An error that should not exist stops nothing: taken singly, what fails twice alone is poison (ADR 0005)."""

    def wrap(store: EventStore) -> None:
        append = store.append

        def breaking(consultation: str, records: Any) -> bool:
            if any(record.sequence == 5 for record in records):
                raise ZeroDivisionError("secret")
            return append(consultation, records)

        store.append = breaking  # type: ignore[method-assign]

    part.wrap = wrap
    stream.add(*(delivery(sequence) for sequence in range(1, 11)))
    part.runner.start()
    await part.reach(10)
    assert [(5, "could not be written: ZeroDivisionError")] == part.dead.reasons
    stream.add(delivery(11), delivery(12))
    await part.reach(12)
    assert 11 not in stream.acknowledged  # batches are whole again
    await part.runner.stop()
    assert {"c1": [1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12]} == contents(part.path)


async def test_a_lack_of_memory_makes_no_event_poison(part: Rig, stream: Stream) -> None:
    """The machine's trouble is no fault of the message: it waits."""
    left = 5

    def wrap(store: EventStore) -> None:
        commit = store.commit

        def failing(sequence: int, message_id: str = "") -> None:
            nonlocal left
            left -= 1
            if left >= 0:
                raise MemoryError
            commit(sequence, message_id)

        store.commit = failing  # type: ignore[method-assign]

    part.wrap = wrap
    stream.add(delivery(1))
    part.runner.start()
    await part.reach(1)
    await part.runner.stop()
    assert [] == part.dead.letters
    assert {"c1": [1]} == contents(part.path)


async def test_poison_is_stored_away_before_its_batch_is_acknowledged(part: Rig, stream: Stream) -> None:
    """Its neighbours are written; the dead letter has the reason and the position."""
    part.dead.gate = asyncio.Event()
    stream.add(delivery(1), poison(2), delivery(3))
    part.runner.start()
    await eventually(lambda: part.dead.attempts == 1)
    assert [] == stream.acknowledged
    part.dead.gate.set()
    await part.reach(3)
    await part.runner.stop()
    assert [(2, "the message has no Nats-Msg-Id header")] == part.dead.reasons
    assert 1.0 == part.sample("fi_persister_dead_letters_total")
    assert {"c1": [1, 3]} == contents(part.path)


async def test_a_batch_with_poison_waits_for_the_dead_letter_stream(part: Rig, stream: Stream) -> None:
    """A message counts as done only when it is kept somewhere."""
    part.dead.down = True
    stream.add(delivery(1), poison(2), delivery(3))
    part.runner.start()
    await eventually(lambda: part.dead.attempts >= 3)
    await part.be(RunnerState.RETRYING)
    assert part.runner.reason == "the dead-letter stream is out of reach"
    assert [] == stream.acknowledged
    part.dead.down = False
    await part.reach(3)
    await part.runner.stop()
    assert [2] == [sequence for sequence, _ in part.dead.reasons]
    assert {"c1": [1, 3]} == contents(part.path)


async def test_an_event_under_a_used_id_is_kept_under_conflicts_in_the_same_commit(part: Rig, stream: Stream) -> None:
    """The first one stays the consultation's own; the second is as safe, and ``fi-dead`` says where it is."""
    body = reusing(2, of=1).body
    stream.add(delivery(1), reusing(2, of=1), delivery(3, of=1), delivery(4))
    part.runner.start()
    await part.reach(4)
    await eventually(lambda: part.dead.letters)
    await part.runner.stop()
    ((_, pointer, headers),) = part.dead.letters
    assert {"consultation_id": "c1", "conflicts": [[2, 1]]} == orjson.loads(pointer)
    assert "/conflicts/" in headers["Fi-Reason"]
    assert [(1.0, 0.0, 1.0)] == [
        tuple(part.sample(f"fi_persister_{name}_total") for name in ("reused_keys", "dead_letters", "duplicates"))
    ]
    assert {"c1": [1, 4]} == contents(part.path)
    assert {"c1": [(2, body)]} == conflicts(part.path)


async def test_a_conflict_that_is_posted_again_is_kept_once(part: Rig, stream: Stream) -> None:
    """Exactly once holds for it, too; another body under the id is another conflict."""
    other = b'{"event_type":"U"}'
    stream.add(delivery(1), reusing(2, of=1))
    part.runner.start()
    await part.reach(2)
    stream.add(reusing(3, of=1), reusing(4, of=1, body=other))
    await part.reach(4)
    await part.runner.stop()
    assert {"c1": [(2, reusing(2, of=1).body), (4, other)]} == conflicts(part.path)


async def test_a_flood_of_used_ids_stops_nothing_and_loses_nothing(tmp_path: Path, stream: Stream) -> None:
    """One client's mistake must not block others, even while `fi-dead` is full."""
    stream.add(delivery(1), *(reusing(n, of=1, body=b'{"event_type":"%d"}' % n) for n in range(2, 300)), delivery(300))
    async with rig(tmp_path, stream, limit=PoisonLimit(streak=5, ratio=0.01, window=10)) as part:
        part.dead.down = True
        part.runner.start()
        await part.reach(300)
        await part.runner.stop()
        assert 298.0 == part.sample("fi_persister_reused_keys_total")
    assert {"c1": [1, 300]} == contents(part.path)
    assert list(range(2, 300)) == [sequence for sequence, _ in conflicts(part.path)["c1"]]


async def test_a_batch_that_fails_keeps_no_conflict_either(part: Rig, stream: Stream) -> None:
    """Events and conflicts are in one commit: a failed one is tried again as a whole."""
    disk = part.io = FullDisk()
    stream.add(delivery(1))
    part.runner.start()
    await part.reach(1)
    disk.full = True
    stream.add(reusing(2, of=1), delivery(3))
    await eventually(lambda: (part.sample("fi_persister_failures_total", kind="transient") or 0) >= 2)
    disk.full = False
    await part.reach(3)
    await part.runner.stop()
    assert {"c1": [1, 3]} == contents(part.path)
    assert [2] == [sequence for sequence, _ in conflicts(part.path)["c1"]]


async def test_a_flood_of_poison_stops_the_partition(tmp_path: Path, stream: Stream) -> None:
    """A bad release must not empty the stream into the dead letters; nothing after it is acknowledged."""
    stream.add(delivery(1), *(poison(sequence) for sequence in range(2, 50)))
    async with rig(tmp_path, stream, limit=PoisonLimit(streak=5)) as part:
        part.runner.start()
        await part.be(RunnerState.STOPPED)
        assert "5 poison messages in a row" in part.runner.reason
        assert "FI_POISON_STREAK=0" in part.runner.reason
        assert 4 == len(part.dead.letters)
        assert [] == stream.acknowledged
        await part.runner.stop()
    async with rig(tmp_path, stream, limit=PoisonLimit(streak=0)) as again:
        again.runner.start()
        await again.reach(49)
        await again.runner.stop()
        assert 48 == len(again.dead.letters)
    assert {"c1": [1]} == contents(part.path)


async def test_rare_poison_never_adds_up_to_a_flood(tmp_path: Path, stream: Stream) -> None:
    """Each comes in a batch of its own, with good batches between."""
    async with rig(tmp_path, stream, limit=PoisonLimit(streak=3)) as part:
        part.runner.start()
        for number in range(6):
            for one in (poison(2 * number + 1), delivery(2 * number + 2)):
                stream.add(one)
                await part.reach(one.sequence)
        await part.runner.stop()
        assert 6 == len(part.dead.letters)


async def test_good_batches_count_for_the_share_of_poison(tmp_path: Path, stream: Stream) -> None:
    """Two of ten may be poison; how the messages are divided into batches makes no difference."""
    async with rig(tmp_path, stream, limit=PoisonLimit(streak=100, ratio=0.2, window=10)) as part:
        part.runner.start()
        for first in (1, 11):
            stream.add(poison(first), poison(first + 1), *(delivery(first + more) for more in range(2, 9)))
            await part.reach(first + 8)
            stream.add(delivery(first + 9))
            await part.reach(first + 9)
        for number in (21, 22):
            stream.add(poison(number))
            await part.reach(number)
        stream.add(delivery(23), poison(24))
        await part.be(RunnerState.STOPPED)
        assert "3 of the last 10 messages were poison" in part.runner.reason
        assert 6 == len(part.dead.letters)
        assert 22 == stream.acknowledged[-1]
        await part.runner.stop()


async def test_poison_that_could_not_be_stored_yet_counts_once(tmp_path: Path, stream: Stream) -> None:
    """While `fi-dead` is down the same batch comes again and again: that is no flood."""
    async with rig(tmp_path, stream, limit=PoisonLimit(streak=3)) as part:
        part.dead.down = True
        stream.add(poison(1), poison(2))
        part.runner.start()
        await eventually(lambda: (part.sample("fi_persister_failures_total", kind="transient") or 0) >= 3)
        part.dead.down = False
        await part.reach(2)
        assert 2 == len(part.dead.letters)
        stream.add(poison(3))
        await part.be(RunnerState.STOPPED)
        assert "3 poison messages in a row" in part.runner.reason
        await part.runner.stop()


async def test_a_stop_finishes_the_batch_in_hand(part: Rig, stream: Stream) -> None:
    """Committed, acknowledged, copied into the file, released."""
    part.dead.gate = asyncio.Event()
    stream.add(delivery(1), poison(2))
    part.runner.start()
    await eventually(lambda: part.dead.attempts == 1)
    stopping = asyncio.create_task(part.runner.stop())
    stream.add(delivery(3))
    assert not (await asyncio.wait({stopping}, timeout=0.1))[0]
    part.dead.gate.set()
    async with asyncio.timeout(5):
        await stopping
    assert [2] == stream.acknowledged
    EventStore.open(part.path, expected=None).close()
    assert {"c1": [1]} == contents(part.path)


async def test_a_stop_ends_although_the_batch_in_hand_fails(part: Rig, stream: Stream) -> None:
    """The failure must not swallow the stop: the process would never end."""
    part.dead.gate = asyncio.Event()
    part.dead.down = True
    stream.add(delivery(1), poison(2))
    part.runner.start()
    await eventually(lambda: part.dead.attempts == 1)
    stopping = asyncio.create_task(part.runner.stop())
    await asyncio.sleep(0)
    part.dead.gate.set()
    async with asyncio.timeout(5):
        await stopping
    assert [] == stream.acknowledged
    EventStore.open(part.path, expected=None).close()


async def test_a_stop_while_the_file_is_being_opened_releases_the_lock(part: Rig, stream: Stream) -> None:
    """The opening goes on in its thread; another process must get the file all the same."""
    entered, go_on = threading.Event(), threading.Event()

    def wrap(_: EventStore) -> None:
        entered.set()
        go_on.wait(5)

    part.wrap = wrap
    part.runner.start()
    await eventually(entered.is_set)
    stopping = asyncio.create_task(part.runner.stop())
    await asyncio.sleep(0)
    go_on.set()
    async with asyncio.timeout(5):
        await stopping
    EventStore.open(part.path, expected=None).close()


async def test_a_stop_whose_caller_is_cancelled_still_releases(part: Rig, stream: Stream) -> None:
    """SIGTERM while a partition is handed over: the caller ends at once, the partition in order."""
    part.dead.gate = asyncio.Event()
    stream.add(delivery(1), poison(2))
    part.runner.start()
    await eventually(lambda: part.dead.attempts == 1)
    handover = asyncio.create_task(part.runner.stop())
    await asyncio.sleep(0.01)
    handover.cancel()
    with pytest.raises(asyncio.CancelledError):
        await handover
    part.dead.gate.set()
    async with asyncio.timeout(5):
        await part.runner.stop()
    assert [2] == stream.acknowledged
    EventStore.open(part.path, expected=None).close()


async def test_a_partition_that_another_process_holds_is_taken_when_it_is_released(part: Rig, stream: Stream) -> None:
    """A handover is no failure: no backoff, no alarm."""
    stream.add(delivery(1))
    async with rig(part.path.parent, stream) as other:
        other.runner.start()
        await other.reach(1)
        part.runner.start()
        await part.be(RunnerState.RETRYING)
        await other.runner.stop()
    stream.add(delivery(2))
    await part.reach(2)
    await part.runner.stop()
    assert part.sample("fi_persister_failures_total", kind="transient") == 0.0
    assert {"c1": [1, 2]} == contents(part.path)


async def test_a_partition_that_another_process_does_not_release_is_reported(
    part: Rig, stream: Stream, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It waits as long as necessary, but so do its events: the log must show it and name the file."""
    monkeypatch.setattr("services.persister.partition.HANDOVER_SECONDS", 0.05)
    async with rig(part.path.parent, stream) as other:
        other.runner.start()
        await other.be(RunnerState.FOLLOWING)
        part.runner.start()
        await eventually(lambda: part.sample("fi_persister_failures_total", kind="transient") != 0.0)
        await other.runner.stop()
    stream.add(delivery(1))
    await part.reach(1)
    printed = capsys.readouterr()
    assert re.search(r"EVENT_PERSIST_FAILED .*CorpusLockedError", printed.out + printed.err)


async def test_an_idle_partition_follows_the_stream(part: Rig, stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that trim need not stop at its last event."""
    monkeypatch.setattr("services.persister.partition.IDLE_SECONDS", 0.05)
    stream.add(delivery(1))
    part.runner.start()
    await part.reach(1)
    await eventually(lambda: part.runner.idle_at == 1)
    for proven in (50, 40):
        stream.empty_up_to = Position(proven, "other/id")
        await part.runner.advance()
    assert [50] == stream.advanced
    assert 50 == part.runner.idle_at
    await part.runner.stop()
    store = EventStore.open(part.path, expected=None)
    assert store.committed == 50
    store.close()


async def test_an_idle_partition_shows_that_its_disk_fails(part: Rig, stream: Stream) -> None:
    """Not only the next event finds out; and it opens its file again by itself."""
    disk = part.io = FullDisk()
    stream.add(delivery(1))
    part.runner.start()
    await part.reach(1)
    disk.full = True
    stream.empty_up_to = Position(50, "other/id")
    await part.runner.advance()
    await eventually(lambda: (part.sample("fi_persister_failures_total", kind="transient") or 0) >= 1)
    disk.full = False
    await part.be(RunnerState.FOLLOWING)
    await part.runner.advance()
    assert [50] == stream.advanced
    await part.runner.stop()


@pytest.mark.parametrize("name", ["00.h5", "00.h5.wal"])
async def test_files_that_are_deleted_stop_the_partition(part: Rig, stream: Stream, name: str) -> None:
    """What is committed to a deleted file goes nowhere, and its acknowledgement would let trim delete the events."""
    stream.add(delivery(1))
    part.runner.start()
    await part.reach(1)
    (part.path.parent / name).unlink()
    stream.add(delivery(2))
    await part.be(RunnerState.STOPPED)
    assert "deleted or replaced" in part.runner.reason
    assert [1] == stream.acknowledged
    await part.runner.stop()


async def test_an_idle_partition_notices_that_its_directory_is_gone(part: Rig, stream: Stream) -> None:
    """The volume was removed while it ran."""
    stream.add(delivery(1))
    part.runner.start()
    await part.reach(1)
    shutil.rmtree(part.path.parent)
    await part.runner.maintain()
    await part.be(RunnerState.STOPPED)
    await part.runner.stop()


async def test_no_log_line_quotes_an_event(part: Rig, stream: Stream, capsys: pytest.CaptureFixture[str]) -> None:
    """Payloads are medical data: neither errors nor dead letters may show them."""
    secret = b'{"event_type":"T","payload":"hush"'
    stream.add(poison(1, delivery(1).headers, secret), poison(2, {"Nats-Msg-Id": "hush"}, b'"hush"'), delivery(3))
    part.runner.start()
    await part.reach(3)
    await part.runner.stop()
    printed = capsys.readouterr()
    assert "EVENT_SET_ASIDE" in printed.out
    assert "hush" not in printed.out + printed.err


async def test_a_call_on_the_file_that_does_not_come_back_is_counted(part: Rig, stream: Stream) -> None:
    """A disk that hangs raises no error; only the waiting time shows it."""
    stream.add(delivery(1))
    part.runner.start()
    await part.reach(1)
    gate = threading.Event()
    call = asyncio.create_task(part.rounds.hdf5.run(lambda: gate.wait(30)))
    await eventually(lambda: part.runner.disk_wait > 0.2)
    gate.set()
    assert await call
    await eventually(lambda: part.runner.disk_wait == 0)
    await part.runner.stop()


async def test_what_fails_in_the_thread_after_a_cancellation_is_not_quoted(
    part: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    """asyncio logs an exception that was never retrieved, with its text."""
    gate = threading.Event()

    def fail() -> None:
        gate.wait(30)
        raise ValueError("a patient's words")

    call = asyncio.create_task(part.rounds.hdf5.run(fail))
    await asyncio.sleep(0)
    call.cancel()
    gate.set()
    await asyncio.wait({call})
    del call
    gc.collect()
    await asyncio.sleep(0)
    assert "words" not in caplog.text

"""Trimming on a real cluster: what every store has committed, in slices, by the broker's clock; nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from fiq.event import Event, message_id_at, new_event_id
from services.cli.embedded.processes import Cluster
from services.log.errors import CorpusAwayError
from services.log.jetstream import log as module
from services.log.jetstream.log import Trimmer
from services.log.jetstream.placement import KEYS_SECONDS, BucketPlacements
from services.log.jetstream.reader import JetStreamReader
from services.log.jetstream.stream import STREAM
from services.log.partitions import partition_of
from services.log.protocol import Trimmed
from services.log.settings import LogSettings
from services.log.status import Placement
from tests.support.persisters import PARTITIONS, Log, provisioned
from tests.support.polling import eventually

DAY = 86400.0
#: bytes of a body, and a limit of the stream that some four hundred of them fill
BODY, ROOM = 4000, 2 * 2**20


@pytest.fixture
async def log(fresh_log: Cluster) -> AsyncIterator[Log]:
    async with provisioned(fresh_log) as made:
        yield made


@pytest.fixture
async def small(fresh_log: Cluster) -> AsyncIterator[Log]:
    async with provisioned(fresh_log, max_bytes=ROOM) as made:
        yield made


class Keys:
    """The keys of a store, as its persisters would put them."""

    def __init__(self, log: Log, store: str = "main", message_ids: Mapping[int, str] | None = None) -> None:
        settings = LogSettings(servers=log.settings.servers, partitions=PARTITIONS, store=store)
        self._placements = BucketPlacements(log.nc, settings)
        self._placed: dict[int, Placement] = {}
        self._message_ids = message_ids or {}

    async def reached(self, **committed: int) -> Keys:
        """Put what partitions ("p0") have committed; "rest" stands for the others."""
        for partition in range(PARTITIONS):
            at = committed.get(f"p{partition}", committed.get("rest"))
            if at is None:
                continue
            if partition not in self._placed:
                self._placed[partition] = await self._placements.claim(partition, "v1", 1, begins=1)
            if at != self._placed[partition].committed:
                message_id = self._message_ids.get(at, "")
                self._placed[partition] = await self._placements.progress(self._placed[partition], at, message_id)
        return self


async def _fill(log: Log, share: float, *, size: int = BODY, together: int = 20) -> None:
    """Publish to all partitions until the stream is that full."""
    body = b'{"event_type":"T","payload":%*d}' % (size, 1)
    number = 0
    while (await log.state())["bytes"] < share * log.settings.max_bytes:
        events = [Event(f"c{number + n}", new_event_id(), 1, body) for n in range(together)]
        await asyncio.gather(*(log.publisher.append(event) for event in events))
        number += together


async def _sequences(log: Log) -> dict[int, list[int]]:
    """Return the sequences that the stream holds, of each partition."""
    state = await log.state()
    found: dict[int, list[int]] = {partition: [] for partition in range(PARTITIONS)}
    for sequence in range(state["first_seq"], state["last_seq"] + 1):
        message = await log.api.leader_message(STREAM, sequence)
        if message is not None:
            found[int(message["subject"].split(".")[2])].append(sequence)
    return found


@asynccontextmanager
async def _publishing(log: Log) -> AsyncIterator[list[float]]:
    """Publish one event after the other; yield how long each took, seconds."""
    took: list[float] = []

    async def publish() -> None:
        while True:
            began = time.perf_counter()
            await log.publisher.append(Event("busy", new_event_id(), 1, b"{}"))
            took.append(time.perf_counter() - began)

    task = asyncio.create_task(publish())
    try:
        yield took
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# -- reading ----------------------------------------------------------------------------------------------------------


async def test_what_was_deleted_around_a_partition_is_not_shown_as_if_it_had_never_been(
    small: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While no persister answers for them: a client would take that for all. Behind the holes it can read."""
    monkeypatch.setattr(module, "FILTER_SLICE", 20)
    held, other = (next(f"c{n}" for n in range(9) if partition_of(f"c{n}", PARTITIONS) == p) for p in (1, 2))
    body = b'{"event_type":"T","payload":%*d}' % (BODY, 1)
    sent = [Event(held, new_event_id(), 1, body)]
    await small.publisher.append(sent[0])
    while (await small.state())["bytes"] < 0.75 * small.settings.max_bytes:
        sent += (more := [Event(other, new_event_id(), 1, body) for _ in range(20)])
        await small.publisher.append_batch(more)
    reader = JetStreamReader(small.nc, small.settings, timeout=2)
    assert 5 == len((await reader.page(other, 0, 5)).events)
    last = (await small.state())["last_seq"]
    await Keys(small).reached(rest=last, p1=0)

    assert (await Trimmer(small.nc, retention=3600).trim()).purged

    assert 1 == (await small.state())["first_seq"]
    with pytest.raises(CorpusAwayError):
        await reader.page(other, 0, 5)
    with pytest.raises(CorpusAwayError):
        await reader.locate(other, sent[1].event_id)
    page = await reader.page(other, last - 3, 5)
    assert [one.event_id for one in sent[-3:]] == [one.event.event_id for one in page.events]


# -- a stream that was set back ---------------------------------------------------------------------------------------


async def test_a_key_whose_message_the_stream_does_not_have_there_trims_nothing(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What clients posted since the stream was set back is in no file; it is told once."""
    await log.publish(40)
    found = await log.api.leader_message(STREAM, 30)
    assert found is not None
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(module, "_trim_log", SimpleNamespace(error=lambda _, **what: told.append(what)))
    keys = await Keys(log, message_ids={30: message_id_at(found["headers"]), 35: "other/id"}).reached(rest=30, p2=35)
    trimmer = Trimmer(log.nc, retention=0)

    assert [0, 0] == [(await trimmer.trim()).purged for _ in range(2)]
    assert [{"key": "main.02", "committed": 35}] == told

    await keys.reached(rest=30)
    assert 30 == (await trimmer.trim()).purged


# -- what may go ------------------------------------------------------------------------------------------------------


async def test_what_every_store_has_committed_goes_and_no_more(log: Log) -> None:
    """The second store is behind in partition 1: everything after its position stays, of all partitions."""
    await log.publish(40)
    await (await Keys(log).reached(rest=40)).reached()
    await Keys(log, "second").reached(rest=40, p1=17)
    assert Trimmed(17, 17, 0.0) == _rounded(await Trimmer(log.nc, retention=0).trim())
    assert 18 == (await log.state())["first_seq"]


async def test_a_store_that_is_not_formed_holds_everything_back(log: Log) -> None:
    """Its partitions without a key have committed nothing."""
    await log.publish(40)
    await Keys(log).reached(rest=40)
    keys = await Keys(log, "second").reached(p0=40, p1=40, p2=40)
    trimmer = Trimmer(log.nc, retention=0)
    assert Trimmed(0, 0, 0.0) == _rounded(await trimmer.trim())
    await keys.reached(p3=40)
    assert 40 == (await trimmer.trim()).purged


async def test_a_key_that_was_deleted_holds_everything_back(log: Log) -> None:
    """Only an operator knows what its file holds."""
    await log.publish(40)
    await Keys(log).reached(rest=40)
    await log.nc.request("$KV.fi-partitions.main.02", b"", headers={"KV-Operation": "DEL"}, timeout=5)
    assert Trimmed(0, 0, 0.0) == _rounded(await Trimmer(log.nc, retention=0).trim())


async def test_a_partition_that_was_placed_anew_holds_back_what_it_lacks(log: Log) -> None:
    """A restore says where its files end; a trimmer that began before that looks again before each purge."""
    await log.publish(40)
    keys = await Keys(log).reached(rest=40)
    trimmer = Trimmer(log.nc, retention=0)
    looked = await trimmer._look()
    await keys.reached(p2=10)
    await asyncio.sleep(KEYS_SECONDS)
    assert 0 == await trimmer._purge(looked, 40)
    assert 10 == (await trimmer.trim()).purged


# -- age and clocks ---------------------------------------------------------------------------------------------------


async def test_young_events_stay_while_there_is_room(log: Log) -> None:
    """To the very event: what is older than the retention goes."""
    await log.publish(300, consultations=30)
    await asyncio.sleep(2)
    await log.publish(10)
    await Keys(log).reached(rest=310)
    assert 0 == (await Trimmer(log.nc, retention=60).trim()).purged
    assert 300 == (await Trimmer(log.nc, retention=1.5).trim()).purged


@pytest.mark.parametrize("jump", [DAY, -DAY])
async def test_a_jump_of_our_own_clock_deletes_nothing(log: Log, monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    """Everything was deleted when it was a day ahead."""
    await log.publish(40)
    await Keys(log).reached(rest=40)
    monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: time.time() + jump, monotonic=time.monotonic))
    assert Trimmed(40, 0, 0.0) == _rounded(await Trimmer(log.nc, retention=3600).trim())


@pytest.mark.parametrize("jump", [DAY, -DAY])
async def test_a_jump_of_the_leaders_clock_deletes_nothing(
    log: Log, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """Of the clock that it answers with, or that it stamps new events with, whichever way it jumps."""
    await log.publish(40)
    await Keys(log).reached(rest=40)
    trimmer = Trimmer(log.nc, retention=3600)
    request = trimmer._api.request

    async def jumped(suffix: str, *args: Any, **more: Any) -> dict[str, Any]:
        answer = await request(suffix, *args, **more)
        if "ts" in answer:
            answer["ts"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + jump))
        return answer

    monkeypatch.setattr(trimmer._api, "request", jumped)
    assert 0 == (await trimmer.trim()).purged
    stored_at = trimmer._stored_at

    async def stamped(sequence: int) -> float:
        """Say of each event after the first twenty that a leader stored it whose clock had jumped."""
        return await stored_at(sequence) + (jump if sequence > 20 else 0)

    monkeypatch.setattr(trimmer, "_stored_at", stamped)
    assert 0 == (await trimmer.trim()).purged


# -- a full stream ----------------------------------------------------------------------------------------------------


async def test_a_full_stream_keeps_its_cushion(small: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest go, down to 60 %, and no further; below 70 % nothing does. (All of it went at once.)"""
    monkeypatch.setattr(module, "SLICE", 10)
    trimmer = Trimmer(small.nc, retention=3600)
    await _fill(small, 0.65)
    keys = await Keys(small).reached(rest=(await small.state())["last_seq"])
    assert 0 == (await trimmer.trim()).purged
    await _fill(small, 0.75)
    await keys.reached(rest=(await small.state())["last_seq"])
    trimmed = await trimmer.trim()
    assert 0.55 < trimmed.fullness <= 0.6
    assert trimmed.purged + 1 == (await small.state())["first_seq"]
    assert 0 == (await trimmer.trim()).purged


async def test_a_partition_that_is_stopped_holds_back_its_own_events_only(
    small: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a full stream; none of its own goes, and the oldest of the others do, also when it stands at the beginning."""
    monkeypatch.setattr(module, "SLICE", 20)
    monkeypatch.setattr(module, "FILTER_SLICE", 20)
    await _fill(small, 0.75)
    last = (await small.state())["last_seq"]
    before = await _sequences(small)
    keys = await Keys(small).reached(rest=last, p1=0)
    trimmer = Trimmer(small.nc, retention=3600)
    trimmed = await trimmer.trim()
    after = await _sequences(small)
    assert (0, True) == (trimmed.committed, 0.5 < trimmed.fullness <= 0.6)
    assert before[1] == after[1]
    for partition in (0, 2, 3):  # the oldest are gone, and only they
        assert after[partition] == before[partition][-len(after[partition]) :]
        assert len(after[partition]) < len(before[partition])
    # and it gets all of them when it goes on, found by sequence and by subject
    first = await small.api.leader_message(STREAM, 1, next_of="fi.events.1.*")
    assert first is not None
    assert before[1][0] == first["seq"]
    counted = await small.api.get_message(STREAM, 1, next_of="fi.events.1.*", counted=True)
    assert counted is not None
    assert len(before[1]) == 1 + counted["pending"]
    # once it has gone on, the rest goes by sequence again
    await keys.reached(rest=last)
    await _fill(small, 0.75)
    await keys.reached(rest=(await small.state())["last_seq"])
    assert 0.5 < (await trimmer.trim()).fullness <= 0.6


async def test_a_cursor_gets_every_event_of_a_partition_around_which_was_trimmed(
    small: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, from its position on, although what lies between is gone."""
    monkeypatch.setattr(module, "FILTER_SLICE", 20)
    await _fill(small, 0.75)
    expected = (await _sequences(small))[1]
    await Keys(small).reached(rest=(await small.state())["last_seq"], p1=expected[2])
    assert 0 < (await Trimmer(small.nc, retention=3600).trim()).purged
    subscription = await small.nc.jetstream().subscribe(
        "fi.events.1.*", stream=STREAM, ordered_consumer=True, config=_from(expected[2] + 1)
    )
    got = [(await subscription.next_msg(timeout=5)).metadata.sequence.stream for _ in expected[3:]]
    assert expected[3:] == got


def _from(sequence: int) -> Any:
    from nats.js.api import ConsumerConfig, DeliverPolicy

    return ConsumerConfig(deliver_policy=DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=sequence)


async def test_publishing_goes_on_while_a_full_stream_is_trimmed(fresh_log: Cluster) -> None:
    """It stood still for as long as one purge of the whole cushion took. It took as long as one slice at most."""
    async with provisioned(fresh_log, max_bytes=32 * 2**20) as log:
        await _fill(log, 0.78, size=500, together=100)
        last = (await log.state())["last_seq"]
        await Keys(log).reached(rest=last, p3=last // 20)
        async with _publishing(log) as took:
            await eventually(lambda: len(took) > 20)
            undisturbed = max(took)
            took.clear()
            began = time.perf_counter()
            trimmed = await Trimmer(log.nc, retention=3600).trim()
            seconds = time.perf_counter() - began
    shown = (
        f"{trimmed.purged} events in {seconds:.1f} s; longest publish {max(took):.3f} s, {undisturbed:.3f} s without"
    )
    assert (True, True) == (0.5 < trimmed.fullness <= 0.6, trimmed.purged > 2 * module.SLICE)
    assert len(took) > 50
    assert max(took) < 1.0, shown


def _rounded(trimmed: Trimmed) -> Trimmed:
    return Trimmed(trimmed.committed, trimmed.purged, round(trimmed.fullness, 1))


def test_consultations_of_all_partitions_are_published() -> None:
    """Or the tests above would show nothing."""
    assert set(range(PARTITIONS)) == {partition_of(f"c{n}", PARTITIONS) for n in range(12)}

"""Bad messages on a real cluster: each to fi-dead with its reason, none in the way of the others (DESIGN, G6)."""

from __future__ import annotations

import asyncio
from pathlib import Path

import nats.errors
from nats.aio.client import Client

from services.log.jetstream.stream import STREAM
from services.log.partitions import partition_name, partition_of
from tests.support.persisters import PARTITIONS, Log, Persister, persisted
from tests.support.polling import eventually
from tests.support.raw_nats import HEADERS, SUBJECTS, message, publish_raw


async def garbage(nc: Client, consultation: str, count: int) -> None:
    """Publish what is no event, and wait until the stream has it, also while a route is made again."""

    async def stored() -> bool:
        try:
            await nc.request(f"fi.events.{consultation}", b"garbage", timeout=10)
        except nats.errors.NoRespondersError:
            return False
        return True

    for _ in range(count):
        await eventually(stored)


async def test_each_goes_to_the_dead_letters_and_its_neighbours_into_hdf5(log: Log, tmp_path: Path) -> None:
    """Whatever bytes it is made of, and however long it is; also when a route between two nodes breaks of it."""
    bad = [message(subject) for subject in SUBJECTS] + [message(b"c1", headers) for headers in HEADERS]
    with Persister(tmp_path, log.cluster, tmp_path / "data") as persister:
        await persister.ready()
        before = await log.publish(50)
        leader = await asyncio.to_thread(log.cluster.wait_stream_leader, STREAM)  # routes would not carry all of it
        await publish_raw(log.cluster.urls[leader], bad)
        await garbage(log.nc, "c2", 1)
        await log.nc.request("fi.events.c3", b"x" * log.nc.max_payload, timeout=10)
        after = await log.publish(50)
        await persisted(tmp_path / "data", before, after)

        async def letters() -> list[dict[str, str]]:
            found = await log.dead()
            return found if len(found) >= len(bad) + 2 else []

        dead = await eventually(letters)
        assert len(bad) + 2 == len(dead)
        assert all(headers["Fi-Reason"] and int(headers["Fi-Stream-Sequence"]) for headers in dead)
        assert [str(log.nc.max_payload)] == [h["Fi-Cut-From-Bytes"] for h in dead if "Fi-Cut-From-Bytes" in h]
        await persister.ready()
        assert 0 == await persister.end()
    events = {line["event"] for line in persister.lines}
    assert "EVENT_SET_ASIDE" in events
    assert not events & {"LOG_DISCONNECTED", "LIBRARY"}


async def test_a_flood_stops_its_partition_only_and_readiness_says_so(log: Log, tmp_path: Path) -> None:
    """The operator looks at fi-dead, stops the cause, and lets the rest be set aside."""
    data = tmp_path / "data"
    partition = partition_of("c1", PARTITIONS)
    other = next(f"c{n}" for n in range(2, 50) if partition_of(f"c{n}", PARTITIONS) != partition)
    with Persister(tmp_path / "a", log.cluster, data, FI_POISON_STREAK="5") as persister:
        await persister.ready()
        await garbage(log.nc, "c1", 12)
        reasons = await persister.not_ready("poison messages in a row")
        assert f"partition {partition_name(partition)} is stopped" in reasons
        assert 1 == reasons.count("partition ")
        assert 4 == len(await log.dead())
        await garbage(log.nc, other, 1)

        async def one_more() -> bool:
            return len(await log.dead()) == 5

        await eventually(one_more)
        assert 0 == await persister.end()
    with Persister(tmp_path / "b", log.cluster, data, FI_POISON_STREAK="0") as again:
        await again.ready()

        async def through() -> bool:
            return len({headers["Fi-Stream-Sequence"] for headers in await log.dead()}) == 13

        await eventually(through)
        await again.ready()
        assert 0 == await again.end()


async def test_a_dead_letter_stream_that_is_gone_makes_the_partition_wait(log: Log, tmp_path: Path) -> None:
    """Not skip: what is poison to this release may be fine to the next."""
    with Persister(tmp_path, log.cluster, tmp_path / "data") as persister:
        await persister.ready()
        await log.nc.request("$JS.API.STREAM.DELETE.fi-dead", timeout=10)
        await garbage(log.nc, "c1", 1)
        await persister.not_ready("is retrying: the log did not take the message")
        assert 0 == await persister.end()

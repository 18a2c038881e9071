"""Placement in the bucket: one winner of a claim, updates by revision, and what was deleted is not forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import nats.js.errors
import pytest

from services.cli.embedded.processes import Cluster
from services.log.errors import LogMismatchError, LogUnavailableError, PlacementError
from services.log.jetstream import placement as module
from services.log.jetstream.api import JetStreamApi
from services.log.jetstream.connection import Connection, close, connect
from services.log.jetstream.placement import BucketPlacements, read_stores
from services.log.jetstream.stream import BUCKET, BUCKET_STREAM, STREAM, provision
from services.log.settings import LogSettings
from services.log.status import Placement, StorePlacement
from tests.support.polling import eventually

VOLUMES = ("11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222")


def _settings(cluster: Cluster, **different: object) -> LogSettings:
    settings = LogSettings(servers=tuple(cluster.urls), max_bytes=64 << 20, dead_max_bytes=16 << 20)
    return replace(settings, **different)  # type: ignore[arg-type]


@pytest.fixture
async def nc(fresh_log: Cluster) -> AsyncIterator[Connection]:
    connection = await connect(_settings(fresh_log), name="test", on_closed=pytest.fail)
    await provision(connection, _settings(fresh_log))
    yield connection
    await close(connection)


@pytest.fixture
def placements(nc: Connection, cluster: Cluster) -> BucketPlacements:
    return BucketPlacements(nc, _settings(cluster))


async def test_of_claims_at_three_nodes_at_the_same_moment_exactly_one_wins(nc: Connection, cluster: Cluster) -> None:
    """Nine volumes ask through three nodes for each of 16 partitions: all learn of the same winner."""
    connections = [
        await connect(replace(_settings(cluster), servers=(url,)), name="test", on_closed=pytest.fail)
        for url in cluster.urls
    ]
    try:
        claimants = {f"volume-{n}": BucketPlacements(connections[n % 3], _settings(cluster)) for n in range(9)}
        for partition in range(16):
            told = await asyncio.gather(
                *(one.claim(partition, volume, 1, begins=1) for volume, one in claimants.items())
            )
            assert len(set(told)) == 1
            assert told[0].volume in claimants
        read = await BucketPlacements(nc, _settings(cluster)).read()
        assert set(range(16)) == set(read.partitions)
        assert all(place.revision for place in read.partitions.values())
    finally:
        for connection in connections:
            await close(connection)


async def test_a_claim_says_where_the_file_begins_and_that_it_holds_nothing(placements: BucketPlacements) -> None:
    found = await placements.claim(3, VOLUMES[0], 1, begins=101)

    assert Placement(3, VOLUMES[0], 1, committed=100, begins=101, revision=found.revision) == found
    assert {3: found} == (await placements.read()).partitions


async def test_another_claim_is_told_who_has_the_partition(placements: BucketPlacements) -> None:
    first = await placements.claim(3, VOLUMES[0], 1, begins=1)

    assert first == await placements.claim(3, VOLUMES[1], 1, begins=1)


async def test_progress_is_put_by_revision(placements: BucketPlacements) -> None:
    first = await placements.claim(3, VOLUMES[0], 1, begins=1)

    second = await placements.progress(first, 50, "c/1")

    assert replace(first, committed=50, message_id="c/1", revision=second.revision) == second
    assert second == await placements.get(3)


async def test_progress_adopts_the_revision_of_another_process_of_the_volume(placements: BucketPlacements) -> None:
    """As after a handover, or when a put took effect whose answer never came."""
    first = await placements.claim(3, VOLUMES[0], 1, begins=1)
    await placements.progress(first, 50)

    third = await placements.progress(first, 60)

    assert 60 == third.committed
    assert third == await placements.get(3)


async def test_of_two_processes_that_write_copies_of_a_partition_one_stops(
    placements: BucketPlacements, nc: Connection, cluster: Cluster
) -> None:
    """A handover moves the key once; a volume whose key moved again has a copy that uses the same identity."""
    claimed = await placements.claim(3, VOLUMES[0], 1, begins=1)
    other = BucketPlacements(nc, _settings(cluster))
    taken = await other.progress(await placements.progress(claimed, 10), 20)
    taken = await other.progress(taken, 30)
    ours = await placements.progress(claimed, 40)  # as after a handover back: what it had put does not count

    with pytest.raises(PlacementError, match=r"another process puts the progress of partition 03, too: two data dir"):
        await other.progress(taken, 30)

    assert 50 == (await placements.progress(ours, 50)).committed


async def test_the_last_progress_of_an_earlier_owner_does_not_replace_that_of_the_next_one(
    placements: BucketPlacements, nc: Connection, cluster: Cluster
) -> None:
    """The earlier owner never put progress of its own, released the file, and puts where it left it too late."""
    claimed = await placements.claim(3, VOLUMES[0], 1, begins=1)
    earlier = BucketPlacements(nc, _settings(cluster))
    ours = await placements.progress(claimed, 20)

    with pytest.raises(LogUnavailableError, match="progress of partition 03 was not put: its next owner has put its"):
        await earlier.progress(claimed, 10, owned=lambda: False)

    assert ours == await placements.get(3)
    assert 30 == (await placements.progress(ours, 30)).committed


async def test_two_processes_that_keep_step_are_found_out_too(
    placements: BucketPlacements, nc: Connection, cluster: Cluster
) -> None:
    """Each has what the other one put just now."""
    claimed = await placements.claim(3, VOLUMES[0], 1, begins=1)
    other = BucketPlacements(nc, _settings(cluster))
    ours, theirs = await placements.progress(claimed, 10), await other.progress(claimed, 10)

    with pytest.raises(PlacementError, match="another process puts"):
        await placements.progress(ours, 20)

    assert 20 == (await other.progress(theirs, 20)).committed


async def test_an_owner_that_begins_where_the_last_one_ended_goes_on_after_a_put_without_an_answer(
    placements: BucketPlacements, nc: Connection, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last progress of the earlier owner is the position of the next one, whose second put is not answered."""
    claimed = await placements.claim(3, VOLUMES[0], 1, begins=1)
    await BucketPlacements(nc, _settings(cluster)).progress(claimed, 10)
    ours = await placements.progress(claimed, 10)
    put, left = placements._put_placement, [True]

    async def unanswered(wanted: Placement) -> int | None:
        return None if left and left.pop() else await put(wanted)

    monkeypatch.setattr(placements, "_put_placement", unanswered)

    assert 20 == (await placements.progress(ours, 20)).committed


async def test_progress_finds_out_that_the_partition_was_placed_anew(placements: BucketPlacements) -> None:
    first = await placements.claim(3, VOLUMES[0], 1, begins=1)
    renewed = await placements.renew(replace(first, message_id="c/1"), epoch=2, committed=20)
    assert not renewed.message_id  # of the event at another sequence

    with pytest.raises(PlacementError, match=r"partition 03 was placed anew: volume 1111.*, epoch 2; it was on volume"):
        await placements.progress(first, 50)

    assert renewed == await placements.get(3)
    assert 20 == renewed.committed


async def test_progress_finds_out_that_the_bucket_was_set_back(placements: BucketPlacements) -> None:
    """Its key has an older revision than this process put: what another log's trim goes by must not be raised."""
    first = await placements.claim(3, VOLUMES[0], 1, begins=1)
    later = replace(first, revision=first.revision + 10)

    with pytest.raises(PlacementError, match="bucket fi-partitions was set back"):
        await placements.progress(later, 50)

    assert first == await placements.get(3)


async def test_renewing_what_changed_since_it_was_read_is_refused(placements: BucketPlacements) -> None:
    first = await placements.claim(3, VOLUMES[0], 1, begins=1)
    await placements.progress(first, 50)

    with pytest.raises(PlacementError, match="partition 03 changed meanwhile: its persister runs"):
        await placements.renew(first, epoch=2, committed=20)


async def test_the_store_is_formed_once(placements: BucketPlacements) -> None:
    assert not (await placements.read()).formed

    await placements.form(VOLUMES)
    await placements.form(VOLUMES[:1])

    read = await placements.read()
    assert read.formed
    assert VOLUMES == read.volumes


@pytest.mark.parametrize("verb", ["delete", "purge"])
async def test_a_deleted_key_is_told_and_cannot_be_claimed(
    placements: BucketPlacements, nc: Connection, verb: str
) -> None:
    await placements.claim(3, VOLUMES[0], 1, begins=1)
    bucket = await nc.jetstream().key_value(BUCKET)
    await getattr(bucket, verb)("main.03")

    read = await placements.read()
    with pytest.raises(PlacementError, match=r"the key main\.03 of bucket fi-partitions was deleted"):
        await placements.claim(3, VOLUMES[1], 1, begins=1)

    assert {3} == read.deleted
    assert {} == read.partitions


async def test_an_operator_places_what_has_lost_its_key(placements: BucketPlacements, nc: Connection) -> None:
    lost = await placements.progress(await placements.claim(3, VOLUMES[0], 1, begins=1), 50)
    await (await nc.jetstream().key_value(BUCKET)).delete("main.03")

    found = await placements.place(lost)

    assert replace(lost, revision=found.revision) == found
    assert {3: found} == (await placements.read()).partitions


async def test_a_key_that_cannot_be_read_counts_as_deleted(placements: BucketPlacements, nc: Connection) -> None:
    await (await nc.jetstream().key_value(BUCKET)).put("main.03", b'{"volume": 1}')
    bucket = await nc.jetstream().key_value(BUCKET)
    await bucket.put("main.04", b"oops")

    assert {4} <= (await placements.read()).deleted


async def test_keys_of_another_stream_of_events_do_not_count(
    placements: BucketPlacements, nc: Connection, cluster: Cluster
) -> None:
    """After a lost stream its sequences mean other events: nothing of the old one may be trimmed by, or followed."""
    old = await placements.claim(3, VOLUMES[0], 4, begins=1)
    await placements.form(VOLUMES)
    await JetStreamApi(nc).request(f"STREAM.DELETE.{STREAM}")
    await provision(nc, _settings(cluster))

    later = BucketPlacements(nc, _settings(cluster))
    read, stores = await later.read(), await read_stores(nc)
    claimed = await later.claim(3, VOLUMES[1], 1, begins=1)

    assert (False, {}, frozenset()) == (read.formed, read.partitions, read.deleted)
    assert {} == stores
    assert VOLUMES[1] == claimed.volume
    assert claimed.revision > old.revision


async def test_without_the_stream_or_the_bucket_there_is_no_placement(
    placements: BucketPlacements, nc: Connection
) -> None:
    await JetStreamApi(nc).request(f"STREAM.DELETE.{BUCKET_STREAM}")
    with pytest.raises(PlacementError, match="there is no bucket fi-partitions: `fiq provision` makes it"):
        await placements.read()

    await JetStreamApi(nc).request(f"STREAM.DELETE.{STREAM}")
    with pytest.raises(LogMismatchError, match="stream fi-events was deleted"):
        await placements.read()


async def test_all_stores_are_read_at_once(nc: Connection, cluster: Cluster) -> None:
    for store in ("main", "copy"):
        one = BucketPlacements(nc, _settings(cluster, store=store))
        await one.claim(0, VOLUMES[0], 1, begins=1)
    await one.form(VOLUMES)

    found = await read_stores(nc)

    assert {"copy": True, "main": False} == {name: store.formed for name, store in found.items()}
    assert all(VOLUMES[0] == store.partitions[0].volume for store in found.values())


async def test_a_replica_that_lags_decides_nothing(
    placements: BucketPlacements, nc: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader says how new the bucket is; where the answer is older, the leader itself is asked for each key."""
    claimed = [await placements.claim(p, VOLUMES[0], 1, begins=1) for p in (0, 1)]
    asked: list[str] = []
    leaders, replicas = module._leaders, module._replicas

    async def counted(api: JetStreamApi, key: str) -> module._Entry:
        asked.append(key)
        return await leaders(api, key)

    async def lagging(nc: Connection, keys: list[str], last: int) -> dict[str, module._Entry] | None:
        return await replicas(nc, keys, last + 1)

    monkeypatch.setattr(module, "_leaders", counted)
    monkeypatch.setattr(module, "_replicas", lagging)

    assert claimed == list((await placements.read()).partitions.values())
    assert ["main.00", "main.01"] == asked


async def test_places_tell_of_changes_but_not_of_progress(
    placements: BucketPlacements, nc: Connection, cluster: Cluster
) -> None:
    first = await placements.claim(0, VOLUMES[0], 1, begins=1)
    await placements.read()
    changes: list[None] = []
    other = BucketPlacements(nc, _settings(cluster))
    async with placements.watching(lambda: changes.append(None)):
        second = await other.progress(first, 10)
        await nc.flush()
        assert [] == changes
        await other.renew(second, epoch=2, committed=5)
        await eventually(lambda: changes)
        changes.clear()
        await (await nc.jetstream().key_value(BUCKET)).delete("main.00")
        await eventually(lambda: changes)


async def test_claim_and_progress_outlive_the_loss_of_the_buckets_leader(nc: Connection, cluster: Cluster) -> None:
    """Whatever happens to their answers, what is told in the end is what the bucket says."""
    placements = BucketPlacements(nc, _settings(cluster))
    claimed = await placements.claim(0, VOLUMES[0], 1, begins=1)
    info = await JetStreamApi(nc).stream_info(BUCKET_STREAM)
    assert info is not None
    index = int(info["cluster"]["leader"].removeprefix("n")) - 1
    cluster.kill(index)
    try:
        told: list[Placement] = []
        read: list[StorePlacement] = []

        async def all_of_them() -> bool:
            try:
                told[:] = [await placements.progress(claimed, 77), await placements.claim(1, VOLUMES[0], 1, begins=1)]
                read[:] = [await placements.read()]
            except LogUnavailableError:
                return False
            return True

        await eventually(all_of_them, 40)
        assert dict(enumerate(told)) == read[0].partitions
        assert 77 == told[0].committed
    finally:
        cluster.start_node(index)
        await asyncio.to_thread(cluster.wait_ready)


async def test_nats_py_reads_the_bucket_like_any_other(placements: BucketPlacements, nc: Connection) -> None:
    """So does `nats kv get fi-partitions main.00`."""
    first = await placements.claim(0, VOLUMES[0], 1, begins=1)
    await placements.progress(first, 10)
    bucket = await nc.jetstream().key_value(BUCKET)

    assert ["main.00"] == await bucket.keys()
    entry = await bucket.get("main.00")
    assert b'"committed":10' in (entry.value or b"")
    assert 2 == len(await bucket.history("main.00"))
    with pytest.raises(nats.js.errors.KeyWrongLastSequenceError):
        await bucket.update("main.00", b"{}", last=first.revision)

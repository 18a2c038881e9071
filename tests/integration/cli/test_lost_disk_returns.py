"""A disk that was given up or restored elsewhere comes back: it is refused, whatever was interrupted meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from fiq.corpus import open_corpus, verify_corpus
from services.cli.embedded.processes import Cluster
from services.log.errors import PlacementError
from services.log.jetstream.placement import BucketPlacements
from services.log.jetstream.stream import STREAM
from services.persister.volume import Volume
from tests.support.commands import done, fiq, killed_in, refused
from tests.support.persisters import PARTITIONS, Contents, Log, Persister, corpus_of, joined, persisted, provisioned
from tests.support.polling import eventually
from tests.support.torture import LONG

EVERY = range(PARTITIONS)


@pytest.fixture
async def log(fresh_log: Cluster) -> AsyncIterator[Log]:
    """Three nodes with fresh streams."""
    async with provisioned(fresh_log) as made:
        yield made


async def away(log: Log, folder: Path) -> tuple[Path, str, Contents]:
    """Return a volume's directory that is out of reach now, the volume's UUID, and what it holds."""
    data = folder / "old"
    with Persister(folder / "first", log.cluster, data) as persister:
        await persister.ready()
        events = await log.publish(40)
        await persisted(data, events)
        assert 0 == await persister.end()
    return data, Volume.open(data, "main").uuid, events


async def epochs(log: Log) -> list[int]:
    """Return the epochs that the cluster has, by partition."""
    return [place.epoch for place in (await BucketPlacements(log.nc, log.settings).read()).partitions.values()]


def epochs_in(data: Path) -> list[int]:
    """Return the epochs that the partition files say."""
    with open_corpus(data) as corpus:
        return [info.identity.epoch for info in corpus.partitions]


async def turned_away(log: Log, folder: Path, old: Path, *, epoch: int = 2) -> Persister:
    """Start a persister on the directory that came back, and return it once it has said why it does nothing."""
    persister = Persister(folder / "returned", log.cluster, old)

    async def check() -> bool:
        status, body = await persister.ask("/readyz")
        assert 503 == status
        assert PARTITIONS == body.count(f"epoch is 1 in the file but {epoch} is expected"), body
        assert PARTITIONS == body.count("`A lost disk comes back`")
        return True

    await eventually(check)
    return persister


async def test_a_disk_that_comes_back_after_it_was_given_up_is_refused(log: Log, tmp_path: Path) -> None:
    """Both directories have one name, and run at once: nothing is written to the old one, all of it to the new one."""
    old, volume, before = await away(log, tmp_path)
    data = tmp_path / "new"
    await done(log, "give-up", volume, "--to", data, "--yes")
    with await turned_away(log, tmp_path, old) as returned:
        with Persister(tmp_path / "b", log.cluster, data) as successor:
            await successor.ready()
            after = await log.publish(40)
            await persisted(data, before, after)
            assert "partition 00 is stopped" in (await returned.ask("/readyz"))[1]
            assert 0 == await successor.end()
        assert 0 == await returned.end()
    assert (before, [1] * PARTITIONS) == (corpus_of(old), epochs_in(old))
    assert [2] * PARTITIONS == epochs_in(data)
    assert verify_corpus(data).clean
    told = await fiq(log, "doctor", "--corpus", old)
    assert "`A lost disk comes back`" in " ".join((told.stdout + told.stderr).split())


async def test_a_disk_that_comes_back_after_a_restore_is_refused(log: Log, tmp_path: Path) -> None:
    """The same backup may be restored once more: it is one history, and the stream decides whether anything is lost."""
    old, _, before = await away(log, tmp_path)
    saved, data, again = tmp_path / "saved", tmp_path / "new", tmp_path / "again"
    await done(log, "backup", saved, "--corpus", old)
    assert "given up since" not in await done(log, "restore", saved, "--to", data)
    assert ([2] * PARTITIONS, [2] * PARTITIONS) == (epochs_in(data), await epochs(log))
    with await turned_away(log, tmp_path, old) as returned:
        with Persister(tmp_path / "b", log.cluster, data) as successor:
            await successor.ready()
            after = await log.publish(40)
            await persisted(data, before, after)
            assert 0 == await successor.end()
        assert 0 == await returned.end()
    assert before == corpus_of(old)

    assert "was restored or given up since the backup" in await done(log, "restore", saved, "--to", again)
    with Persister(tmp_path / "c", log.cluster, again) as successor:
        await successor.ready()
        await persisted(again, before, after)
        assert 0 == await successor.end()
    assert [3] * PARTITIONS == epochs_in(again)
    assert verify_corpus(again).clean


async def test_a_backup_that_is_found_after_the_volume_was_given_up_takes_its_place(log: Log, tmp_path: Path) -> None:
    """So the disk that came back does, too: as a backup of itself, with what the stream had lost."""
    old, volume, before = await away(log, tmp_path)
    data, saved, again = tmp_path / "new", tmp_path / "saved", tmp_path / "again"
    await log.api.purge(STREAM, 41)
    await done(log, "give-up", volume, "--to", data, "--yes")
    with Persister(tmp_path / "b", log.cluster, data) as successor:
        await successor.ready()
        after = await log.publish(10)
        await persisted(data, after)
        assert 0 == await successor.end()
    assert "is not where the cluster has the partition" in await refused(log, "backup", saved, "--corpus", old)
    await done(log, "backup", saved, "--corpus", old, "--offline")
    # --force: partitions whose last events came before 40 cannot know that they have everything below 41
    await done(log, "restore", saved, "--to", again, "--force")
    with Persister(tmp_path / "c", log.cluster, again) as successor:
        await successor.ready()
        await persisted(again, before, after)
        assert 0 == await successor.end()
    assert [3] * PARTITIONS == epochs_in(again)
    with await turned_away(log, tmp_path, old, epoch=3) as returned:
        assert 0 == await returned.end()


#: commands, and the step that is killed; `make torture` kills the others, too
STEPS = [("give-up", "make_empty"), ("restore", "_move")]
if LONG:
    STEPS += [("give-up", "write_identity"), ("restore", "_copy_file"), ("restore", "write_identity")]


@pytest.mark.parametrize(("command", "step"), STEPS)
async def test_what_is_killed_after_the_placement_was_renewed_is_done_again(
    log: Log, tmp_path: Path, command: str, step: str
) -> None:
    """The old disk is refused already; the new directory is no volume yet."""
    old, volume, events = await away(log, tmp_path)
    saved, data, again = tmp_path / "saved", tmp_path / "new", tmp_path / "again"
    await done(log, "backup", saved, "--corpus", old)
    given = (volume, "--yes") if command == "give-up" else (saved,)
    step = f"services.cli.backup.restore.{step}"
    code = await asyncio.to_thread(killed_in, step, command, *given, "--to", data, "--server", log.cluster.url)
    assert -signal.SIGKILL == code
    assert not (data / "volume.json").exists()
    with await turned_away(log, tmp_path, old) as returned:
        assert 0 == await returned.end()

    await done(log, command, *given, "--to", again)
    with Persister(tmp_path / "b", log.cluster, again) as successor:
        await successor.ready()
        await persisted(again, events)
        assert 0 == await successor.end()
    assert [3] * PARTITIONS == epochs_in(again)


async def test_a_persister_stops_when_its_partitions_are_placed_anew_under_it(log: Log, tmp_path: Path) -> None:
    """Its host was out of reach when the volume was given up, and its process lives still."""
    data = tmp_path / "data"
    with Persister(tmp_path / "a", log.cluster, data) as persister:
        await persister.ready()
        before = await log.publish(40)
        await persisted(data, before)
        placements = BucketPlacements(log.nc, log.settings)

        async def renewed(partition: int) -> bool:
            place = await placements.get(partition)
            assert place is not None
            with contextlib.suppress(PlacementError):  # its owner put some progress meanwhile
                place = await placements.renew(place, epoch=2, committed=place.committed)
            return place.epoch == 2

        for partition in EVERY[1:]:
            await eventually(partial(renewed, partition))
        body = await persister.not_ready("epoch is 1 in the file but 2 is expected")
        await eventually(lambda: stopped(persister, EVERY[1:]))
        assert "partition 00" not in body
        after = await log.publish(40)
        own = await eventually(lambda: grown(data, before, after))
        assert 0 == await persister.end()
    assert own == corpus_of(data)


async def stopped(persister: Persister, partitions: range) -> bool:
    """Whether exactly *partitions* are stopped."""
    _, body = await persister.ask("/readyz")
    return all((f"partition 0{p} is stopped" in body) == (p in partitions) for p in EVERY)


def grown(data: Path, before: Contents, after: Contents) -> Contents:
    """Return what *data* holds once partition 00 has all of its own; whatever else of *after* is there is an error."""
    with open_corpus(data / "00.h5") as corpus:
        own = set(corpus)
    held, everything = corpus_of(data), joined((before, after))
    assert {name: everything[name] if name in own else before[name] for name in before} == held
    return held

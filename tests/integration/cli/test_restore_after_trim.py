"""`fiq restore` and `fiq give-up` against a stream that is trimmed meanwhile, or was in its middle."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from fiq.corpus import open_corpus
from services.cli.backup.cluster import fence, look
from services.cli.embedded.processes import Cluster
from services.cli.target import find_cluster
from services.log.jetstream.log import Trimmer
from services.log.jetstream.stream import STREAM
from tests.integration.cli.test_place import deleted, files, keys, reached
from tests.support.commands import done, refused
from tests.support.persisters import PARTITIONS, Log, provisioned


@pytest.fixture
async def log(fresh_log: Cluster) -> AsyncIterator[Log]:
    """Three nodes with fresh streams."""
    async with provisioned(fresh_log) as made:
        yield made


async def test_a_purge_that_began_before_the_fence_is_over_when_the_stream_is_looked_at_again(
    log: Log, tmp_path: Path
) -> None:
    """A trimmer read the keys a moment before; else the second look would not see what it deletes a moment later."""
    await log.publish(100)
    await reached(log, files(log, tmp_path / "data", committed=100), 100)
    target = find_cluster(log.cluster.url, None)
    seen = await look(target, "main")
    assert seen is not None
    trimmer = Trimmer(log.nc, retention=0)
    read = await trimmer._look()
    await fence(target, "main", [replace(one, epoch=2, committed=20) for one in seen.placed.values()], seen)
    assert 0 == await trimmer._slice(read, full=False)
    assert 20 == (await trimmer.trim()).purged


async def test_what_was_trimmed_in_the_middle_of_the_stream_is_told_and_given_up_only_when_asked_to(
    log: Log, tmp_path: Path
) -> None:
    """It is unknown which events of the partition are gone, only up to where; what the stream has is fetched."""
    await log.publish(100)
    data, saved, new = tmp_path / "data", tmp_path / "saved", tmp_path / "new"
    volume = files(log, data, committed=20)
    await reached(log, volume, 20, 70)
    await done(log, "backup", saved, "--corpus", data, "--offline")
    assert "begins anew and loses nothing" in await done(log, "give-up", volume, "--to", tmp_path / "anew", "--yes")
    await log.api.request(f"STREAM.MSG.DELETE.{STREAM}", {"seq": 50})
    reason = await refused(log, "restore", saved, "--to", new)
    assert "lacks 1 event after that" in reason
    assert "partition 03, sequences 21 to 70, as far as the stream lacks them" in reason
    told = await done(log, "restore", saved, "--to", new, "--force")
    assert "given up: partition 00, sequences 21 to 70, as far as the stream lacks them" in told
    with open_corpus(new) as corpus:
        assert [20] * PARTITIONS == [info.committed for info in corpus.partitions]
    assert "loses its part of 1 event trimmed" in await refused(log, "give-up", volume, "--to", data)


async def test_a_restore_over_a_lost_key_takes_an_epoch_that_no_file_has(log: Log, tmp_path: Path) -> None:
    """The volume was restored once already, from the same backup; that directory is refused from now on."""
    data, saved = tmp_path / "data", tmp_path / "saved"
    await reached(log, files(log, data, committed=0))
    await done(log, "backup", saved, "--corpus", data, "--offline")
    await done(log, "restore", saved, "--to", tmp_path / "second")
    await deleted(log)
    await done(log, "restore", saved, "--to", tmp_path / "third")
    assert [3] * PARTITIONS == [key.epoch for key in await keys(log)]

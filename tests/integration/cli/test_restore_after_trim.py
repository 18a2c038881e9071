"""`fiq restore` and `fiq give-up` against a stream that is trimmed meanwhile, or was in its middle."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from services.cli.backup.cluster import fence, look
from services.cli.cluster import Cluster
from services.cli.target import find_cluster
from services.eventlog.jetstream.trim import Trimmer
from tests.integration.cli.test_place import files, reached
from tests.support.persisters import Log, provisioned


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

"""A file that is older than what its key says: the stream brings the rest, unless trim was faster."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from services.cli.embedded.processes import Cluster
from services.log.jetstream.placement import BucketPlacements
from services.log.jetstream.stream import STREAM
from tests.support.persisters import Log, Persister, persisted, provisioned
from tests.support.polling import eventually


@pytest.mark.parametrize("trimmed", [False, True])
async def test_an_older_file_is_followed_when_its_key_says_so(
    fresh_log: Cluster, tmp_path: Path, trimmed: bool
) -> None:
    """A trimmer that had read the higher keys may still purge: what it deletes is noticed, not skipped."""
    data, saved = tmp_path / "data", tmp_path / "saved"
    async with provisioned(fresh_log) as log:
        with Persister(tmp_path / "a", log.cluster, data) as persister:
            first = await log.publish(50)
            await persisted(data, first)
            assert 0 == await persister.end()
        await asyncio.to_thread(shutil.copytree, data, saved)
        with Persister(tmp_path / "b", log.cluster, data) as persister:
            second = await log.publish(100)
            await persisted(data, first, second)
            assert 0 == await persister.end()
        assert 150 == max(await committed(log))
        with Persister(tmp_path / "c", log.cluster, saved) as persister:
            await eventually(lambda: lowered(log))
            if trimmed:
                await log.api.purge(STREAM, 101)
                await persister.not_ready("the partition file is an old copy")
            else:
                await persisted(saved, first, second)
                await persister.ready()
            assert 0 == await persister.end()


async def committed(log: Log) -> list[int]:
    """Return what the keys say."""
    return [place.committed for place in (await BucketPlacements(log.nc, log.settings).read()).partitions.values()]


async def lowered(log: Log) -> bool:
    """Whether no key says more than the older files have."""
    return max(await committed(log)) <= 50

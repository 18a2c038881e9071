"""A store that begins while another one trims: it claims nothing that is gone when its files begin."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from services.cli.embedded.processes import Cluster
from services.log.jetstream.connection import Connection
from services.log.jetstream.log import Trimmer
from services.log.jetstream.placement import BucketPlacements, read_stores
from services.persister.volume import Volume, VolumeContext, claim_partitions
from tests.integration.log.test_trim import Keys
from tests.support.persisters import PARTITIONS, provisioned
from tests.support.polling import eventually


async def test_a_purge_by_keys_from_before_the_store_began_is_seen(fresh_log: Cluster, tmp_path: Path) -> None:
    """The trimmer had read the keys when the second store began; what it reads afterwards holds it back."""
    async with provisioned(fresh_log) as log:
        await log.publish(100)
        keys = await Keys(log).reached(rest=100)
        settings = replace(log.settings, store="second", partitions=PARTITIONS)
        context = VolumeContext(Volume.open(tmp_path, "second"), 1, settings, log.identity)
        trimmer = Trimmer(log.nc, retention=0)
        before = await trimmer._look()
        placing = asyncio.create_task(claim_partitions(context, BucketPlacements(log.nc, settings)))
        await eventually(lambda: begun(log.nc))
        assert 100 == await trimmer._slice(before, full=False)
        await log.publish(5)
        await keys.reached(rest=105)
        assert 0 == (await trimmer.trim()).purged
        assert [101] * PARTITIONS == [found.begins for found in (await placing).placed.values()]
        assert (await read_stores(log.nc))["second"].formed


async def begun(nc: Connection) -> bool:
    """Whether the second store shows."""
    return "second" in await read_stores(nc)

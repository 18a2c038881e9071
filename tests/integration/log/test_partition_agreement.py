"""Our partition function and the server's must agree: one decides the file's name, the other who reads the event."""

from __future__ import annotations

import random
import string
from collections.abc import AsyncIterator

import pytest

from services.cli.embedded.processes import Cluster
from services.log.jetstream.api import JetStreamApi
from services.log.jetstream.connection import Connection, close, connect
from services.log.jetstream.stream import STREAM, provision, subject_of
from services.log.partitions import partition_of
from services.log.settings import LogSettings
from tests.support.cluster import delete_streams
from tests.support.polling import eventually

#: consultations, each on a single node
COUNT = 4000
ALPHABET = string.ascii_letters + string.digits + "_-"


@pytest.fixture
async def nc(single_node: Cluster) -> AsyncIterator[Connection]:
    await delete_streams(single_node)
    connection = await connect(_settings(single_node, 16), name="test", on_closed=lambda _: None)
    yield connection
    await close(connection)


def _settings(node: Cluster, partitions: int) -> LogSettings:
    return LogSettings(servers=tuple(node.urls), partitions=partitions, replicas=1, max_bytes=64 * 2**20)


@pytest.mark.parametrize("partitions", [1, 16, 100])
async def test_the_server_files_each_consultation_where_we_look_for_it(
    nc: Connection, single_node: Cluster, partitions: int
) -> None:
    """Random ids of all lengths and characters; the stored subjects say where the server put them."""
    # given
    await provision(nc, _settings(single_node, partitions))
    chosen = random.Random(partitions)
    ids = {"".join(chosen.choices(ALPHABET, k=chosen.randint(1, 128))) for _ in range(COUNT)}

    # when
    for consultation in ids:
        await nc.publish(subject_of(consultation), b"x")

    # then
    async def subjects() -> set[str]:
        stored = await _stored_subjects(nc)
        assert len(stored) == len(ids)
        return stored

    expected = {f"fi.events.{partition_of(consultation, partitions)}.{consultation}" for consultation in ids}
    assert await eventually(subjects) == expected


async def _stored_subjects(nc: Connection) -> set[str]:
    found: set[str] = set()
    while True:
        query = {"subjects_filter": "fi.events.>", "offset": len(found)}
        info = await JetStreamApi(nc).request(f"STREAM.INFO.{STREAM}", query)
        page = info["state"].get("subjects") or {}
        found |= page.keys()
        if not page or len(found) >= info["total"]:
            return found

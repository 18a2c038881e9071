"""Certificates and users are renewed while clients work: no client is refused, no request fails, the old ones end."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from fiq.event import Event, new_event_id
from services.cli.embedded.processes import Cluster
from services.log.errors import LogAccessError
from services.log.jetstream.connection import Connection, Role, close, connect
from services.log.jetstream.publisher import Publisher
from services.log.jetstream.stream import provision
from tests.support.cluster import reload
from tests.support.polling import eventually
from tests.support.security import Secured, make_deployment, replace_certificate

LIMITS = {"max_bytes": 2**24, "dead_max_bytes": 2**20, "partitions": 4}


class Load:
    """A client that publishes without a pause, on one connection.

    Attributes:
        stored: sequences of what was acknowledged.
        failed: errors of publishes; retries inside a publish's deadline are none.
    """

    def __init__(self, nc: Connection) -> None:
        self.stored: list[int] = []
        self.failed: list[str] = []
        self.nc = nc
        self._publisher = Publisher(nc, deadline=20, max_in_flight=10)

    async def run(self) -> None:
        await self._publisher.start()
        while True:
            try:
                appended = await self._publisher.append(Event("c1", new_event_id(), 1, b'{"event_type":"T"}'))
            except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
                self.failed.append(repr(error))
                await asyncio.sleep(0.1)
            else:
                self.stored.append(appended.sequence)

    async def goes_on(self) -> None:
        """Wait until 20 more are stored."""
        before = len(self.stored)
        await eventually(lambda: len(self.stored) >= before + 20)


@asynccontextmanager
async def load(secured: Secured) -> AsyncIterator[Load]:
    async with secured.connected(Role.PROVISIONER) as nc:
        await provision(nc, secured.settings(Role.PROVISIONER, **LIMITS))
    async with secured.connected(Role.INGEST) as nc:
        made = Load(nc)
        task = asyncio.create_task(made.run())
        try:
            await made.goes_on()
            yield made
        finally:
            task.cancel()
            await asyncio.wait([task])


async def shown(secured: Secured, index: int) -> int:
    """Return the serial number of the certificate that a node shows to a new connection."""
    context = ssl.create_default_context(cafile=secured.layout.ca_certificate)
    port = secured.cluster.ports[index].client
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    found = x509.load_der_x509_certificate(writer.get_extra_info("ssl_object").getpeercert(binary_form=True))
    writer.close()
    with contextlib.suppress(ssl.SSLError, ConnectionError):  # the server may have been about to say something
        await writer.wait_closed()
    return found.serial_number


async def all_shown(secured: Secured) -> list[int]:
    return [await shown(secured, index) for index in range(secured.cluster.size)]


async def test_certificates_are_renewed_under_load(secured: Secured) -> None:
    """New connections see the new ones, those that are there stay, and not one publish fails."""
    async with load(secured) as client:
        before = await all_shown(secured)

        secured.deployment.renew_certificates()
        await asyncio.to_thread(reload, secured.cluster)

        async def renewed() -> bool:
            return not set(before) & set(await all_shown(secured))

        await eventually(renewed)
        await client.goes_on()
        async with secured.connected(Role.INGEST) as nc:
            assert nc.is_connected
        assert [] == client.failed
        assert 0 == client.nc.stats["reconnects"]


async def test_nodes_find_each_other_with_renewed_certificates(secured: Secured) -> None:
    """A node that comes back joins by its new certificate, and trusts the others' new ones."""
    secured.deployment.renew_certificates()
    await asyncio.to_thread(reload, secured.cluster)

    await asyncio.to_thread(secured.cluster.stop, 0)
    secured.cluster.start_node(0)

    await asyncio.to_thread(secured.cluster.wait_ready)
    assert [True, True, True] == [seen.healthy for seen in await asyncio.to_thread(secured.cluster.views)]


async def test_users_are_renewed_in_two_steps_under_load(secured: Secured, tmp_path: Path) -> None:
    """Both seeds are good between the steps; after the second the old one is not; who had it comes back."""
    old = tmp_path / "old.seed"
    old.write_bytes(secured.layout.seed(Role.INGEST).read_bytes())
    async with load(secured) as client:
        secured.deployment.begin_users()
        await asyncio.to_thread(reload, secured.cluster)
        await _in(secured, old)
        await _in(secured, secured.layout.next_seed(Role.INGEST))
        await client.goes_on()
        assert 0 == client.nc.stats["reconnects"]

        secured.deployment.finish_users()
        assert old.read_bytes() != secured.layout.seed(Role.INGEST).read_bytes()
        await asyncio.to_thread(reload, secured.cluster)

        await eventually(lambda: client.nc.stats["reconnects"] >= 1 and client.nc.is_connected)
        await client.goes_on()
        await _in(secured, secured.layout.seed(Role.INGEST))
        await eventually(lambda: _is_out(secured, old))
        assert [] == client.failed
        assert sorted(client.stored) == client.stored


async def _in(secured: Secured, seed: Path) -> None:
    async def tried() -> bool:
        return not await _is_out(secured, seed)

    await eventually(tried)


async def _is_out(secured: Secured, seed: Path) -> bool:
    """Say whether *every* node refuses *seed*."""
    for url in secured.cluster.urls:
        settings = secured.settings(Role.INGEST, seed_file=str(seed), servers=(url,))
        try:
            await close(await connect(settings, name="test", role=Role.INGEST, on_closed=pytest.fail))
        except LogAccessError:
            continue
        return False
    return True


async def test_a_certificate_that_has_expired_meanwhile_is_told_and_renewing_it_heals(tmp_path: Path) -> None:
    """A connection that is there does not notice; the next one does, says why, and goes on trying."""
    layout = make_deployment(tmp_path / "deployment")
    with Cluster(tmp_path / "node", nodes=1, security=layout.folder) as cluster:
        secured = Secured(cluster, layout)
        async with secured.connected(Role.INGEST) as nc:
            past = datetime.now(UTC) - timedelta(days=9)
            replace_certificate(layout, "n1", start=past, lifetime=timedelta(days=8), hosts=["localhost", "127.0.0.1"])
            await asyncio.to_thread(reload, cluster)
            assert nc.is_connected
            await asyncio.to_thread(cluster.stop, 0)
            cluster.start_node(0)
            await eventually(lambda: "its certificate has expired" in nc._reported)

            secured.deployment.renew_certificates()
            await asyncio.to_thread(reload, cluster)

            await eventually(lambda: nc.is_connected)


async def test_a_cluster_encrypts_its_disks_when_the_deployment_says_so(tmp_path: Path) -> None:
    """What was published is not in the node's store; the same node reads it again."""
    layout = make_deployment(tmp_path / "deployment", encrypt=True)
    text = b"My back hurts since Tuesday."
    for _ in range(2):
        with Cluster(tmp_path / "nodes", nodes=1, security=layout.folder) as cluster:
            secured = Secured(cluster, layout)
            async with secured.connected(Role.PROVISIONER) as nc:
                await provision(nc, secured.settings(Role.PROVISIONER, **LIMITS, replicas=1))
            async with secured.connected(Role.INGEST) as nc:
                await nc.request("fi.events.c1", text, timeout=10)
                info = await nc.request("$JS.API.STREAM.INFO.fi-events", timeout=10)
    assert b'"messages":2' in info.data
    stored = [path.read_bytes() for path in (tmp_path / "nodes").rglob("*.blk")]
    assert stored
    assert not any(text in block for block in stored)

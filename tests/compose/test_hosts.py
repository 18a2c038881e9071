"""Three hosts, as docs/deploy-several-hosts.md sets them up: one leaves and returns, two are gone for good in turn."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
from aiohttp import ClientSession

from services.cli.demo import AcceptedPost, Load, Post, compare, generate
from services.log.partitions import partition_of
from tests.support.compose.engine import PACE, EngineError, docker
from tests.support.compose.hosts import HOSTS, PARTITIONS, PERSISTERS, Hosts
from tests.support.compose.stack import Deployment, consultations_in, stream_is_whole
from tests.support.polling import eventually, eventually_sync

pytestmark = pytest.mark.timeout(420)

EVENTS = 400


class Clients:
    """Posts to one host or another, and remembers what was accepted."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.accepted: dict[str, AcceptedPost] = {}
        #: partition -> the host whose volume has it, once that was seen
        self.owners: dict[int, int] = {}
        self._posted = 0

    async def post(self, host: int) -> None:
        """Post new consultations to the ingest of *host*."""
        self._posted += 1
        url = f"http://{self.hosts.machines[host].address('ingest', 7001)}"
        load = Load(url, clients=4, repeats=0.05, token=self.hosts.token)
        consultations = generate(EVENTS, seed=self._posted)
        named = [[Post(f"round{self._posted}-{p.consultation}", p.key, p.body) for p in one] for one in consultations]
        self.accepted.update((await load.run(named)).accepted)

    async def are_served(self, *hosts: int) -> None:
        """Wait until the volumes of *hosts*, all by default, hold what was accepted for them, once and in order."""
        machines = [self.hosts.machines[host] for host in hosts or range(len(HOSTS))]
        wanted = [one for one in self.accepted.values() if not hosts or self.owner(one) in hosts]

        async def all_there() -> bool:
            return len(await asyncio.to_thread(_dump, machines)) >= len(wanted)

        await eventually(all_there, 120, PACE)
        verdict = compare(consultations_in(await asyncio.to_thread(_dump, machines)), wanted)
        assert [] == verdict.summary()
        assert len(wanted) == verdict.persisted

    def owner(self, one: AcceptedPost) -> int:
        """Return the host whose volume has the event's partition."""
        return self.owners[_partition(one.post.consultation)]

    async def is_queued(self, one: AcceptedPost, host: int) -> bool:
        """Whether the ingest of *host* says that an event waits in the stream; False while it can say nothing."""
        path = f"consultations/{one.post.consultation}/events/{one.post.key}"
        async with ClientSession(headers={"Authorization": f"Bearer {self.hosts.token}"}) as session:
            url = f"http://{await asyncio.to_thread(self.hosts.machines[host].address, 'ingest', 7001)}/{path}"
            async with session.get(url) as answer:
                found = await answer.json(content_type=None)
        assert (answer.status, found["status"]) in {(200, "queued"), (503, 503)}
        return answer.status == 200


def _partition(consultation: str) -> int:
    return partition_of(consultation, PARTITIONS)


def _dump(machines: list[Deployment]) -> list[str]:
    return [line for machine in machines for line in machine.dump()]


@pytest.fixture(scope="module")
def clients(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clients]:
    """Clients of three hosts that were just set up."""
    hosts = Hosts(tmp_path_factory.mktemp("hosts"))
    try:
        hosts.prepare()
        for machine in hosts.machines:
            machine("up", "-d")
        # it waits for the cluster by itself, but not for ever
        eventually_sync(lambda: _provisioned(hosts.machines[0]), 90, PACE)
        yield Clients(hosts)
    finally:
        hosts.remove()


def _provisioned(machine: Deployment) -> bool:
    try:
        machine("run", "--rm", "provision")
    except EngineError:
        return False
    return True


async def _healthy(machines: list[Deployment]) -> None:
    for machine in machines:
        await asyncio.to_thread(machine.is_healthy, 120)


async def test_three_hosts_are_one_cluster_over_tls(clients: Clients) -> None:
    """Each partition lives on one of three volumes, each event on three disks, and no route is in the clear."""
    hosts = clients.hosts
    await _healthy(hosts.machines)
    for host in range(len(HOSTS)):
        await clients.post(host)
    await stream_is_whole(lambda: hosts.settings)
    await clients.are_served()
    for host, machine in enumerate(hosts.machines):
        found = {_partition(line.split(" ")[0]) for line in await asyncio.to_thread(machine.dump)}
        assert len(found) == PARTITIONS // len(HOSTS), f"{machine.project} has partitions {found}"
        clients.owners.update(dict.fromkeys(found, host))
        seen = orjson.loads(machine("exec", "-T", "node", "wget", "-q", "-O", "-", "http://127.0.0.1:8222/varz"))
        assert (True, True, True) == (seen["tls_required"], seen["cluster"]["tls_required"], seen["routes"] > 0)
    assert PARTITIONS == len(clients.owners)


async def test_the_doctor_on_one_host_sees_all_nodes(clients: Clients) -> None:
    """Each syncs what it acknowledges; who asks is connected to one of them only."""
    output = await asyncio.to_thread(clients.hosts.machines[1], "run", "--rm", "-T", "ops", "fiq", "doctor", "--json")
    findings = orjson.loads(output)["findings"]
    (shared,) = [one for one in findings if one["level"] != "ok"]
    assert ("permissions", "warning") == (shared["check"], shared["level"])
    assert shared["what"].startswith("containers share a user: ")  # of these hosts
    assert len(HOSTS) == sum(one["check"] == "sync_interval" for one in findings)


async def test_a_prometheus_elsewhere_reaches_the_metrics_of_each_process(clients: Clients) -> None:
    """Ingest and every persister of a host have a published port of their own."""
    async with ClientSession() as session:
        for machine in clients.hosts.machines:
            for service, port, name in (("ingest", 7101, "fi_ingest_"), ("persister", 7002, "fi_persister_")):
                containers = await asyncio.to_thread(machine.containers, service)
                found = [docker("port", container, f"{port}").splitlines()[0] for container in containers]
                assert len(set(found)) == len(containers)
                for address in found:
                    async with session.get(f"http://{address}/metrics") as answer:
                        assert (200, True) == (answer.status, name in await answer.text())
    first = clients.hosts.machines[0]
    assert PERSISTERS == len(await asyncio.to_thread(first.containers, "persister"))


async def test_a_host_is_restarted_part_by_part(clients: Clients) -> None:
    """By the script, which asks this host's node alone: its service has another name than the server."""
    hosts = clients.hosts
    steps = ["restarting node", *(f"restarting {service}, 1 of 1" for service in ("persister", "ingest"))]
    restart = hosts.machines[1].rolling_restart
    said = await asyncio.to_thread(restart, "node", "persister", "ingest", FIQ_NODES="node", FIQ_SETTLE="0")
    assert [*steps, "everything was restarted and is healthy"] == said
    await clients.post(1)


async def test_a_host_goes_away_and_comes_back(clients: Clients) -> None:
    """The others take events and store theirs; its partitions wait in the stream, and are finished when it is back."""
    hosts, before = clients.hosts, set(clients.accepted)
    with hosts.cut_off(1):
        await clients.post(0)
        await clients.post(2)
        await clients.are_served(0, 2)
        new = [one for key, one in clients.accepted.items() if key not in before]
        waiting = [one for one in new if clients.owner(one) == 1]
        assert 0 < len(waiting) < len(new)
        with hosts.killed(1):  # its power fails, too
            # 503 and to be asked again as long as the broker takes the node that vanished for one that answers
            for one, host in ((waiting[0], 0), (waiting[-1], 2)):
                await eventually(lambda one=one, host=host: clients.is_queued(one, host), 60, PACE)  # type: ignore[misc]
    await stream_is_whole(lambda: hosts.settings)
    await _healthy(hosts.machines)
    await clients.are_served()


def _is_not_restarted(machine: Deployment) -> None:
    """Assert that the script leaves the host's node alone: as unhealthy during elections, then for what it misses."""

    def why() -> str:
        with pytest.raises(EngineError, match="; nothing more is restarted") as refused:
            machine.rolling_restart("node", FIQ_NODES="node", FIQ_TIMEOUT="0")
        if "restarting" in str(refused.value):
            pytest.fail(str(refused.value))
        return str(refused.value)

    eventually_sync(lambda: "sees 1 of 2 other nodes" in why(), 60, PACE)


@pytest.fixture
def backups(tmp_path: Path) -> Path:
    """Where the image's user may write, too: a disk that outlives the host."""
    tmp_path.chmod(0o777)
    return tmp_path


async def test_a_host_is_gone_for_good(clients: Clients, backups: Path) -> None:
    """A new machine under its name gets the backup of its volume; the stream and the other nodes bring the rest."""
    hosts = clients.hosts
    lost = hosts.machines[2]
    mount = ("-v", f"{backups}:/backups")
    await asyncio.to_thread(lost, "run", "--rm", *mount, "ops", "fiq", "backup", "/backups/last")
    await clients.post(2)  # after the backup: only the stream has these
    await asyncio.to_thread(lost.remove)
    await clients.post(0)
    for machine in hosts.machines[:2]:  # no second node may go, whether it leads anything or not
        await asyncio.to_thread(_is_not_restarted, machine)

    await asyncio.to_thread(hosts.equip, 2)
    await asyncio.to_thread(lost, "up", "-d", "node")
    restore = ("placement", "fiq", "restore", "/backups/last", "--to", "/data")
    await asyncio.to_thread(lost, "run", "--rm", *mount, *restore)
    await asyncio.to_thread(lost, "up", "-d")
    await stream_is_whole(lambda: hosts.settings)
    await _healthy(hosts.machines)
    await clients.post(2)
    await clients.are_served()


async def test_a_host_is_gone_for_good_without_a_backup(clients: Clients) -> None:
    """After the operator confirms twice, a new volume takes its name and gets all events from the stream."""
    hosts = clients.hosts
    lost = hosts.machines[1]
    volume = orjson.loads(await asyncio.to_thread(lost, "exec", "-T", "persister", "cat", "/data/volume.json"))[
        "volume"
    ]
    await asyncio.to_thread(lost.remove)
    await clients.post(0)

    await asyncio.to_thread(hosts.equip, 1)
    await asyncio.to_thread(lost, "up", "-d", "node")
    await stream_is_whole(lambda: hosts.settings)
    give_up = ("run", "--rm", "placement", "fiq", "give-up", volume, "--to", "/data")
    with pytest.raises(EngineError, match="nothing was changed; --yes gives these sequences up"):
        await asyncio.to_thread(lost, *give_up)
    assert "loses nothing" in await asyncio.to_thread(lost, *give_up, "--yes")
    await asyncio.to_thread(lost, "up", "-d")
    await stream_is_whole(lambda: hosts.settings)
    await _healthy(hosts.machines)
    await clients.post(1)
    await clients.are_served()

"""Three hosts, as docs/deploy.md sets them up: one goes away and comes back, two are gone for good in turn."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from services.cli.rehearsal.consultations import Post, generate
from services.cli.rehearsal.load import Accepted, Load
from services.cli.rehearsal.verification import compare
from tests.support.compose.engine import EngineError, docker
from tests.support.compose.hosts import HOSTS, Hosts
from tests.support.compose.stack import Deployment, consultations_in, stream_is_whole
from tests.support.polling import eventually, eventually_sync

pytestmark = pytest.mark.timeout(420)

EVENTS = 400


class Clients:
    """Posts to one host or another, and remembers what was accepted."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.accepted: dict[str, Accepted] = {}
        self._posted = 0

    async def post(self, host: int) -> None:
        """Post consultations that nobody posted before to the ingest of *host*."""
        self._posted += 1
        url = f"http://{self.hosts.machines[host].address('ingest', 7001)}"
        load = Load(url, clients=4, repeats=0.05, token=self.hosts.token)
        consultations = generate(EVENTS, seed=self._posted)
        named = [[Post(f"round{self._posted}-{p.consultation}", p.key, p.body) for p in one] for one in consultations]
        self.accepted.update((await load.run(named)).accepted)

    async def are_served(self, *hosts: int) -> None:
        """Wait until the volumes of *hosts*, all by default, hold what was accepted, once and in order."""
        machines = [self.hosts.machines[host] for host in hosts or range(len(HOSTS))]

        async def all_there() -> bool:
            return len(await asyncio.to_thread(_dump, machines)) >= len(self.accepted)

        await eventually(all_there, timeout=120)
        verdict = compare(consultations_in(await asyncio.to_thread(_dump, machines)), self.accepted.values())
        assert [] == verdict.summary()
        assert len(self.accepted) == verdict.persisted


def _dump(machines: list[Deployment]) -> list[str]:
    return [line for machine in machines for line in machine.dump()]


@pytest.fixture(scope="module")
def clients(image: str, room: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clients]:
    """Clients of three hosts that were just set up."""
    hosts = Hosts(tmp_path_factory.mktemp("hosts"))
    try:
        hosts.prepare()
        for machine in hosts.machines:
            machine("up", "-d")
        # it waits for the cluster by itself, but not for ever
        eventually_sync(lambda: _provisioned(hosts.machines[0]), timeout=90)
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
        await eventually(lambda m=machine: {"healthy"} == m.states(), timeout=120)  # type: ignore[misc]


async def test_three_hosts_are_one_cluster_over_tls(clients: Clients) -> None:
    """Each partition lives on one of three volumes, each event on three disks, and no route is in the clear."""
    hosts = clients.hosts
    await _healthy(hosts.machines)
    for host in range(len(HOSTS)):
        await clients.post(host)
    await stream_is_whole(lambda: hosts.settings)
    await clients.are_served()
    for machine in hosts.machines:
        assert machine.dump(), f"{machine.project} has no partition"
        seen = orjson.loads(machine("exec", "-T", "node", "wget", "-q", "-O", "-", "http://127.0.0.1:8222/varz"))
        assert (True, True, True) == (seen["tls_required"], seen["cluster"]["tls_required"], seen["routes"] > 0)


async def test_a_host_goes_away_and_comes_back(clients: Clients) -> None:
    """The others take events without a break; its partitions wait in the stream, and are finished when it is back."""
    hosts = clients.hosts
    away = hosts.machines[1]
    running = await asyncio.to_thread(lambda: away("ps", "-q").split())
    await asyncio.to_thread(docker, "kill", "-s", "KILL", *running)
    await clients.post(0)
    await clients.post(2)
    await asyncio.to_thread(docker, "start", *running)
    await stream_is_whole(lambda: hosts.settings)
    await _healthy(hosts.machines)
    await clients.are_served()


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

    await asyncio.to_thread(hosts.equip, 2)
    await asyncio.to_thread(lost, "up", "-d", "node")
    await asyncio.to_thread(lost, "run", "--rm", *mount, "ops", "fiq", "restore", "/backups/last", "--to", "/data")
    await asyncio.to_thread(lost, "up", "-d")
    await stream_is_whole(lambda: hosts.settings)
    await _healthy(hosts.machines)
    await clients.post(2)
    await clients.are_served()


async def test_a_host_is_gone_for_good_without_a_backup(clients: Clients) -> None:
    """Its volume begins anew under its name, when somebody says so twice; the stream brings what it still has: all."""
    hosts = clients.hosts
    lost = hosts.machines[1]
    volume = orjson.loads(await asyncio.to_thread(lost, "exec", "-T", "persister", "cat", "/data/volume.json"))[
        "volume"
    ]
    await asyncio.to_thread(lost.remove)
    await clients.post(0)

    await asyncio.to_thread(hosts.equip, 1)
    await asyncio.to_thread(lost, "up", "-d", "node")
    give_up = ("run", "--rm", "ops", "fiq", "give-up", volume, "--to", "/data")
    with pytest.raises(EngineError, match="nothing was changed; --yes gives these sequences up"):
        await asyncio.to_thread(lost, *give_up)
    assert "loses nothing" in await asyncio.to_thread(lost, *give_up, "--yes")
    await asyncio.to_thread(lost, "up", "-d")
    await stream_is_whole(lambda: hosts.settings)
    await _healthy(hosts.machines)
    await clients.post(1)
    await clients.are_served()

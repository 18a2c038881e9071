"""A real Prometheus scrapes the real stack: every panel has data, and alerts come and go with what they are about."""

from __future__ import annotations

import asyncio
import http.client
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.cli import monitoring
from services.cli.embedded.processes import LOOPBACK, Cluster, free_ports
from services.log.jetstream.connection import Role
from tests.support.persisters import Persister
from tests.support.polling import eventually_sync
from tests.support.prometheus import Prometheus, dashboard_queries, running_prometheus, tool
from tests.support.security import Secured, fiq, make_deployment
from tests.support.service import Service

#: the deployment's settings of the log
LOG = {"FI_PARTITIONS": "4", "FI_STREAM_MAX_BYTES": "64MiB", "FI_DEAD_MAX_BYTES": "16MiB"}
#: pause between two posts, seconds
PACE = 0.1
#: what is posted twice with one key, one in so many
DUPLICATE_EVERY = 5
#: what an operator waits a minute for, a test does not
HURRY = {"FiqBacklogOld": ("> 60", "> 3")}
#: services look every 5 s, Prometheus every second, and both may be late on a busy machine, seconds
PATIENCE = 40.0
#: `$__rate_interval` with a scrape a second
RATE_INTERVAL = "10s"


class Client:
    """Posts events all the time, some of them twice, and counts the answers."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.answers: Counter[int] = Counter()

    def __enter__(self) -> Client:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        number = 0
        while not self._stop.wait(PACE):
            number += 1
            for _ in range(2 if number % DUPLICATE_EVERY == 0 else 1):
                self.answers[self._post(number)] += 1

    def _post(self, number: int) -> int:
        connection = http.client.HTTPConnection(LOOPBACK, self._port, timeout=20)
        headers = {"Content-Type": "application/json", "Idempotency-Key": f"key-{number}"}
        try:
            connection.request("POST", f"/consultations/c{number % 20}/events", b'{"event_type":"A"}', headers)
            return connection.getresponse().status
        finally:
            connection.close()


class Persisters:
    """Two processes on one volume, each on a port of its own that stays."""

    def __init__(self, secured: Secured, folder: Path) -> None:
        self.ports = free_ports(2)
        self._secured = secured
        self._folder = folder
        self._running: list[Persister] = []

    def start(self) -> None:
        """Start both, without waiting."""
        own = {**self._secured.environment(Role.PERSISTER), **LOG}
        self._running = [
            Persister(
                self._folder / str(port),
                self._secured.cluster,
                self._folder / "data",
                **own,
                FI_PERSISTER_PORT=str(port),
            )
            for port in self.ports
        ]

    def kill(self) -> None:
        """End both with SIGKILL."""
        for persister in self._running:
            persister.process.kill()
        for persister in self._running:
            persister.process.wait()


@dataclass(frozen=True)
class Monitored:
    """The pipeline's persisters, its Prometheus, its nodes, and a client at work."""

    persisters: Persisters
    prometheus: Prometheus
    secured: Secured
    client: Client


@pytest.fixture(scope="module")
def monitored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitored]:
    """Three nodes with TLS and users, ingest, two persisters; events, retries, one dead letter; a real Prometheus."""
    tool("prometheus")  # before all the rest is started in vain
    folder = tmp_path_factory.mktemp("monitored")
    layout = make_deployment(folder / "deployment")
    with ExitStack() as stack:
        secured = Secured(stack.enter_context(Cluster(folder / "cluster", security=layout.folder)), layout)
        done = fiq(secured.environment(Role.PROVISIONER) | LOG, "provision")
        assert (0, []) == (done.code, done.errors)
        persisters = Persisters(secured, folder)
        stack.callback(persisters.kill)
        persisters.start()
        own = {**secured.environment(Role.INGEST), **LOG, "FI_PORT": "0"}
        ingest = stack.enter_context(Service(folder, "services.ingest", **own))
        started = ingest.wait_for("INGEST_STARTED")
        port, management = int(started["port"]), int(started["management_port"])
        # ready when the persisters have claimed the partitions
        eventually_sync(lambda: monitoring.get(management, "/readyz")[0] == 200, PATIENCE)
        asyncio.run(_set_aside(secured))
        # or FiqBackupOld rings, as it should
        done = fiq(LOG, "backup", str(folder / "backup"), "--corpus", str(folder / "data"), "--offline")
        assert (0, []) == (done.code, done.errors)
        client = stack.enter_context(Client(port))
        targets = {"ingest": [management], "persister": persisters.ports}
        (folder / "prometheus").mkdir()
        prometheus = stack.enter_context(running_prometheus(folder / "prometheus", targets, HURRY))
        yield Monitored(persisters, prometheus, secured, client)


async def _set_aside(secured: Secured) -> None:
    """Publish what is no event."""
    async with secured.connected(Role.INGEST) as nc:
        await nc.request("fi.events.c1", b"garbage", timeout=10)


def test_every_panel_of_the_dashboard_has_data(monitored: Monitored) -> None:
    """Each of its expressions returns at least one number."""
    queries = {expression.replace("$__rate_interval", RATE_INTERVAL) for _, expression in dashboard_queries()}
    empty = set(queries)

    def all_answered() -> bool:
        empty.difference_update([query for query in empty if monitored.prometheus.query(query)])
        assert set() == empty
        return True

    assert len(queries) > 30
    assert eventually_sync(all_answered, PATIENCE)


def test_alerts_fire_when_the_persisters_are_gone_and_stop_when_they_are_back(monitored: Monitored) -> None:
    """The alert for dead letters stays until an operator acts. Clients notice nothing."""
    calm = {"FiqDeadLetters"}
    eventually_sync(lambda: _firing(monitored, calm), PATIENCE)

    monitored.persisters.kill()
    storm = calm | {"FiqVolumeAway", "FiqBacklogOld", "FiqTargetDown"}
    # the volume's alert speaks for its partitions, too
    wrong = {"FiqPartitionWithoutOwner", "FiqNoIngest", "FiqUnwatched", "FiqNoLeader"}
    eventually_sync(lambda: monitored.prometheus.firing() & (storm | wrong) == storm, PATIENCE)

    monitored.persisters.start()
    eventually_sync(lambda: _firing(monitored, calm), PATIENCE)
    assert {202} == set(monitored.client.answers)
    # what the metrics ask of the broker, the services' users may ask
    assert [] == monitored.secured.violations()


def _firing(monitored: Monitored, expected: set[str]) -> bool:
    """Whether just these alerts fire, and perhaps that a busy machine makes the cluster slow."""
    assert expected == monitored.prometheus.firing() - {"FiqClusterSlow"}
    return True

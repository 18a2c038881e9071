"""A real Prometheus scrapes the real stack: every panel has data, and alerts come and go with what they are about."""

from __future__ import annotations

import asyncio
import http.client
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import nats
import pytest
from prometheus_client import CollectorRegistry, start_http_server

from services.cli.ports import LOOPBACK
from services.cli.stack import Stack
from services.eventlog.jetstream.certificates import Validity
from services.eventlog.metrics import LogMetrics
from tests.support.polling import eventually_sync
from tests.support.prometheus import Prometheus, dashboard_queries, running_prometheus, tool

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


@dataclass(frozen=True)
class Monitored:
    """The stack, its Prometheus, and a client at work."""

    stack: Stack
    prometheus: Prometheus
    client: Client


@pytest.fixture(scope="module")
def monitored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitored]:
    """Three nodes, ingest, two persisters; events, retries, one dead letter; Prometheus with the rules of deploy/."""
    tool("prometheus")  # before the stack is started in vain
    folder = tmp_path_factory.mktemp("monitored")
    settings = {"FI_STREAM_MAX_BYTES": "64MiB", "FI_PARTITIONS": "4"}
    with Stack(folder / "stack", env=settings) as stack, _certificates() as port, Client(stack.ingest.port) as client:
        asyncio.run(_set_aside(stack))
        targets = {
            "ingest": [stack.ingest.port],
            "persister": [service.port for service in stack.persisters],
            "nats": [port],
        }
        prometheus_folder = folder / "prometheus"
        prometheus_folder.mkdir()
        with running_prometheus(prometheus_folder, targets, HURRY) as prometheus:
            yield Monitored(stack, prometheus, client)


@contextmanager
def _certificates() -> Iterator[int]:
    """Serve the one metric that a stack without TLS does not have, as a service with TLS shows it."""
    registry = CollectorRegistry()
    LogMetrics(registry).certificates([Validity("node", "n1", time.time() + 30 * 86400)])
    shown = registry.restricted_registry(["fi_certificate_expiry_timestamp_seconds"])
    server, thread = start_http_server(0, LOOPBACK, shown)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


async def _set_aside(stack: Stack) -> None:
    """Publish what is no event."""
    connection = await nats.connect(stack.cluster.urls)
    await connection.request("fi.events.c1", b"garbage", timeout=10)
    await connection.close()


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
    """The dead letter's stays: somebody must look at it. Clients notice nothing of it all."""
    calm = {"FiqDeadLetters"}
    eventually_sync(lambda: monitored.prometheus.firing() == calm, PATIENCE)

    for persister in monitored.stack.persisters:
        persister.process.kill()
    storm = calm | {"FiqVolumeAway", "FiqBacklogOld", "FiqTargetDown"}
    # the volume's alert speaks for its partitions, too
    wrong = {"FiqPartitionWithoutOwner", "FiqNoIngest", "FiqUnwatched", "FiqNoLeader"}
    eventually_sync(lambda: monitored.prometheus.firing() & (storm | wrong) == storm, PATIENCE)

    for persister in monitored.stack.persisters:
        monitored.stack.restart(persister)
    eventually_sync(lambda: monitored.prometheus.firing() == calm, PATIENCE)
    assert {202} == set(monitored.client.answers)

"""Benchmark of what TLS, users and their permissions cost: POST on a plain cluster and on a secured one, in turn."""

from __future__ import annotations

from benchmarks import processes, streams
from benchmarks.bench import Bench, summary
from benchmarks.jobs import Report
from benchmarks.plan import CLIENTS, PARTITIONS
from benchmarks.results import PLAIN, SECURED, Latency
from services.cli.embedded.cluster import Cluster
from services.log.jetstream.names import Role
from tests.support.security import Secured, fiq, make_deployment


def security(bench: Bench) -> list[Latency]:
    """Measure POST on both clusters, which run side by side: the one that is not measured is idle."""
    streams.fresh_stream(bench.cluster, PARTITIONS)
    layout = make_deployment(bench.folder / "deployment")
    reports: dict[tuple[int, str], list[Report]] = {}
    with Cluster(bench.folder / "secured", max_file_store="8GB", security=layout.folder) as cluster:
        secured = Secured(cluster, layout)
        done = fiq(secured.environment(Role.PROVISIONER), "provision")
        if done.code:
            raise RuntimeError("\n".join(done.errors))
        folders = [bench.folder / name for name in ("ingest-plain", "ingest-secured")]
        for folder in folders:
            folder.mkdir()
        with (
            processes.ingest(bench.cluster.urls[0], folders[0], partitions=PARTITIONS) as (_, plain_port),
            processes.ingest(cluster.urls[0], folders[1], partitions=PARTITIONS, settings=_credentials(secured)) as (
                _,
                secured_port,
            ),
        ):
            ports = {PLAIN: plain_port, SECURED: secured_port}
            for number in range(bench.plan.rounds):
                for clients in CLIENTS:
                    bench.tell(f"security: round {number + 1}, {clients} clients")
                    for target, port in ports.items():
                        reports.setdefault((clients, target), []).append(bench.load(port, clients))
    return [summary(target, clients, reports[clients, target]) for clients, target in reports]


def _credentials(secured: Secured) -> dict[str, str]:
    environment = secured.environment(Role.INGEST)
    return {name: value for name, value in environment.items() if name != "FI_LOG_URL"}

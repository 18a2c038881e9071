"""Benchmark of memory: the most that each process holds while a backlog is posted and drained."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from types import TracebackType

import psutil

from benchmarks import drains, processes, streams
from benchmarks.bench import CONSULTATIONS, FULL_LOAD, PARTITIONS, Bench
from benchmarks.load import LoadJob, run
from benchmarks.results import Memory
from services.cli.embedded.processes import Cluster, ManagedProcess

#: how often memory is looked at, seconds
_INTERVAL = 0.1
_MB = 1e6
_STORE = "memory"


class Sampler:
    """Watches processes from a thread and remembers the most that each held in each phase.

    Attributes:
        phase: name of what is going on.
    """

    def __init__(self) -> None:
        self.phase = ""
        self._watched: dict[str, int] = {}
        self._most: dict[tuple[str, str], int] = defaultdict(int)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory sampler", daemon=True)

    def watch(self, name: str, process: ManagedProcess) -> None:
        """Watch *process* from now on."""
        if process.pid is not None:
            self._watched = {**self._watched, name: process.pid}

    def most_mb(self, name: str, phase: str) -> float:
        """Return the most that a process was seen to hold, MB; 0 when it was not seen."""
        return self._most[name, phase] / _MB

    def rows(self) -> list[Memory]:
        """Return what was seen."""
        return [
            Memory(
                process=name,
                idle_mb=self.most_mb(name, "idle"),
                filling_mb=self.most_mb(name, "filling"),
                draining_mb=self.most_mb(name, "draining"),
                after_mb=self.most_mb(name, "after"),
            )
            for name in self._watched
        ]

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_INTERVAL):
            phase = self.phase
            for name, pid in self._watched.items():
                self._most[name, phase] = max(self._most[name, phase], resident(pid))


def resident(pid: int) -> int:
    """Return the resident bytes of a process; 0 when it has ended."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def memory(bench: Bench) -> list[Memory]:
    """Post a backlog through ingest into new nodes, let one persister drain all partitions, and watch all of them."""
    with Cluster(bench.folder / "memory") as cluster, Sampler() as sampler:
        for name, node in zip(cluster.names, cluster.nodes, strict=True):
            sampler.watch(f"nats-server {name}", node)
        streams.fresh_stream(cluster, PARTITIONS)
        _watch(bench, cluster, sampler)
        return sampler.rows()


def _watch(bench: Bench, cluster: Cluster, sampler: Sampler) -> None:
    url, plan = cluster.url, bench.plan
    with processes.ingest(url, bench.folder, partitions=PARTITIONS) as (ingest, port):
        sampler.watch("ingest", ingest)
        sampler.phase = "idle"
        time.sleep(plan.settle)
        bench.tell(f"memory: posting {plan.backlog:,} events")
        sampler.phase = "filling"
        accepted = _post(bench, port)
        bench.tell("memory: draining")
        sampler.phase = "draining"
        with processes.persisters(url, bench.folder / _STORE / "corpus", partitions=PARTITIONS) as found:
            sampler.watch("persister", found[0].process)
            drains.wait_committed(found, accepted, plan.drain_timeout)
            sampler.phase = "after"
            time.sleep(plan.settle)


def _post(bench: Bench, port: int) -> int:
    plan = bench.plan
    job = LoadJob(str(port), FULL_LOAD, plan.drain_timeout, 0.0, plan.backlog, str(bench.dialogues), CONSULTATIONS)
    return run("http", job, seconds=plan.drain_timeout).events

"""What the cluster, the persisters and the corpus say of themselves, collected for ``fiq status``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nats.aio.client import Client

from services.cli import monitoring
from services.cli.embedded.stack import State
from services.cli.target import Target, connected
from services.log.errors import LogUnavailableError
from services.log.jetstream import stream as names
from services.log.jetstream.monitor import live_processes, look_once
from services.log.metrics import PARTITIONS, PROCESSES
from services.log.partitions import partition_name
from services.log.settings import LogSettings
from services.log.status import LiveProcess, LogState, PartitionState, ReplicaReport, StreamReport

#: how long an election may keep the broker from answering, seconds
_ELECTION = 12.0
_PAUSE = 0.25


@dataclass(frozen=True, slots=True)
class Node:
    """A node: its name, client URL (where known), role in the stream's raft group, and condition."""

    name: str
    url: str
    role: str
    condition: str


@dataclass(frozen=True, slots=True)
class Worker:
    """A persister process that answered: its name here, where it runs, its volume, its partitions, its own port.

    *address* is host:port of its `/readyz` and `/metrics` as it listens there; empty when it does not say.
    """

    name: str
    host: str
    pid: str
    volume: str
    partitions: tuple[str, ...]
    address: str = ""


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition of one store.

    Attributes:
        name: two digits.
        committed: stream sequence that its file has reached: as the file says where it can be read from here, else as
            its owner or its key says; None when none of them does.
        lag: events that wait behind that.
        oldest_seconds: age of the oldest of them; None when nothing waits.
        volume: UUID of the volume that holds it; empty when no key says so.
        epoch: how often it was placed; 0 when no key says so.
        begins: first stream sequence that its file may hold: above 1, the store began after a trim.
        owners: persisters that say they run it: one, except for a moment.
    """

    name: str
    committed: int | None
    lag: int
    oldest_seconds: float | None
    volume: str
    epoch: int
    begins: int
    owners: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Overview:
    """Everything that ``fiq status`` shows; *remarks* say what could not be found out, or needs somebody."""

    nodes: tuple[Node, ...]
    stream: StreamReport | None
    dead: StreamReport | None
    workers: tuple[Worker, ...]
    partitions: tuple[Partition, ...]
    remarks: tuple[str, ...]


async def collect(target: Target, corpus: Path | None) -> Overview:
    """Ask everybody.

    Args:
        target: the cluster.
        corpus: the data directory, when it can be reached from here.

    Raises LogUnavailableError: no node answered.
    """
    committed, remarks = _committed(corpus)
    async with connected(target.settings) as connection:
        log = await _look(connection, target.settings)
    workers = named_workers(log.processes or (), target.state)
    if log.stream is None:
        remarks.append(f"there is no stream {names.STREAM}: start a service, or run  fiq provision")
    if log.processes is None:
        remarks.append(f"it is not known which persisters live: {log.troubles.get(PROCESSES, 'no answer')}")
    elif not workers:
        remarks.append("no persister answers: events are kept in the stream until one runs")
    partitions = log.partitions(target.settings.store)
    if log.stream is not None and not partitions:
        remarks.append(f"it is not known where partitions live: {log.troubles.get(PARTITIONS, 'no answer')}")
    now = time.time() - log.clock_offset
    return Overview(
        nodes=_nodes(log.stream, target.state),
        stream=log.stream,
        dead=log.dead,
        workers=tuple(workers),
        partitions=tuple(_partition(one, workers, committed, now) for one in partitions if log.stream),
        remarks=tuple(remarks),
    )


async def _look(connection: Client, settings: LogSettings) -> LogState:
    """Ask the broker; while a leader is being elected it does not answer, so ask again for a while."""
    deadline = time.monotonic() + _ELECTION
    while True:
        try:
            return await look_once(connection, settings)
        except LogUnavailableError as error:
            if time.monotonic() >= deadline:
                raise LogUnavailableError(
                    f"the cluster takes connections but does not answer ({error}): are most of its nodes down? Look at "
                    "their logs, or try again"
                ) from error
            await asyncio.sleep(_PAUSE)


def _nodes(stream: StreamReport | None, state: State | None) -> tuple[Node, ...]:
    found = {}
    if stream is not None:
        found = {replica.name: ("replica", _condition(replica)) for replica in stream.replicas}
        found |= {stream.leader: ("leader", "current")} if stream.leader else {}
    members = {} if state is None else {one.name: one for one in state.members if one.url.startswith("nats://")}
    nodes = []
    for name in sorted(found.keys() | members.keys()):
        role, condition = found.get(name, ("", "healthy"))
        if name in members and not _is_healthy(members[name].monitoring):
            condition = "not healthy"
        nodes.append(Node(name, members[name].url if name in members else "", role, condition))
    return tuple(nodes)


def _condition(replica: ReplicaReport) -> str:
    if replica.offline:
        return "offline"
    return "current" if replica.current else f"{replica.lag} behind"


def _is_healthy(url: str) -> bool:
    return monitoring.get(url, "/healthz")[0] == 200


async def ask_workers(connection: Client, state: State | None) -> list[Worker]:
    """Return the persisters that answer, by name; *state* has the names of those that ``fiq up`` started."""
    return named_workers(await live_processes(connection), state)


def named_workers(processes: Iterable[LiveProcess], state: State | None) -> list[Worker]:
    """Return *processes* by name; *state* has the names of those that ``fiq up`` started."""
    known = {} if state is None else {str(member.pid): member.name for member in state.members}
    workers = []
    for process in processes:
        said = process.metadata
        pid = said.get("pid", "")
        workers.append(
            Worker(
                name=known.get(pid) or said.get("worker", ""),
                host=said.get("host", ""),
                pid=pid,
                volume=process.volume,
                partitions=tuple(partition_name(partition) for partition in sorted(process.partitions)),
                address=said.get("address", ""),
            )
        )
    return sorted(workers, key=lambda worker: worker.name)


def _partition(one: PartitionState, workers: list[Worker], committed: Mapping[int, int], now: float) -> Partition:
    name, place = partition_name(one.partition), one.placement
    return Partition(
        name=name,
        committed=committed.get(one.partition, one.committed if one.owners or place is not None else None),
        lag=one.waiting.events,
        oldest_seconds=None if one.oldest is None else max(0.0, now - one.oldest),
        volume="" if place is None else place.volume,
        epoch=0 if place is None else place.epoch,
        begins=0 if place is None else place.begins,
        owners=tuple(worker.name for worker in workers if name in worker.partitions),
    )


def _committed(corpus: Path | None) -> tuple[dict[int, int], list[str]]:
    if corpus is None or not corpus.exists():
        return {}, []
    from fiq.corpus import CorpusError, open_corpus  # h5py is slow to import, and not every status needs it

    try:
        with open_corpus(corpus) as opened:
            return {info.identity.partition: info.committed for info in opened.partitions}, []
    except CorpusError as error:
        return {}, [f"the corpus cannot be read: {error}"]

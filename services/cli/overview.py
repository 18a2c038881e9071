"""What the cluster, the persisters and the corpus say of themselves, collected for ``fiq status``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from nats.aio.client import Client

from services.cli import monitoring
from services.cli.folder import State
from services.cli.target import Target, connected
from services.eventlog.errors import LogUnavailableError
from services.eventlog.jetstream import names
from services.eventlog.jetstream.api import JetStreamApi
from services.eventlog.jetstream.processes import persister_infos
from services.eventlog.jetstream.report import (
    ClusterReport,
    PartitionReport,
    ReplicaReport,
    StreamReport,
    cluster_report,
    read_stream,
)
from services.eventlog.partitions import partition_name
from services.eventlog.settings import LogSettings

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
        acknowledged: stream sequence up to which the broker was told that all is safe; None when nobody answers.
        lag: events behind that; None when nobody answers.
        committed: sequence that the partition file has reached; None when it cannot be read from here.
        volume: UUID of the volume that holds it; empty when that is not known.
        placed: a volume has claimed it.
        owners: persisters that say they run it: one, except for a moment.
    """

    name: str
    acknowledged: int | None
    lag: int | None
    committed: int | None
    volume: str
    placed: bool
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

    Raises:
        LogUnavailableError: no node answered.
    """
    committed, remarks = _committed(corpus)
    async with connected(target.settings) as connection:
        report = await _report(connection, target.settings)
        dead = await JetStreamApi(connection).stream_info(names.DEAD_STREAM)
        workers = await ask_workers(connection, target.state)
    if report.stream is None:
        remarks.append(f"there is no stream {names.STREAM}: start a service, or run  fiq provision")
    if not workers:
        remarks.append("no persister answers: events are kept in the stream until one runs")
    return Overview(
        nodes=_nodes(report.stream, target.state),
        stream=report.stream,
        dead=None if dead is None else read_stream(dead),
        workers=tuple(workers),
        partitions=tuple(_partition(one, workers, committed) for one in report.partitions if report.stream),
        remarks=tuple(remarks),
    )


async def _report(connection: Client, settings: LogSettings) -> ClusterReport:
    """Ask the broker; while a leader is being elected nobody answers, so ask again for a while."""
    deadline = time.monotonic() + _ELECTION
    while True:
        try:
            return await cluster_report(connection, settings)
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
    port = urlsplit(url).port
    return port is not None and monitoring.get(port, "/healthz")[0] == 200


async def ask_workers(connection: Client, state: State | None) -> list[Worker]:
    """Return the persisters that answer, by name; *state* has the names of those that ``fiq up`` started."""
    known = {} if state is None else {str(member.pid): member.name for member in state.members}
    workers = []
    for metadata in await persister_infos(connection):
        pid = metadata.get("pid", "")
        workers.append(
            Worker(
                name=known.get(pid) or metadata.get("worker", ""),
                host=metadata.get("host", ""),
                pid=pid,
                volume=metadata.get("volume", ""),
                partitions=tuple(sorted(filter(None, metadata.get("partitions", "").split(",")))),
                address=metadata.get("address", ""),
            )
        )
    return sorted(workers, key=lambda worker: worker.name)


def _partition(report: PartitionReport, workers: list[Worker], committed: Mapping[int, int]) -> Partition:
    name = partition_name(report.partition)
    return Partition(
        name=name,
        acknowledged=report.acknowledged if report.answered else None,
        lag=report.pending + report.ack_pending if report.answered else None,
        committed=committed.get(report.partition),
        volume=report.volume,
        placed=report.exists,
        owners=tuple(worker.name for worker in workers if name in worker.partitions),
    )


def _committed(corpus: Path | None) -> tuple[dict[int, int], list[str]]:
    if corpus is None or not corpus.exists():
        return {}, []
    from services.corpus import CorpusError, open_corpus  # h5py is slow to import, and not every status needs it

    try:
        with open_corpus(corpus) as opened:
            return {info.identity.partition: info.committed for info in opened.partitions}, []
    except CorpusError as error:
        return {}, [f"the corpus cannot be read: {error}"]

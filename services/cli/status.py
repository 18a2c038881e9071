"""The cluster's state in one snapshot, and ``fiq status``, which shows it.

:func:`take_snapshot` asks either log once, as the services do: streams, placement of partitions, and the persisters
that answer. ``fiq doctor``, ``backup``, ``restore``, ``give-up`` and ``place`` read the same snapshot.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import orjson
import typer
from rich.filesize import decimal
from rich.table import Table

from services.cli import console, monitoring
from services.cli.embedded.stack import StackState
from services.cli.target import FolderOption, ServerOption, Target, connected, find_cluster
from services.log.errors import LogUnavailableError
from services.log.jetstream.connection import Connection
from services.log.jetstream.monitor import look_once
from services.log.jetstream.stream import DEAD_STREAM, STREAM
from services.log.metrics import PARTITIONS, PROCESSES
from services.log.partitions import partition_name
from services.log.settings import LogSettings
from services.log.status import LiveProcess, LogState, PartitionState, Placement, ReplicaReport, StreamReport

#: how long an election may keep the broker from answering, seconds
_ELECTION = 12.0
_PAUSE = 0.25


@dataclass(frozen=True, slots=True)
class Worker:
    """A persister process that answered.

    Attributes:
        name: its name in ``fiq up``, or the one that it reports.
        host: where it runs.
        pid: its process id.
        volume: UUID of its volume.
        partitions: names of those that it owns.
        address: host:port of its ``/readyz`` and ``/metrics`` on that host; empty when it does not report one.
    """

    name: str
    host: str
    pid: str
    volume: str
    partitions: tuple[str, ...]
    address: str = ""


@dataclass(frozen=True, slots=True)
class ClusterSnapshot:
    """The cluster as one store's commands need it.

    Attributes:
        store: name of the store.
        log: the streams, placements and processes.
        workers: the persisters that answer, of all volumes, by name.
    """

    store: str
    log: LogState
    workers: tuple[Worker, ...]

    @property
    def stream(self) -> StreamReport | None:
        """The stream of events; None without one, or without a broker."""
        return self.log.stream

    @property
    def partitions(self) -> tuple[PartitionState, ...]:
        """The store's partitions; none while they are not known."""
        return self.log.partitions(self.store) if self.log.stream_exists else ()

    @property
    def placed(self) -> Mapping[int, Placement]:
        """The placements of the store's partitions."""
        found = (self.log.placements or {}).get(self.store)
        return {} if found is None else found.partitions

    @property
    def without_owner(self) -> list[str]:
        """Names of the partitions that no live process runs."""
        return [partition_name(one.partition) for one in self.partitions if not one.owners]

    def why_unknown(self, part: str) -> str:
        """Return why the log could not be asked for *part*."""
        return self.log.troubles.get(part, "no answer")


async def take_snapshot(
    connection: Connection | None, settings: LogSettings, state: StackState | None = None
) -> ClusterSnapshot:
    """Ask the log once.

    Args:
        connection: to the cluster; None for a log without a broker.
        settings: of the log; they name the store.
        state: of the ``fiq up`` that runs the log, for the names of its persisters.

    Raises LogUnavailableError: no leader of the stream answered.
    """
    log = await _ask_owners(settings) if connection is None else await _ask_broker(connection, settings)
    known = {} if state is None else {str(member.pid): member.name for member in state.members}
    workers = sorted((_worker(one, known) for one in log.processes or ()), key=lambda worker: worker.name)
    return ClusterSnapshot(settings.store, log, tuple(workers))


async def _ask_owners(settings: LogSettings) -> LogState:
    from services.log.zeromq import log as zeromq  # pyzmq is imported for this log only

    return await zeromq.look_once(settings)


async def _ask_broker(connection: Connection, settings: LogSettings) -> LogState:
    """Ask again for a while if a leader is being elected."""
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


def _worker(process: LiveProcess, known: Mapping[str, str]) -> Worker:
    metadata = process.metadata
    pid = metadata.get("pid", "")
    return Worker(
        name=known.get(pid) or metadata.get("worker", ""),
        host=metadata.get("host", ""),
        pid=pid,
        volume=process.volume,
        partitions=tuple(partition_name(partition) for partition in sorted(process.partitions)),
        address=metadata.get("address", ""),
    )


# -- fiq status ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Node:
    """A node: its name, client URL (where known), role in the stream's raft group, and condition."""

    name: str
    url: str
    role: str
    condition: str


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition of one store.

    Attributes:
        name: two digits.
        committed: stream sequence that its file has reached: from the file if it can be read here, else from its owner
            or its key; None when none of them says.
        lag: events after that which are not committed.
        oldest_seconds: age of the oldest of them; None when there are none.
        volume: UUID of the volume that holds it; empty when no key says so.
        epoch: how often it was placed; 0 when no key says so.
        begins: first stream sequence that its file may hold: above 1, the store began after a trim.
        owners: persisters that report it as theirs: one, except for a moment.
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
class ClusterStatus:
    """The output of ``fiq status``; *remarks* say what is unknown or needs attention."""

    nodes: tuple[Node, ...]
    stream: StreamReport | None
    dead: StreamReport | None
    workers: tuple[Worker, ...]
    partitions: tuple[Partition, ...]
    remarks: tuple[str, ...]


def status(
    server: ServerOption = None,
    folder: FolderOption = None,
    corpus: Annotated[
        Path | None,
        typer.Option(help="Data directory from which committed positions are read; FI_STORE names the store."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
) -> None:
    """Show nodes, stream, and each partition's lag and owner."""
    target = find_cluster(server, folder)
    directory = corpus or (None if target.state is None else Path(target.state.data_dir))
    found = asyncio.run(_read(target, directory))
    if json:
        typer.echo(orjson.dumps(asdict(found), option=orjson.OPT_INDENT_2))
    else:
        _print(found)


async def _read(target: Target, corpus: Path | None) -> ClusterStatus:
    committed, remarks = _committed(corpus)
    if target.settings.uses_zeromq:
        snapshot = await take_snapshot(None, target.settings, target.state)
    else:
        async with connected(target.settings) as connection:
            snapshot = await take_snapshot(connection, target.settings, target.state)
    log = snapshot.log
    if not log.has_stream:
        remarks += _without_broker(snapshot, target.settings)
    if not log.stream_exists:
        remarks.append(f"there is no stream {STREAM}: start a service, or run  fiq provision")
    if log.processes is None:
        remarks.append(f"it is unknown which persisters run: {snapshot.why_unknown(PROCESSES)}")
    elif not snapshot.workers and log.has_stream:
        remarks.append("no persister answers: events are kept in the stream until one runs")
    if log.stream_exists and not snapshot.partitions:
        remarks.append(f"the placement of partitions is unknown: {snapshot.why_unknown(PARTITIONS)}; run  fiq doctor")
    now = time.time() - log.clock_offset
    return ClusterStatus(
        nodes=_nodes(log.stream, target.state),
        stream=log.stream,
        dead=log.dead,
        workers=snapshot.workers,
        partitions=tuple(_partition(one, snapshot.workers, committed, now) for one in snapshot.partitions),
        remarks=tuple(remarks),
    )


def _without_broker(snapshot: ClusterSnapshot, settings: LogSettings) -> list[str]:
    remarks = [f"the log at {settings.url} has no broker: there are no nodes, no stream and no dead letters"]
    if without := snapshot.without_owner:
        remarks.append(f"no persister answers for partitions {', '.join(without)}: clients get 503 until one runs")
    return remarks


def _committed(corpus: Path | None) -> tuple[dict[int, int], list[str]]:
    if corpus is None or not corpus.exists():
        return {}, []
    from fiq.corpus import CorpusError, open_corpus  # h5py is slow to import, and not every status needs it

    try:
        with open_corpus(corpus) as opened:
            return {info.identity.partition: info.committed for info in opened.partitions}, []
    except CorpusError as error:
        return {}, [f"the corpus cannot be read: {error}"]


def _nodes(stream: StreamReport | None, state: StackState | None) -> tuple[Node, ...]:
    found = {}
    if stream is not None:
        found = {replica.name: ("replica", _condition(replica)) for replica in stream.replicas}
        found |= {stream.leader: ("leader", "current")} if stream.leader else {}
    members = {} if state is None else {member.name: member for member in state.nodes}
    nodes = []
    for name in sorted(found.keys() | members.keys()):
        role, condition = found.get(name, ("", "healthy"))
        if name in members and monitoring.get(members[name].monitoring, "/healthz")[0] != 200:
            condition = "not healthy"
        nodes.append(Node(name, members[name].url if name in members else "", role, condition))
    return tuple(nodes)


def _condition(replica: ReplicaReport) -> str:
    if replica.offline:
        return "offline"
    return "current" if replica.current else f"{replica.lag} behind"


def _partition(one: PartitionState, workers: tuple[Worker, ...], committed: Mapping[int, int], now: float) -> Partition:
    name, placement = partition_name(one.partition), one.placement
    return Partition(
        name=name,
        committed=committed.get(one.partition, one.committed if one.owners or placement is not None else None),
        lag=one.waiting.events,
        oldest_seconds=None if one.oldest is None else max(0.0, now - one.oldest),
        volume="" if placement is None else placement.volume,
        epoch=0 if placement is None else placement.epoch,
        begins=0 if placement is None else placement.begins,
        owners=tuple(worker.name for worker in workers if name in worker.partitions),
    )


def _print(found: ClusterStatus) -> None:
    out = console.out()
    if found.nodes:
        table = console.table("node", "role", "condition", "address")
        for node in found.nodes:
            table.add_row(node.name, node.role, node.condition, node.url)
        out.print(table)
        out.print()
    for name, stream in ((STREAM, found.stream), (DEAD_STREAM, found.dead)):
        if stream is not None:
            out.print(f"stream {name}: {_fill(stream)}")
    if found.partitions:
        out.print()
        out.print(_table(found))
    for remark in found.remarks:
        console.err().print(f"fiq: {remark}", soft_wrap=True)


def _fill(stream: StreamReport) -> str:
    sequences = f", sequences {stream.first_sequence} to {stream.last_sequence}" if stream.messages else ""
    limit = f" of {decimal(stream.max_bytes)} ({stream.bytes / stream.max_bytes:.1%})" if stream.max_bytes > 0 else ""
    return f"{stream.messages} messages{sequences}, {decimal(stream.bytes)}{limit}"


def _table(found: ClusterStatus) -> Table:
    pids = {worker.name: worker.pid for worker in found.workers}
    table = console.table("partition", ">committed", ">lag", ">oldest", "owner", "volume")
    for one in found.partitions:
        owners = ", ".join(f"{owner} (pid {pids[owner]})" for owner in one.owners) or "nobody"
        committed = "-" if one.committed is None else str(one.committed)
        oldest = "-" if one.oldest_seconds is None else f"{one.oldest_seconds:.0f} s"
        volume = one.volume or "not placed"
        if one.begins > 1:
            volume += f", from sequence {one.begins} on"
        table.add_row(one.name, committed, str(one.lag), oldest, owners, volume)
    return table

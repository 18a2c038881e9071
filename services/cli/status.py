"""The cluster's state in one snapshot, and ``fiq status``, which shows it.

:func:`take_snapshot` asks either log once, as the services do: streams, placement of partitions, and the persisters
that answer. ``fiq doctor``, ``backup``, ``restore``, ``give-up`` and ``place`` read the same snapshot, and wait for an
election. ``fiq status`` answers within three seconds, whichever node is frozen: it shows what is known by then.
"""

from __future__ import annotations

import asyncio
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import orjson
import typer
from rich.filesize import decimal

from fiq.errors import FiqError
from fiq.words import count
from services.cli import console, monitoring
from services.cli.console import JsonOption
from services.cli.embedded.stack import Member, StackState
from services.cli.target import FolderOption, ServerOption, Target, connected, find_cluster
from services.log.errors import LogUnavailableError
from services.log.jetstream.connection import Connection
from services.log.jetstream.monitor import PART_SECONDS, look_once
from services.log.jetstream.stream import DEAD_STREAM, STREAM
from services.log.metrics import PARTITIONS, PROCESSES, STREAMS
from services.log.partitions import partition_name
from services.log.settings import LogSettings
from services.log.status import (
    ALIVE_SECONDS,
    LiveProcess,
    LogState,
    PartitionState,
    Placement,
    ReplicaReport,
    StreamReport,
    Waiting,
)

#: how long an election may keep the broker from answering, seconds
_ELECTION = 12.0
_PAUSE = 0.25
#: how long `fiq status` waits for the stream's leader, and its parts for other nodes, seconds
_STATUS_PATIENCE = 1.5
#: shortest time that the rest of that is worth a question, seconds
_SHORTEST_LOOK = 0.3
#: pause between two looks of `fiq status --watch`, seconds
_WATCH_SECONDS = 2.0
#: moves a terminal's cursor to the top and clears what follows
_CLEAR = "\x1b[H\x1b[J"


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
        """The store's partitions; while their placement is not known, those that a live process reports."""
        if not self.log.stream_exists:
            return ()
        return self.log.partitions(self.store) if self.log.stores is not None else self._reported()

    def _reported(self) -> tuple[PartitionState, ...]:
        ours = [process for process in self.log.processes or () if process.store == self.store]
        found: dict[int, PartitionState] = {}
        for process in ours:
            for number, progress in process.progress.items():
                owners = sum(number in other.partitions for other in ours)
                waiting = Waiting(progress.waiting, process.stream_sequence, False)
                if number not in found or found[number].committed < progress.committed:
                    found[number] = PartitionState(number, None, owners, progress.committed, waiting, None)
        return tuple(found[number] for number in sorted(found))

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
    connection: Connection | None,
    settings: LogSettings,
    state: StackState | None = None,
    *,
    patience: float | None = None,
) -> ClusterSnapshot:
    """Ask the log once.

    Args:
        connection: to the cluster; None for a log without a broker.
        settings: of the log; they name the store.
        state: of the ``fiq up`` that runs the log, for the names of its persisters.
        patience: return within this time what is known, seconds; by default wait for an election.

    Raises LogUnavailableError: no leader of the stream answered; never with *patience*.
    """
    if connection is None:
        log = await _ask_owners(settings)
    else:
        log = await _ask_broker(connection, settings, _ELECTION if patience is None else patience)
        trouble = log.troubles.get(STREAMS)
        if trouble is not None and patience is None:
            raise LogUnavailableError(
                f"the cluster takes connections but does not answer ({trouble}): are most of its nodes down? Look at "
                "their logs, or try again"
            )
    known = {} if state is None else {str(member.pid): member.name for member in state.members}
    workers = sorted((_worker(one, known) for one in log.processes or ()), key=lambda worker: worker.name)
    return ClusterSnapshot(settings.store, log, tuple(workers))


async def _ask_owners(settings: LogSettings) -> LogState:
    from services.log.zeromq import log as zeromq  # pyzmq is imported for this log only

    return await zeromq.look_once(settings)


async def _ask_broker(connection: Connection, settings: LogSettings, patience: float) -> LogState:
    """Ask again, for *patience* seconds, while a leader is being elected."""
    deadline = time.monotonic() + patience
    while True:
        left = deadline - time.monotonic()
        log = await look_once(connection, settings, part_seconds=min(PART_SECONDS, max(_SHORTEST_LOOK, left)))
        if STREAMS not in log.troubles or deadline - time.monotonic() < _PAUSE + _SHORTEST_LOOK:
            return log
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
    """The output of ``fiq status``; *remarks* say what is unknown or needs attention.

    Attributes:
        complete: False if the leader of the stream, or of the bucket with the placements, did not answer in time.
    """

    nodes: tuple[Node, ...]
    stream: StreamReport | None
    dead: StreamReport | None
    workers: tuple[Worker, ...]
    partitions: tuple[Partition, ...]
    remarks: tuple[str, ...]
    complete: bool = True


def status(
    server: ServerOption = None,
    folder: FolderOption = None,
    corpus: Annotated[
        Path | None,
        typer.Option(help="Data directory from which committed positions are read; FI_STORE names the store."),
    ] = None,
    json: JsonOption = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every two seconds, until Ctrl-C.")] = False,
) -> None:
    """Show nodes, stream, and each partition's lag and owner."""
    if not watch:
        found = _look(server, folder, corpus)
        _print_json(found) if json else show_status(found)
        if not found.complete:
            raise typer.Exit(1)
        return
    while True:
        try:
            shown: ClusterStatus | FiqError = _look(server, folder, corpus)
        except FiqError as error:  # nothing runs yet, or not now: it may come back
            shown = error
        if not json:
            typer.echo(f"{_CLEAR if sys.stdout.isatty() else ''}{datetime.now(UTC):%H:%M:%S} UTC")
        if isinstance(shown, FiqError):
            typer.echo(f"fiq: {shown}", err=True)
        elif json:
            typer.echo(orjson.dumps(asdict(shown)))
        else:
            show_status(shown)
            typer.echo()
        time.sleep(_WATCH_SECONDS)


def _look(server: str | None, folder: Path | None, corpus: Path | None) -> ClusterStatus:
    target = find_cluster(server, folder)
    return asyncio.run(_read(target, corpus or (None if target.state is None else Path(target.state.data_dir))))


async def _read(target: Target, corpus: Path | None) -> ClusterStatus:
    members = () if target.state is None else target.state.nodes
    # in threads, while the log is asked, which is mostly waiting
    healths = asyncio.gather(*(asyncio.to_thread(_health, member) for member in members))
    files = asyncio.create_task(asyncio.to_thread(_committed, corpus))
    if target.settings.uses_zeromq:
        snapshot = await take_snapshot(None, target.settings, target.state)
    else:
        async with connected(target.settings) as connection:
            snapshot = await take_snapshot(connection, target.settings, target.state, patience=_STATUS_PATIENCE)
    committed, remarks = await files
    log = snapshot.log
    if not log.has_stream:
        remarks += _without_broker(snapshot, target.settings)
    if not log.stream_exists:
        remarks.append(f"there is no stream {STREAM}: start a service, or run  fiq provision")
    if (trouble := log.troubles.get(STREAMS)) is not None:
        remarks.append(
            f"the leader of stream {STREAM} does not answer ({trouble}). After the loss of a node the others elect "
            "another one within some seconds: try again, or see it with  fiq status --watch"
        )
    if log.processes is None:
        remarks.append(f"it is unknown which persisters run: {snapshot.why_unknown(PROCESSES)}")
    elif not snapshot.workers and log.has_stream:
        away = "" if all(status for status in await healths) else " (or is connected to the node that does not answer)"
        remarks.append(f"no persister answers{away}: events are kept in the stream until one runs")
    unplaced = log.stream_exists and log.has_stream and log.stores is None
    if unplaced and trouble is None:
        remarks.append(f"the placement of partitions is unknown: {snapshot.why_unknown(PARTITIONS)}; run  fiq doctor")
    now = time.time() - log.clock_offset
    return ClusterStatus(
        nodes=_nodes(log.stream, members, await healths),
        stream=log.stream,
        dead=log.dead,
        workers=snapshot.workers,
        partitions=tuple(_partition(one, snapshot.workers, committed, now) for one in snapshot.partitions),
        remarks=tuple(remarks),
        complete=trouble is None and not unplaced,
    )


def _health(member: Member) -> int:
    """Return what the node's monitoring port answers: 200 if it is healthy, 0 if nothing."""
    return monitoring.get(member.monitoring, "/healthz")[0]


def _without_broker(snapshot: ClusterSnapshot, settings: LogSettings) -> list[str]:
    remarks = [f"the log at {settings.url} has no broker: there are no nodes, no stream and no dead letters"]
    if without := snapshot.without_owner:
        remarks.append(f"no persister answers for partitions {', '.join(without)}: clients get 503 until one runs")
    return remarks


def _committed(corpus: Path | None) -> tuple[dict[int, int], list[str]]:
    if corpus is None or not corpus.exists():
        return {}, []
    from fiq.corpus import (  # h5py is slow to import, and not every status needs it
        CorpusError,
        DamagedPartitionWarning,
        open_corpus,
    )

    try:
        with warnings.catch_warnings(), open_corpus(corpus) as opened:
            warnings.simplefilter("ignore", DamagedPartitionWarning)
            committed = {info.identity.partition: info.committed for info in opened.partitions}
            return committed, [str(damaged) for damaged in opened.damaged]
    except CorpusError as error:
        return {}, [f"the corpus cannot be read: {error}"]


def _nodes(stream: StreamReport | None, members: Sequence[Member], healths: Sequence[int]) -> tuple[Node, ...]:
    found = {}
    if stream is not None:
        found = {replica.name: ("replica", _condition(replica)) for replica in stream.replicas}
        found |= {stream.leader: ("leader", "current")} if stream.leader else {}
    urls = {member.name: member.url for member in members}
    health = {member.name: status for member, status in zip(members, healths, strict=True)}
    nodes = []
    for name in sorted(found.keys() | urls.keys()):
        role, condition = found.get(name, ("", "healthy"))
        if (status := health.get(name, 200)) != 200:
            condition = "not healthy" if status else "does not answer"
        nodes.append(Node(name, urls.get(name, ""), role, condition))
    return tuple(nodes)


def _condition(replica: ReplicaReport) -> str:
    if replica.offline:
        return "offline"
    if replica.seen_seconds is not None and replica.seen_seconds >= ALIVE_SECONDS:
        return f"silent for {replica.seen_seconds:.0f} s"
    if replica.seen_seconds is None and not replica.current:  # frozen or gone before this leader was elected
        return "silent since the election"
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


def _print_json(found: ClusterStatus) -> None:
    typer.echo(orjson.dumps(asdict(found), option=orjson.OPT_INDENT_2))


def show_status(found: ClusterStatus) -> None:
    """Print tables for people to stdout, and the remarks to stderr."""
    if found.nodes:
        table = console.table("node", "role", "condition", "address")
        for node in found.nodes:
            table.add_row(node.name, node.role, node.condition, node.url)
        console.show(table)
        typer.echo()
    for name, stream in ((STREAM, found.stream), (DEAD_STREAM, found.dead)):
        if stream is not None:
            typer.echo(f"stream {name}: {_fill(stream)}")
    if found.stream is not None or found.dead is not None:
        typer.echo()
    if found.partitions:
        _print_partitions(found)
    for remark in found.remarks:
        typer.echo(f"fiq: {remark}", err=True)


def _fill(stream: StreamReport) -> str:
    sequences = f", sequences {stream.first_sequence} to {stream.last_sequence}" if stream.messages else ""
    limit = f" of {decimal(stream.max_bytes)} ({stream.bytes / stream.max_bytes:.1%})" if stream.max_bytes > 0 else ""
    return f"{count(stream.messages, 'message')}{sequences}, {decimal(stream.bytes)}{limit}"


def _print_partitions(found: ClusterStatus) -> None:
    volumes = sorted({one.volume for one in found.partitions if one.volume})
    numbers = {volume: str(number) for number, volume in enumerate(volumes, start=1)}
    for volume in volumes:
        typer.echo(f"volume {numbers[volume]}: {volume}")
    pids = {worker.name: worker.pid for worker in found.workers}
    table = console.table("partition", ">committed", ">lag", ">oldest", "owner", "volume")
    for one in found.partitions:
        owners = ", ".join(f"{owner} (pid {pids[owner]})" for owner in one.owners) or "none"
        committed = "-" if one.committed is None else str(one.committed)
        oldest = "-" if one.oldest_seconds is None else f"{one.oldest_seconds:.0f} s"
        volume = numbers.get(one.volume, "not placed" if found.complete else "unknown")
        if one.begins > 1:
            volume += f", from sequence {one.begins} on"
        table.add_row(one.name, committed, str(one.lag), oldest, owners, volume)
    console.show(table)

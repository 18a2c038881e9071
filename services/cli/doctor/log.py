"""The log as the broker tells of it: streams, replicas, clocks, dead letters, partitions and who runs them."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nats.aio.client import Client
from rich.filesize import decimal

from fiq.errors import FiqError
from services.cli.doctor.finding import Finding, error, ok, unknown, warning
from services.cli.doctor.nodes import clock
from services.cli.embedded.stack import State
from services.cli.overview import Worker, named_workers
from services.log.errors import ProvisionError
from services.log.jetstream import stream as names
from services.log.jetstream.api import JetStreamApi
from services.log.jetstream.monitor import NodeState, ask_nodes, look_once
from services.log.jetstream.stream import changes, stream_config
from services.log.metrics import PARTITIONS
from services.log.partitions import partition_name
from services.log.settings import LogSettings
from services.log.status import LogState, PartitionState, StreamReport

#: above this share of its limit a stream is worth a look, and above that clients are refused soon
FULL, VERY_FULL = 0.7, 0.95


@dataclass(frozen=True, slots=True)
class LogView:
    """What the broker answered.

    Attributes:
        info: STREAM.INFO of the stream of events; None when there is none.
        log: the same snapshot that the services work with.
        partitions: those of the settings' store; none while they are not known.
        workers: the persisters that answer.
        nodes: what each of them says of itself; empty where this user may not ask.
        clocks: where *nodes* is empty, by node: how far its clock is ahead of ours, and how uncertain that is, both in
            seconds.
    """

    info: dict[str, Any] | None
    log: LogState
    partitions: tuple[PartitionState, ...]
    workers: tuple[Worker, ...]
    nodes: tuple[NodeState, ...]
    clocks: dict[str, tuple[float, float]]


async def examine(nc: Client, settings: LogSettings, state: State | None) -> LogView:
    """Ask the broker everything. Raises LogUnavailableError: no answer; LogRefusedError: the broker refuses to tell."""
    asked = time.perf_counter()
    info = await JetStreamApi(nc).stream_info(names.STREAM)
    uncertain = (time.perf_counter() - asked) / 2
    log = await look_once(nc, settings)
    nodes = await ask_nodes(nc)
    clocks = {log.stream.leader: (-log.clock_offset, uncertain)} if log.stream is not None and log.stream.leader else {}
    return LogView(
        info=info,
        log=log,
        partitions=log.partitions(settings.store),
        workers=tuple(named_workers(log.processes or (), state)),
        nodes=tuple(nodes),
        clocks={} if nodes else clocks,
    )


def check_clocks(seen: LogView, offset: float, known: Collection[str]) -> Iterator[Finding]:
    """Compare the nodes' clocks, but those *known* already, with ours, taken to be *offset* seconds ahead."""
    for name, (ahead, uncertain) in seen.clocks.items():
        if name not in known:
            yield clock(name, ahead - offset, uncertain)
    if not seen.clocks and not known:
        yield unknown("clocks", "no node told its time", "the leader of the stream tells it: start the nodes")


def check_stream(seen: LogView, settings: LogSettings) -> Iterator[Finding]:
    """Look at the stream of events: that it is what the settings ask for, its replicas, its room."""
    stream = seen.log.stream
    if stream is None or seen.info is None:
        meaning = "clients get 503 for everything"
        yield error("stream", f"there is no stream {names.STREAM}", meaning, "`fiq provision`, or start a service")
        return
    yield from _drift(seen.info, settings)
    yield from _replicas(stream)
    yield _room(names.STREAM, stream, "clients get 503 when it is full", "find who does not commit: `fiq status`")


def _drift(info: dict[str, Any], settings: LogSettings) -> Iterator[Finding]:
    try:
        different = changes(stream_config(settings), info["config"], info["state"]["bytes"])
    except ProvisionError as problem:
        yield error("stream", str(problem), "services with these settings refuse to start", "see what it says")
        return
    if different:
        yield warning(
            "stream",
            f"stream {names.STREAM} is not what the settings ask for: {', '.join(sorted(different))}",
            "the next service that provisions changes it",
            "set the same FI_ variables everywhere; `fiq provision` changes the stream now",
        )
    else:
        yield ok("stream", f"stream {names.STREAM} is what the settings ask for")


def _replicas(stream: StreamReport) -> Iterator[Finding]:
    check = "replicas"
    if not stream.leader:
        meaning = "clients get 503; normal for some seconds after the loss of a node"
        yield error(check, "the stream has no leader", meaning, "if it stays: start the nodes that are down")
    elif not stream.has_quorum:
        meaning = "most copies are down: nothing can be stored"
        yield error(check, "the stream has no quorum", meaning, "start the nodes that are down")
    behind = [replica for replica in stream.replicas if replica.offline or not replica.current]
    for replica in behind:
        if replica.offline or not replica.alive:
            meaning = "the loss of one more node stops everything"
            yield error(
                check, f"the copy on {replica.name} is offline", meaning, f"start {replica.name}; look at its log"
            )
        else:
            meaning = "the loss of another node may stop everything until it has caught up"
            action = "wait; restart no other node meanwhile"
            yield warning(check, f"the copy on {replica.name} is {replica.lag} entries behind", meaning, action)
    if stream.copies < 3:
        meaning = "the loss of one node loses events that clients got a 202 for"
        yield warning(check, f"the stream has {stream.copies} copies", meaning, "FI_REPLICAS=3 on three nodes")
    elif not behind and stream.leader:
        yield ok(check, f"{stream.copies} copies, all current; {stream.leader} leads")


def _room(name: str, stream: StreamReport, meaning: str, action: str) -> Finding:
    share = stream.bytes / stream.max_bytes if stream.max_bytes > 0 else 0.0
    what = f"{name} holds {stream.messages} messages, {decimal(stream.bytes)}, {share:.0%} of its limit"
    if share >= FULL:
        return (error if share >= VERY_FULL else warning)("stream", what, meaning, action)
    return ok("stream", what)


def check_dead_letters(seen: LogView) -> Iterator[Finding]:
    """Look whether anything was set aside."""
    if seen.log.dead is None:
        if seen.log.stream is not None:
            meaning = "a partition with a bad message waits for it"
            yield error("dead letters", f"there is no stream {names.DEAD_STREAM}", meaning, "`fiq provision`")
        return
    if seen.log.dead.messages:
        yield warning(
            "dead letters",
            f"{seen.log.dead.messages} messages were set aside in {names.DEAD_STREAM}",
            "no persister could take them: they are in no HDF5 file",
            f"`nats stream view {names.DEAD_STREAM}` shows the reasons; purge it when you are done",
        )
        yield _room(names.DEAD_STREAM, seen.log.dead, "partitions with bad messages wait when it is full", "purge it")
    else:
        yield ok("dead letters", "none")


def check_placement(seen: LogView, volumes: int) -> Iterator[Finding]:
    """Look at where the partitions live and who runs them.

    Args:
        volumes: how many volumes the store is meant to have.
    """
    if seen.log.stream is None:
        return
    if not seen.partitions:
        reason = seen.log.troubles.get(PARTITIONS, "no answer")
        yield error(
            "placement", f"it is not known where partitions live: {reason}", "nothing is placed", "see what it says"
        )
        return
    yield from _stores(seen)
    found = list(_placement(seen.partitions, seen.workers, volumes))
    yield from found
    if not found:
        hosts = len({worker.host for worker in seen.workers})
        yield ok("placement", f"{len(seen.partitions)} partitions, all placed and run, by {hosts} host(s)")


def _stores(seen: LogView) -> Iterator[Finding]:
    """Tell of partitions whose key was lost, and of stores that do not hold all of the history."""
    for store, placed in sorted((seen.log.placements or {}).items()):
        if placed.formed and (lost := set(range(len(seen.partitions))) - placed.partitions.keys()):
            found = ", ".join(map(partition_name, sorted(lost)))
            what = f"the key of partition {found} of store {store} is gone from bucket {names.BUCKET}"
            meaning = "no volume may claim it: it could have a file already; its events wait"
            yield error("placement", what, meaning, "docs/operations.md, `A lost key`")
        late = [one.begins for one in placed.partitions.values() if one.begins > 1]
        if late:
            what = f"store {store} begins at sequence {min(late)}: it is no full copy"
            meaning = "what is older is in no file of it"
            yield warning("placement", what, meaning, "seed it from another store: docs/operations.md, `A second copy`")


def _placement(partitions: Sequence[PartitionState], workers: Sequence[Worker], volumes: int) -> Iterator[Finding]:
    check = "placement"
    if not workers:
        meaning = "events wait in the stream until one runs; when it is full clients get 503"
        yield error(check, "no persister answers", meaning, "start them, with the same FI_LOG_URL and FI_STORE")
    unplaced = [partition_name(one.partition) for one in partitions if one.placement is None]
    if unplaced:
        meaning = "their events wait in the stream; ingest is not ready"
        action = f"start persisters; FI_VOLUMES must be the number of volumes that there are, here it is {volumes}"
        yield error(check, f"no volume has claimed partition {', '.join(unplaced)}", meaning, action)
    homes: dict[str, list[PartitionState]] = {}
    for one in partitions:
        if one.placement is not None:
            homes.setdefault(one.placement.volume, []).append(one)
    quota = math.ceil(len(partitions) / volumes)
    alive = {worker.volume for worker in workers}
    for volume, here in sorted(homes.items()):
        names_here = ", ".join(partition_name(one.partition) for one in here)
        if workers and volume not in alive:
            meaning = "their events wait in the stream; everybody else goes on"
            action = "start the persisters of that volume; if its disk is lost: `fiq restore` or `fiq give-up`"
            yield error(check, f"volume {volume} is away, with partition {names_here}", meaning, action)
        if len(here) > quota:
            meaning = f"a volume is meant to have {quota}: work is shared unevenly"
            yield warning(
                check, f"volume {volume} has {len(here)} partitions", meaning, "set FI_VOLUMES alike everywhere"
            )
    owners = Counter(name for worker in workers for name in worker.partitions)
    for one in partitions:
        name = partition_name(one.partition)
        if one.placement is not None and one.placement.volume in alive and not owners[name]:
            meaning = f"{one.waiting.events} events of it wait"
            yield error(check, f"nobody runs partition {name}", meaning, "look at /readyz of the volume's persisters")
        elif owners[name] > 1:
            action = "nothing if it passes; else look at their logs"
            yield warning(check, f"{owners[name]} processes say they run partition {name}", "a handover", action)


def unreachable(problem: FiqError) -> Finding:
    """Return the finding for a cluster that does not answer."""
    return error("nodes", str(problem), "clients get 503, persisters wait", "see what it says")

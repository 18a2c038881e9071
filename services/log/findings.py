"""What is wrong with the pipeline, what follows from it, and what to do: words of ``fiq doctor`` and of the service.

:func:`conditions` judges one :class:`~services.log.status.LogState`, which every process of the pipeline has anyway:
copies and room of the streams, dead letters, placement and owners of the partitions, and age of what waits. ``fiq
doctor`` adds what can be seen only from outside or on a host; ``GET /pipeline`` shows what is not fine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from fiq.words import count
from services.log.metrics import DEAD_LETTERS, PARTITIONS, PROCESSES, STREAMS
from services.log.partitions import partition_name
from services.log.protocol import DEAD_LETTER_LOG, EVENT_LOG
from services.log.status import LiveProcess, LogState, PartitionState, StreamReport, Verified

#: shares of a stream's limit
FULL, VERY_FULL = 0.7, 0.95
#: age of the oldest waiting event from which a partition is behind, seconds; the alert FiqBacklogOld has the same
OLD_SECONDS = 60.0


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    #: nothing is lost or refused yet
    WARNING = "warning"
    #: something is lost, refused or stopped, or will be with the next fault
    ERROR = "error"
    #: it could not be checked from here
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of one check.

    Attributes:
        check: what was checked: versions, nodes, clocks, …
        level: how bad it is.
        what: what was found.
        meaning: what follows from it; empty when all is well.
        action: what to do; empty when all is well.
    """

    check: str
    level: Level
    what: str
    meaning: str = ""
    action: str = ""


def ok(check: str, what: str) -> Finding:
    """Return a finding that all is well."""
    return Finding(check, Level.OK, what)


def warning(check: str, what: str, meaning: str, action: str) -> Finding:
    """Return a finding to act on some day."""
    return Finding(check, Level.WARNING, what, meaning, action)


def error(check: str, what: str, meaning: str, action: str) -> Finding:
    """Return a finding to act on now."""
    return Finding(check, Level.ERROR, what, meaning, action)


def unknown(check: str, what: str, action: str) -> Finding:
    """Return what could not be checked, and how it could be."""
    return Finding(check, Level.UNKNOWN, what, "", action)


def worst(findings: Iterable[Finding]) -> Level:
    """Return the worst level of all; unknown is better than a warning, and worse than fine."""
    order = (Level.OK, Level.UNKNOWN, Level.WARNING, Level.ERROR)
    return max((finding.level for finding in findings), key=order.index, default=Level.OK)


def conditions(state: LogState, now: float) -> Iterator[Finding]:
    """Yield what is not fine in *state*, of all stores.

    Args:
        state: of the log.
        now: seconds since 1970, by the clock of the log's leader.
    """
    for finding in _all(state, now):
        if finding.level is not Level.OK:
            yield finding


def _all(state: LogState, now: float) -> Iterator[Finding]:
    if state.has_stream:
        if (trouble := state.troubles.get(STREAMS)) is not None:
            meaning = "clients get 503; normal for some seconds after the loss of a node"
            yield error("stream", f"the log does not answer: {trouble}", meaning, "if it stays so, start the nodes")
        if not state.stream_exists:
            yield no_stream()
            return
        if state.stream is not None:
            yield from check_replicas(state.stream)
            yield check_events_room(state.stream)
        yield from check_dead_letters(state)
    yield from check_verified(state)
    for store in sorted(state.stores or ()):
        yield from check_placement(state, store, None)
        yield from check_age(state, store, now)


# -- the streams -------------------------------------------------------------------------------------------------------


def no_stream() -> Finding:
    """Return that there is no stream of events."""
    action = "`fiq provision`, or start a service"
    return error("stream", f"there is no stream {EVENT_LOG}", "clients get 503 for everything", action)


def check_replicas(stream: StreamReport) -> Iterator[Finding]:
    """Check that the stream has a leader and a quorum, and that its copies are complete."""
    check = "replicas"
    if not stream.leader:
        meaning = "clients get 503; normal for some seconds after the loss of a node"
        yield error(check, "the stream has no leader", meaning, "if it stays so, start the nodes that are down")
    elif not stream.has_quorum:
        meaning = "most copies are down: nothing can be stored"
        yield error(check, "the stream has no quorum", meaning, "start the nodes that are down")
    behind = [replica for replica in stream.replicas if replica.offline or not replica.current]
    for replica in behind:
        if replica.offline or not replica.alive:
            action = f"start {replica.name}; look at its log"
            meaning = "the loss of one more node stops everything"
            yield error(check, f"the copy on {replica.name} is offline", meaning, action)
        else:
            meaning = "the loss of another node may stop everything until it has caught up"
            action = "wait; restart no other node meanwhile"
            yield warning(check, f"the copy on {replica.name} is {replica.lag} entries behind", meaning, action)
    if stream.copies < 3:
        meaning = "the loss of one node loses events that clients got a 202 for"
        yield warning(check, f"the stream has {count(stream.copies, 'copy')}", meaning, "FI_REPLICAS=3 on three nodes")
    elif not behind and stream.leader:
        yield ok(check, f"{count(stream.copies, 'copy')}, all current; {stream.leader} leads")


def check_events_room(stream: StreamReport) -> Finding:
    """Check how full the stream of events is."""
    action = "find the partition that does not commit: `fiq status`"
    return _room(EVENT_LOG, stream, "clients get 503 when it is full", action)


def check_dead_letters(state: LogState) -> Iterator[Finding]:
    """Check whether there are dead letters."""
    dead, check = state.dead, "dead letters"
    if dead is None:
        if state.stream is not None and DEAD_LETTERS not in state.troubles:
            meaning = "a partition with a bad message waits for it"
            yield error(check, f"there is no stream {DEAD_LETTER_LOG}", meaning, "`fiq provision`")
    elif dead.messages:
        yield warning(
            check,
            f"{count(dead.messages, 'message')} set aside in {DEAD_LETTER_LOG}",
            "no persister could store them: they are in no HDF5 file",
            "`fiq dead list` shows the reasons; `fiq dead requeue` or `fiq dead drop` each",
        )
        yield _room(DEAD_LETTER_LOG, dead, "partitions with bad messages wait when it is full", "`fiq dead drop`")
    else:
        yield ok(check, "none")


def _room(name: str, stream: StreamReport, meaning: str, action: str) -> Finding:
    share = stream.bytes / stream.max_bytes if stream.max_bytes > 0 else 0.0
    what = f"{name} holds {count(stream.messages, 'message')}, {stream.bytes / 1e6:.1f} MB, {share:.0%} of its limit"
    if share >= FULL:
        return (error if share >= VERY_FULL else warning)("stream", what, meaning, action)
    return ok("stream", what)


# -- the partitions ----------------------------------------------------------------------------------------------------


def check_placement(state: LogState, store: str, volumes: int | None) -> Iterator[Finding]:
    """Check where the partitions of *store* are placed, and which persisters own them.

    Args:
        state: of the log.
        store: its name.
        volumes: how many volumes the store is meant to have; None if that is not known.
    """
    partitions = state.partitions(store)
    if not partitions:
        why = state.troubles.get(PARTITIONS, "no answer")
        what = f"the placement of partitions is unknown: {why}"
        yield error("placement", what, "nothing is placed", "see the message")
        return
    found = [*_stores(state, len(partitions)), *_unowned(state, store, partitions, volumes)]
    found += _volumes(state, store, partitions, volumes)
    yield from found
    if not found:
        hosts = len({process.metadata.get("host", "") for process in _processes(state, store)})
        yield ok(
            "placement", f"{count(len(partitions), 'partition')}, all placed and owned; hosts with persisters: {hosts}"
        )


def check_age(state: LogState, store: str, now: float) -> Iterator[Finding]:
    """Check how old the oldest waiting event of each partition is; *now* is the time of the log's leader."""
    for one in state.partitions(store):
        age = 0.0 if one.oldest is None else now - one.oldest
        if age > OLD_SECONDS:
            what = f"partition {partition_name(one.partition)} of store {store} is behind: its oldest event has waited "
            meaning = f"{count(one.waiting.events, 'event')}: safe in the log, and not in HDF5 yet"
            action = "look at /readyz of its persister; docs/runbook.md, `FiqBacklogOld`"
            yield warning("backlog", f"{what}{age:.0f} s for HDF5", meaning, action)


def check_verified(state: LogState) -> Iterator[Finding]:
    """Check what the last ``fiq verify`` of each volume found, where there was one."""
    newest: dict[str, Verified] = {}
    for process in state.processes or ():
        found = process.verified
        if found is not None and (process.volume not in newest or newest[process.volume].at < found.at):
            newest[process.volume] = found
    for volume, found in sorted(newest.items()):
        if found.problems:
            number = count(found.problems, "problem")
            what = f"fiq verify found {number} in volume {volume} at {found.at}"
            meaning = "events were changed, removed or moved, or the disk is faulty"
            yield error("verification", what, meaning, "docs/runbook.md, `FiqCorpusDamaged`")


def _processes(state: LogState, store: str) -> list[LiveProcess]:
    return [process for process in state.processes or () if process.store == store]


def _stores(state: LogState, partitions: int) -> Iterator[Finding]:
    """Report partitions whose key is lost, and stores that lack the beginning of the history."""
    for store, placed in sorted((state.placements or {}).items()):
        if placed.formed and (lost := set(range(partitions)) - placed.partitions.keys()):
            keys = ", ".join(map(partition_name, sorted(lost)))
            what = f"the key of partition {keys} of store {store} is gone from bucket fi-partitions"
            meaning = "no volume may claim it: it could have a file already; its events wait"
            yield error("placement", what, meaning, "docs/operations.md, `A lost key`")
        late = [one.begins for one in placed.partitions.values() if one.begins > 1]
        if late:
            what = f"store {store} begins at sequence {min(late)}: it is not a full copy"
            action = "seed it from another store: docs/operations.md, `A second copy`"
            yield warning("placement", what, "earlier events are in none of its files", action)


def _unowned(
    state: LogState, store: str, partitions: Sequence[PartitionState], volumes: int | None
) -> Iterator[Finding]:
    check, processes = "placement", _processes(state, store)
    waits = "their events wait in the stream" if state.has_stream else "their clients get 503"
    if state.processes is None:
        why = state.troubles.get(PROCESSES, "no answer yet")
        yield unknown(check, f"it is not known which persisters run: {why}", "look again in some seconds")
        return
    if not processes:
        meaning = "clients get 503 until one runs"
        if state.has_stream:
            meaning = "events wait in the stream until one runs; when it is full clients get 503"
        yield error(check, "no persister answers", meaning, "start them, with the same FI_LOG_URL and FI_STORE")
    if unplaced := [partition_name(one.partition) for one in partitions if one.placement is None]:
        here = "" if volumes is None else f", here it is {volumes}"
        action = f"start persisters; FI_VOLUMES must be the number of existing volumes{here}"
        what = f"no volume has claimed partition {', '.join(unplaced)}"
        yield error(check, what, f"{waits}; ingest is not ready", action)
    alive = {process.volume for process in processes}
    for one in partitions:
        name = partition_name(one.partition)
        if one.placement is not None and one.placement.volume in alive and not one.owners:
            meaning = f"{one.waiting.events} of its events wait"
            action = "look at /readyz of the volume's persisters"
            yield error(check, f"no persister owns partition {name}", meaning, action)
        elif one.owners > 1:
            action = "nothing if it passes; else look at their logs"
            yield warning(check, f"{one.owners} processes say that they own partition {name}", "a handover", action)


def _volumes(
    state: LogState, store: str, partitions: Sequence[PartitionState], volumes: int | None
) -> Iterator[Finding]:
    check, processes = "placement", _processes(state, store)
    alive = {process.volume for process in processes}
    placed: dict[str, list[str]] = {}
    for one in partitions:
        if one.placement is not None:
            placed.setdefault(one.placement.volume, []).append(partition_name(one.partition))
    for volume, here in sorted(placed.items()):
        if processes and volume not in alive:
            meaning = "their events wait in the stream; other partitions work"
            action = "start the persisters of that volume; if its disk is lost: `fiq restore` or `fiq give-up`"
            yield error(check, f"volume {volume} is away, with partition {', '.join(here)}", meaning, action)
        if volumes is not None and len(here) > (quota := math.ceil(len(partitions) / volumes)):
            meaning = f"a volume is meant to have {quota}: work is shared unevenly"
            action = "set FI_VOLUMES alike everywhere"
            yield warning(check, f"volume {volume} has {count(len(here), 'partition')}", meaning, action)

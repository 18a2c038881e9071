"""Looks at the log once a second and keeps one immutable snapshot, from which everything else in the process reads.

Metrics, readiness, the backlog and its ``Retry-After``, ``fiq status`` and the turn to trim all read the
:class:`~services.log.status.LogState`; nothing else polls the broker. A look has four parts, which fail one by one:

- *streams*: ``STREAM.INFO`` of the events, each second; *dead letters*: of theirs, each :data:`WHOLE_EVERY` seconds;
- *processes*, each second: one question to all persisters in the NATS service API (ADR-32). The broker passes it on to
  each process that subscribes to it, so a process that is gone is missing at once. The answers come while the loop
  sleeps, and count for :data:`LIVE_SECONDS`. Each says in the metadata of its service which partitions it runs and how
  far they are: ``partitions`` "00,03", ``progress`` "00:<committed>:<waiting>,03:…" and ``stream_sequence``;
- *partitions*, each :data:`WHOLE_EVERY` seconds, and each second until all are placed: the keys of the bucket
  ``fi-partitions``, and for each partition that waits its oldest event. Where no owner says how much waits, or its file
  is stalled, the broker counts: a batched direct get of one message says how many follow it (``Nats-Num-Pending``), in
  0.1 to 3 ms of one node.

With each third whole look all nodes are asked for their memory and storage, for the metrics alone. A cluster without
accounts (``fiq up``) answers nothing to that.

No consumer is ever asked: one whose node is dead answers late or never, and would keep the others from being seen. A
part that cannot be read keeps its last value for :data:`KEPT_SECONDS` and is then unknown: an alert must neither flap
with one lost answer nor rest on old values. Measured with 16 partitions (2026-11-27): docs/adr/0022-one-monitor.md.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import nats.errors
import orjson
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from fiq.errors import FiqError
from fiq.words import count
from services.core.lifecycle import supervised_task
from services.core.logs import get_logger
from services.log.errors import LogRefusedError, LogUnavailableError
from services.log.jetstream.api import JetStreamApi
from services.log.jetstream.connection import Connection
from services.log.jetstream.placement import read_stores
from services.log.jetstream.stream import (
    DEAD_STREAM,
    NODES_HEALTH,
    NODES_STATE,
    PERSISTER_SERVICE,
    STREAM,
    filter_subject,
    read_stream,
)
from services.log.metrics import DEAD_LETTERS, PARTITIONS, PROCESSES, STREAMS, LogMetrics
from services.log.partitions import partition_name
from services.log.settings import LogSettings
from services.log.status import (
    Backlog,
    LiveProcess,
    LogState,
    NodeReport,
    PartitionProgress,
    PartitionState,
    Placement,
    StorePlacement,
    StreamReport,
    Waiting,
)

#: pause between two looks, seconds
LOOK_SECONDS = 1.0
#: every n-th look is a whole one
WHOLE_EVERY = 5
#: every n-th whole look asks the nodes, and what they said is shown for so long, seconds
NODES_EVERY, NODES_KEPT_SECONDS = 3, 60.0
#: the question for their health: a node that has not caught up, or sees no leader, is no concern of this
_ENABLED_ONLY = b'{"js-enabled-only":true}'
#: a part of a look may take this long, seconds: a frozen node must not delay the others
PART_SECONDS = 2.0
#: how long the last answer is shown when no new one comes, seconds
KEPT_SECONDS = 20.0
#: a process that has not answered for this long is gone, seconds
LIVE_SECONDS = 3.5
#: a partition with waiting events whose file has not moved for this long is stalled, seconds
STALLED_SECONDS = 10.0
#: a single look waits this long for the processes' answers, seconds
_ANSWER_SECONDS = 0.75

#: how long the first answer of all nodes is awaited, and how long a further one, seconds
_FIRST_ANSWER, _NEXT_ANSWER = 1.0, 0.25
#: the question to all persisters
PROCESSES_SUBJECT = f"$SRV.INFO.{PERSISTER_SERVICE}"

_log = get_logger("eventlog.monitor")


@dataclass(frozen=True, slots=True)
class _Found:
    """The oldest waiting event of a partition, after *committed*; *waiting* None: it was not counted."""

    committed: int
    oldest: float | None
    waiting: int | None
    sequence: int


class LogMonitor:
    """Watches the log of one connection; see :class:`services.log.protocol.Status`.

    Args:
        nc: the connection.
        settings: the store that is shown while no store has a key or a process.
        metrics: where it is shown; None for a look by itself.
        part_seconds: how long a part of a look may take.

    Attributes:
        state: the newest snapshot.
    """

    def __init__(
        self,
        nc: Connection,
        settings: LogSettings,
        metrics: LogMetrics | None = None,
        *,
        part_seconds: float = PART_SECONDS,
    ) -> None:
        self.state = LogState()
        self._nc = nc
        self._settings = settings
        self._metrics = metrics
        self._part_seconds = part_seconds
        self._api = JetStreamApi(nc, timeout=part_seconds)
        self._seen: dict[str, float] = {}
        self._troubles: dict[str, str] = {}
        # streams
        self._stream: StreamReport | None = None
        self._stream_exists = True
        self._dead: StreamReport | None = None
        self._offset = 0.0
        # processes: the answers by the service's id, and since when questions are asked
        self._answers: dict[str, tuple[LiveProcess, float]] = {}
        self._subscription: Subscription | None = None
        self._inbox = ""
        self._questions = 0
        self._asked_since: float | None = None
        # nodes
        self._nodes: dict[str, tuple[NodeReport, float]] = {}
        self._enabled: dict[str, bool] = {}
        self._nodes_subscriptions: list[Subscription] = []
        # partitions
        self._placements: Mapping[str, StorePlacement] | None = None
        self._oldest: dict[tuple[str, int], _Found] = {}
        self._moved: dict[tuple[str, int], tuple[int, float]] = {}

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            for turn in range(WHOLE_EVERY * NODES_EVERY):
                if turn == 0:
                    await self._ask_nodes()
                # who waits for partitions to be placed waits for a whole look; a log that does not answer comes first
                forming = STREAMS not in self._troubles and _unplaced(self.state) > 0
                await self.look(whole=forming or turn % WHOLE_EVERY == 0)
                await asyncio.sleep(LOOK_SECONDS)

    async def look(self, *, whole: bool = True) -> None:
        """Look once; what fails is counted and logged, never raised."""
        streams = self._part(STREAMS, self._streams, whole=whole)
        await asyncio.gather(streams, self._part(PROCESSES, self._ask, whole=whole))
        if whole:
            dead = self._part(DEAD_LETTERS, self._dead_letters, whole=whole)
            await asyncio.gather(dead, self._part(PARTITIONS, self._places, whole=whole))
        self._forget_old()
        self.state = self._snapshot()
        if self._metrics is not None:
            self._show(self._metrics)

    async def close(self) -> None:
        """Take no more answers. Idempotent."""
        subscriptions = [self._subscription, *self._nodes_subscriptions]
        self._subscription, self._nodes_subscriptions = None, []
        for subscription in subscriptions:
            if subscription is not None and not self._nc.is_closed:
                await subscription.unsubscribe()

    def backlog(self) -> Backlog | None:
        return self.state.backlog()

    async def ready(self) -> list[str]:
        return problems_of(self.state) if self._nc.is_connected else ["no connection to the log"]

    async def _part(self, part: str, look: Callable[[], Awaitable[None]], *, whole: bool) -> None:
        if not self._nc.is_connected:
            self._troubles[part] = "no connection"
            return
        try:
            async with asyncio.timeout(self._part_seconds):
                await look()
        except TimeoutError:
            reason = f"no answer within {self._part_seconds:g} s"
        except FiqError as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001 - a fault in here must not end the service, nor the monitor
            reason = repr(error)
        else:
            self._seen[part] = time.monotonic()
            self._troubles.pop(part, None)
            return
        if self._metrics is not None and whole:  # so that all parts are counted alike
            self._metrics.failures.labels(part).inc()
        if self._troubles.get(part) != reason:  # once for each reason, or an outage would fill the log
            _log.warning("OBSERVATION_FAILED", part=part, reason=reason)
        self._troubles[part] = reason

    def _forget_old(self) -> None:
        kept = time.monotonic() - KEPT_SECONDS
        old = {part for part in self._troubles if self._seen.get(part, 0.0) < kept}
        if STREAMS in old:
            self._stream = None
            self._stream_exists = True
        if DEAD_LETTERS in old:
            self._dead = None
        if PARTITIONS in old:
            self._placements = None
            self._oldest.clear()
        if PROCESSES in old:
            self._answers.clear()
            self._asked_since = None

    # -- streams ------------------------------------------------------------------------------------------------------

    async def _streams(self) -> None:
        begun, started = time.time(), time.perf_counter()
        info = await self._api.stream_info(STREAM)
        round_trip = time.perf_counter() - started
        self._stream_exists = info is not None
        self._stream = None if info is None else read_stream(info)
        if info is not None:
            # the leader read its clock somewhere between question and answer: half way is the best guess
            self._offset = begun + round_trip / 2 - datetime.fromisoformat(info["ts"]).timestamp()
            if self._metrics is not None:
                self._metrics.round_trip.set(round_trip)
                self._metrics.clock_offset.set(self._offset)

    async def _dead_letters(self) -> None:
        dead = await self._api.stream_info(DEAD_STREAM)
        self._dead = None if dead is None else read_stream(dead)

    # -- processes ----------------------------------------------------------------------------------------------------

    async def _ask(self) -> None:
        """Ask all persisters; the answers to the last question have arrived by now.

        Each question has a reply subject of its own: a persister may answer once on each (``allow_responses``), and
        when two questions on one subject reach it before its first answer, nats-server refuses both answers.
        """
        now = time.monotonic()
        try:
            if self._subscription is None:
                self._inbox = self._nc.new_inbox()
                self._subscription = await self._nc.subscribe(f"{self._inbox}.*", cb=self._hear)
            self._questions += 1
            await self._nc.publish(PROCESSES_SUBJECT, reply=f"{self._inbox}.{self._questions}")
        except (nats.errors.Error, OSError) as error:
            self._asked_since = None
            raise LogUnavailableError(f"{PROCESSES_SUBJECT}: {type(error).__name__}") from error
        if self._asked_since is None:
            self._asked_since = now
        if not self._answers:
            _check_allowed(self._nc)
        if now - self._asked_since > LIVE_SECONDS:
            self._answers = {name: one for name, one in self._answers.items() if now - one[1] <= LIVE_SECONDS}

    async def _hear(self, message: Msg) -> None:
        if not message.data:  # status 503: there is no subscriber
            self._answers.clear()
            return
        try:
            document = orjson.loads(message.data)
            self._answers[str(document["id"])] = read_process(document.get("metadata") or {}), time.monotonic()
        except (orjson.JSONDecodeError, KeyError, AttributeError, TypeError):
            _log.debug("ANSWER_MALFORMED")

    # -- nodes --------------------------------------------------------------------------------------------------------

    async def _ask_nodes(self) -> None:
        """Ask all nodes for their resources; the answers come while the loop sleeps.

        A node whose JetStream is off after a full disk goes on to show its configuration, if it led a stream at that
        moment (nats-server 2.15.1): only its health says so.
        """
        if not self._nc.is_connected:
            return
        try:
            for hear in (self._hear_node, self._hear_health)[len(self._nodes_subscriptions) :]:
                self._nodes_subscriptions.append(await self._nc.subscribe(self._nc.new_inbox(), cb=hear))
            state, health = self._nodes_subscriptions
            await self._nc.publish(NODES_STATE, reply=state.subject)
            await self._nc.publish(NODES_HEALTH, _ENABLED_ONLY, reply=health.subject)
        except (nats.errors.Error, OSError) as error:
            _log.debug("NODES_NOT_ASKED", reason=type(error).__name__)

    async def _hear_node(self, message: Msg) -> None:
        if not message.data:  # status 503: this cluster has no accounts that pass the question on
            return
        try:
            report = read_node(orjson.loads(message.data)["data"])
        except (orjson.JSONDecodeError, KeyError, AttributeError, TypeError):
            _log.debug("ANSWER_MALFORMED")
        else:
            self._nodes[report.name] = report, time.monotonic()

    async def _hear_health(self, message: Msg) -> None:
        if not message.data:
            return
        try:
            document = orjson.loads(message.data)
            self._enabled[str(document["server"]["name"])] = document["data"]["status"] == "ok"
        except (orjson.JSONDecodeError, KeyError, AttributeError, TypeError):
            _log.debug("ANSWER_MALFORMED")

    # -- partitions ---------------------------------------------------------------------------------------------------

    async def _places(self) -> None:
        self._placements = await read_stores(self._nc)
        state = self._snapshot()
        waiting = [(store, one) for store, found in (state.stores or {}).items() for one in found if _waits(one)]
        reporters = self._reporters()
        looks = (self._look_at(store, one, state, reporters.get((store, one.partition))) for store, one in waiting)
        failed = [error for error in await asyncio.gather(*looks, return_exceptions=True) if error is not None]
        if failed:  # what the others found counts
            raise failed[0]

    async def _look_at(self, store: str, one: PartitionState, state: LogState, reporter: LiveProcess | None) -> None:
        """Find the oldest waiting event of a partition, and how many wait where its owner does not say."""
        key, last = (store, one.partition), 0 if state.stream is None else state.stream.last_sequence
        known = self._oldest.get(key)
        counted = reporter is None or one.waiting.stalled
        if not counted and known is not None and known.committed == one.committed and known.oldest is not None:
            return
        found, after = await self._next(one.partition, one.committed, counted=counted)
        self._oldest[key] = _Found(one.committed, found, after if counted else None, last)

    async def _next(self, partition: int, committed: int, *, counted: bool) -> tuple[float | None, int]:
        """Return when the next event of a partition was stored, and how many there are when they are *counted*."""
        subject = filter_subject(partition)
        message = await self._api.get_message(STREAM, committed + 1, next_of=subject, counted=counted)
        if message is None:  # committed meanwhile, or a replica that has not got it yet
            return None, 0
        return datetime.fromisoformat(message["time"]).timestamp(), 1 + message.get("pending", 0)

    # -- the snapshot -------------------------------------------------------------------------------------------------

    def _reporters(self) -> dict[tuple[str, int], LiveProcess]:
        """Return for each partition the process that reports its progress; in a handover the one that is furthest."""
        reporters: dict[tuple[str, int], LiveProcess] = {}
        for process, _ in self._answers.values():
            for partition, progress in process.progress.items():
                other = reporters.get((process.store, partition))
                if other is None or other.progress[partition].committed < progress.committed:
                    reporters[process.store, partition] = process
        return reporters

    def _snapshot(self) -> LogState:
        now = time.monotonic()
        processes = tuple(process for process, _ in self._answers.values())
        stores: dict[str, tuple[PartitionState, ...]] = {}
        if self._placements is not None:
            names = {*self._placements, *(process.store for process in processes)}
            if not names or self._metrics is None:
                names.add(self._settings.store)
            reporters = self._reporters()
            count = self._stream.partitions if self._stream is not None else 0
            for store in sorted(names):
                keys = self._placements[store].partitions if store in self._placements else {}
                stores[store] = tuple(
                    self._partition(store, p, keys.get(p), processes, reporters.get((store, p)), now)
                    for p in range(count or self._settings.partitions)
                )
        return LogState(
            at=self._seen.get(STREAMS, 0.0),
            stream=self._stream,
            stream_exists=self._stream_exists,
            dead=self._dead,
            placements=self._placements,
            processes=processes if processes or self._knows_processes(now) else None,
            stores=stores or None,
            clock_offset=self._offset,
            troubles=dict(self._troubles),
            server_version=str(self._nc.server_info.get("version", "")),
        )

    def _partition(
        self,
        store: str,
        partition: int,
        placement: Placement | None,
        processes: tuple[LiveProcess, ...],
        reporter: LiveProcess | None,
        now: float,
    ) -> PartitionState:
        owners = sum(one.store == store and partition in one.partitions for one in processes)
        progress = None if reporter is None else reporter.progress[partition]
        committed = max(0 if progress is None else progress.committed, 0 if placement is None else placement.committed)
        before, since = self._moved.get((store, partition), (-1, now))
        if before != committed or (progress is not None and not progress.waiting):
            since = now
        self._moved[store, partition] = committed, since
        stalled = not owners or now - since > STALLED_SECONDS
        found = self._oldest.get((store, partition))
        if progress is not None and reporter is not None and not (stalled and progress.waiting):
            events, sequence = progress.waiting, reporter.stream_sequence or self._last()
        elif found is not None and found.waiting is not None and found.committed == committed:
            events, sequence = found.waiting, found.sequence
        else:  # until it is counted: an equal part of what the stream has got since
            events, sequence = self._share(committed), self._last()
        oldest = found.oldest if found is not None and events and found.committed == committed else None
        return PartitionState(partition, placement, owners, committed, Waiting(events, sequence, stalled), oldest)

    def _knows_processes(self, now: float) -> bool:
        """Whether silence means that no process runs: they were asked for long enough."""
        if PROCESSES in self._troubles or self._asked_since is None:
            return False
        return now - self._asked_since >= _ANSWER_SECONDS

    def _last(self) -> int:
        return 0 if self._stream is None else self._stream.last_sequence

    def _share(self, committed: int) -> int:
        if self._stream is None:
            return 0
        partitions = self._stream.partitions or self._settings.partitions
        return -(-max(0, min(self._stream.messages, self._stream.last_sequence - committed)) // partitions)

    # -- metrics ------------------------------------------------------------------------------------------------------

    def _show(self, metrics: LogMetrics) -> None:
        state, connected = self.state, self._nc.is_connected
        metrics.connected.set(connected)
        stream = state.stream if connected and STREAMS not in state.troubles else None
        metrics.available.set(stream is not None and bool(stream.leader) and stream.has_quorum)
        if connected:
            metrics.certificates(self._nc.certificates())
        metrics.forget(STREAMS)
        for name, report in ((STREAM, state.stream), (DEAD_STREAM, state.dead)):
            if report is not None:
                metrics.stream(name, report)
        metrics.stores(state)
        since = time.monotonic() - NODES_KEPT_SECONDS
        self._nodes = {name: one for name, one in self._nodes.items() if one[1] > since}
        metrics.nodes(
            replace(one, jetstream=self._enabled.get(name, one.jetstream)) for name, (one, _) in self._nodes.items()
        )


def problems_of(state: LogState) -> list[str]:
    """Return why events cannot be stored and persisted just now; nothing when they can."""
    if (trouble := state.troubles.get(STREAMS)) is not None:
        return [f"the log does not answer: {trouble}"]
    if not state.stream_exists:
        return [f"stream {STREAM} does not exist"]
    if state.stream is None:
        return ["the log has not been seen yet"]
    found = []
    if not state.stream.leader:
        found.append(f"stream {STREAM} has no leader")
    elif not state.stream.has_quorum:
        found.append(f"stream {STREAM} has no quorum: too few of its {count(state.stream.copies, 'node')} answer")
    if state.placements is None and state.at and (trouble := state.troubles.get(PARTITIONS)) is not None:
        found.append(f"it is not known where partitions live: {trouble}")
    elif unplaced := _unplaced(state):
        found.append(f"{count(unplaced, 'partition')} without an owner yet: start the persisters")
    return found


def _unplaced(state: LogState) -> int:
    """Return how many partitions have no owner in the store that has most of them placed."""
    return min((sum(one.placement is None for one in store) for store in (state.stores or {}).values()), default=0)


def _waits(one: PartitionState) -> bool:
    return one.waiting.events > 0 or not one.owners


@asynccontextmanager
async def monitoring(
    nc: Connection, settings: LogSettings, metrics: LogMetrics, on_failed: Callable[[str], None]
) -> AsyncIterator[LogMonitor]:
    """Watch the log while the body runs; *on_failed* is called if that ends early.

    The context may be left in another task than the one that entered it.
    """

    monitor = LogMonitor(nc, settings, metrics)
    try:
        async with supervised_task(monitor.run(), "log monitor", on_failed):
            yield monitor
    finally:
        await monitor.close()


async def look_once(nc: Connection, settings: LogSettings, *, part_seconds: float = PART_SECONDS) -> LogState:
    """Return the log as it is now, the settings' store included.

    Takes :data:`_ANSWER_SECONDS`, or *part_seconds* while a node is frozen that leads something. If that is the
    stream's leader, the streams and the placements are among the ``troubles``, and the processes are known.
    """
    monitor = LogMonitor(nc, settings, part_seconds=part_seconds)
    try:
        await monitor.look(whole=False)
        if STREAMS not in monitor.state.troubles:
            await monitor.look()
        # silence means that no process runs only after this long
        asked = monitor._asked_since
        await asyncio.sleep(0.0 if asked is None else asked + _ANSWER_SECONDS - time.monotonic())
        return monitor._snapshot()
    finally:
        await monitor.close()


# -- processes ---------------------------------------------------------------------------------------------------------


def show_progress(progress: Mapping[int, PartitionProgress]) -> str:
    """Return *progress* as the metadata of a process hold it, such as ``00:38:2,03:41:0``."""
    return ",".join(f"{partition_name(p)}:{one.committed}:{one.waiting}" for p, one in sorted(progress.items()))


def read_progress(text: str) -> dict[int, PartitionProgress]:
    """Undo :func:`show_progress`; malformed parts are left out."""
    parts = (part.split(":") for part in text.split(","))
    return {
        int(p[0]): PartitionProgress(int(p[1]), int(p[2])) for p in parts if len(p) == 3 and all(map(str.isdecimal, p))
    }


def read_process(metadata: Mapping[str, str]) -> LiveProcess:
    """Return what a process says of itself in the *metadata* of its service."""
    sequence = metadata.get("stream_sequence", "")
    return LiveProcess(
        store=metadata.get("store", ""),
        volume=metadata.get("volume", ""),
        partitions=frozenset(int(name) for name in metadata.get("partitions", "").split(",") if name.isdecimal()),
        progress=read_progress(metadata.get("progress", "")),
        stream_sequence=int(sequence) if sequence.isdecimal() else 0,
        metadata=metadata,
    )


def _check_allowed(nc: Connection) -> None:
    """Raise LogRefusedError when the user of the connection may not ask, so that silence means nothing."""
    refused = [text for text in nc.violations if PROCESSES_SUBJECT.lower() in text.lower()]
    if refused:
        raise LogRefusedError(f"the NATS user may not ask which persisters live: {refused[0]}")


# -- nodes -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NodeState:
    """What a node reports: state, configuration, clock and health.

    Attributes:
        name: in the cluster.
        varz: what its monitoring port returns at ``/varz``.
        trouble: why it is not healthy; empty when it is.
        ahead: how far its clock is ahead of ours, seconds.
        uncertain: how far off that may be, seconds.
    """

    name: str
    varz: Mapping[str, Any]
    trouble: str
    ahead: float
    uncertain: float


async def ask_nodes(nc: Connection) -> list[NodeState]:
    """Return every node that answers, by name; none where this user may not ask.

    The same as on each monitoring port, which is on loopback: the system account exports these two questions to the
    account of the streams (``accounts.conf``), and each node hears those that any connection asks.

    Raises LogUnavailableError: the connection is gone.
    """
    found = []
    if states := await _ask_all(nc, NODES_STATE):
        health = {answer.document["server"]["name"]: answer.document for answer in await _ask_all(nc, NODES_HEALTH)}
        for answer in states:
            varz = answer.document["data"]
            found.append(node_state(varz, _trouble(health.get(varz["server_name"], {})), answer.after, answer.at))
    return sorted(found, key=lambda node: node.name)


def read_node(varz: Mapping[str, Any]) -> NodeReport:
    """Return what a node's ``/varz`` says of its memory and storage."""
    jetstream = varz.get("jetstream") or {}
    config, stats = jetstream.get("config") or {}, jetstream.get("stats") or {}
    return NodeReport(
        name=str(varz["server_name"]),
        memory=int(varz["mem"]),
        memory_limit=int(varz.get("gomemlimit", 0)),
        jetstream=bool(config),
        storage=int(stats.get("storage", 0)),
        storage_limit=int(config.get("max_storage", 0)),
    )


def node_state(varz: Mapping[str, Any], trouble: str, after: float, at: float) -> NodeState:
    """Compare the clock of a node by its ``/varz``, which came at *at* (s since 1970), *after* so many seconds."""
    said = datetime.fromisoformat(varz["now"]).timestamp()
    return NodeState(str(varz["server_name"]), varz, trouble, said - (at - after / 2), after / 2)


def _trouble(answer: Mapping[str, Any]) -> str:
    data = answer.get("data") or {}
    return "" if data.get("status") == "ok" else str(data.get("error") or "no answer")


@dataclass(frozen=True, slots=True)
class _Answer:
    """A JSON document that came *after* so many seconds, *at* a time in seconds since 1970."""

    document: dict[str, Any]
    after: float
    at: float


async def _ask_all(nc: Connection, subject: str) -> list[_Answer]:
    """Return the answers of all who subscribe to *subject*. Raises LogUnavailableError: the connection is gone."""
    answers: asyncio.Queue[tuple[Msg, float]] = asyncio.Queue()
    inbox = nc.new_inbox()

    async def keep(message: Msg) -> None:
        answers.put_nowait((message, time.time()))

    try:
        subscription = await nc.subscribe(inbox, cb=keep)
        try:
            asked = time.time()
            await nc.publish(subject, reply=inbox)
            return await _collected(answers, asked)
        finally:
            await subscription.unsubscribe()
    except (nats.errors.Error, OSError) as error:
        raise LogUnavailableError(f"{subject}: {type(error).__name__}") from error


async def _collected(answers: asyncio.Queue[tuple[Msg, float]], asked: float) -> list[_Answer]:
    found: list[_Answer] = []
    try:
        while True:
            async with asyncio.timeout(_NEXT_ANSWER if found else _FIRST_ANSWER):
                message, at = await answers.get()
            if not message.data:  # status 503: there is no subscriber
                return found
            found.append(_Answer(orjson.loads(message.data), at - asked, at))
    except TimeoutError:
        return found

"""What operators see of the pipeline: ``GET /pipeline``.

It shows the snapshot of the log that this process keeps for its metrics, its readiness and its backlog
(:class:`~services.log.status.LogState`, renewed each second), and asks no other process. So it is cheap, answers while
the log does not, and lacks what the log does not have: without a broker there are no nodes and no stream.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime

import orjson
from aiohttp import web

from services.core.command import product_version
from services.ingest.reading import answer_read, negotiate, response_of
from services.ingest.records import JSON
from services.ingest.settings import SETTINGS, Settings
from services.log.findings import conditions
from services.log.metrics import STREAMS
from services.log.partitions import partition_name
from services.log.protocol import Status
from services.log.status import LiveProcess, LogState, PartitionState, StreamReport

STATUS = web.AppKey("status", Status)
#: a node that the stream's leader has not heard of for this long is shown as down, seconds: three heartbeats
SILENT_SECONDS = 3.0

Json = dict[str, object]


async def get_pipeline(request: web.Request) -> web.StreamResponse:
    """Answer with the state of the pipeline."""
    return await answer_read(request, _pipeline)


async def _pipeline(request: web.Request, held: ExitStack) -> web.StreamResponse:
    media_type = negotiate(request, JSON)
    document = pipeline(request.app[STATUS], request.app[SETTINGS])
    return response_of(request, orjson.dumps(document), media_type)


def pipeline(status: Status, settings: Settings) -> Json:
    """Return the state of the pipeline as ``GET /pipeline`` shows it."""
    state, backlog = status.state, status.backlog()
    leader_time = time.time() - state.clock_offset
    accepted = None if backlog is None else backlog.sequence
    return {
        "time": _time(time.time()),
        "seen_seconds": round(time.monotonic() - state.at, 3) if state.at else None,
        "log": "nats" if state.has_stream else "zmq",
        "nodes": list(_nodes(state)),
        "stream": None if state.stream is None else _stream(state.stream),
        "partitions": [
            _partition(store, one, state, leader_time)
            for store, found in sorted((state.stores or {}).items())
            for one in found
        ],
        "volumes": list(_volumes(state)),
        "backlog": {
            "events": None if backlog is None else backlog.events,
            "limit": settings.max_backlog or None,
        },
        "totals": {
            "accepted": accepted,
            "persisted": None if backlog is None or accepted is None else max(0, accepted - backlog.events),
            "monotonic_seconds": None if backlog is None else round(backlog.at, 3),
        },
        "dead_letters": None if state.dead is None else state.dead.messages,
        "conflicts": None if state.processes is None else sum(one.conflicts for one in state.processes),
        "conditions": [
            {"check": one.check, "severity": one.level, "what": one.what, "meaning": one.meaning, "action": one.action}
            for one in conditions(state, leader_time)
        ],
        "versions": {
            "fiq": product_version(),
            "nats_server": state.server_version or None,
            "persisters": sorted({version for one in state.processes or () if (version := _said(one, "version"))}),
        },
    }


def _nodes(state: LogState) -> Iterator[Json]:
    """Yield the nodes that hold the stream; a leader that does not answer is shown as down until there is another."""
    stream = state.stream
    if stream is None:
        return
    found: list[Json] = []
    if stream.leader:
        answers = STREAMS not in state.troubles
        found.append({"name": stream.leader, "leader": answers, "up": answers, "current": answers, "lag": 0})
    for one in stream.replicas:
        up = one.alive and one.seen_seconds is not None and one.seen_seconds < SILENT_SECONDS
        found.append({"name": one.name, "leader": False, "up": up, "current": up and one.current, "lag": one.lag})
    yield from sorted(found, key=lambda node: str(node["name"]))


def _stream(stream: StreamReport) -> Json:
    return {
        "created": stream.created,
        "leader": stream.leader or None,
        "quorum": bool(stream.leader) and stream.has_quorum,
        "messages": stream.messages,
        "bytes": stream.bytes,
        "max_bytes": stream.max_bytes,
        "first_sequence": stream.first_sequence,
        "last_sequence": stream.last_sequence,
    }


def _partition(store: str, one: PartitionState, state: LogState, now: float) -> Json:
    owners = [process for process in _processes(state, store) if one.partition in process.partitions]
    return {
        "store": store,
        "partition": partition_name(one.partition),
        "committed": one.committed,
        "lag": one.waiting.events,
        "stalled": one.waiting.stalled and one.waiting.events > 0,
        "oldest_seconds": None if one.oldest is None else round(max(0.0, now - one.oldest), 1),
        "owners": [_said(process, "worker") for process in owners],
        "volume": None if one.placement is None else one.placement.volume,
    }


def _volumes(state: LogState) -> Iterator[Json]:
    """Yield the volumes that hold partitions, or that a process writes."""
    placed: dict[tuple[str, str], list[str]] = {}
    for store, found in (state.stores or {}).items():
        for one in found:
            if one.placement is not None:
                placed.setdefault((store, one.placement.volume), []).append(partition_name(one.partition))
    for process in state.processes or ():
        placed.setdefault((process.store, process.volume), [])
    for (store, volume), names in sorted(placed.items()):
        processes = [one for one in _processes(state, store) if one.volume == volume]
        checks = sorted((one.verified for one in processes if one.verified is not None), key=lambda one: one.at)
        yield {
            "store": store,
            "volume": volume,
            "partitions": names,
            "processes": [
                {"worker": _said(one, "worker"), "host": _said(one, "host"), "version": _said(one, "version")}
                for one in sorted(processes, key=lambda one: _said(one, "worker"))
            ],
            "verified": checks[-1] if checks else None,
        }


def _processes(state: LogState, store: str) -> list[LiveProcess]:
    return [process for process in state.processes or () if process.store == store]


def _said(process: LiveProcess, key: str) -> str:
    return process.metadata.get(key, "")


def _time(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S.%f}"[:-3] + "Z"

"""What operators see and do: the state of the pipeline, and the dead letters. The scope is ``ops``.

``GET /pipeline`` shows the snapshot of the log that this process keeps for its metrics, its readiness and its backlog
(:class:`~services.log.status.LogState`, renewed each second), and asks no other process. So it is cheap, answers while
the log does not, and lacks what the log does not have: without a broker there are no nodes and no stream.

A dead letter is listed, shown, put back into the log (*requeue*) or removed (*drop*). What goes back is the event that
ingest wrote: same consultation, id, time of receipt, trace and body. A letter that is no such event would only be set
aside again, and is refused. A requeue appends first and then removes the letter, so a crash in between leaves a letter
that can be requeued again; HDF5 has the event once all the same, because persisters know its id. While the broker still
remembers the id of the first message it would drop the event as a duplicate: that is refused, with the time to wait.
"""

from __future__ import annotations

import base64
import math
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

import orjson
from aiohttp import web

from fiq.errors import FiqError
from fiq.event import Event
from services.core.command import product_version
from services.ingest import problems
from services.ingest.access import audit, bodies_shown
from services.ingest.admission import ADMISSION, IN_FLIGHT
from services.ingest.formats import read_body
from services.ingest.problems import REFUSALS, ProblemType, RequestRefusedError
from services.ingest.reading import READ_LIMIT, READER, answer_read, limit_of, negotiate, position_of, response_of
from services.ingest.records import JSON, page_body, record
from services.ingest.settings import SETTINGS, Settings
from services.log.dead_letters import DeadLetter
from services.log.errors import (
    CorpusAwayError,
    DuplicateInFlightError,
    LogFullError,
    LogRefusedError,
    LogUnavailableError,
    TooManyInFlightError,
)
from services.log.findings import conditions
from services.log.metrics import STREAMS
from services.log.partitions import partition_name
from services.log.protocol import Appended, DeadLetterBox, EventWriter, Status
from services.log.status import LiveProcess, LogState, PartitionState, StreamReport

STATUS = web.AppKey("status", Status)
DEAD_LETTERS = web.AppKey("dead_letters", DeadLetterBox)
WRITER = web.AppKey("writer", EventWriter)
#: a node that the stream's leader has not heard of for this long is shown as down, seconds: it misses two heartbeats
SILENT_SECONDS = 2.5
#: conflicts that are shown of one dead letter; their consultations show all
SHOWN_CONFLICTS = 100
#: longest body of an action, bytes, and longest reason, characters
ACTION_BYTES, REASON_LENGTH = 8192, 500

#: the problem for each error of an action
_ACTION_ERRORS: dict[type[FiqError], ProblemType] = {
    CorpusAwayError: problems.CORPUS_AWAY,
    LogFullError: problems.LOG_FULL,
    LogUnavailableError: problems.LOG_UNAVAILABLE,
    DuplicateInFlightError: problems.DUPLICATE_IN_FLIGHT,
    TooManyInFlightError: problems.TOO_MANY_IN_FLIGHT,
    LogRefusedError: problems.LOG_REFUSED,
}
_SEQUENCE = re.compile(r"[1-9][0-9]{0,17}", re.ASCII)

Json = dict[str, object]


# -- the pipeline ------------------------------------------------------------------------------------------------------


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


# -- dead letters ------------------------------------------------------------------------------------------------------


async def list_dead_letters(request: web.Request) -> web.StreamResponse:
    """Answer with a page of dead letters, without their bodies."""
    return await answer_read(request, _list)


async def get_dead_letter(request: web.Request) -> web.StreamResponse:
    """Answer with one dead letter and its body; of a list of conflicts with these events, from the corpus."""
    return await answer_read(request, _show)


async def requeue_dead_letter(request: web.Request) -> web.StreamResponse:
    """Put the message of a dead letter back into the log."""
    return await _act(request, _requeue, reason_required=False)


async def drop_dead_letter(request: web.Request) -> web.StreamResponse:
    """Remove a dead letter for good."""
    return await _act(request, _drop, reason_required=True)


async def _list(request: web.Request, held: ExitStack) -> web.StreamResponse:
    after, limit = position_of(request.query.get("after", "0"), "after"), limit_of(request)
    media_type = negotiate(request, JSON)
    request.app[READ_LIMIT].enter(held)
    letters, more = await request.app[DEAD_LETTERS].page(after, limit)
    following = f"/dead-letters?after={letters[-1].sequence}&limit={limit}" if more and letters else None
    records = [orjson.dumps(_letter(one)) for one in letters]
    body = page_body(media_type, "dead_letters", records, {"next": following})
    return response_of(request, body, media_type, following)


async def _show(request: web.Request, held: ExitStack) -> web.StreamResponse:
    media_type = negotiate(request, JSON)
    request.app[READ_LIMIT].enter(held)
    letter = await _found(request)
    document = orjson.dumps(_letter(letter))
    if letter.listed:
        conflicts, left_out = await _conflicts(request, letter)
        shown, last = len(conflicts), b'"events":[%b],"left_out":%d' % (b",".join(conflicts), left_out)
    else:
        shown, last = 1, orjson.dumps(_body(letter.body))[1:-1]
    bodies_shown(request, shown, dead_letter=letter.sequence)
    return response_of(request, b"%b,%b}" % (document[:-1], last), media_type)


async def _conflicts(request: web.Request, letter: DeadLetter) -> tuple[list[bytes], int]:
    """Return records of the first conflicts that *letter* lists, and how many others there are."""
    listed = letter.conflicts()
    found = []
    for one in listed[:SHOWN_CONFLICTS]:
        page = await request.app[READER].conflicts(one.consultation, one.sequence - 1, 1)
        for stored in page.events:
            if stored.sequence == one.sequence:
                shown = record(stored, consultation=True, status=False)
                found.append(b'%b,"first_sequence":%d}' % (shown[:-1], one.first))
    return found, len(listed) - len(found)


def _letter(letter: DeadLetter) -> Json:
    return {
        "sequence": letter.sequence,
        "kind": "conflicts" if letter.listed else "message",
        "time": letter.stored,
        "partition": partition_name(letter.partition),
        "reason": letter.reason,
        "stream_sequence": letter.position or None,
        "consultation_id": letter.consultation or None,
        "message_id": letter.message_id.removeprefix(f"{letter.consultation}/") or None,
        "trace_id": letter.trace_id or None,
        "bytes": letter.size,
        "conflicts": letter.listed or None,
        "obstacle": letter.obstacle or None,
    }


def _body(body: bytes) -> Json:
    try:
        return {"body": body.decode()}
    except UnicodeDecodeError:
        return {"body_base64": base64.b64encode(body).decode()}


async def _found(request: web.Request) -> DeadLetter:
    text = request.match_info["sequence"]
    letter = await request.app[DEAD_LETTERS].get(int(text)) if _SEQUENCE.fullmatch(text) else None
    if letter is None:
        raise RequestRefusedError(problems.UNKNOWN_DEAD_LETTER)
    return letter


# -- actions -----------------------------------------------------------------------------------------------------------


async def _act(
    request: web.Request, action: Callable[[web.Request, str], Awaitable[Json]], *, reason_required: bool
) -> web.StreamResponse:
    """Answer with what *action* returns, which gets the operator's reason."""
    app = request.app
    refusals = app[REFUSALS]
    reservation = None
    with app[IN_FLIGHT]:
        try:
            media_type = negotiate(request, JSON)
            reservation = app[ADMISSION].reserve(batch=False)
            timeout = app[SETTINGS].body_timeout
            body = await read_body(request, reservation, limit=ACTION_BYTES, timeout=timeout)
            done = await action(request, _reason(request, body, required=reason_required))
            return response_of(request, orjson.dumps(done), media_type)
        except RequestRefusedError as refusal:
            return refusals.answer_error(refusal, request)
        except tuple(_ACTION_ERRORS) as error:
            problem = next(found for kind, found in _ACTION_ERRORS.items() if isinstance(error, kind))
            if problem is problems.LOG_REFUSED:
                refusals.log_refused(str(error))
            return refusals.answer(problem, request=request)
        finally:
            if reservation is not None:
                reservation.release()


def _reason(request: web.Request, body: bytes, *, required: bool) -> str:
    """Return the reason in *body*, ``{"reason": …}``; empty when there is none and none is required."""
    if not body and not required:
        return ""
    if request.content_type != JSON:
        raise RequestRefusedError(problems.UNSUPPORTED_MEDIA_TYPE, f"Send {JSON}.")
    try:
        document: Any = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise RequestRefusedError(problems.INVALID_JSON) from None
    reason = document.get("reason", "" if not required else None) if isinstance(document, dict) else None
    if not isinstance(reason, str) or len(reason) > REASON_LENGTH or (required and not reason.strip()):
        raise RequestRefusedError(problems.INVALID_ACTION)
    return reason


async def _requeue(request: web.Request, reason: str) -> Json:
    letter = await _found(request)
    if letter.event is None:
        raise RequestRefusedError(problems.NOT_REQUEUEABLE, f"It cannot go back: {letter.obstacle}.")
    event = letter.event
    appended = await request.app[WRITER].append(event)
    if appended.duplicate:
        await _check_duplicate(request, letter, event, appended)
    values: Json = {"consultation_id": event.consultation, "message_id": str(event.event_id)}
    told: Json = {"reason": reason} if reason else {}
    audit("DEAD_LETTER_REQUEUED", request, dead_letter=letter.sequence, **values, sequence=appended.sequence, **told)
    await request.app[DEAD_LETTERS].remove(letter.sequence)
    return {"status": "requeued", "sequence": letter.sequence, **values, "stream_sequence": appended.sequence}


async def _check_duplicate(request: web.Request, letter: DeadLetter, event: Event, appended: Appended) -> None:
    """Check that what the log has under the id of *event* is the event, and is not the message that was set aside.

    It may have been posted or requeued again meanwhile. If it is gone from the log already, the persisters have it.
    """
    if appended.sequence == letter.position:
        age = time.time() - datetime.fromisoformat(letter.stored).timestamp()
        wait = max(1, math.ceil(request.app[SETTINGS].log.duplicate_window - age))
        raise RequestRefusedError(
            problems.REQUEUE_TOO_EARLY,
            f"The log still knows the message under its id, and would drop it. Try again in {wait} s.",
            headers={"Retry-After": str(wait)},
        )
    stored = await request.app[READER].at(appended.sequence)
    if stored is not None and stored.event.body != event.body:
        raise RequestRefusedError(problems.NOT_REQUEUEABLE, "Another event was posted under its key meanwhile.")


async def _drop(request: web.Request, reason: str) -> Json:
    letter = await _found(request)
    if not await request.app[DEAD_LETTERS].remove(letter.sequence):
        raise RequestRefusedError(problems.UNKNOWN_DEAD_LETTER)
    of = {"consultation_id": letter.consultation, "message_id": letter.message_id, "stream_sequence": letter.position}
    known = {name: value for name, value in of.items() if value}
    audit("DEAD_LETTER_DROPPED", request, dead_letter=letter.sequence, **known, reason=reason)
    return {"status": "dropped", "sequence": letter.sequence}

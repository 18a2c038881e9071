"""The loads of the agent: clients over HTTP, clients that publish, and appends one by one."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from uuid import uuid4

import nats
import nats.errors
import nats.js.errors

from services.eventlog.jetstream.names import subject_of
from tests.benchmarks import dialogues, http_client
from tests.benchmarks.jobs import AppendJob, LoadJob, Report
from tests.benchmarks.plain_hdf5 import PlainFile

#: sends one event of a consultation; returns whether it was accepted
Send = Callable[[str, bytes], Awaitable[bool]]

_ACCEPTED = 202


async def over_http(job: LoadJob) -> Report:
    """Post to a server, each client over a connection of its own."""
    port = int(job.target)
    connections = [await http_client.connect(port) for _ in range(job.clients)]

    def sender(connection: http_client.Connection) -> Send:
        async def send(consultation: str, body: bytes) -> bool:
            request = http_client.post(port, consultation, str(uuid4()), body)
            return await connection.request(request) == _ACCEPTED

        return send

    try:
        return await _measure(job, [sender(connection) for connection in connections])
    finally:
        for connection in connections:
            connection.close()


async def over_nats(job: LoadJob) -> Report:
    """Publish with nats-py as its manual shows it, all clients over one connection, and wait for each answer."""
    connection = await nats.connect(job.target, name="bench publish")
    stream = connection.jetstream()

    async def send(consultation: str, body: bytes) -> bool:
        headers = {"Nats-Msg-Id": f"{consultation}/{uuid4()}"}
        try:
            await stream.publish(subject_of(consultation), body, timeout=10, headers=headers)
        except (nats.errors.Error, nats.js.errors.Error):
            return False
        return True

    try:
        return await _measure(job, [send] * job.clients)
    finally:
        await connection.close()


async def append_each(job: AppendJob) -> Report:
    """Append to HDF5 with high-level h5py and flush, event by event.

    A part of a backlog creates more consultations an event than the whole. So their creation is timed by itself and
    counted once in as many events as a consultation has.
    """
    events = list(dialogues.backlog(dialogues.load(Path(job.folder)), job.events, job.spread))
    consultations = {event.consultation for event in events}
    with PlainFile(Path(job.path)) as file:
        started = time.perf_counter()
        for consultation in consultations:
            file.create(consultation)
        created = time.perf_counter()
        for event in events:
            file.append(event.consultation, event.received_ns, event.event_id.bytes, event.body)
            file.flush()
        ended = time.perf_counter()
    creation = (created - started) / len(consultations) * len(events) / dialogues.CONSULTATION_EVENTS
    return Report(ended - created + creation, len(events), 0, [])


async def _measure(job: LoadJob, senders: list[Send]) -> Report:
    posts = _posts(dialogues.load(Path(job.folder)))
    begin = time.perf_counter() + job.warm_up
    end = begin + job.seconds
    latencies: list[int] = []
    sent = failures = 0

    async def client(send: Send) -> None:
        nonlocal sent, failures
        while sent < job.limit and (started := time.perf_counter()) < end:
            sent += 1
            accepted = await send(*next(posts))
            done = time.perf_counter()
            if not accepted:
                failures += 1
            elif begin <= done <= end:
                latencies.append(round((done - started) * 1e6))

    await asyncio.gather(*(client(send) for send in senders))
    return Report(min(time.perf_counter(), end) - begin, len(latencies), failures, latencies)


def _posts(source: dialogues.Dialogues) -> Iterator[tuple[str, bytes]]:
    """Yield consultation and body without end; a dialogue that comes again is another consultation."""
    for turn in itertools.count():
        for number, bodies in enumerate(source.consultations):
            consultation = f"bench-{turn}-{number:05d}"
            for body in bodies:
                yield consultation, body

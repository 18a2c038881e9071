"""The loads of the agent: clients over HTTP, clients that publish, and appends one by one."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import nats
from nats.aio.msg import Msg

from benchmarks import dialogues, http_client, plain_service
from benchmarks.jobs import AppendJob, LoadJob, Report
from benchmarks.plain_hdf5 import PlainFile
from benchmarks.tally import Tally

#: called when everything is prepared; returns when the load is to begin
Meet = Callable[[], None]


async def over_http(job: LoadJob, meet: Meet) -> Report:
    """Post to a server, each client over a connection of its own, each event with a fresh key."""
    port, tally = int(job.target), Tally(job)
    requests = (
        http_client.post(port, consultation, key, body)
        for key, (consultation, body) in zip(_keys(), _posts(job), strict=True)
    )

    def start() -> None:
        meet()
        tally.start()

    await http_client.post_all(port, job.clients, requests, tally, start, pause=job.pause)
    return tally.report()


async def over_nats(job: LoadJob, meet: Meet) -> Report:
    """Publish with nats-py to a bare R3 file stream, all clients over one connection, all answers to one inbox."""
    tally, posts, keys = Tally(job), _posts(job), _keys()
    connection = await nats.connect(job.target, name="bench publish")
    await plain_service.prepare(connection.jetstream())
    inbox = connection.new_inbox()
    waiting: dict[str, asyncio.Future[bool]] = {}

    async def answered(message: Msg) -> None:
        waiting.pop(message.subject).set_result(b'"error"' not in message.data)

    async def client() -> None:
        while tally.more():
            key, (consultation, body) = next(keys), next(posts)
            reply = f"{inbox}.{key}"
            answer = waiting[reply] = asyncio.get_running_loop().create_future()
            started = time.perf_counter()
            headers = {"Nats-Msg-Id": f"{consultation}/{key}"}
            await connection.publish(f"plain.{consultation}", body, reply=reply, headers=headers)
            tally.count(started, accepted=await answer)
            if job.pause:
                await asyncio.sleep(job.pause)

    try:
        await connection.subscribe(f"{inbox}.*", cb=answered)
        await connection.flush()
        meet()
        tally.start()
        await asyncio.gather(*(client() for _ in range(job.clients)))
    finally:
        await connection.close()
    return tally.report()


async def append_each(job: AppendJob, meet: Meet) -> Report:
    """Append to HDF5 with high-level h5py and flush, event by event.

    A part of a backlog creates more consultations an event than the whole. So their creation is timed by itself and
    counted once in as many events as a consultation has.
    """
    events = list(dialogues.backlog(dialogues.load(Path(job.folder)), job.events, job.spread))
    consultations = {event.consultation for event in events}
    meet()
    with PlainFile(Path(job.path)) as file:
        started = time.perf_counter()
        for consultation in consultations:
            file.create(consultation)
        created = time.perf_counter()
        for event in events:
            file.append(event.consultation, [(event.received_ns, event.event_id.bytes, event.body)])
            file.flush()
        ended = time.perf_counter()
    creation = (created - started) / len(consultations) * len(events) / dialogues.CONSULTATION_EVENTS
    return Report(ended - created + creation, len(events))


def _keys() -> Iterator[str]:
    run = uuid4().hex
    return (f"{run}-{number}" for number in itertools.count())


def _posts(job: LoadJob) -> Iterator[tuple[str, bytes]]:
    return dialogues.posts(dialogues.load(Path(job.folder)), job.consultations, job.name)

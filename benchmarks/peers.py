"""What the product is compared with: ``python -m benchmarks.peers KIND …``.

- ``empty PORT``: reads the body and answers.
- ``old PORT FILE``: what the users' service did before: it appends to HDF5 and syncs inside the request.
- ``web URL PORT`` and ``work URL FILE``: the service that one would write in an afternoon. An aiohttp handler publishes
  with a message id and answers when the stream has the event. Workers fetch up to 500 messages from one durable
  consumer, append them to a file each, sync it, and acknowledge each message. Stream and consumer have three replicas.
  There is no order over the workers, no check of duplicates at the file, and no recovery of a file that a crash broke.

All servers are aiohttp on uvloop without an access log, like the product.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import nats
import numpy as np
import orjson
import uvloop
from aiohttp import web
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig

from fiq.corpus.format import EVENT_DTYPE, EVENTS, EVENTS_CHUNK, PAYLOAD, PAYLOAD_CHUNK
from services.cli.embedded.processes import LOOPBACK


class PlainFile:
    """An HDF5 file with a group for each consultation, as one would write it without thinking of crashes.

    Groups and datasets are looked up by name for each event: plain code keeps no handles of thousands of consultations.
    """

    def __init__(self, path: Path) -> None:
        self._file = h5py.File(path, "w")
        self._sequence = 0

    def append(self, consultation: str, events: Sequence[tuple[int, bytes, bytes]]) -> None:
        """Append events of one consultation: when each was received, its id, its body."""
        name = f"consultations/{consultation}"
        group = self._file[name] if name in self._file else self.create(consultation)
        table, payload = group[EVENTS], group[PAYLOAD]
        offset, row = payload.shape[0], table.shape[0]
        rows, lines, chain, written_ns = [], b"", np.void(bytes(32)), time.time_ns()
        for received_ns, event_id, body in events:
            self._sequence += 1
            place = offset + len(lines)
            rows.append((self._sequence, received_ns, place, len(body), 0, np.void(event_id), chain, written_ns))
            lines += body + b"\n"
        payload.resize((offset + len(lines),))
        payload[offset:] = np.frombuffer(lines, np.uint8)
        table.resize((row + len(rows),))
        table[row:] = np.array(rows, EVENT_DTYPE)

    def create(self, consultation: str) -> Any:
        """Create the group of a consultation with its two datasets and return it."""
        group = self._file.create_group(f"consultations/{consultation}")
        group.create_dataset(EVENTS, (0,), EVENT_DTYPE, maxshape=(None,), chunks=(EVENTS_CHUNK,))
        group.create_dataset(PAYLOAD, (0,), np.uint8, maxshape=(None,), chunks=(PAYLOAD_CHUNK,))
        return group

    def sync(self) -> None:
        """Flush, and wait until it is on the disk."""
        self._file.flush()
        os.fsync(self._file.id.get_vfd_handle())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> PlainFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

PATH = "/consultations/{consultation}/events"


def empty_handler() -> Handler:
    """Return a handler that does nothing but read the body."""

    async def handle(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(status=202, body=b'{"status":"accepted"}', content_type="application/json")

    return handle


def old_handler(file: PlainFile) -> Handler:
    """Return a handler that appends the event to *file* and waits until it is on the disk."""

    async def handle(request: web.Request) -> web.Response:
        body = await request.read()
        orjson.loads(body)
        event_id = uuid.uuid4()
        file.append(request.match_info["consultation"], [(time.time_ns(), event_id.bytes, body)])
        file.sync()
        document = {"status": "accepted", "message_id": str(event_id)}
        return web.Response(status=202, body=orjson.dumps(document), content_type="application/json")

    return handle


async def serve(handler: Handler, port: int) -> None:
    """Serve *handler* on loopback until the process is ended."""
    app = web.Application()
    app.router.add_post(PATH, handler)
    app.router.add_get("/healthz", _healthy)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, LOOPBACK, port).start()
    gc.collect()
    gc.freeze()  # as the product does
    await asyncio.Event().wait()


async def _healthy(_: web.Request) -> web.Response:
    return web.Response(text="ok")


STREAM, WORKERS = "plain", "plain-workers"
#: messages that a fetch may bring, and how long it may wait for them, seconds
_FETCH, _WAIT = 500, 0.25


async def prepare(stream: JetStreamContext) -> None:
    """Make the stream; it is fine when it exists."""
    await stream.add_stream(name=STREAM, subjects=[f"{STREAM}.*"], num_replicas=3)


async def run_web(url: str, port: int) -> None:
    """Take events over HTTP and publish them."""
    stream = (await nats.connect(url)).jetstream()
    await prepare(stream)
    await stream.add_consumer(STREAM, ConsumerConfig(durable_name=WORKERS, ack_policy=AckPolicy.EXPLICIT))

    async def handle(request: web.Request) -> web.Response:
        body = await request.read()
        orjson.loads(body)
        consultation, key = request.match_info["consultation"], request.headers["Idempotency-Key"]
        headers = {"Nats-Msg-Id": f"{consultation}/{key}", "Received": str(time.time_ns())}
        answer = await stream.publish(f"{STREAM}.{consultation}", body, headers=headers)
        return web.json_response({"status": "accepted", "sequence": answer.seq}, status=202)

    await serve(handle, port)


async def run_worker(url: str, path: Path) -> None:
    """Move messages from the consumer to *path*, a fetch at a time."""
    consumer = await (await nats.connect(url)).jetstream().pull_subscribe_bind(WORKERS, STREAM)
    with PlainFile(path) as file:
        while True:
            try:
                messages = await consumer.fetch(_FETCH, timeout=_WAIT)
            except TimeoutError:  # nats-py's own one, too
                continue
            consultations: dict[str, list[Msg]] = {}
            for message in messages:
                consultations.setdefault(message.subject.removeprefix(f"{STREAM}."), []).append(message)
            for consultation, events in consultations.items():
                file.append(consultation, [_row(message) for message in events])
            file.sync()
            committed = {"committed_ns": time.time_ns(), "received_ns": [_received(one) for one in messages]}
            for message in messages:
                await message.ack()
            print(orjson.dumps(committed).decode(), flush=True)


def _row(message: Msg) -> tuple[int, bytes, bytes]:
    key = (message.headers or {})["Nats-Msg-Id"].encode()
    return _received(message), key[-16:].rjust(16), message.data


def _received(message: Msg) -> int:
    return int((message.headers or {})["Received"])


def main(kind: str, *arguments: str) -> None:
    """Serve, or work, until the process is ended."""
    if kind == "empty":
        uvloop.run(serve(empty_handler(), int(arguments[0])))
    elif kind == "old":
        with PlainFile(Path(arguments[1])) as file:
            uvloop.run(serve(old_handler(file), int(arguments[0])))
    elif kind == "web":
        uvloop.run(run_web(arguments[0], int(arguments[1])))
    else:
        uvloop.run(run_worker(arguments[0], Path(arguments[1])))


if __name__ == "__main__":
    main(*sys.argv[1:])

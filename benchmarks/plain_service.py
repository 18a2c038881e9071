"""The service that one would write in an afternoon: ``python -m benchmarks.plain_service web URL PORT``.

``web`` is an aiohttp handler that publishes with a message id and answers when the stream has it. ``work URL FILE``
fetches up to 500 messages from one durable consumer, appends them to its own HDF5 file, syncs it, and acknowledges
each. The stream and the consumer have three replicas. There is no order over the workers, no check of duplicates at
the file, and no recovery of a file that a crash has broken. For the benchmark it prints a line a fetch.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import nats
import orjson
import uvloop
from aiohttp import web
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig

from benchmarks.plain_hdf5 import PlainFile
from benchmarks.references import serve

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


if __name__ == "__main__":
    role, at, where = sys.argv[1:]
    uvloop.run(run_web(at, int(where)) if role == "web" else run_worker(at, Path(where)))

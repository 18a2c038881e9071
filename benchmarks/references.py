"""HTTP servers to compare with: ``python -m benchmarks.references {empty,old} PORT [FILE]``.

``empty`` reads the body and answers; ``old`` does what the users' service did before: it appends to HDF5 and syncs
inside the request. Both are aiohttp on uvloop without an access log, like the product.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path

import orjson
import uvloop
from aiohttp import web

from benchmarks.plain_hdf5 import PlainFile
from services.cli.embedded.processes import LOOPBACK

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


def main(arguments: list[str]) -> None:
    """Serve what *arguments* ask for."""
    kind, port, *rest = arguments
    if kind == "empty":
        uvloop.run(serve(empty_handler(), int(port)))
    else:
        with PlainFile(Path(rest[0])) as file:
            uvloop.run(serve(old_handler(file), int(port)))


if __name__ == "__main__":
    main(sys.argv[1:])

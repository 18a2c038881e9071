"""A way to a nats-server on which messages get lost, as they do when a client reconnects or is too slow."""

from __future__ import annotations

import asyncio
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

_PIECE = 1 << 16


@asynccontextmanager
async def lossy(url: str, loses: Callable[[bytes], bool]) -> AsyncIterator[str]:
    """Yield a URL that leads to the server at *url*.

    Args:
        url: of a server without TLS.
        loses: is asked about each message to the client, headers and body, and says whether it gets lost.
    """
    target = urlsplit(url)

    async def serve(reader: StreamReader, writer: StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(target.hostname, target.port)
        ways = [asyncio.create_task(_copy(reader, far_writer)), asyncio.create_task(_sift(far_reader, writer, loses))]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        far_writer.close()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def _copy(reader: StreamReader, writer: StreamWriter) -> None:
    while piece := await reader.read(_PIECE):
        writer.write(piece)


async def _sift(reader: StreamReader, writer: StreamWriter, loses: Callable[[bytes], bool]) -> None:
    while line := await reader.readline():
        if line.startswith((b"MSG ", b"HMSG ")):
            content = await reader.readexactly(int(line.split()[-1]) + 2)
            if loses(content[:-2]):
                continue
            line += content
        writer.write(line)

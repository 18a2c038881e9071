"""Clients that post at the same moment: each has a connection of its own and has sent all but its last byte."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from services.cli import monitoring
from tests.support.polling import eventually

Answer = tuple[int, dict[str, Any]]

#: most that a race may take, seconds
PATIENCE = 60.0


@dataclass(frozen=True)
class Edge:
    """The ports of a running ingest process."""

    port: int
    management_port: int

    async def in_flight(self) -> int:
        """Return how many requests it has begun to read and not answered."""
        _, text = await asyncio.to_thread(monitoring.get, self.management_port, "/metrics")
        lines = (line.partition(" ") for line in text.decode().splitlines())
        return next(int(float(value)) for name, _, value in lines if name == "fi_ingest_requests_in_flight")


class Runner:
    """One client at the start."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, last: bytes) -> None:
        self._reader = reader
        self._writer = writer
        self._last = last

    @classmethod
    async def ready(cls, port: int, path: str, key: str, body: bytes) -> Runner:
        """Connect and send all but the last byte of a POST."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
        head += f"Idempotency-Key: {key}\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body[:-1])
        return cls(reader, writer, body[-1:])

    def run(self) -> None:
        """Send the last byte."""
        self._writer.write(self._last)

    async def answer(self) -> Answer:
        """Return what came back, once all of it is there."""
        head, _, body = (await self._reader.read()).partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(body)

    def close(self) -> None:
        """Leave the connection."""
        self._writer.close()


async def race(edges: Sequence[Edge], path: str, key: str, bodies: Sequence[bytes]) -> list[Answer]:
    """Post *bodies* under one *key*, in turns to *edges*, when these have the rest of every request."""
    async with AsyncExitStack() as stack:
        places = [edges[number % len(edges)] for number in range(len(bodies))]
        pairs = zip(places, bodies, strict=True)
        runners = await asyncio.gather(*(Runner.ready(edge.port, path, key, body) for edge, body in pairs))
        for runner in runners:
            stack.callback(runner.close)

        async def at_the_start() -> bool:
            return all([await edge.in_flight() == places.count(edge) for edge in edges])

        await eventually(at_the_start)
        for runner in runners:
            runner.run()
        async with asyncio.timeout(PATIENCE):
            return await asyncio.gather(*(runner.answer() for runner in runners))

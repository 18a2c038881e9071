"""What `nats backup stream` and `nats backup restore stream` do, on the wire (nats-architecture-and-design, ADR-1)."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import orjson
from nats.aio.msg import Msg

from services.log.jetstream.api import JetStreamApi
from services.log.jetstream.connection import Connection


@dataclass(frozen=True)
class StreamBackup:
    """A stream with its consumers, as the server packed it."""

    name: str
    description: dict[str, Any]
    chunks: list[bytes]


async def back_up(nc: Connection, name: str) -> StreamBackup:
    """Fetch the snapshot of a stream."""
    chunks: list[bytes] = []
    done = asyncio.Event()

    async def take(message: Msg) -> None:
        if not message.data:
            done.set()
            return
        chunks.append(message.data)
        await nc.publish(message.reply)

    inbox = nc.new_inbox()
    subscription = await nc.subscribe(inbox, cb=take)
    answer = await JetStreamApi(nc).request(f"STREAM.SNAPSHOT.{name}", {"deliver_subject": inbox})
    await asyncio.wait_for(done.wait(), 30)
    await subscription.unsubscribe()
    return StreamBackup(name, {"config": answer["config"], "state": answer["state"]}, chunks)


async def restore(nc: Connection, backup: StreamBackup) -> None:
    """Make the stream, which must not exist, from its snapshot."""
    answer = await JetStreamApi(nc).request(f"STREAM.RESTORE.{backup.name}", backup.description)
    for chunk in [*backup.chunks, b""]:
        reply = await nc.request(answer["deliver_subject"], chunk, timeout=30)
    assert "error" not in orjson.loads(reply.data), reply.data

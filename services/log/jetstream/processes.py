"""Which persister processes live just now, and how far they are: their answers in the NATS service API (ADR-32).

The broker passes the question on to each process that subscribes to it, so a process that is gone is missing at once;
no list is kept that could be wrong. Each process says in the metadata of its service which partitions it runs and what
it knows of them: ``partitions`` "00,03", ``progress`` "00:<committed>:<waiting>,03:…" and ``stream_sequence``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import nats.errors
import orjson
from nats.aio.client import Client
from nats.aio.msg import Msg

from services.log.errors import LogRefusedError, LogUnavailableError
from services.log.jetstream.names import PERSISTER_SERVICE
from services.log.partitions import partition_name
from services.log.status import LiveProcess, Progress

#: how long the first answer is awaited, and how long a further one, seconds
_FIRST_ANSWER, _NEXT_ANSWER = 1.0, 0.25
#: the question to all persisters
PROCESSES_SUBJECT = f"$SRV.INFO.{PERSISTER_SERVICE}"


@dataclass(frozen=True, slots=True)
class Answer:
    """What one of those who were asked said.

    Attributes:
        document: the JSON object.
        after: how long it took, seconds.
        at: when it came, seconds since 1970.
    """

    document: dict[str, Any]
    after: float
    at: float


def show_progress(progress: Mapping[int, Progress]) -> str:
    """Return *progress* as the metadata of a process hold it, such as ``00:38:2,03:41:0``."""
    return ",".join(f"{partition_name(p)}:{one.committed}:{one.waiting}" for p, one in sorted(progress.items()))


def read_progress(text: str) -> dict[int, Progress]:
    """Undo :func:`show_progress`; malformed parts are left out."""
    parts = (part.split(":") for part in text.split(","))
    return {int(p[0]): Progress(int(p[1]), int(p[2])) for p in parts if len(p) == 3 and all(map(str.isdecimal, p))}


def read_process(metadata: Mapping[str, str]) -> LiveProcess:
    """Return what a process says of itself in the *metadata* of its service."""
    sequence = metadata.get("stream_sequence", "")
    return LiveProcess(
        store=metadata.get("store", ""),
        volume=metadata.get("volume", ""),
        partitions=frozenset(int(name) for name in metadata.get("partitions", "").split(",") if name.isdecimal()),
        progress=read_progress(metadata.get("progress", "")),
        stream_sequence=int(sequence) if sequence.isdecimal() else 0,
        metadata=metadata,
    )


async def live_processes(nc: Client) -> list[LiveProcess]:
    """Return every persister process that answers.

    Raises:
        LogUnavailableError: the connection is gone.
        LogRefusedError: the user of the connection may not ask, so silence means nothing.
    """
    infos = await persister_infos(nc)
    if not infos:
        check_allowed(nc)
    return [read_process(metadata) for metadata in infos]


def check_allowed(nc: Client) -> None:
    """Make sure that silence means that no persister lives.

    Raises LogRefusedError: the user of the connection may not ask.
    """
    refused = [text for text in getattr(nc, "violations", ()) if PROCESSES_SUBJECT.lower() in text.lower()]
    if refused:
        raise LogRefusedError(f"the NATS user may not ask which persisters live: {refused[0]}")


async def persister_infos(nc: Client) -> list[dict[str, str]]:
    """Return what every persister process says of itself, in the order in which they answer.

    Raises LogUnavailableError: the connection is gone.
    """
    return [answer.document.get("metadata") or {} for answer in await everybody(nc, PROCESSES_SUBJECT)]


async def everybody(nc: Client, subject: str) -> list[Answer]:
    """Ask all who subscribe to *subject* and return their answers; nothing when there are none.

    Raises LogUnavailableError: the connection is gone.
    """
    answers: asyncio.Queue[tuple[Msg, float]] = asyncio.Queue()
    inbox = nc.new_inbox()

    async def keep(message: Msg) -> None:
        answers.put_nowait((message, time.time()))

    try:
        subscription = await nc.subscribe(inbox, cb=keep)
        try:
            asked = time.time()
            await nc.publish(subject, reply=inbox)
            return await _collected(answers, asked)
        finally:
            await subscription.unsubscribe()
    except (nats.errors.Error, OSError) as error:
        raise LogUnavailableError(f"{subject}: {type(error).__name__}") from error


async def _collected(answers: asyncio.Queue[tuple[Msg, float]], asked: float) -> list[Answer]:
    found: list[Answer] = []
    try:
        while True:
            async with asyncio.timeout(_NEXT_ANSWER if found else _FIRST_ANSWER):
                message, at = await answers.get()
            if not message.data:  # status 503: there is no subscriber
                return found
            found.append(Answer(orjson.loads(message.data), at - asked, at))
    except TimeoutError:
        return found

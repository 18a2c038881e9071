"""One question to everybody who is subscribed to a subject, and all their answers."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import nats.errors
import orjson
from nats.aio.client import Client
from nats.aio.msg import Msg

from services.eventlog.errors import LogUnavailableError

#: how long the first answer is awaited, and how long a further one, seconds
_FIRST_ANSWER, _NEXT_ANSWER = 1.0, 0.25


@dataclass(frozen=True, slots=True)
class Answer:
    """What one of them said.

    Attributes:
        document: the JSON object.
        after: how long it took, seconds.
        at: when it came, seconds since 1970.
    """

    document: dict[str, Any]
    after: float
    at: float


async def everybody(nc: Client, subject: str) -> list[Answer]:
    """Ask on *subject* and return what comes, in whatever number; nothing where nobody is subscribed.

    Raises:
        LogUnavailableError: the connection is gone.
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
            if not message.data:  # status 503: nobody offers it
                return found
            found.append(Answer(orjson.loads(message.data), at - asked, at))
    except TimeoutError:
        return found

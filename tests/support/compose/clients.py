"""Clients of a deployment as people are: they pause between two events, and retry once."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

from aiohttp import ClientError, ClientSession, ClientTimeout

from services.cli.demo import AcceptedPost, Post, generate

#: a client's pause between two events: a person speaks no faster, seconds
PAUSE = 0.05
#: what Retry-After asks for, or less, seconds
RETRY_AFTER = 1.0


class Client:
    """Posts events one after another; sends each again once when it was not accepted, and counts what then failed.

    Attributes:
        accepted: by event id.
        seconds: of each accepted event, from its first attempt to its 202, the pause before a second one included.
        retried: events that needed one.
        failed: why both attempts of an event failed.
    """

    def __init__(self, url: str, token: str) -> None:
        self._url = url
        self._headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
        self.accepted: dict[str, AcceptedPost] = {}
        self.seconds: list[float] = []
        self.retried = 0
        self.failed: list[str] = []

    @asynccontextmanager
    async def posting(self, clients: int) -> AsyncIterator[None]:
        """Be so many clients while the block runs."""
        finished = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(self._run(finished))
            try:
                yield
            finally:
                finished.set()

    async def _run(self, finished: asyncio.Event) -> None:
        body = generate(1, seed=0)[0][0].body
        consultation = f"client-{uuid4().hex[:8]}"
        async with ClientSession(timeout=ClientTimeout(total=15)) as session:
            while not finished.is_set():
                await self._post(session, Post(consultation, str(uuid4()), body))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PAUSE * random.uniform(0.5, 1.5)):
                        await finished.wait()

    async def _post(self, session: ClientSession, post: Post) -> None:
        begun = time.perf_counter()
        first = await self._attempt(session, post)
        if first is not None:
            self.retried += 1
            await asyncio.sleep(RETRY_AFTER)
            second = await self._attempt(session, post)
            if second is not None:
                self.failed.append(f"{first}, then {second}")
                return
        self.seconds.append(time.perf_counter() - begun)

    async def _attempt(self, session: ClientSession, post: Post) -> str | None:
        headers = self._headers | {"Idempotency-Key": post.key}
        url = f"{self._url}/consultations/{post.consultation}/events"
        try:
            async with session.post(url, data=post.body, headers=headers) as answer:
                if answer.status != 202:
                    return str(answer.status)
                self.accepted[post.key] = AcceptedPost(post, (await answer.json())["sequence"])
        except (ClientError, TimeoutError) as error:
            return type(error).__name__
        return None

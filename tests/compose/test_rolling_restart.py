"""An upgrade that clients do not notice."""

from __future__ import annotations

import asyncio
import contextlib
import random
from uuid import uuid4

import pytest
from aiohttp import ClientError, ClientSession, ClientTimeout

from services.cli.rehearsal.consultations import Post, generate
from services.cli.rehearsal.load import Accepted
from tests.support.compose.engine import run
from tests.support.compose.stack import Deployment

pytestmark = pytest.mark.timeout(600)

#: a client's pause between two events: a person speaks no faster, seconds
PAUSE = 0.05
CLIENTS = 4


class Client:
    """Posts events one after another; sends each again once when it was not accepted, and counts what then failed."""

    def __init__(self, url: str, token: str) -> None:
        self._url = url
        self._headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
        self.accepted: dict[str, Accepted] = {}
        self.retried = 0
        self.failed: list[str] = []

    async def run(self, name: str, finished: asyncio.Event) -> None:
        """Post until *finished*."""
        posts = [Post(f"{name}-{uuid4().hex[:8]}", one.key, one.body) for one in generate(1, seed=0)[0]]
        async with ClientSession(timeout=ClientTimeout(total=15)) as session:
            while not finished.is_set():
                one = Post(posts[0].consultation, str(uuid4()), posts[0].body)
                await self._post(session, one)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PAUSE * random.uniform(0.5, 1.5)):
                        await finished.wait()

    async def _post(self, session: ClientSession, post: Post) -> None:
        first = await self._attempt(session, post)
        if first is None:
            return
        self.retried += 1
        await asyncio.sleep(1)  # what Retry-After asks for, or less
        second = await self._attempt(session, post)
        if second is not None:
            self.failed.append(f"{first}, then {second}")

    async def _attempt(self, session: ClientSession, post: Post) -> str | None:
        headers = self._headers | {"Idempotency-Key": post.key}
        url = f"{self._url}/consultations/{post.consultation}/events"
        try:
            async with session.post(url, data=post.body, headers=headers) as answer:
                if answer.status != 202:
                    return str(answer.status)
                self.accepted[post.key] = Accepted(post, (await answer.json())["sequence"])
        except (ClientError, TimeoutError) as error:
            return type(error).__name__
        return None


async def test_a_client_that_retries_once_sees_no_failure(stack: Deployment) -> None:
    """Nodes, persisters and ingests are restarted one after the other under load; nothing is lost either."""
    client, finished = Client(stack.url, stack.token), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for number in range(CLIENTS):
            group.create_task(client.run(f"rolling-{number}", finished))
        try:
            await asyncio.to_thread(run, "env", "FIQ_SETTLE=4", "./rolling-restart", cwd=stack.folder, timeout=540)
        finally:
            finished.set()
    assert [] == client.failed
    assert len(client.accepted) > 100
    stack.accepted.update(client.accepted)
    await stack.is_whole()
    await stack.is_verified()

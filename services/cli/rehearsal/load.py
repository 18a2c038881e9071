"""Concurrent clients that post consultations, repeat some posts, and keep at it until each event is accepted."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import orjson
from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector

from services.cli.rehearsal.consultations import Post

#: statuses after which the same request, with the same key, is sent again
_AGAIN = frozenset({409, 429, 503})
#: pause before that, seconds; shorter than Retry-After says, so that the length of an outage is seen
_PAUSE = 0.1
#: an answer may take this long, seconds
_TIMEOUT = 15.0


class UnexpectedAnswerError(Exception):
    """Raised when the service answers what it never should."""


@dataclass(slots=True)
class Accepted:
    """An event that got at least one 202.

    Attributes:
        post: the request.
        sequence: lowest position in the stream that an answer told.
    """

    post: Post
    sequence: int


@dataclass(slots=True)
class Outcome:
    """What the clients saw.

    Attributes:
        accepted: by event id.
        repeated: posts that were sent again on purpose after their 202.
        duplicates: answers that said so.
        refused: answers by status, and "lost" for requests without one; all of them were sent again.
        seconds: latency of each 202, from the attempt that brought it.
        longest_gap: longest time without a 202 from any client, seconds.
    """

    accepted: dict[str, Accepted] = field(default_factory=dict)
    repeated: int = 0
    duplicates: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    longest_gap: float = 0.0

    def percentile(self, share: float) -> float:
        """Return the latency, seconds, below which *share* (0 to 1) of the accepted posts stayed."""
        ordered = sorted(self.seconds)
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


class Load:
    """Clients against one ingest.

    Args:
        url: of ingest.
        clients: how many post at the same time.
        repeats: share of posts that are sent a second time after they were accepted, 0 to 1.
        seed: of the order and of the repeats.
        token: of the API, where one is asked for.
    """

    def __init__(
        self,
        url: str,
        *,
        clients: int = 20,
        repeats: float = 0.05,
        seed: int = 0,
        token: str = "",
    ) -> None:
        self._url = url
        self._clients = clients
        self._repeats = repeats
        self._seed = seed
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._last = 0.0
        self._allowed = math.inf
        self._more_allowed = asyncio.Event()
        self.outcome = Outcome()
        self.finished = False

    def allow(self, events: float) -> None:
        """Let clients wait once so many *events* are accepted, until more are allowed; at first all are."""
        self._allowed = events
        self._more_allowed.set()
        self._more_allowed = asyncio.Event()

    async def run(self, consultations: Sequence[Sequence[Post]]) -> Outcome:
        """Post everything; a consultation is one client's, in order, mixed with that client's other consultations.

        Raises:
            UnexpectedAnswerError: an answer was neither 202 nor one that asks to try again.
        """
        self._last = time.monotonic()
        async with (
            ClientSession(
                connector=TCPConnector(limit=self._clients),
                timeout=ClientTimeout(total=_TIMEOUT),
                headers=self._headers,
            ) as session,
            asyncio.TaskGroup() as group,
        ):
            for index in range(self._clients):
                chance = random.Random(f"{self._seed}/{index}")  # noqa: S311 - no secrets
                group.create_task(self._client(session, consultations[index :: self._clients], chance))
        self.finished = True
        return self.outcome

    async def _client(self, session: ClientSession, mine: Sequence[Sequence[Post]], chance: random.Random) -> None:
        waiting = [list(reversed(posts)) for posts in mine if posts]
        sent: list[Post] = []
        while waiting:
            chosen = chance.randrange(len(waiting))
            post = waiting[chosen].pop()
            if not waiting[chosen]:
                waiting.pop(chosen)
            while len(self.outcome.accepted) >= self._allowed:
                await self._more_allowed.wait()
            await self._until_accepted(session, post)
            sent.append(post)
            if chance.random() < self._repeats:
                self.outcome.repeated += 1
                await self._until_accepted(session, chance.choice(sent[-50:]))

    async def _until_accepted(self, session: ClientSession, post: Post) -> None:
        while True:
            if await self._attempt(session, post):
                return
            await asyncio.sleep(_PAUSE)

    async def _attempt(self, session: ClientSession, post: Post) -> bool:
        headers = {"Content-Type": "application/json", "Idempotency-Key": post.key}
        started = time.monotonic()
        try:
            async with session.post(
                f"{self._url}/consultations/{post.consultation}/events", data=post.body, headers=headers
            ) as response:
                status, body = response.status, await response.read()
        except (ClientError, TimeoutError):
            self.outcome.refused["lost"] += 1
            return False
        if status == 202:
            self._accept(post, orjson.loads(body), time.monotonic() - started)
            return True
        if status not in _AGAIN:
            raise UnexpectedAnswerError(f"status {status} to a valid event")
        self.outcome.refused[str(status)] += 1
        return False

    def _accept(self, post: Post, answer: dict[str, object], seconds: float) -> None:
        now = time.monotonic()
        outcome = self.outcome
        outcome.longest_gap = max(outcome.longest_gap, now - self._last)
        self._last = now
        outcome.seconds.append(seconds)
        outcome.duplicates += bool(answer.get("duplicate"))
        sequence = answer["sequence"]
        if not isinstance(sequence, int):
            raise UnexpectedAnswerError("a 202 without a sequence")
        known = outcome.accepted.get(post.key)
        if known is None:
            outcome.accepted[post.key] = Accepted(post, sequence)
        else:
            known.sequence = min(known.sequence, sequence)

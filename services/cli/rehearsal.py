"""Concurrent clients that post consultations, repeat some posts, and keep at it until each event is accepted."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import orjson

from fiq.client import AsyncClient, RetryPolicy
from services.cli.embedded.stack import Stack
from services.log.errors import LogUnavailableError
from services.log.jetstream.api import JetStreamApi
from services.log.jetstream.connection import close, connect
from services.log.jetstream.monitor import LogMonitor, PartitionState
from services.log.jetstream.names import STREAM, filter_subject
from services.log.settings import LogSettings

#: how long what was killed stays dead, seconds
DOWN_SECONDS = 2.0
#: how long an election may take, seconds
LEADER_TIMEOUT = 30.0
_POLL = 0.1
#: problems that are named one by one; the rest is counted
_NAMED = 10
_OPENINGS = ("What brings you in today?", "How have you been since the last visit?", "Where does it hurt?")
_QUESTIONS = ("Since when?", "Does it get worse at night?", "Any fever?", "Do you take anything for it?", "How strong?")
_ANSWERS = ("For about {n} days.", "No, I don't think so.", "Yes, mostly in the morning.", "{n} out of ten.", "A bit.")
_SUMMARY = "Symptoms for {n} days. Advised rest and a follow-up in {m} weeks."
#: an outage may take this long; the longest pause between two tries of a post is short, so that its length is seen
_RETRY = RetryPolicy(deadline=600.0, max_backoff=0.1)


@dataclass(frozen=True, slots=True)
class Post:
    """One request.

    Attributes:
        consultation: id of the consultation.
        key: the idempotency key, a UUID, so that it is the event's id too.
        body: the JSON document.
    """

    consultation: str
    key: str
    body: bytes


def generate(events: int, *, seed: int, per_consultation: int = 10) -> list[list[Post]]:
    """Return consultations with *events* events in all, the same for the same *seed*.

    Args:
        events: how many events.
        seed: of the pseudo-random generator.
        per_consultation: mean number of events in a consultation.
    """
    chance = random.Random(seed)  # noqa: S311 - no secrets
    consultations: list[list[Post]] = []
    left = events
    while left > 0:
        count = min(left, chance.randint(2, 2 * per_consultation - 2))
        consultations.append(_consultation(f"demo-{len(consultations):05d}", count, chance))
        left -= count
    return consultations


def post(consultation: str, body: dict[str, object], chance: random.Random) -> Post:
    """Return the request that posts *body*, with a key drawn from *chance*."""
    return Post(consultation, str(UUID(int=chance.getrandbits(128), version=4)), orjson.dumps(body))


def _consultation(name: str, count: int, chance: random.Random) -> list[Post]:
    events: list[dict[str, object]] = [_message("Doctor", chance.choice(_OPENINGS))]
    while len(events) < count - 1:
        doctor = len(events) % 2 == 0
        text = chance.choice(_QUESTIONS if doctor else _ANSWERS).format(n=chance.randint(1, 9))
        events.append(_message("Doctor" if doctor else "Patient", text))
    summary = _SUMMARY.format(n=chance.randint(1, 9), m=chance.randint(1, 4))
    events.append({"event_type": "CONSULTATION_SUMMARIZED", "payload": {"text": summary}})
    return [post(name, event, chance) for event in events[:count]]


def _message(speaker: str, text: str) -> dict[str, object]:
    return {"event_type": "MESSAGE_RECEIVED", "payload": {"speaker": speaker, "text": text}}


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
        retries: tries that were made again after a failure.
        seconds: latency of each 202, with the tries before it.
        longest_gap: longest time without a 202 from any client, seconds.
    """

    accepted: dict[str, Accepted] = field(default_factory=dict)
    repeated: int = 0
    duplicates: int = 0
    retries: int = 0
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
        self._client = AsyncClient(url, token or None, retry=_RETRY, connections=clients)
        self._clients = clients
        self._repeats = repeats
        self._seed = seed
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

        Raises ClientError: the service refuses a valid event, or is away for good.
        """
        self._last = time.monotonic()
        async with self._client, asyncio.TaskGroup() as group:
            for index in range(self._clients):
                chance = random.Random(f"{self._seed}/{index}")  # noqa: S311 - no secrets
                group.create_task(self._post_all(consultations[index :: self._clients], chance))
        self.outcome.retries = self._client.retries
        self.finished = True
        return self.outcome

    async def _post_all(self, mine: Sequence[Sequence[Post]], chance: random.Random) -> None:
        waiting = [list(reversed(posts)) for posts in mine if posts]
        sent: list[Post] = []
        while waiting:
            chosen = chance.randrange(len(waiting))
            post = waiting[chosen].pop()
            if not waiting[chosen]:
                waiting.pop(chosen)
            while len(self.outcome.accepted) >= self._allowed:
                await self._more_allowed.wait()
            await self._post(post)
            sent.append(post)
            if chance.random() < self._repeats:
                self.outcome.repeated += 1
                await self._post(chance.choice(sent[-50:]))

    async def _post(self, post: Post) -> None:
        started = time.monotonic()
        answer = await self._client.post(post.consultation, post.body, post.key)
        now = time.monotonic()
        outcome = self.outcome
        outcome.longest_gap = max(outcome.longest_gap, now - self._last)
        self._last = now
        outcome.seconds.append(now - started)
        outcome.duplicates += answer.duplicate
        known = outcome.accepted.get(post.key)
        if known is None:
            outcome.accepted[post.key] = Accepted(post, answer.sequence)
        else:
            known.sequence = min(known.sequence, answer.sequence)


# -- The proof: every accepted event is in the corpus once, byte for byte, in stream order, and nothing else is ------


@dataclass(slots=True)
class Verdict:
    """What the comparison found.

    Attributes:
        persisted: events in the corpus.
        consultations: groups in the corpus.
        problems: what is wrong; nothing when all is well. No payloads.
    """

    persisted: int = 0
    consultations: int = 0
    problems: list[str] = field(default_factory=list)

    def summary(self) -> list[str]:
        """Return the first problems, and how many there are more."""
        more = len(self.problems) - _NAMED
        return self.problems[:_NAMED] + ([f"and {more} more"] if more > 0 else [])


#: an event of the corpus: its id, its sequence, its body
Found = tuple[str, int, bytes]


def verify(path: Path, accepted: Iterable[Accepted]) -> Verdict:
    """Compare the corpus at *path* with what clients were told. Raises CorpusError: the corpus cannot be read."""
    from fiq.corpus import open_corpus  # h5py takes long to import, and most commands need none of it

    with open_corpus(path) as corpus:
        found = (
            (name, [(str(event.event_id), event.sequence, event.raw) for event in corpus[name]])
            for name in sorted(corpus.consultations())
        )
        return compare(found, accepted)


def compare(found: Iterable[tuple[str, list[Found]]], accepted: Iterable[Accepted]) -> Verdict:
    """Compare the consultations of a corpus, each with its events in their order, with what clients were told."""
    wanted: dict[str, dict[str, Accepted]] = defaultdict(dict)
    for one in accepted:
        wanted[one.post.consultation][one.post.key] = one
    verdict = Verdict()
    for name, events in found:
        verdict.consultations += 1
        verdict.persisted += len(events)
        verdict.problems += _compare(name, events, wanted.pop(name, {}))
    verdict.problems += [f"{name}: not in the corpus" for name in sorted(wanted)]
    return verdict


def _compare(name: str, events: list[Found], wanted: dict[str, Accepted]) -> list[str]:
    problems = []
    if len({key for key, _, _ in events}) != len(events):
        problems.append(f"{name}: an event is there twice")
    if [sequence for _, sequence, _ in events] != sorted({sequence for _, sequence, _ in events}):
        problems.append(f"{name}: events are not in stream order")
    for key, sequence, body in events:
        one = wanted.get(key)
        if one is None:
            problems.append(f"{name}: event {key} was never accepted")
        elif body != one.post.body:
            problems.append(f"{name}: event {key} has another body")
        elif sequence > one.sequence:  # an earlier attempt, whose answer was lost, may have brought it
            problems.append(f"{name}: event {key} has sequence {sequence}, but its client was told {one.sequence}")
    missing = wanted.keys() - {key for key, _, _ in events}
    return problems + [f"{name}: event {key} is missing" for key in sorted(missing)]


# -- kill -9 of the stream's leader and of a persister, in the middle of the load, and their return ------------------


@dataclass(slots=True)
class Chaos:
    """Kills parts of a stack and starts them again.

    Attributes:
        stack: what is hurt.
        tell: called with a line for people at each step.
        killed: what was killed, in order.
    """

    stack: Stack
    tell: Callable[[str], None] = lambda _: None
    killed: list[str] = field(default_factory=list)

    async def kill_leader(self) -> None:
        """Kill the node that leads the stream, and start it again after a while."""
        cluster = self.stack.cluster
        index = await asyncio.to_thread(cluster.wait_stream_leader, STREAM, timeout=LEADER_TIMEOUT)
        name = f"{cluster.names[index]}, the stream's leader"
        await asyncio.to_thread(cluster.kill, index)
        self._note(name)
        await asyncio.sleep(DOWN_SECONDS)
        await asyncio.to_thread(cluster.start_node, index)
        self.tell(f"{cluster.names[index]} is started again")

    async def kill_persister(self, index: int) -> None:
        """Kill a persister, and start it again after a while; meanwhile another one takes its partitions."""
        service = self.stack.persisters[index]
        await asyncio.to_thread(service.process.kill)
        self._note(service.name)
        await asyncio.sleep(DOWN_SECONDS)
        await asyncio.to_thread(self.stack.restart, service)
        self.tell(f"{service.name} is started again")

    async def recovered(self) -> None:
        """Wait until every node has caught up and every service is ready.

        Raises ChildFailedError: a process did not come back.
        """
        await asyncio.to_thread(self.stack.cluster.wait_ready)
        for service in self.stack.services:
            await asyncio.to_thread(self.stack.wait_ready, service)

    def _note(self, name: str) -> None:
        self.killed.append(name)
        self.tell(f"kill -9 {name}")


async def drained(settings: LogSettings, *, timeout: float, on_lag: Callable[[int], None] = lambda _: None) -> bool:
    """Wait until every partition has committed all that the stream holds for it; False when time is over.

    Args:
        settings: of the log.
        timeout: seconds.
        on_lag: called with the number of events that are still to come.
    """
    nc = await connect(settings, name="fiq rehearsal", on_closed=lambda _: None)
    monitor = LogMonitor(nc, settings)
    try:
        async with asyncio.timeout(timeout):
            while True:
                await monitor.look()
                lag = await _lag(JetStreamApi(nc), monitor.state.partitions(settings.store))
                on_lag(lag or 0)
                if lag == 0:
                    return True
                await asyncio.sleep(_POLL)
    except TimeoutError:
        return False
    finally:
        await monitor.close()
        await close(nc)


async def _lag(api: JetStreamApi, partitions: Sequence[PartitionState]) -> int | None:
    """Return how many events wait; None while that is not sure."""
    if not partitions or not all(one.owners for one in partitions):
        return None
    lag = sum(one.waiting.events for one in partitions)
    if not lag:  # as far as the owners know: they may not have got the last ones yet
        try:
            for one in partitions:
                next_of = filter_subject(one.partition)
                if await api.leader_message(STREAM, one.committed + 1, next_of=next_of) is not None:
                    lag += 1
        except LogUnavailableError:
            return None
    return lag

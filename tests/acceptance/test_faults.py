"""What clients see when parts are missing, and that nothing that was accepted is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from uuid import uuid4

import orjson
import pytest
from aiohttp import ClientResponse, ClientSession, ClientTimeout

from fiq.corpus import open_corpus
from services.cli.demo import AcceptedPost, Post, compare_corpus, wait_until_persisted
from services.cli.embedded.stack import Stack
from services.cli.target import connected
from services.log.jetstream.api import JetStreamApi
from services.log.jetstream.stream import STREAM
from services.log.settings import LogSettings
from tests.support.polling import eventually


class Connection:
    """Posts events and remembers what was accepted."""

    def __init__(self, session: ClientSession, stack: Stack) -> None:
        self._session = session
        self.stack = stack
        self.accepted: dict[str, AcceptedPost] = {}
        self._probe: Post | None = None

    async def post(self, post: Post) -> ClientResponse:
        """Send *post*; the response is read."""
        response = await self._session.post(
            f"{self.stack.ingest.url}/consultations/{post.consultation}/events",
            data=post.body,
            headers={"Content-Type": "application/json", "Idempotency-Key": post.key},
        )
        answer = await response.json(content_type=None)
        if response.status == 202:
            known = self.accepted.setdefault(post.key, AcceptedPost(post, answer["sequence"]))
            known.sequence = min(known.sequence, answer["sequence"])
        return response

    async def accepts(self) -> bool:
        """Whether an event is accepted now: the same one until it is, as a refused one may be stored all the same."""
        self._probe = self._probe or new_post()
        if (await self.post(self._probe)).status != 202:
            return False
        self._probe = None
        return True

    async def is_verified(self) -> None:
        """Assert that HDF5 holds what was accepted, once and in order."""
        assert await wait_until_persisted(self.stack.data_dir, len(self.accepted), timeout=60)
        verdict = compare_corpus(self.stack.data_dir, self.accepted.values())
        assert [] == verdict.summary()


@pytest.fixture
async def session() -> AsyncIterator[ClientSession]:
    async with ClientSession(timeout=ClientTimeout(total=60)) as session:
        yield session


def new_post(size: int = 0) -> Post:
    """Return an event of one of a hundred consultations, with *size* bytes of text."""
    key = str(uuid4())
    text = key.encode() + b"x" * size
    return Post(f"c-{int(key[:2], 16) % 100}", key, b'{"event_type":"MESSAGE_RECEIVED","payload":"' + text + b'"}')


async def test_a_retry_after_the_brokers_window_and_after_a_restart_of_all_nodes_is_one_event_in_hdf5(
    start_stack: Callable[..., Stack], session: ClientSession
) -> None:
    """G2 has no time limit: what the broker has forgotten, the corpus knows."""
    stack = await asyncio.to_thread(start_stack, FI_DUPLICATE_WINDOW="100ms")
    client = Connection(session, stack)
    post = new_post()
    first = await (await client.post(post)).json()

    async def stored_anew() -> bool:
        """The window is over when the broker takes the same id for a new one; the client is told of the first."""
        before = await _last_sequence(stack)
        response = await client.post(post)
        assert (first["sequence"], True) == ((answer := await response.json())["sequence"], answer["duplicate"])
        return await _last_sequence(stack) > before

    await eventually(stored_anew)
    for index in range(stack.cluster.size):
        stack.cluster.kill(index)
    for index in range(stack.cluster.size):
        stack.cluster.start_node(index)
    await asyncio.to_thread(stack.cluster.wait_ready)

    async def accepted_again() -> bool:
        return await _accepted(client, post)

    await eventually(accepted_again)
    await client.is_verified()
    with open_corpus(stack.data_dir) as corpus:
        assert [first["sequence"]] == [event.sequence for event in corpus[post.consultation]]


async def _last_sequence(stack: Stack) -> int:
    async with connected(LogSettings(servers=tuple(stack.cluster.urls))) as connection:
        info = await JetStreamApi(connection).stream_info(STREAM)
    assert info is not None
    return int(info["state"]["last_seq"])


async def test_posts_go_on_with_one_node_down_and_come_back_after_two(
    start_stack: Callable[..., Stack], session: ClientSession
) -> None:
    """One of three is no loss; two are told within the deadline, and nothing that was accepted is gone."""
    deadline = 2.0
    stack = await asyncio.to_thread(start_stack, FI_PUBLISH_DEADLINE=str(deadline))
    client = Connection(session, stack)
    cluster = stack.cluster
    await eventually(client.accepts)

    leader = await asyncio.to_thread(cluster.wait_stream_leader, STREAM)
    cluster.kill(leader)
    await eventually(client.accepts)  # an election is needed
    assert {202} == {(await client.post(new_post())).status for _ in range(50)}  # each at its first try

    cluster.kill((leader + 1) % 3)
    undecided = [new_post() for _ in range(20)]
    refused = await asyncio.gather(*(client.post(post) for post in undecided))
    assert {503} == {response.status for response in refused}
    assert all(int(response.headers["Retry-After"]) > 0 for response in refused)
    lines = [orjson.loads(line) for line in (stack.logs / "ingest.log").read_bytes().splitlines()]
    took = [line["duration_s"] for line in lines if line["event"] == "REQUEST_REFUSED"][-len(undecided) :]
    assert deadline <= max(took) < deadline + 1

    cluster.start_node(leader)
    cluster.start_node((leader + 1) % 3)
    await eventually(client.accepts, timeout=60)
    for post in undecided:  # may or may not have been stored: the same key is safe
        await eventually(lambda post=post: _accepted(client, post))  # type: ignore[misc]
    await asyncio.to_thread(cluster.wait_ready)
    await client.is_verified()


async def test_a_full_stream_refuses_until_the_persisters_have_drained_and_trimmed_it(
    start_stack: Callable[..., Stack], session: ClientSession
) -> None:
    """G5: told early and honestly, and accepted again without anybody's help."""
    stack = await asyncio.to_thread(start_stack, FI_STREAM_MAX_BYTES="1MiB")
    client = Connection(session, stack)
    for persister in stack.persisters:
        persister.process.kill()

    response = await client.post(new_post(20_000))
    while response.status == 202:
        response = await client.post(new_post(20_000))
    assert 503 == response.status
    assert int(response.headers["Retry-After"]) > 0
    assert (await response.json())["type"].endswith("log-full")

    for persister in stack.persisters:
        stack.restart(persister)
    for _ in range(60):  # more than the stream holds at once
        post = new_post(20_000)
        await eventually(lambda post=post: _accepted(client, post))  # type: ignore[misc]
    await client.is_verified()


async def _accepted(client: Connection, post: Post) -> bool:
    return (await client.post(post)).status == 202

"""Every 202 is in HDF5 once and in order, whatever happens to containers and networks, and an operator is told.

Each fault is held until the alert for it fires in the real Prometheus. That it stopped afterwards is read from
Prometheus's own history at the end, for all of them: while later faults are done, the alerts of earlier ones end.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    ExitStack,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from uuid import uuid4

import pytest

from services.cli.demo import Load, Post, generate
from tests.support.compose.alerts import Alert, Watch
from tests.support.compose.engine import docker
from tests.support.compose.faults import disconnected, killed, no_slow_network, paused, slow
from tests.support.compose.stack import NODES, Deployment
from tests.support.dialogues import consultations
from tests.support.polling import eventually

pytestmark = pytest.mark.timeout(480)

#: each test posts one of so many parts of all dialogues
SHARE = 14
#: the fault begins when this share of a test's events is accepted
BEGIN = 0.3
#: and ends after this time at the earliest, seconds; longer than a client's ping takes to miss a node
LASTS = 6.0
#: clients that go on while the network is slow: with nothing under way little of it shows
BUSY = 4


@pytest.fixture(scope="module")
def dialogues() -> Iterator[list[list[Post]]]:
    """Parts of all dialogues: one for each test, no consultation in two of them."""
    every = consultations()
    return iter([every[index::SHARE] for index in range(SHARE)])


@pytest.fixture(scope="module")
def watch(shared_stack: Deployment) -> Watch:
    """What Prometheus tells, and told."""
    return Watch(shared_stack)


async def test_what_several_clients_post_is_in_hdf5(stack: Deployment, dialogues: Iterator[list[list[Post]]]) -> None:
    """From nothing: provisioned, posted over the balancer, stored over TLS, written by two persisters."""
    await stack.post(stack.load(), next(dialogues))
    await stack.is_verified()


async def test_a_slow_and_lossy_network(stack: Deployment, dialogues: Iterator[list[list[Post]]], watch: Watch) -> None:
    """All nodes send slowly and lose packets: it takes longer, and nothing is lost."""
    reason = no_slow_network()
    if reason is not None:
        if os.environ.get("FIQ_REQUIRE_DOCKER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    await _hurt(stack, next(dialogues), _slow_nodes(stack), watch, Alert("FiqClusterSlow"), _busy(stack))


async def test_kill_9_of_the_leader(stack: Deployment, dialogues: Iterator[list[list[Post]]], watch: Watch) -> None:
    """Another node leads after an election; the killed one catches up."""
    leader = await stack.leader()
    await _hurt(stack, next(dialogues), killed(stack, leader), watch, _offline(leader))


async def test_the_leader_is_cut_off_from_the_network(
    stack: Deployment, dialogues: Iterator[list[list[Post]]], watch: Watch
) -> None:
    """It cannot acknowledge anything alone; the two others go on without it."""
    leader = await stack.leader()
    await _hurt(stack, next(dialogues), disconnected(stack, leader), watch, _offline(leader))


async def test_a_frozen_leader(stack: Deployment, dialogues: Iterator[list[list[Post]]], watch: Watch) -> None:
    """Its connections stay open and answer nothing: clients leave it by their own pings."""
    leader = await stack.leader()
    await _hurt(stack, next(dialogues), paused(stack, leader), watch, _offline(leader))


async def test_kill_9_of_every_persister(
    stack: Deployment, dialogues: Iterator[list[list[Post]]], watch: Watch
) -> None:
    """Clients notice nothing; the events wait in the stream until a persister is there again."""
    await _hurt(stack, next(dialogues), killed(stack, "persister"), watch, Alert("FiqVolumeAway"))


async def test_kill_9_of_everything_at_once(
    stack: Deployment, dialogues: Iterator[list[list[Post]]], watch: Watch
) -> None:
    """A power failure in the middle of the load: what was accepted was on the disks. Prometheus is back first."""
    await _hurt(stack, next(dialogues), _without_power(stack), watch, Alert("FiqNoIngest"))


async def test_each_alert_stopped_when_its_fault_was_over(watch: Watch) -> None:
    """For each of the faults above, from Prometheus's own record. Alone it has nothing to look at, and fails."""
    assert watch.told
    for told in watch.told:
        await watch.stopped(told)


async def _hurt(
    stack: Deployment,
    part: list[list[Post]],
    fault: AbstractContextManager[None],
    watch: Watch,
    alert: Alert,
    meanwhile: AbstractAsyncContextManager[None] | None = None,
) -> None:
    """Do *fault* in the middle of a load until *alert* fires, and compare HDF5 with what clients were told."""
    await watch.quiet(alert)
    load = stack.load()
    async with _finished(stack.post(load, part)) as posting:
        await _accepted(load, BEGIN * sum(map(len, part)))
        async with _done(fault), meanwhile or nullcontext(), watch.during(alert):
            await asyncio.wait({posting}, timeout=LASTS)
    await stack.is_whole()
    await stack.is_verified()


@asynccontextmanager
async def _busy(stack: Deployment) -> AsyncIterator[None]:
    """Let some clients post one event after another while the block runs."""
    finished = asyncio.Event()

    async def post() -> None:
        while not finished.is_set():
            name = uuid4().hex
            posts = [Post(name, str(uuid4()), one.body) for one in generate(10, seed=0)[0]]
            await stack.post(stack.load(clients=1), [posts])

    async with _finished(asyncio.gather(*(post() for _ in range(BUSY)))):
        try:
            yield
        finally:
            finished.set()


@asynccontextmanager
async def _finished(posting: Awaitable[object]) -> AsyncIterator[asyncio.Future[object]]:
    """Wait at the end until *posting* is done, also when the block failed: later tests must know what was accepted."""
    task = asyncio.ensure_future(posting)
    try:
        yield task
    finally:
        await task


@asynccontextmanager
async def _done(fault: AbstractContextManager[None]) -> AsyncIterator[None]:
    await asyncio.to_thread(fault.__enter__)
    try:
        yield
    finally:
        await asyncio.to_thread(fault.__exit__, None, None, None)


async def _accepted(load: Load, count: float) -> None:
    await eventually(lambda: len(load.result.accepted) >= count, timeout=60)


def _offline(node: str) -> Alert:
    return Alert("FiqReplicaOffline", f'stream="fi-events",node="{node}"')


@contextmanager
def _slow_nodes(stack: Deployment) -> Iterator[None]:
    with ExitStack() as slowed:
        for node in NODES:
            slowed.enter_context(slow(stack, node))
        yield


@contextmanager
def _without_power(stack: Deployment) -> Iterator[None]:
    """Kill every container, and start Prometheus alone; the others at the end."""
    running = stack("ps", "-q").split()
    docker("kill", "-s", "KILL", *running)
    docker("start", stack.container("prometheus"))
    try:
        yield
    finally:
        docker("start", *running)

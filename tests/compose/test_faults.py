"""Every 202 is in HDF5 once and in order, whatever happens to containers and networks."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager

import pytest

from services.cli.rehearsal.consultations import Post
from services.cli.rehearsal.load import Load
from tests.support.compose.engine import docker
from tests.support.compose.faults import disconnected, killed, no_slow_network, paused, slow
from tests.support.compose.stack import NODES, Deployment
from tests.support.dialogues import consultations
from tests.support.polling import eventually

pytestmark = pytest.mark.timeout(300)

#: each test posts one of so many parts of all dialogues
SHARE = 14
#: the fault begins when this share of a test's events is accepted
BEGIN = 0.3
#: and ends after this time, seconds; longer than a client's ping takes to miss a node
LASTS = 6.0


@pytest.fixture(scope="module")
def dialogues() -> Iterator[list[list[Post]]]:
    """Parts of all dialogues: one for each test, no consultation in two of them."""
    every = consultations()
    return iter([every[index::SHARE] for index in range(SHARE)])


async def test_what_several_clients_post_is_in_hdf5(stack: Deployment, dialogues: Iterator[list[list[Post]]]) -> None:
    """From nothing: provisioned, posted over the balancer, stored over TLS, written by two persisters."""
    await stack.post(stack.load(), next(dialogues))
    await stack.is_verified()


async def test_kill_9_of_the_leader(stack: Deployment, dialogues: Iterator[list[list[Post]]]) -> None:
    """Another node leads after an election; the killed one catches up."""
    leader = await stack.leader()
    await _hurt(stack, next(dialogues), killed(stack, leader))


async def test_the_leader_is_cut_off_from_the_network(stack: Deployment, dialogues: Iterator[list[list[Post]]]) -> None:
    """It cannot acknowledge anything alone; the two others go on without it."""
    leader = await stack.leader()
    await _hurt(stack, next(dialogues), disconnected(stack, leader))


async def test_a_frozen_leader(stack: Deployment, dialogues: Iterator[list[list[Post]]]) -> None:
    """Its connections stay open and answer nothing: clients leave it by their own pings."""
    leader = await stack.leader()
    await _hurt(stack, next(dialogues), paused(stack, leader))


async def test_a_slow_and_lossy_network(stack: Deployment, dialogues: Iterator[list[list[Post]]]) -> None:
    """All nodes send slowly and lose packets: it takes longer, and nothing is lost."""
    reason = no_slow_network()
    if reason is not None:
        if os.environ.get("FIQ_REQUIRE_DOCKER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with slow(stack, NODES[0]), slow(stack, NODES[1]), slow(stack, NODES[2]):
        await stack.post(stack.load(), next(dialogues))
    await stack.is_whole()
    await stack.is_verified()


async def test_kill_9_of_every_persister(stack: Deployment, dialogues: Iterator[list[list[Post]]]) -> None:
    """Clients notice nothing; the events wait in the stream until a persister is there again."""
    await _hurt(stack, next(dialogues), killed(stack, "persister"))


async def test_kill_9_of_everything_at_once(stack: Deployment, dialogues: Iterator[list[list[Post]]]) -> None:
    """A power failure in the middle of the load: what was accepted was on the disks."""
    load, part = stack.load(), next(dialogues)
    posting = asyncio.create_task(stack.post(load, part))
    await _accepted(load, BEGIN * sum(map(len, part)))
    running = await asyncio.to_thread(lambda: stack("ps", "-q").split())
    await asyncio.to_thread(docker, "kill", "-s", "KILL", *running)
    await asyncio.to_thread(docker, "start", *running)
    await posting
    await stack.is_whole()
    await stack.is_verified()


async def _hurt(stack: Deployment, part: list[list[Post]], fault: AbstractContextManager[None]) -> None:
    """Do *fault* in the middle of a load, and compare HDF5 with what clients were told."""
    load = stack.load()
    posting = asyncio.create_task(stack.post(load, part))
    await _accepted(load, BEGIN * sum(map(len, part)))
    await asyncio.to_thread(fault.__enter__)
    try:
        await asyncio.wait({posting}, timeout=LASTS)
    finally:
        await asyncio.to_thread(fault.__exit__, None, None, None)
    await posting
    await stack.is_whole()
    await stack.is_verified()


async def _accepted(load: Load, count: float) -> None:
    await eventually(lambda: len(load.outcome.accepted) >= count, timeout=60)

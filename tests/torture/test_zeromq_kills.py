"""The log without a broker: persisters and ingest are killed under load, and what got a 202 is there once, in order."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from fiq.corpus import open_corpus, verify_corpus
from services.cli.demo import Load, compare_corpus
from services.cli.embedded.stack import LogKind, Service, Stack
from tests.support.dialogues import consultations
from tests.support.polling import eventually
from tests.support.torture import LONG, times

#: share of the events that clients send again after their 202
REPEATS = 0.05
#: seconds for which what was killed stays away
AWAY = 0.5


@pytest.mark.parametrize("killed", ["persisters", "ingest"])
@pytest.mark.timeout(1800 if LONG else 240)
async def test_what_was_accepted_is_there_once_and_in_order_whatever_is_killed(tmp_path: Path, killed: str) -> None:
    """Twenty kills with SIGKILL in `make torture`, a few otherwise; clients retry with their keys."""
    kills = times(2, 20)
    dialogues = consultations()
    if not LONG:
        dialogues = dialogues[:300]
    total = sum(len(posts) for posts in dialogues)
    stack = Stack(tmp_path / "stack", log=LogKind.ZMQ)
    await asyncio.to_thread(stack.start)
    try:
        load = Load(stack.ingest.url, clients=20, repeats=REPEATS)
        posting = asyncio.create_task(load.run(dialogues))
        for number in range(kills):
            services = stack.persisters if killed == "persisters" else [stack.ingest]
            load.allow((number + 2) * total / (kills + 2))  # so that each kill hits a load
            share = (number + 1) * total / (kills + 2)
            await eventually(lambda share=share: len(load.result.accepted) >= share, timeout=120)  # type: ignore[misc]
            await _kill(stack, services[number % len(services)])
        load.allow(total)
        outcome = await posting

        assert total == len(outcome.accepted)
        assert [] == compare_corpus(stack.data_dir, outcome.accepted.values()).summary()
        assert {posts[0].consultation: [post.key for post in posts] for posts in dialogues} == _order(stack.data_dir)
        assert verify_corpus(stack.data_dir).clean
        # shown by `make torture ARGS=-rP`
        print(  # noqa: T201
            f"{kills} kills of {killed}: {total} events, {outcome.retries} retries, "
            f"longest time without a 202 {outcome.longest_gap:.1f} s"
        )
    finally:
        await asyncio.to_thread(stack.stop)


async def _kill(stack: Stack, service: Service) -> None:
    await asyncio.to_thread(service.process.kill)
    await asyncio.sleep(AWAY)
    await asyncio.to_thread(stack.restart, service)
    for one in stack.services:
        await asyncio.to_thread(stack.wait_ready, one)


def _order(data_dir: Path) -> dict[str, list[str]]:
    with open_corpus(data_dir) as corpus:
        return {name: [str(event.event_id) for event in corpus[name]] for name in corpus}

"""The client and `fiq post` against real processes: whatever is killed, each event is in HDF5 once, in order."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from fiq.client import AsyncClient, Client, ClientError, EventBody, RefusedError, RetryPolicy
from services.cli.embedded.stack import Stack
from services.log.jetstream.stream import STREAM
from tests.support.corpus_contents import holds
from tests.support.polling import eventually

#: longer than an election and a restart take on a busy machine
RETRY = RetryPolicy(deadline=90)


def body(number: int, **members: str) -> bytes:
    return orjson.dumps({"event_type": "A", "n": number, **members})


async def test_a_key_that_is_posted_again_is_the_same_event(stack: Stack) -> None:
    """By another client, too."""
    async with AsyncClient(stack.ingest.url, retry=RETRY) as client:
        first = await client.post("again", body(1), "line-1")
    async with AsyncClient(stack.ingest.url, retry=RETRY) as client:
        second = await client.post("again", body(1), "line-1")
    assert (first.message_id, first.sequence, False, True) == (
        second.message_id,
        second.sequence,
        first.duplicate,
        second.duplicate,
    )
    await holds(stack.data_dir, "again", [body(1)])


async def test_what_is_no_event_is_refused_with_its_problem(stack: Stack) -> None:
    """As docs/problems.md has it."""
    async with AsyncClient(stack.ingest.url, retry=RETRY) as client:
        with pytest.raises(RefusedError, match="event_type is required") as caught:
            await client.post("bad", {"payload": "secret-payload"})
    assert ("/problems/invalid-event", 422, False) == (
        caught.value.type,
        caught.value.status,
        caught.value.may_be_stored,
    )
    assert "secret-payload" not in str(caught.value)


def test_a_long_batch_is_in_hdf5_once_after_a_failure_in_the_middle(stack: Stack) -> None:
    """A synchronous program that calls it again with the same key repeats nothing; the order is kept."""
    events = [body(number) for number in range(2500)]

    def breaking() -> Iterator[EventBody]:
        yield from events[:1700]
        yield {"event_type": "A", "n": float("nan")}

    with Client(stack.ingest.url, retry=RETRY) as client:
        with pytest.raises(ClientError, match="event 1701") as caught:
            client.post_batch("long", breaking(), "file-1")
        stored = client.post_batch("long", iter(events), "file-1")
        found = [event.sequence for event in client.read("long")]
    assert caught.value.may_be_stored
    assert [True] * 1000 + [False] * 1500 == [one.duplicate for one in stored]
    assert found == [one.sequence for one in stored]
    asyncio.run(holds(stack.data_dir, "long", events))


async def test_posts_outlive_the_death_of_ingest_and_of_the_leader(stack: Stack) -> None:
    """Programs that only call post() notice nothing but a pause."""
    accepted = 0

    async def consultation(client: AsyncClient, name: str) -> None:
        nonlocal accepted
        for number in range(40):
            await client.post(name, body(number))
            accepted += 1

    names = [f"killed-{number}" for number in range(6)]
    async with AsyncClient(stack.ingest.url, retry=RETRY) as client:
        posts = [asyncio.create_task(consultation(client, name)) for name in names]
        await eventually(lambda: accepted > 30)
        stack.ingest.process.kill()
        await asyncio.to_thread(stack.restart, stack.ingest)
        await eventually(lambda: accepted > 90)
        leader = await asyncio.to_thread(stack.cluster.wait_stream_leader, STREAM)
        stack.cluster.kill(leader)
        await asyncio.gather(*posts)
        assert client.retries > 0
    stack.cluster.start_node(leader)
    await asyncio.to_thread(stack.cluster.wait_ready)
    for name in names:
        await holds(stack.data_dir, name, [body(number) for number in range(40)])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
async def test_a_file_whose_posting_was_ended_is_in_hdf5_once(
    stack: Stack, tmp_path: Path, number: signal.Signals
) -> None:
    """By Ctrl-C or by SIGKILL, in the middle: the same command goes on."""
    names = [f"file-{number}-{index}" for index in range(3)]
    events = [body(index, consultation_id=names[index % 3]) for index in range(600)]
    file = tmp_path / "events.ndjson"
    file.write_bytes(b"\n".join(events))
    arguments = ["post", str(file), "--url", stack.ingest.url, "--patience", "90"]
    command = [sys.executable, "-m", "services.cli.main", *arguments]
    first = await asyncio.create_subprocess_exec(*command, "--batch", "1", "--concurrency", "1")
    await eventually(file.with_name("events.ndjson.posting").exists)
    first.send_signal(number)
    assert (130 if number is signal.SIGINT else -number) == await first.wait()

    again = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    out, _ = await again.communicate()

    assert (0, True) == (again.returncode, b"accepted" in out)
    assert not file.with_name("events.ndjson.posting").exists()
    for index, name in enumerate(names):
        await holds(stack.data_dir, name, events[index::3])

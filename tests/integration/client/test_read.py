"""Batches, reading and following against real processes."""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing
from pathlib import Path
from typing import Literal
from uuid import uuid4

import orjson
import pytest

from fiq.client import AsyncClient, Client, RefusedError, RetryPolicy
from services.cli.embedded.stack import Stack
from services.log.jetstream.stream import STREAM
from tests.support.corpus_contents import holds
from tests.support.polling import eventually

#: longer than an election and a restart take on a busy machine
RETRY = RetryPolicy(deadline=90)


def body(number: int, **members: str) -> bytes:
    return orjson.dumps({"event_type": "A", "n": number, **members})


async def test_a_batch_is_stored_once_in_parts_and_line_by_line_too(stack: Stack) -> None:
    """The key of a line is `<key>:<number>`, however it is sent; one that brings its own has that."""
    events = [body(1), body(2, event_id="mine"), body(3)]
    async with AsyncClient(stack.ingest.url, retry=RETRY) as client:
        first = await client.post_batch("batch", events, "file-1")
        again = await client.post_batch("batch", events, "file-1")
        part = await client.post_batch("batch", events[1:], "file-1", numbers=[2, 3])
        alone = [
            await client.post("batch", events[0], "file-1:1"),
            await client.post("batch", events[1], "mine"),
            await client.post("batch", events[2], "file-1:3"),
        ]
    assert [False] * 3 == [one.duplicate for one in first]
    assert [(one.message_id, one.sequence, True) for one in first] == [
        (one.message_id, one.sequence, one.duplicate) for one in again
    ]
    assert (again, again[1:]) == (alone, part)
    await holds(stack.data_dir, "batch", events)


async def test_a_batch_of_several_consultations_goes_where_each_line_says(stack: Stack) -> None:
    """The answer is in the order of the lines."""
    events = [body(number, consultation_id=f"several-{number % 2}") for number in range(6)]
    async with AsyncClient(stack.ingest.url, retry=RETRY) as client:
        stored = await client.post_batch(None, events)
    assert [f"several-{number % 2}" for number in range(6)] == [one.consultation for one in stored]
    for number in range(2):
        await holds(stack.data_dir, f"several-{number}", events[number::2])


async def test_bad_lines_and_keys_of_other_events_are_named_by_number(stack: Stack) -> None:
    """Bad lines: nothing is stored. A reused key: the other lines are stored."""
    async with AsyncClient(stack.ingest.url, retry=RETRY) as client:
        with pytest.raises(RefusedError) as bad:
            await client.post_batch("named", [body(1), b'{"no":"type"}', b"secret-payload"])
        await client.post_batch("named", [body(1)], "k")
        with pytest.raises(RefusedError) as reused:
            await client.post_batch("named", [body(7), body(2)], "k")
    assert bad.value.problem is not None
    assert reused.value.problem is not None
    assert ([2, 3], False) == ([line.number for line in bad.value.problem.lines], bad.value.may_be_stored)
    assert ([1], True) == ([line.number for line in reused.value.problem.lines], reused.value.may_be_stored)
    assert "secret-payload" not in f"{bad.value}{bad.value.problem!r}"
    await holds(stack.data_dir, "named", [body(1), body(2)])


async def test_what_was_accepted_is_read_at_once(stack: Stack) -> None:
    """All of it, in order, from any position, in pages of any size; each event by its id, too."""
    events = [body(number) for number in range(40)]
    async with AsyncClient(stack.ingest.url, retry=RETRY) as client:
        stored = await client.post_batch("read", events)
        found = [event async for event in client.read("read", page=7)]
        rest = [event async for event in client.read("read", found[24].sequence)]
        one = await client.event("read", stored[3].message_id)
        assert None is await client.event("read", uuid4())
        assert [] == [event async for event in client.read("nobody")]
    assert [orjson.loads(event) for event in events] == [event.event for event in found]
    assert [(one.message_id, one.sequence) for one in stored] == [(one.message_id, one.sequence) for one in found]
    assert [event.sequence for event in found[25:]] == [event.sequence for event in rest]
    assert one is not None
    assert (3, stored[3].sequence) == (one.event["n"], one.sequence)


async def test_integers_keep_all_digits(stack: Stack) -> None:
    """Beyond 64 bits, too, in a page, alone and followed: a rounded patient's number is another patient's."""
    number = 12345678901234567890123
    async with AsyncClient(stack.ingest.url, retry=RETRY) as client:
        stored = await client.post("digits", b'{"event_type":"NOTE","payload":{"n":%d,"dose":0.5}}' % number)
        one = await client.event("digits", stored.message_id)
        assert one is not None
        found = [one, *[event async for event in client.read("digits")]]
        async with aclosing(client.follow("digits")) as events:
            async for event in events:
                found.append(event)
                break
    assert [{"n": number, "dose": 0.5}] * 3 == [event.event["payload"] for event in found]


async def test_an_event_is_queued_and_then_persisted(stack: Stack) -> None:
    """Either way it is safe."""
    async with AsyncClient(stack.ingest.url, retry=RETRY) as client:
        stored = await client.post("queued", body(1))

        async def persisted() -> bool:
            found = await client.event("queued", stored.message_id)
            assert found is not None
            assert stored.sequence == found.sequence
            return found.persisted

        assert await eventually(persisted)


async def test_events_are_chosen_and_all_consultations_followed(stack: Stack) -> None:
    """By key, by type, by sequence; and the feed of the service that runs, from a position on."""
    async with AsyncClient(stack.ingest.url, retry=RETRY) as client:
        first = await client.post("chosen-1", {"event_type": "A"}, "first")
        posted = [await client.post(f"chosen-{n % 2}", {"event_type": "AB"[n % 2], "n": n}, f"k{n}") for n in range(6)]
        by_key = await client.event("chosen-1", key="k3")
        assert by_key is not None
        assert (posted[3].message_id, 3) == (by_key.message_id, by_key.event["n"])
        assert None is await client.event("chosen-1", key="k2")
        read = [event.event["n"] async for event in client.read("chosen-1", first.sequence, type="B")]
        assert [1, 3, 5] == read
        bounded = [event.event["n"] async for event in client.read("chosen-0", before=posted[4].sequence)]
        assert [0, 2] == bounded
        found = []
        async with aclosing(client.follow_all(posted[0].sequence, type="B")) as events:
            async for event in events:
                found.append((event.consultation, event.sequence))
                if len(found) == 3:
                    break
    assert [("chosen-1", posted[n].sequence) for n in (1, 3, 5)] == found


async def test_following_skips_and_repeats_nothing_whatever_dies(stack: Stack) -> None:
    """Ingest and the stream's leader are killed while events come."""
    seen: list[int] = []

    async def follow(client: AsyncClient) -> None:
        async with aclosing(client.follow("followed")) as events:
            async for event in events:
                seen.append(event.event["n"])  # noqa: PERF401 - it has no end

    async with AsyncClient(stack.ingest.url, retry=RETRY) as client:
        follower = asyncio.create_task(follow(client))
        for number in range(30):
            await client.post("followed", body(number))
            if number == 10:
                await eventually(lambda: len(seen) == 11)
                stack.ingest.process.kill()
                await asyncio.to_thread(stack.restart, stack.ingest)
            if number == 20:
                leader = await asyncio.to_thread(stack.cluster.wait_stream_leader, STREAM)
                stack.cluster.kill(leader)
        await eventually(lambda: len(seen) >= 30 or follower.done(), timeout=60)
        follower.cancel()
    stack.cluster.start_node(leader)
    await asyncio.to_thread(stack.cluster.wait_ready)
    assert list(range(30)) == seen


async def test_a_file_goes_in_batches_and_a_reused_key_is_named(stack: Stack, tmp_path: Path) -> None:
    """`fiq post` sends a hundred lines in few requests; another file under the same key is refused by line."""
    events = [body(number, consultation_id="posted") for number in range(100)]
    file = tmp_path / "events.ndjson"
    file.write_bytes(b"\n".join(events))

    async def post(*options: str) -> tuple[int | None, str]:
        command = [sys.executable, "-m", "services.cli.main", "post", str(file), "--url", stack.ingest.url, *options]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
        out, err = await process.communicate()
        return process.returncode, (out + err).decode()

    code, _ = await post("--key", "one", "--batch", "50")
    assert 0 == code
    log = stack.logs / f"{stack.ingest.name}.log"
    await eventually(lambda: log.read_bytes().count(b'"events":50') == 2)
    await holds(stack.data_dir, "posted", events)
    file.write_bytes(file.read_bytes().replace(b'"n":42', b'"n":43'))
    code, told = await post("--key", "one")
    assert (1, True) == (code, "line 43: " in told)
    assert "/problems/idempotency-key-reused" in told


async def test_consultations_are_listed_over_pages_in_both_orders(stack: Stack) -> None:
    """With their number of events and times; by activity the one with the newest event comes first."""
    names = [f"listed-{number:02d}" for number in range(7)]
    async with AsyncClient(stack.ingest.url, retry=RETRY) as client:
        await client.post_batch(None, [body(number, consultation_id=name) for number, name in enumerate(names)])
        last = await client.post("listed-03", body(9))

        async def listed(order: Literal["name", "activity"]) -> list[tuple[str, int]]:
            found = [one async for one in client.consultations("listed-", order=order, page=3)]
            assert all(one.first_received <= one.last_received for one in found)
            return [(one.consultation, one.events) for one in found]

        async def persisted() -> bool:
            return ("listed-03", 2) in await listed("name")

        await eventually(persisted)
        assert [(name, 1 + (name == "listed-03")) for name in names] == await listed("name")
        by_activity = await listed("activity")
        assert (("listed-03", 2), set(names)) == (by_activity[0], {name for name, _ in by_activity})
        event = await client.event("listed-03", last.message_id)
        found = [one async for one in client.consultations("listed-", after="listed-02")]
        assert event is not None
        assert names[3:] == [one.consultation for one in found]
        assert event.received == found[0].last_received


async def test_an_operator_sees_the_pipeline_and_its_dead_letters(stack: Stack) -> None:
    """Both clients; that there is no such letter is a refusal."""
    async with AsyncClient(stack.ingest.url, retry=RETRY) as client:
        shown = await client.pipeline()
        assert {"nats"} == {shown["log"]}
        assert [] == [letter async for letter in client.dead_letters()]
        for refused in (client.dead_letter(1), client.requeue(1), client.drop(1, "a test")):
            with pytest.raises(RefusedError) as caught:
                await refused
            assert "/problems/unknown-dead-letter" == caught.value.type
    await asyncio.to_thread(_seen_by_the_other_client, stack.ingest.url)


def _seen_by_the_other_client(url: str) -> None:
    with Client(url, retry=RETRY) as client:
        assert client.pipeline()["partitions"]
        assert [] == list(client.dead_letters())
        with pytest.raises(RefusedError, match="unknown-dead-letter"):
            client.dead_letter(1)
        with pytest.raises(RefusedError, match="unknown-dead-letter"):
            client.requeue(1)
        with pytest.raises(RefusedError, match="unknown-dead-letter"):
            client.drop(1, "a test")

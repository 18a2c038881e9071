"""What clients may rely on, whichever log it is: the same tests over JetStream and over ZeroMQ, with real processes."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientConnectorError, ClientSession
from cloudevents.core.bindings.http import to_binary_event
from cloudevents.core.v1.event import CloudEvent

from fiq.corpus import open_corpus
from services.cli.embedded.processes import Cluster
from services.ingest.records import rfc3339
from tests.support.cluster import delete_streams, heal
from tests.support.pipelines import SMALL, Pipeline
from tests.support.polling import eventually
from tests.support.racing import race

PATH = "/consultations/c-1/events"
LINES = "application/x-ndjson"
BODIES = (b'{"event_type":"A","payload":"one"}', b'{"event_type":"A","payload":"two"}')
REUSED = "/problems/idempotency-key-reused"


@pytest.fixture(params=["jetstream", "zeromq"])
async def pipeline(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Pipeline]:
    """A pipeline on each of the logs; nothing runs yet, and nothing is stored."""
    if request.param == "jetstream":
        cluster: Cluster = request.getfixturevalue("cluster")
        await heal(cluster)
        await delete_streams(cluster)
        yield Pipeline(tmp_path, SMALL | {"FI_LOG_URL": cluster.url})
    else:
        with tempfile.TemporaryDirectory(prefix="fiq") as folder:  # paths of sockets are short
            yield Pipeline(tmp_path, SMALL | {"FI_LOG_URL": f"zmq+ipc://{folder}/s"})


def lines(count: int, payload: str = "x") -> bytes:
    return b"\n".join(b'{"event_type":"A","n":%d,"payload":"%b"}' % (n, payload.encode()) for n in range(count))


async def test_200_clients_that_race_one_key_with_two_bodies_store_one_event(pipeline: Pipeline) -> None:
    """At one moment, through two processes: those with the first body get 202, the others 422."""
    async with pipeline.running(ingests=2) as both:
        for number, key in enumerate(("a", "b", "c"), start=1):
            answers = await race([one.edge for one in both], PATH, key, [BODIES[n // 2 % 2] for n in range(200)])

            stored = dict(await pipeline.holds("c-1", number))
            (sequence,) = {answer["sequence"] for status, answer in answers if status == 202}
            first = BODIES.index(stored[sequence])
            of_body = [Counter(status for status, _ in answers[n::4] + answers[n + 1 :: 4]) for n in (0, 2)]
            assert of_body == [Counter({202 if n == first else 422: 100}) for n in (0, 1)]
            assert {answer["type"] for status, answer in answers if status == 422} == {REUSED}
            assert sum(not answer.get("duplicate", False) for status, answer in answers if status == 202) <= 1


async def test_the_same_batch_with_two_contents_is_stored_once(pipeline: Pipeline) -> None:
    """Each line is one of the two, and each answer says which of its own lines are not."""
    contents = (lines(50, "one"), lines(50, "two"))
    async with pipeline.running(ingests=2) as both:
        posts = [both[n % 2].post(f"{PATH}/batch", contents[n // 2 % 2], "k", LINES) for n in range(20)]
        answers = await asyncio.gather(*posts)

        assert {status for status, _ in answers} <= {202, 422}
        stored = dict(await pipeline.holds("c-1", 50))
        for number, (_, answer) in enumerate(answers):
            own = contents[number // 2 % 2].splitlines()
            for line, result in zip(own, answer["results"], strict=True):
                held = stored.get(result.get("sequence", 0))
                assert (held == line) == ("problem" not in result)


async def test_a_batch_is_stored_byte_for_byte_in_its_order(pipeline: Pipeline) -> None:
    """As NDJSON and as an array; the largest one, too."""
    async with pipeline.running() as (client,):
        texts = [b'{"event_type":"A","n":1.10}', b'{ "event_type" : "\\u0041", "s":"[,]" }']
        _, first = await client.post(f"{PATH}/batch", b"[" + b" ,".join(texts) + b"]")
        assert list(zip([one["sequence"] for one in first["results"]], texts, strict=True)) == (
            await pipeline.holds("c-1", 2)
        )

        many = [b'{"consultation_id":"m-%d","event_type":"A","n":%d}' % (n % 20, n) for n in range(1000)]
        status, large = await client.post("/events/batch", b"\n".join(many), kind=LINES)
        assert status == 202
        answered = [one["sequence"] for one in large["results"]]
        for number in range(20):
            expected = list(zip(answered[number::20], many[number::20], strict=True))
            assert expected == await pipeline.holds(f"m-{number}", 50)


async def test_a_key_is_known_after_all_processes_were_restarted(pipeline: Pipeline) -> None:
    """A retry gets the first answer, marked; another body is refused, alone or in a batch. Nothing is stored twice."""
    async with pipeline.running() as (client,):
        single = await client.accepted(PATH, BODIES[0], "k")
        batch = await client.accepted(f"{PATH}/batch", lines(3), "b", LINES)
        await pipeline.holds("c-1", 4)
    async with pipeline.running(FI_KEY_LOOKUP_WAIT="10") as (client,):
        assert await client.post(PATH, BODIES[0], "k") == (202, single | {"duplicate": True})
        marked = [result | {"duplicate": True} for result in batch["results"]]
        assert (await client.post(f"{PATH}/batch", lines(3), "b", LINES))[1]["results"] == marked
        status, problem = await client.post(PATH, BODIES[1], "k")
        assert (status, problem["type"]) == (422, REUSED)
        changed = lines(3).replace(b'"n":1', b'"n":9')
        status, problem = await client.post(f"{PATH}/batch", changed, "b", LINES)
        assert (status, [wrong["line"] for wrong in problem["lines"]]) == (422, [2])
        await client.accepted(PATH, BODIES[0], "another")
        await pipeline.holds("c-1", 5)


async def test_a_batch_that_is_known_in_part_is_completed(pipeline: Pipeline) -> None:
    """Its known events keep their sequences; the others are stored after what came between."""
    keyed = [b'{"event_type":"A","event_id":"e-%d"}' % n for n in range(6)]
    async with pipeline.running() as (client,):
        first = await client.accepted(f"{PATH}/batch", b"\n".join(keyed[:3]), "", LINES)
        await client.accepted(PATH, BODIES[0], "between")
        whole = await client.accepted(f"{PATH}/batch", b"\n".join(keyed), "", LINES)

        assert [one["sequence"] for one in first["results"]] == [one["sequence"] for one in whole["results"][:3]]
        assert [True] * 3 + [False] * 3 == [one.get("duplicate", False) for one in whole["results"]]
        assert [*keyed[:3], BODIES[0], *keyed[3:]] == [body for _, body in await pipeline.holds("c-1", 7)]


async def test_a_cloudevent_of_the_official_client_is_stored(pipeline: Pipeline) -> None:
    """And its retry is known."""
    attributes = {"id": "1", "source": "/ward/3", "type": "MESSAGE_RECEIVED", "subject": "c-1"}
    message = to_binary_event(CloudEvent(attributes | {"datacontenttype": "application/json"}, {"text": "hello"}))
    async with pipeline.running() as (client,):
        status, first = await client.post_headers("/events", message.body, message.headers)
        assert (status, first["consultation_id"]) == (202, "c-1")
        assert await client.post_headers("/events", message.body, message.headers) == (202, first | {"duplicate": True})
        ((sequence, body),) = await pipeline.holds("c-1", 1)
        assert (first["sequence"], {"text": "hello"}) == (sequence, json.loads(body)["payload"])


async def test_what_was_accepted_is_read_at_once(pipeline: Pipeline) -> None:
    """In order and without a gap, page by page, while it is being persisted; one event by its id; the consultations."""
    async with pipeline.running(ingests=2) as (writer, reader):
        accepted = []
        for number in range(30):
            accepted.append(await writer.accepted(PATH, b'{"event_type":"A","n":%d}' % number, f"k{number}"))
            _, page = await reader.get(f"{PATH}?limit=1000")
            assert [one["sequence"] for one in accepted] == [event["sequence"] for event in page["events"]]
        found: list[int] = []
        url = f"{PATH}?limit=7"
        while url:
            _, page = await reader.get(url)
            found += [event["event"]["n"] for event in page["events"]]
            url = page["next"] or ""
        assert list(range(30)) == found
        found, url = [], f"{PATH}?limit=7&before={2**63 - 1}"
        while url:
            _, page = await reader.get(url)
            found = [event["event"]["n"] for event in page["events"]] + found
            url = page["previous"] or ""
        assert list(range(30)) == found
        _, page = await reader.get(f"{PATH}?key=k3&bodies=0")
        assert [(accepted[3]["sequence"], "A")] == [(one["sequence"], one["event_type"]) for one in page["events"]]
        _, one = await reader.get(f"{PATH}/{accepted[3]['message_id']}")
        assert (accepted[3]["sequence"], {"event_type": "A", "n": 3}) == (one["sequence"], one["event"])
        status, problem = await reader.get(f"{PATH}/6f1b1d4e-0000-4000-8000-000000000000")
        assert (404, "/problems/unknown-event") == (status, problem["type"])
        await writer.accepted("/consultations/b-1/events", BODIES[0], "k")
        await pipeline.holds("b-1", 1)

        async def both() -> bool:
            found = (await reader.get("/consultations"))[1].get("consultations", [])
            return [("b-1", 1), ("c-1", 30)] == [(one["consultation_id"], one["events"]) for one in found]

        await eventually(both)


async def test_a_record_says_when_the_event_was_written_into_hdf5(pipeline: Pipeline) -> None:
    """As HDF5 has it: after the post, and before the answer that shows it; null while the event waits."""
    async with pipeline.running(ingests=2) as (writer, reader):
        before = rfc3339(time.time_ns())
        accepted = await writer.accepted(PATH, BODIES[0], "k")
        answered = rfc3339(time.time_ns())

        async def written() -> str:
            _, one = await reader.get(f"{PATH}/{accepted['message_id']}")
            assert (one["status"] == "persisted") == (one["written"] is not None)
            return one["written"] or ""

        shown = await eventually(written)
        without_broker = pipeline.settings["FI_LOG_URL"].startswith("zmq")
        assert before < shown < (answered if without_broker else rfc3339(time.time_ns()))
        _, page = await reader.get(PATH)
        assert [shown] == [one["written"] for one in page["events"]]
        await pipeline.holds("c-1", 1)
        with open_corpus(pipeline.data) as corpus:
            assert [shown] == [rfc3339(event.written_ns) for event in corpus["c-1"]]


async def test_a_follower_misses_and_repeats_nothing_when_processes_die(pipeline: Pipeline) -> None:
    """The owner of the partition, and then the very process that it follows through."""
    posted: list[int] = []
    seen: list[int] = []
    async with pipeline.ready_persister() as first, pipeline.ready_persister():
        async with pipeline.ingest() as (client, service):

            async def post_some(name: str) -> None:
                for number in range(40):
                    answer = await client.accepted(PATH, b'{"event_type":"T"}', f"{name}-{number}")
                    posted.append(answer["sequence"])

            following = asyncio.create_task(client.follow("c-1", seen))
            await post_some("before")
            await eventually(lambda: posted == seen)

            first.process.kill()
            await post_some("owner")
            await eventually(lambda: posted == seen)
            assert not following.done()

            service.terminate()
            assert 0 == await asyncio.to_thread(service.wait)
            following.cancel()
            assert not [cut for cut in client.cuts if not isinstance(cut, ClientConnectorError)]
        async with pipeline.ingest() as (client, _):
            following = asyncio.create_task(client.follow("c-1", seen))
            await post_some("ingest")
            await eventually(lambda: posted == seen)
            following.cancel()
            _, page = await client.get(f"{PATH}?limit=1000")
            assert posted == [event["sequence"] for event in page["events"]]
    assert not [line for line in service.lines if line["event"] in ("REQUEST_FAILED", "FOLLOWING_FAILED")]


async def test_all_consultations_are_followed_where_the_log_has_one_order(pipeline: Pipeline) -> None:
    """Across processes, from a position on; the log without a broker says that it has none."""
    async with pipeline.running(ingests=2) as (writer, reader):
        posted = [await writer.accepted(f"/consultations/c-{n % 3}/events", BODIES[0], f"k{n}") for n in range(9)]
        async with reader.get_stream(f"/events?follow=1&after={posted[3]['sequence']}") as response:
            if pipeline.settings["FI_LOG_URL"].startswith("zmq"):
                assert (501, "/problems/no-feed") == (response.status, (await response.json())["type"])
                return
            posted.append(await writer.accepted("/consultations/other/events", BODIES[0], "k"))
            found: list[dict[str, Any]] = []
            async with asyncio.timeout(30):
                while len(found) < 6:
                    line = await response.content.readline()
                    if line.startswith(b"data: "):
                        found.append(json.loads(line[6:]))
        of_posted = [(one["consultation_id"], one["sequence"]) for one in posted[4:]]
        assert of_posted == [(one["consultation_id"], one["sequence"]) for one in found]


async def test_a_stop_ends_followers_at_once(pipeline: Pipeline) -> None:
    """They are no requests that are waited for."""
    async with pipeline.ready_persister(), pipeline.ingest(FI_SHUTDOWN_GRACE="20") as (client, service):
        await client.accepted(PATH, BODIES[0], "k")
        async with ClientSession() as session, session.get(f"{client.url}{PATH}?follow=1") as response:
            await response.content.readuntil(b"data: ")
            started = time.monotonic()
            service.terminate()
            assert (await response.content.read()).endswith(b"\n\n")
            assert 0 == await asyncio.to_thread(service.wait)
            assert time.monotonic() - started < 10


async def test_nothing_is_lost_or_doubled_when_all_persisters_are_killed_during_batches(pipeline: Pipeline) -> None:
    """Clients retry with their keys until each batch is accepted."""
    async with pipeline.ready_persister() as first, pipeline.ingest(FI_PUBLISH_DEADLINE="2") as (client, _):
        await client.accepted(f"{PATH}/batch", lines(30), "first", LINES)
        posts = [asyncio.create_task(client.accepted(f"{PATH}/batch", lines(30), f"k{n}", LINES)) for n in range(20)]
        await asyncio.sleep(0.05)
        first.process.kill()
        async with pipeline.ready_persister():
            answers = await asyncio.gather(*posts)
            stored = await pipeline.holds("c-1", 21 * 30)
    told = {result["sequence"] for answer in answers for result in answer["results"]}
    assert told <= {sequence for sequence, _ in stored}
    assert sorted(sequence for sequence, _ in stored) == [sequence for sequence, _ in stored]

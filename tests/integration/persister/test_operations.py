"""What an operator sees and does over HTTP, on a real pipeline: its state, and what became of bad messages."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import h5py
import orjson
import pytest
from typer.testing import CliRunner

from fiq.event import Event, new_event_id
from services.cli.embedded.processes import Cluster
from services.cli.main import app
from services.core.tokens import Scope, Token, digest_of, render
from services.log.dead_letters import message_headers
from services.log.jetstream.connection import Connection, close, connect
from services.log.partitions import partition_name, partition_of
from services.log.settings import LogSettings
from tests.support.cluster import delete_streams, heal
from tests.support.persisters import PARTITIONS
from tests.support.pipelines import SMALL, Client, Pipeline
from tests.support.polling import eventually
from tests.support.service import Service

BODY = b'{"event_type":"A","payload":"private"}'
#: a killed node must be shown within this time, seconds
SHOWN = 5.0


@pytest.fixture
async def nats_pipeline(cluster: Cluster, tmp_path: Path) -> Pipeline:
    """A pipeline on three nodes; nothing runs yet, and nothing is stored."""
    await heal(cluster)
    await delete_streams(cluster)
    return Pipeline(tmp_path, SMALL | {"FI_LOG_URL": cluster.url})


@pytest.fixture
def zmq_pipeline(tmp_path: Path) -> Iterator[Pipeline]:
    with tempfile.TemporaryDirectory(prefix="fiq") as folder:  # paths of sockets are short
        yield Pipeline(tmp_path, SMALL | {"FI_LOG_URL": f"zmq+ipc://{folder}/s"})


async def pipeline_of(client: Client) -> dict[str, Any]:
    status, document = await client.get("/pipeline")
    assert 200 == status
    return document


async def healthy(client: Client, events: int) -> dict[str, Any]:
    """Wait until *events* are persisted and nothing is wrong."""

    async def look() -> dict[str, Any]:
        shown = await pipeline_of(client)
        assert [] == shown["conditions"]
        assert {"accepted": events, "persisted": events} == {
            key: value for key, value in shown["totals"].items() if key != "monotonic_seconds"
        }
        return shown

    return await eventually(look)


def check_partitions(shown: dict[str, Any]) -> None:
    """Each has an owner and nothing that waits; the volume has all of them, and a process with its version."""
    (volume,) = shown["volumes"]
    names = [f"{number:02d}" for number in range(PARTITIONS)]
    assert names == volume["partitions"]
    (process,) = volume["processes"]
    assert [process["version"]] == shown["versions"]["persisters"]
    assert process["version"] == shown["versions"]["fiq"]
    for name, one in zip(names, shown["partitions"], strict=True):
        assert ("main", name, 0, False, None) == tuple(
            one[key] for key in ("store", "partition", "lag", "stalled", "oldest_seconds")
        )
        assert ([process["worker"]], volume["volume"]) == (one["owners"], one["volume"])


async def test_the_state_of_the_pipeline_is_one_document(nats_pipeline: Pipeline, cluster: Cluster) -> None:
    """Nodes, partitions, volumes, totals; a second of load later the totals have risen."""
    async with nats_pipeline.ready_persister(), nats_pipeline.ingest() as (client, _):
        for number in range(10):
            await client.accepted(f"/consultations/c-{number}/events", BODY, "k")
        shown = await healthy(client, 10)
        check_partitions(shown)
        assert ("nats", 0, 0, 10) == (
            shown["log"],
            shown["dead_letters"],
            shown["conflicts"],
            shown["stream"]["last_sequence"],
        )
        assert cluster.names == [node["name"] for node in shown["nodes"]]
        assert [True] * 3 == [node["up"] and node["current"] for node in shown["nodes"]]
        assert [shown["stream"]["leader"]] == [node["name"] for node in shown["nodes"] if node["leader"]]
        assert shown["stream"]["quorum"]
        assert shown["seen_seconds"] < 5
        await client.accepted("/consultations/c-1/events", BODY, "k2")
        later = await healthy(client, 11)
        assert later["totals"]["monotonic_seconds"] > shown["totals"]["monotonic_seconds"]


@pytest.mark.parametrize("leads", [False, True])
async def test_a_killed_node_is_shown_within_five_seconds(
    nats_pipeline: Pipeline, cluster: Cluster, leads: bool
) -> None:
    """Whether it leads the stream, so that nobody answers for a while, or not; and when it is back."""
    async with nats_pipeline.ready_persister(), nats_pipeline.ingest() as (client, _):
        await client.accepted("/consultations/c-1/events", BODY, "k")
        leader = (await healthy(client, 1))["stream"]["leader"]
        name = next(node for node in cluster.names if (node == leader) is leads)
        cluster.kill(cluster.names.index(name))
        began = time.monotonic()
        try:

            async def down() -> bool:
                nodes = {node["name"]: node for node in (await pipeline_of(client))["nodes"]}
                return not nodes[name]["up"]

            await eventually(down)
            took = time.monotonic() - began
            assert took < SHOWN, took

            async def told() -> bool:
                found = [one for one in (await pipeline_of(client))["conditions"] if one["severity"] == "error"]
                return any(f"the copy on {name} is offline" == one["what"] and one["action"] for one in found)

            await eventually(told)
        finally:
            await heal(cluster)
        await healthy(client, 1)


async def test_a_stopped_persister_is_a_condition_with_what_to_do(nats_pipeline: Pipeline) -> None:
    """And what waits is counted."""
    async with nats_pipeline.ingest() as (client, _):
        async with nats_pipeline.ready_persister() as persister:
            await client.accepted("/consultations/c-1/events", BODY, "k")
            await healthy(client, 1)
            persister.terminate()
            assert 0 == await asyncio.to_thread(persister.wait)
        await client.accepted("/consultations/c-1/events", BODY, "k2")

        async def told() -> bool:
            shown = await pipeline_of(client)
            assert ["no persister answers"] == [one["what"] for one in shown["conditions"]]
            assert 1 == shown["backlog"]["events"]
            (one,) = [one for one in shown["partitions"] if one["lag"]]
            assert (1, True, []) == (one["lag"], one["stalled"], one["owners"])
            assert one["oldest_seconds"] is not None
            return True

        await eventually(told)


async def test_without_a_broker_the_document_has_what_there_is(zmq_pipeline: Pipeline) -> None:
    """No nodes, no stream, no dead letters; partitions and volumes as with a broker."""
    async with zmq_pipeline.ready_persister(), zmq_pipeline.ingest() as (client, _):
        for number in range(10):
            await client.accepted(f"/consultations/c-{number}/events", BODY, "k")
        shown = await healthy(client, 10)
        check_partitions(shown)
        assert ("zmq", [], None, None) == (shown["log"], shown["nodes"], shown["stream"], shown["dead_letters"])
        assert shown["versions"]["nats_server"] is None


# -- dead letters, conflicts, verification ----------------------------------------------------------------------------

#: the broker forgets ids after this, so that a requeue need not wait for ten minutes, seconds
WINDOW = 3.0
SHORT = {"FI_DUPLICATE_WINDOW": f"{WINDOW:g}s"}


@asynccontextmanager
async def connected(cluster: Cluster) -> AsyncIterator[Connection]:
    settings = LogSettings(servers=tuple(cluster.urls))
    nc = await connect(settings, name="test", on_closed=lambda _: None)
    try:
        yield nc
    finally:
        await close(nc)


#: of an event that is set aside; too long for a narrow column
REASON = "not written, because the release of this persister did not know the type of the event"


async def publish(nc: Connection, event: Event) -> int:
    """Store the message of *event*, which ingest would not have written; return its sequence."""
    reply = await nc.request(f"fi.events.{event.consultation}", event.body, headers=event.headers(), timeout=10)
    return int(orjson.loads(reply.data)["seq"])


async def set_aside(nc: Connection, event: Event, sequence: int) -> None:
    """Set *event* aside as a persister does that cannot write the message at *sequence*."""
    partition = partition_of(event.consultation, PARTITIONS)
    headers = message_headers(f"test/{new_event_id()}", sequence, event.consultation, event.headers(), REASON)
    await nc.request(f"fi.dead.{partition}", event.body, headers=headers, timeout=10)


async def letters_of(client: Client, count: int) -> list[dict[str, Any]]:
    """Wait until there are *count* dead letters, and return them."""

    async def listed() -> bool:
        status, page = await client.get("/dead-letters")
        assert 200 == status
        found[:] = page["dead_letters"]
        return count == len(found)

    found: list[dict[str, Any]] = []
    await eventually(listed)
    return found


def audited(ingest: Service) -> list[dict[str, Any]]:
    """Return the lines of the audit log."""
    return [line for line in ingest.lines if line.get("component") == "audit"]


async def act(client: Client, sequence: int, action: str, reason: str = "") -> tuple[int, dict[str, Any]]:
    return await client.post(f"/dead-letters/{sequence}/{action}", orjson.dumps({"reason": reason}))


async def test_a_bad_message_is_listed_shown_and_dropped(nats_pipeline: Pipeline, cluster: Cluster) -> None:
    """It cannot go back; what became of it is in the audit log, without what it says."""
    bad = Event("c-1", new_event_id(), 1, b"private garbage")
    async with nats_pipeline.ready_persister(), nats_pipeline.ingest() as (client, ingest), connected(cluster) as nc:
        at = await publish(nc, bad)
        (listed,) = await letters_of(client, 1)
        assert ("message", at, "c-1", str(bad.event_id), len(bad.body)) == tuple(
            listed[key] for key in ("kind", "stream_sequence", "consultation_id", "message_id", "bytes")
        )
        sequence = listed["sequence"]
        status, shown = await client.get(f"/dead-letters/{sequence}")
        assert (200, "private garbage") == (status, shown["body"])
        status, refused = await act(client, sequence, "requeue")
        assert (422, "/problems/not-requeueable") == (status, refused["type"])
        assert (200, "dropped") == ((done := await act(client, sequence, "drop", "a test"))[0], done[1]["status"])
        assert [] == await letters_of(client, 0)
        assert 404 == (await act(client, sequence, "drop", "a test"))[0]
        await eventually(lambda: len(audited(ingest)) == 2)
        shown, dropped = audited(ingest)
        assert ("BODIES_SHOWN", 1, sequence) == (shown["event"], shown["events"], shown["dead_letter"])
        assert ("DEAD_LETTER_DROPPED", "a test") == (dropped["event"], dropped["reason"])
        assert "private" not in ingest.log_path.read_text()


async def test_a_requeued_event_is_in_hdf5_once_as_it_was(nats_pipeline: Pipeline, cluster: Cluster) -> None:
    """Not while the broker would drop it; then under the same id, however often; its copy, which a retry of the
    persister left, ends the same way, and a retry of the client is a duplicate."""
    key = new_event_id()
    event = Event("c-1", key, 1_700_000_000_123_456_789, BODY)
    async with (
        nats_pipeline.ready_persister(**SHORT),
        nats_pipeline.ingest(**SHORT) as (client, _),
        connected(cluster) as nc,
    ):
        at = await publish(nc, replace(event, body=b"not written yet"))
        (own,) = await letters_of(client, 1)
        assert 200 == (await act(client, own["sequence"], "drop", "in place of what the next lines set aside"))[0]
        for _ in range(2):
            await set_aside(nc, event, at)
        first, second = await letters_of(client, 2)
        assert first["obstacle"] is None
        status, answer = await act(client, first["sequence"], "requeue")
        assert (409, "/problems/requeue-too-early") == (status, answer["type"])
        assert 2 == len(await letters_of(client, 2))

        async def taken() -> dict[str, Any]:
            status, answer = await act(client, first["sequence"], "requeue", "a new release takes it")
            assert 200 == status, answer
            return answer

        answer = await eventually(taken)
        assert (str(key), True) == (answer["message_id"], answer["stream_sequence"] > at)
        assert [(answer["stream_sequence"], BODY)] == await nats_pipeline.holds("c-1", 1)
        assert 200 == (await act(client, second["sequence"], "requeue"))[0]
        await letters_of(client, 0)
        status, posted = await client.post("/consultations/c-1/events", BODY, str(key))
        assert (202, True, answer["stream_sequence"]) == (status, posted.get("duplicate"), posted["sequence"])
        await healthy_partitions(client)
        assert [(answer["stream_sequence"], BODY)] == nats_pipeline.stored("c-1")
        status, shown = await client.get(f"/consultations/c-1/events/{key}")
        assert (200, "2023-11-14T22:13:20.123456789Z") == (status, shown["received"])
        assert abs(datetime.fromisoformat(shown["stored"]).timestamp() - time.time()) < 60


async def healthy_partitions(client: Client) -> None:
    """Wait until nothing waits."""

    async def done() -> bool:
        return {0} == {one["lag"] for one in (await pipeline_of(client))["partitions"]}

    await eventually(done)


async def test_fiq_dead_lists_shows_requeues_and_drops(
    nats_pipeline: Pipeline, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a token of the scope ops, from a file or the environment; without one it says so."""
    tokens = {name: Token(name, digest_of(name), frozenset({scope})) for name, scope in SCOPES.items()}
    (tmp_path / "tokens").write_text(render(tokens))
    (tmp_path / "token").write_text("operator\n")
    good, bad = Event("c-1", new_event_id(), 1, BODY), Event("c-1", new_event_id(), 1, b"private \x1b[31m garbage")
    options = ["--token-file", str(tmp_path / "token")]

    async def fiq(*arguments: str, token: Sequence[str] = options) -> Any:
        command = ["dead", *arguments, "--url", client.url, *token]
        return await asyncio.to_thread(CliRunner().invoke, app, command)

    settings = {"FI_TOKEN_FILE": str(tmp_path / "tokens")}
    async with (
        nats_pipeline.ready_persister(),
        nats_pipeline.ingest(**settings) as (client, ingest),
        connected(cluster) as nc,
    ):
        assert "no dead letters\n" == (await fiq("list")).stdout
        await publish(nc, bad)
        await eventually(lambda: _listed(fiq, 1))
        await set_aside(nc, good, 0)
        first, second = await eventually(lambda: _listed(fiq, 2))
        table = (await fiq("list")).stdout
        assert ["no", "yes"] == [line.split()[5] for line in table.splitlines()[1:]]
        assert REASON in table
        assert "private" not in table
        shown = (await fiq("show", str(first["sequence"]))).stdout
        assert "reason: the body is not valid JSON" in shown
        assert "private \\u001b[31m garbage" in shown
        assert "private" in orjson.loads((await fiq("show", str(second["sequence"]), "--json")).stdout)["body"]
        done = await fiq("requeue", str(first["sequence"]), str(second["sequence"]), "--reason", "a mend")
        assert 1 == done.exit_code
        assert f"{second['sequence']} requeued: c-1/{good.event_id}, now sequence " in done.stdout
        assert f"fiq: {first['sequence']}: " in done.stderr
        assert "it would be set aside again" in done.stderr
        await nats_pipeline.holds("c-1", 1)
        assert 2 == (await fiq("drop", str(first["sequence"]))).exit_code
        (dropped,) = orjson.loads((await fiq("drop", str(first["sequence"]), "--reason", "a test", "--json")).stdout)
        assert {"status": "dropped", "sequence": first["sequence"]} == dropped
        done = await fiq("drop", "77", "--reason", "a test")
        assert (1, True) == (done.exit_code, "unknown-dead-letter" in done.stderr)
        monkeypatch.setenv("FI_TOKEN", "clinic")
        done = await fiq("list", token=())
        assert (1, True) == (done.exit_code, "/problems/forbidden" in done.stderr)
        await eventually(lambda: len(audited(ingest)) == 4)
        assert {"operator"} == {line["token"] for line in audited(ingest)}


#: name of a token, which is the token as well -> its scope
SCOPES = {"operator": Scope.OPS, "clinic": Scope.READ}


async def _listed(fiq: Callable[..., Awaitable[Any]], count: int) -> list[dict[str, Any]]:
    """Return the dead letters if there are *count*; else nothing."""
    found: list[dict[str, Any]] = orjson.loads((await fiq("list", "--json")).stdout)
    return found if len(found) == count else []


async def test_a_conflict_is_listed_and_its_body_comes_from_the_corpus(
    nats_pipeline: Pipeline, cluster: Cluster
) -> None:
    """Through the dead letter, and with the consultation; the pointer can be dropped, the event stays."""
    first = Event("c-1", new_event_id(), 1, BODY)
    second = replace(first, body=b'{"event_type":"A","payload":"another"}')
    async with (
        nats_pipeline.ready_persister(**SHORT),
        nats_pipeline.ingest(**SHORT) as (client, _),
        connected(cluster) as nc,
    ):
        kept = await publish(nc, first)

        async def forgotten() -> int:
            at = await publish(nc, second)
            return at if at != kept else 0

        at = await eventually(forgotten)
        (listed,) = await letters_of(client, 1)
        assert ("conflicts", 1) == (listed["kind"], listed["conflicts"])
        status, shown = await client.get(f"/dead-letters/{listed['sequence']}")
        (event,) = shown["events"]
        assert (200, at, kept, "another") == (
            status,
            event["sequence"],
            event["first_sequence"],
            event["event"]["payload"],
        )
        assert 200 == (await act(client, listed["sequence"], "drop", "posted again by the ward"))[0]
        status, page = await client.get("/consultations/c-1/conflicts")
        assert [(at, str(first.event_id), "another")] == [
            (one["sequence"], one["message_id"], one["event"]["payload"]) for one in page["conflicts"]
        ]
        await eventually(lambda: _conflicts(client, 1))


async def _conflicts(client: Client, count: int) -> bool:
    found: int = (await pipeline_of(client))["conflicts"]
    return count == found


async def test_a_consultation_is_verified_on_demand_and_the_last_fiq_verify_is_shown(
    nats_pipeline: Pipeline,
) -> None:
    """Intact; then somebody changes a byte of a body while the persister does not run."""
    async with nats_pipeline.ingest() as (client, _):
        async with nats_pipeline.ready_persister() as persister:
            lines = b"\n".join(b'{"event_type":"A","n":%d}' % number for number in range(1000))
            for part in range(3):
                await client.accepted("/consultations/c-1/events/batch", lines, f"k{part}", "application/x-ndjson")
            await nats_pipeline.holds("c-1", 3000)
            status, found = await client.get("/consultations/c-1/verification")
            assert (200, "intact", 3000, 3000) == (status, found["result"], found["events"], found["checked"])
            assert 64 == len(found["chain"])
            status, nothing = await client.get("/consultations/never/verification")
            assert (200, "intact", 0, None) == (status, nothing["result"], nothing["events"], nothing["chain"])
            done = await asyncio.to_thread(CliRunner().invoke, app, ["verify", str(nats_pipeline.data)])
            assert 0 == done.exit_code
            assert 3000 == (await verified(client, problems=0))["events"]
            persister.terminate()
            assert 0 == await asyncio.to_thread(persister.wait)
        path = nats_pipeline.data / f"{partition_name(partition_of('c-1', PARTITIONS))}.h5"
        with h5py.File(path, "r+") as file:
            row = file["consultations/c-1/events"][2345]
            file["consultations/c-1/payload"][int(row["offset"]) + 2] = ord("E")
        done = await asyncio.to_thread(CliRunner().invoke, app, ["verify", str(nats_pipeline.data)])
        assert 1 == done.exit_code
        async with nats_pipeline.ready_persister():
            status, found = await client.get("/consultations/c-1/verification")
            assert (200, "damaged", 1, int(row["seq"])) == (
                status,
                found["result"],
                found["problems"],
                found["first_damaged_sequence"],
            )
            assert ["chain"] == [one["kind"] for one in found["first_problems"]]
            await verified(client, problems=1)
            assert any(
                "fiq verify found 1 problem" in one["what"] and "error" == one["severity"]
                for one in (await pipeline_of(client))["conditions"]
            )


async def verified(client: Client, *, problems: int) -> dict[str, Any]:
    """Wait until the pipeline shows a verification with so many problems."""
    found: dict[str, Any] = {}

    async def shown() -> bool:
        for volume in (await pipeline_of(client))["volumes"]:  # none until its process has answered
            found.update(volume["verified"] or {})
        return found.get("problems") == problems

    await eventually(shown)
    return found


async def test_without_a_broker_there_are_no_dead_letters_and_no_conflicts(zmq_pipeline: Pipeline) -> None:
    """A client is told at once; verification is the same."""
    async with zmq_pipeline.ready_persister(), zmq_pipeline.ingest() as (client, _):
        await client.accepted("/consultations/c-1/events", BODY, "k")
        assert (200, {"dead_letters": [], "next": None}) == await client.get("/dead-letters")
        assert 404 == (await client.get("/dead-letters/1"))[0]
        assert 404 == (await act(client, 1, "drop", "a test"))[0]
        assert [] == (await client.get("/consultations/c-1/conflicts"))[1]["conflicts"]
        found = (await client.get("/consultations/c-1/verification"))[1]
        assert ("intact", 1, 1) == (found["result"], found["events"], found["checked"])

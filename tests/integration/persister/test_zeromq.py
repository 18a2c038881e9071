"""Processes on the log without a broker: what clients see when owners die, hang or are not allowed to be one."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import pytest

from fiq.event import Event
from services.cli import monitoring
from services.cli.embedded.processes import free_ports
from services.log.errors import LogRefusedError
from services.log.partitions import partition_of
from services.log.protocol import Appended
from services.log.zeromq.sockets import Address
from tests.support.persisters import PARTITIONS
from tests.support.pipelines import SMALL, Client, Pipeline, taking_events
from tests.support.polling import eventually
from tests.support.service import Service
from tests.support.zeromq import links_to

PATH = "/consultations/c-1/events"
BODY = b'{"event_type":"A"}'
UNAVAILABLE = "/problems/log-unavailable"


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A directory with a short path."""
    with TemporaryDirectory(prefix="fiq") as folder:
        yield Path(folder) / "s"


@pytest.fixture
def pipeline(tmp_path: Path, sockets: Path) -> Pipeline:
    return Pipeline(tmp_path, SMALL | {"FI_LOG_URL": f"zmq+ipc://{sockets}"})


async def refused(client: Client, key: str) -> float:
    """Post an event that no owner takes, and return the time until the answer, seconds."""
    began = time.monotonic()
    status, problem = await client.post(PATH, BODY, key)
    assert (503, UNAVAILABLE) == (status, problem["type"])
    return time.monotonic() - began


async def test_without_a_persister_clients_get_503_at_once_and_go_on_when_it_is_back(pipeline: Pipeline) -> None:
    """Before the first one comes, after it was killed, and after it has stopped in an orderly way."""
    async with pipeline.ingest() as (client, _):
        assert await refused(client, "k") < 0.5
        async with pipeline.ready_persister() as owner:
            await taking_events(client)
            assert 1 == (await client.accepted(PATH, BODY, "k"))["sequence"]
            owner.process.kill()
            await asyncio.to_thread(owner.process.wait)
            await eventually(lambda: refused(client, "k2"))
            assert await refused(client, "k2") < 0.5
        async with pipeline.ready_persister() as owner:
            assert 2 == (await client.accepted(PATH, BODY, "k2"))["sequence"]
            assert (await client.accepted(PATH, BODY, "k"))["duplicate"]
            owner.terminate()
            assert 0 == await asyncio.to_thread(owner.wait)
        assert await refused(client, "k3") < 0.5
    assert 2 == len(pipeline.stored("c-1"))


async def test_what_waits_for_its_commit_when_the_owner_dies_is_answered_by_the_next_one(pipeline: Pipeline) -> None:
    """Inside the deadline the client does not notice."""
    async with pipeline.ready_persister() as first, pipeline.ingest(FI_PUBLISH_DEADLINE="20") as (client, _):
        await client.accepted(PATH, BODY, "k0")
        first.process.send_signal(signal.SIGSTOP)
        posts = [asyncio.create_task(client.post(PATH, BODY, f"k{n}")) for n in range(1, 21)]
        await asyncio.sleep(0.5)
        assert not any(post.done() for post in posts)
        first.process.kill()
        async with pipeline.ready_persister():
            assert {202} == {status for status, _ in await asyncio.gather(*posts)}
            assert 21 == len(await pipeline.holds("c-1", 21))


async def test_a_frozen_owner_is_not_waited_for(pipeline: Pipeline) -> None:
    """It says nothing for 1.5 s: from then on clients get 503 at once, and go on when it does."""
    async with pipeline.ready_persister() as owner, pipeline.ingest(FI_PUBLISH_DEADLINE="1") as (client, _):
        await client.accepted(PATH, BODY, "k0")
        owner.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(2)
        assert await refused(client, "k1") < 0.5
        owner.process.send_signal(signal.SIGCONT)
        await client.accepted(PATH, BODY, "k1")
        assert 2 == len(await pipeline.holds("c-1", 2))


async def test_one_of_two_persisters_dies_and_the_other_one_takes_its_partitions(pipeline: Pipeline) -> None:
    """The clients of the partitions that it had before do not notice."""
    names = {partition_of(name, PARTITIONS): name for name in (f"v-{n}" for n in range(64))}
    async with pipeline.ready_persister(), pipeline.ready_persister() as second, pipeline.ingest() as (client, _):
        paths = [f"/consultations/{name}/events" for name in names.values()]
        for path in paths:
            await client.accepted(path, BODY, "before")
        second.process.kill()
        began = time.monotonic()
        await asyncio.gather(*(client.accepted(path, BODY, "after") for path in paths))
        assert time.monotonic() - began < 10
    for name in names.values():
        assert 2 == len(pipeline.stored(name))


async def test_an_event_larger_than_the_credit_is_accepted_alone(pipeline: Pipeline) -> None:
    """Otherwise it would be refused for ever; what overloads the owner gets 503, and nothing hangs."""
    async with pipeline.running(FI_BUFFER_BYTES="1MiB") as (client,):
        large = b'{"event_type":"A","payload":"%b"}' % (b"x" * 900_000)
        await client.accepted(PATH, large, "large")
        answers = await asyncio.gather(*(client.post(PATH, large, f"k{n}") for n in range(12)))
        assert {status for status, _ in answers} <= {202, 503}
        assert 202 in {status for status, _ in answers}
        for number in range(12):
            await client.accepted(PATH, large, f"k{number}")
        assert 13 == len(await pipeline.holds("c-1", 13))


async def test_what_cannot_be_stored_is_refused_and_the_partition_goes_on(pipeline: Pipeline, sockets: Path) -> None:
    """Ingest lets no such event through; one that comes from elsewhere is answered, not set aside."""
    address = Address(f"zmq+ipc://{sockets}", "main")
    good = Event("c-1", uuid4(), 1, BODY)
    partition = partition_of("c-1", PARTITIONS)
    async with pipeline.ready_persister() as owner, links_to(address, partitions=PARTITIONS) as links:
        link = links[partition]
        await eventually(lambda: link.up)
        events = [Event("no id!", uuid4(), 1, BODY), good, Event("c-1", uuid4(), 1, b"{")]
        sent = [link.append(one, time.monotonic() + 10) for one in events]
        answers = await asyncio.gather(*sent, return_exceptions=True)
        assert [LogRefusedError, Appended, LogRefusedError] == [type(answer) for answer in answers]
        await eventually(lambda: 2 == sum(line["event"] == "EVENT_SET_ASIDE" for line in owner.lines))
        assert [BODY] == [body for _, body in await pipeline.holds("c-1", 1)]


async def ends_with(service: Service, reason: str, *, code: int = 1) -> None:
    """The process ends by itself, and says why; 2 is for settings."""
    assert code == await asyncio.to_thread(service.wait)
    assert reason in service.errors


async def test_a_second_volume_or_several_are_refused(pipeline: Pipeline, tmp_path: Path) -> None:
    """Two volumes would share the events of one store."""
    async with pipeline.ready_persister():
        with pipeline.persister(FI_DATA_DIR=str(tmp_path / "other")) as other:
            await ends_with(other, "the sockets belong to volume")
        with pipeline.persister(FI_VOLUMES="2") as other:
            await ends_with(other, "FI_VOLUMES=2", code=2)


async def test_a_lost_partition_file_is_no_new_beginning(pipeline: Pipeline) -> None:
    """An empty file in its place would forget the ids that it held. The other partitions go on."""
    async with pipeline.running() as (client,):
        await client.accepted(PATH, BODY, "k")
    lost = partition_of("c-1", PARTITIONS)
    for path in pipeline.data.glob(f"{lost:02d}.h5*"):
        path.unlink()
    name = next(name for name in (f"v-{n}" for n in range(64)) if partition_of(name, PARTITIONS) != lost)
    with pipeline.persister() as owner:
        line = await asyncio.to_thread(owner.wait_for, "EVENT_PERSIST_FAILED")
        assert "its file" in line["reason"]
        async with pipeline.ingest() as (client, _):
            await client.accepted(f"/consultations/{name}/events", BODY, "k")
            assert await refused(client, "k") < 0.5


async def test_a_corpus_of_another_log_is_refused(pipeline: Pipeline, sockets: Path) -> None:
    """Its sequences are positions in a stream."""
    async with pipeline.running() as (client,):
        await client.accepted(PATH, BODY, "k")
    volume = json.loads((pipeline.data / "volume.json").read_text())
    (pipeline.data / "volume.json").write_text(json.dumps(volume | {"volume": "6f1b1d4e-0000-4000-8000-000000000000"}))
    (sockets / "main.volume").unlink()
    with pipeline.persister() as owner:
        line = await asyncio.to_thread(owner.wait_for, "EVENT_PERSIST_FAILED")
        assert line["stopped"]


async def test_over_tcp_with_the_keys_of_fiq_init(tmp_path: Path) -> None:
    """A client whose key was removed is refused; a persister without keys does not start."""
    command = [sys.executable, "-m", "services.cli.main", "init", str(tmp_path), "--curve", "one,two"]
    await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
    keys = tmp_path / "secrets" / "zmq"
    (keys / "clients" / "two.key").unlink()
    first = min(free_ports(8))
    settings = SMALL | {"FI_LOG_URL": f"zmq+tcp://127.0.0.1:{first}", "FI_ZMQ_SERVER_KEY": str(keys / "server.key")}
    pipeline = Pipeline(tmp_path, settings)
    owner = {"FI_ZMQ_KEY_FILE": str(keys / "server.key_secret"), "FI_ZMQ_CLIENT_KEYS": str(keys / "clients")}
    with pipeline.persister() as without:
        await ends_with(without, "FI_ZMQ_KEY_FILE is not set", code=2)
    async with (
        pipeline.ready_persister(**owner) as persister,
        pipeline.ingest(FI_ZMQ_KEY_FILE=str(keys / "one.key_secret")) as (one, _),
        pipeline.ingest(FI_ZMQ_KEY_FILE=str(keys / "two.key_secret")) as (two, _),
    ):
        await one.accepted(PATH, BODY, "k")
        await refused(two, "k2")
        await asyncio.to_thread(persister.wait_for, "KEY_REFUSED")
        status, body = await asyncio.to_thread(monitoring.get, two.edge.management_port, "/readyz")
        assert status == 503
        assert b"no persister answers" in body
    assert 1 == len(pipeline.stored("c-1"))

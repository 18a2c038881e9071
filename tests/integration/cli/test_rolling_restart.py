"""`fiq rolling-restart` under load: clients that retry once notice nothing."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID, uuid4

import aiohttp
import pytest

from fiq.corpus import open_corpus, verify_corpus
from services.cli.demo import wait_until_persisted
from services.cli.embedded.processes import LOOPBACK, Cluster, free_ports
from services.cli.embedded.rolling_restart import wait_ready
from services.cli.embedded.stack import StackFolder
from services.cli.errors import NotReadyError
from services.cli.monitoring import NodeView, StreamView, problems
from tests.support.polling import eventually
from tests.support.service import Service

FIQ = [sys.executable, "-m", "services.cli.main"]
#: clients at the same time, half of them at each ingest first
CLIENTS = 8


@contextmanager
def up(folder: Path) -> Iterator[StackFolder]:
    """Run `fiq up` in *folder* until it is ready; stopped at the end."""
    # the usual one could be taken by another test while ingest is restarted
    port = str(free_ports(1)[0])
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        process = subprocess.Popen([*FIQ, "up", "--port", port], cwd=folder, stdout=out, stderr=err)
    try:
        yield StackFolder(folder / ".fiq")
    finally:
        process.terminate()
        process.wait(60)


@dataclass
class Load:
    """Clients that post one event after another, and send each again once, to the other ingest, when it fails.

    Attributes:
        accepted: consultation -> event ids, in the order of their answers.
        repeated: how many failed the first time.
        failed: what the second try of an event met.
    """

    urls: list[str]
    accepted: dict[str, list[UUID]] = field(default_factory=dict)
    repeated: int = 0
    failed: list[str] = field(default_factory=list)
    stopped: bool = False

    async def client(self, number: int, session: aiohttp.ClientSession) -> None:
        while not self.stopped:
            consultation, key = f"client-{number}", uuid4()
            problem = await self._try(session, self.urls[number % 2], consultation, key)
            if problem:
                self.repeated += 1
                problem = await self._try(session, self.urls[1 - number % 2], consultation, key)
            if problem:
                self.failed.append(problem)
            else:
                self.accepted.setdefault(consultation, []).append(key)

    async def _try(self, session: aiohttp.ClientSession, url: str, consultation: str, key: UUID) -> str:
        """Post an event and return what went wrong; nothing when it was accepted."""
        try:
            async with session.post(
                f"{url}/consultations/{consultation}/events",
                json={"event_type": "MESSAGE_RECEIVED", "payload": {"text": str(key)}},
                headers={"Idempotency-Key": str(key)},
            ) as response:
                return "" if response.status == 202 else f"{response.status} {await response.text()}"
        except (aiohttp.ClientError, TimeoutError) as error:
            return repr(error)


@pytest.mark.timeout(300)
async def test_no_client_that_retries_once_sees_a_failure(tmp_path: Path) -> None:
    """Three nodes, two ingests, two persisters, each restarted in turn under load; nothing is lost or doubled."""
    with up(tmp_path) as home:

        def started() -> bool:
            assert "error" not in (tmp_path / "err").read_text()
            return home.path.exists() and (home.path / "state.json").exists()

        await eventually(started, timeout=90)
        state = home.read()
        port, management = map(str, free_ports(2))
        ports = {"FI_PORT": port, "FI_MANAGEMENT_PORT": management}
        settings = {"FI_LOG_URL": state.log_url, **ports, "FI_PROVISION": "0"}
        second, second_management = f"http://{LOOPBACK}:{port}", f"http://{LOOPBACK}:{management}"
        before = {member.name: member.pid for member in state.members}
        load = Load([state.ingest_url, second])
        with Service(tmp_path, "services.ingest", **settings) as other:
            await asyncio.to_thread(wait_ready, [], [second_management], 60)
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(30)) as session:
                clients = asyncio.gather(*(load.client(number, session) for number in range(CLIENTS)))
                await eventually(lambda: len(load.accepted) == CLIENTS)
                await _restarted(tmp_path)
                # the second ingest, as the command restarted the first one
                other.terminate()
                assert 0 == await asyncio.to_thread(other.wait)
                with Service(tmp_path, "services.ingest", **settings) as again:
                    await asyncio.to_thread(wait_ready, [], [second_management], 60)
                    load.stopped = True
                    await clients
                    again.terminate()
                    assert 0 == await asyncio.to_thread(again.wait)
        after = {member.name: member.pid for member in home.read().members}
        assert before.keys() == after.keys()
        assert not [name for name, pid in before.items() if after[name] == pid]
        assert [] == load.failed
        assert load.repeated, "the restarts of the ingests went unnoticed: was there any load?"
        assert await wait_until_persisted(home.corpus, sum(map(len, load.accepted.values())), timeout=60)
        with open_corpus(home.corpus) as corpus:
            assert load.accepted == {name: [event.event_id for event in events] for name, events in corpus.items()}
        assert verify_corpus(home.corpus).clean


async def _restarted(folder: Path) -> None:
    done = await asyncio.to_thread(
        subprocess.run, [*FIQ, "rolling-restart"], cwd=folder, capture_output=True, text=True, timeout=200, check=False
    )
    assert 0 == done.returncode, done.stderr
    order = ["n1", "n2", "n3", "persister-1", "persister-2", "ingest"]
    assert [f"restarting {name}" for name in order] == [
        line for line in done.stderr.splitlines() if line.startswith("restarting")
    ]


async def test_waiting_says_what_is_missing(cluster: Cluster) -> None:
    """A script must not go on to the next node, and its operator must know why."""
    nodes = [f"http://{LOOPBACK}:{ports.monitoring}" for ports in cluster.ports]
    command = [*FIQ, "wait", "--monitoring", ",".join(nodes)]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60, check=False)
    assert (0, "ready: 3 nodes, 0 services\n") == (done.returncode, done.stdout)
    cluster.kill(1)
    try:
        with pytest.raises(NotReadyError, match=f"{nodes[1]} is not healthy"):
            await asyncio.to_thread(wait_ready, nodes, [], 1.0)
    finally:
        cluster.start_node(1)
    await asyncio.to_thread(wait_ready, nodes, [], 60.0)
    with pytest.raises(NotReadyError, match="is not ready: no answer"):
        await asyncio.to_thread(wait_ready, nodes, [f"http://{LOOPBACK}:{free_ports(1)[0]}"], 1.0)


def node(name: str, **stream: StreamView) -> NodeView:
    return NodeView(name, healthy=True, leads_meta=name == "n1", meta_current=3, streams=stream)


@pytest.mark.parametrize(
    ("views", "expected"),
    [
        ([node("n1"), node("n2"), node("n3")], []),
        ([node("n1"), NodeView("n2"), node("n3")], ["n2 is not healthy"]),
        ([node("n2"), node("n3")], ["no meta leader sees all nodes"]),
        ([node("n1"), node("n2")], ["no meta leader sees all nodes"]),
        ([node("n1", s=StreamView("", True, 1, 1)), node("n2"), node("n3")], ["stream s has no leader"]),
        (
            [node("n1", s=StreamView("n1", False, 1, 1)), node("n2", s=StreamView("n1", True, 1, 1)), node("n3")],
            ["not every replica of stream s is current"],
        ),
        (
            [node("n1", s=StreamView("n2", False, 1, 1)), node("n2", s=StreamView("n2", True, 1, 1)), node("n3")],
            [],  # only the leader knows
        ),
    ],
)
def test_whole_means_that_any_node_may_go(views: list[NodeView], expected: list[str]) -> None:
    """Healthy nodes alone are not enough: a copy that is behind cannot vote for what it lacks."""
    assert expected == problems(views)

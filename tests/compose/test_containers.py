"""The processes of the product's image as the first ones of their containers."""

from __future__ import annotations

import asyncio
import io
import os
import signal
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from http.client import parse_headers
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import ClientSession

from tests.support.compose.engine import PACE, PREFIX, EngineError, docker
from tests.support.compose.faults import crash, killed, restarts
from tests.support.compose.stack import Deployment, inspect
from tests.support.polling import eventually, eventually_sync

pytestmark = pytest.mark.timeout(300)

#: a cluster that is not there, for services that are stopped before they miss it
NOWHERE = ("-e", "FI_LOG_URL=nats://127.0.0.1:1", "-e", "FI_ALLOW_ANONYMOUS=1")

#: what becomes smaller in a small container, and half of its default
BOUNDS = {"ingest": ("max_in_flight_bytes", 128 * 2**20), "persister": ("FI_BUFFER_BYTES", 32 * 2**20)}


@contextmanager
def container(image: str, *arguments: str) -> Iterator[str]:
    """Run the image, read-only as everywhere, until the block ends; without an init: the command is process 1."""
    options = ("--read-only", "--label", f"com.docker.compose.project={PREFIX}-{os.getpid()}-lone", "-v", "/data")
    found = docker("run", "-d", *options, *arguments).strip()
    try:
        yield found
    finally:
        docker("rm", "-fv", found)


def lines(found: str) -> list[dict[str, Any]]:
    """Return the log of a container; each line is a JSON document."""
    return [orjson.loads(line) for line in docker("logs", found).splitlines()]


@pytest.mark.parametrize("module", ["services.ingest", "services.persister"])
def test_a_stop_during_the_imports_ends_it_in_order(image: str, module: str) -> None:
    """The kernel drops a signal to process 1 without a handler; the container would be killed after the grace time."""
    with container(image, *NOWHERE, image, "python3", "-m", module) as found:
        status = Path("/proc", str(inspect(found)["State"]["Pid"]), "status")
        eventually_sync(lambda: _minds_sigterm(status))
        docker("stop", "-t", "60", found)
        state = inspect(found)["State"]
        assert (0, False) == (state["ExitCode"], state["OOMKilled"])


def _minds_sigterm(status: Path) -> bool:
    """Whether the process holds the signal, or has a handler for it."""
    masks = dict(line.split(":\t") for line in status.read_text().splitlines() if line.startswith("Sig"))
    return any(int(masks[name], 16) & 1 << (signal.SIGTERM - 1) for name in ("SigBlk", "SigCgt"))


def test_a_wrong_setting_is_exit_code_2_and_one_line(image: str) -> None:
    """What `docker ps -a` shows, and what it needs to be mended."""
    with container(image, "-e", "FI_PORT=http", image, "python3", "-m", "services.ingest") as found:
        assert "2\n" == docker("wait", found)
        assert 2 == inspect(found)["State"]["ExitCode"]


@pytest.mark.parametrize(("service", "bound"), BOUNDS.items())
def test_bounds_follow_the_containers_memory(image: str, service: str, bound: tuple[str, int]) -> None:
    """The kernel would end a process that fills buffers made for more. It answers the image's own health check."""
    name, most = bound
    with container(image, "-m", "192m", *NOWHERE, image, "python3", "-m", f"services.{service}") as found:
        line = eventually_sync(
            lambda: next((line for line in lines(found) if line["event"] == "MEMORY_BOUNDED"), None), interval=PACE
        )
        assert line is not None
        assert (True, 192 * 2**20) == (0 < int(line[name]) < most, line.get("limit", 192 * 2**20))
        eventually_sync(lambda: _is_well(found), interval=PACE)


def _is_well(found: str) -> bool:
    """Whether the health check that the image has of itself says so, as the engine runs it."""
    kind, *command = inspect(found)["Config"]["Healthcheck"]["Test"]
    assert "CMD" == kind
    try:
        docker("exec", found, *command)
    except EngineError:
        return False
    return True


def test_what_ends_by_itself_is_started_again(stack: Deployment) -> None:
    """As after a crash or a lack of memory: the restart policy, and the services find together again."""
    before = restarts(stack, "ingest")
    crash(stack, "ingest")
    eventually_sync(lambda: restarts(stack, "ingest") >= before + 2, interval=PACE)
    stack.is_healthy()


async def test_without_any_ingest_the_balancer_tells_clients_to_come_back(stack: Deployment) -> None:
    """In the form of ingest's own answers, so that a client needs to know one only. Likewise when a request is lost."""
    async with ClientSession() as session:

        async def answer() -> tuple[int, str, str]:
            body = b'{"event_type": "MESSAGE_RECEIVED"}'
            async with session.post(f"{stack.url}/consultations/nobody/events", data=body) as got:
                return got.status, got.headers.get("Retry-After", ""), got.content_type

        writer, refused = await _under_way(stack)
        with killed(stack, "ingest"):
            assert (502, "2", "/problems/log-unavailable") == await refused
            writer.close()
            await writer.wait_closed()
            expected = (503, "2", "application/problem+json")

            async def told() -> bool:
                return expected == await answer()

            await eventually(told, interval=PACE)
    await asyncio.to_thread(stack.is_healthy)


async def _under_way(stack: Deployment) -> tuple[asyncio.StreamWriter, Awaitable[tuple[int, str | None, str]]]:
    """Begin to post an event without a key; return status, Retry-After and problem of the answer, when it comes."""
    host, _, port = stack.address("balancer", 7001).rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = ("POST /consultations/broken/events HTTP/1.1", "Host: fiq", f"Authorization: Bearer {stack.token}")
    writer.write("\r\n".join((*head, "Content-Type: application/json", "Content-Length: 100", "", "{")).encode())
    await writer.drain()

    async def answer() -> tuple[int, str | None, str]:
        async with asyncio.timeout(60):
            status = int((await reader.readline()).split()[1])
            headers = parse_headers(io.BytesIO(await reader.readuntil(b"\r\n\r\n")))
            body = await reader.readexactly(int(headers["Content-Length"]))
        assert "application/problem+json" == headers["Content-Type"]
        return status, headers["Retry-After"], orjson.loads(body)["type"]

    return writer, asyncio.ensure_future(answer())


@pytest.mark.parametrize("service", ["ingest", "persister"])
def test_a_stop_is_exit_code_0_and_the_log_is_json_lines(stack: Deployment, service: str) -> None:
    """What was in flight is finished first; one of the last lines says why it stopped."""
    found = stack.containers(service)
    stack("stop", service)  # within the grace period of the file
    ends = {one: (inspect(one)["State"]["ExitCode"], [line["event"] for line in lines(one)][-5:]) for one in found}
    stack("start", service)
    stack.is_healthy()
    assert 2 == len(ends)
    assert [0, 0] == [code for code, _ in ends.values()]
    assert [] == [last for _, last in ends.values() if f"{service.upper()}_STOPPED" not in last]


def test_a_lame_duck_exits_with_0(stack: Deployment) -> None:
    """The stop signal of a node hands its leaderships over; compose waits for that, and calls it no failure."""
    node = stack.container("n2")
    stack("stop", "n2")
    state = inspect(node)["State"]
    stack("start", "n2")
    stack.is_healthy()
    assert (0, False) == (state["ExitCode"], state["OOMKilled"])

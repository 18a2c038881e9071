"""The tests in tests/unit cannot open sockets or start processes."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import pty
import socket
import subprocess
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import aiohttp
import pytest
import uvloop
import zmq

from tests.support.isolation import NotIsolatedError, isolated


def _connect_with_aiohttp() -> None:
    async def connect() -> None:
        async with aiohttp.ClientSession() as session:
            await session.get("http://127.0.0.1:9/")

    asyncio.run(connect())


def _bind_with_zeromq(address: str) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind(address)


def _bind_a_path() -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0fiq-test-isolation")


def _connect_to_a_path() -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect("\0fiq-test-isolation")


ATTEMPTS: dict[str, Callable[[], object]] = {
    "listen": lambda: socket.create_server(("127.0.0.1", 0)),
    "listen on IPv6": lambda: socket.create_server(("::1", 0), family=socket.AF_INET6),
    "connect": lambda: socket.create_connection(("127.0.0.1", 9)),
    "send a datagram": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"", ("127.0.0.1", 9)),
    "listen on a path": _bind_a_path,
    "connect to a path": _connect_to_a_path,
    "asyncio server": lambda: asyncio.run(asyncio.start_server(print, "127.0.0.1", 0)),
    "asyncio server on a path": lambda: asyncio.run(asyncio.start_unix_server(print, "\0fiq-test-isolation")),
    "uvloop": uvloop.new_event_loop,
    "aiohttp": _connect_with_aiohttp,
    "urllib": lambda: urllib.request.urlopen("http://127.0.0.1:9/"),
    "ZeroMQ over TCP": lambda: _bind_with_zeromq("tcp://127.0.0.1:*"),
    "ZeroMQ on a path": lambda: _bind_with_zeromq("ipc://@fiq-test-isolation"),
    "subprocess": lambda: subprocess.run(["true"], check=True),
    "asyncio process": lambda: asyncio.run(asyncio.create_subprocess_exec("true")),
    "os.fork": os.fork,
    "os.system": lambda: os.system("true"),
    "os.posix_spawn": lambda: os.posix_spawn("/bin/true", ["true"], {}),
    "os.spawnv": lambda: os.spawnv(os.P_WAIT, "/bin/true", ["true"]),
    "pty": lambda: pty.spawn("true"),
    "multiprocessing, fork": lambda: multiprocessing.get_context("fork").Process(target=print).start(),
    "multiprocessing, spawn": lambda: multiprocessing.get_context("spawn").Process(target=print).start(),
    "multiprocessing, forkserver": lambda: multiprocessing.get_context("forkserver").Process(target=print).start(),
}


@pytest.mark.parametrize("attempt", ATTEMPTS.values(), ids=ATTEMPTS.keys())
def test_an_attempt_is_refused_even_if_its_error_is_ignored(attempt: Callable[[], object]) -> None:
    """No socket and no process is made, and the test fails at its end."""
    refusal = pytest.raises(NotIsolatedError, match="move this one to tests/integration")
    with refusal, isolated(), contextlib.suppress(NotIsolatedError):
        attempt()


def test_an_attempt_in_another_thread_is_refused() -> None:
    """The threads that a test starts belong to it."""
    with pytest.raises(NotIsolatedError), isolated(), ThreadPoolExecutor() as threads:
        threads.submit(socket.create_server, ("127.0.0.1", 0)).exception()


def test_an_attempt_counts_for_the_innermost_block() -> None:
    """So the attempts above do not fail the tests that make them."""
    with pytest.raises(NotIsolatedError, match=r"Popen outer:"), isolated():
        _attempt_in_nested_blocks()


def _attempt_in_nested_blocks() -> None:
    with isolated():
        pass
    with contextlib.suppress(NotIsolatedError), isolated():
        subprocess.run(["inner"], check=True)
    with contextlib.suppress(NotIsolatedError):
        subprocess.run(["outer"], check=True)


@pytest.mark.xfail(strict=True, raises=NotIsolatedError, reason="shows that tests/unit/conftest.py fails the test")
def test_a_test_that_starts_a_process_fails() -> None:
    """The guard holds in each test of tests/unit, without a fixture."""
    with contextlib.suppress(BaseException):
        subprocess.run(["true"], check=True)


async def test_an_event_loop_and_its_pair_of_sockets_are_allowed() -> None:
    """asyncio wakes its loop through a pair of connected sockets."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        ours.sendall(b"x")
        assert b"x" == await asyncio.get_running_loop().sock_recv(theirs, 1)

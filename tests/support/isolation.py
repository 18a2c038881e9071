"""Refuses sockets and processes to the tests in tests/unit.

CPython reports each socket and each process to the interpreter's audit hooks before it makes one
(docs.python.org/3/library/audit_events.html), and an exception from a hook prevents it. Three ways are not reported and
are replaced while a test runs: the function with which multiprocessing starts processes, the sockets of ZeroMQ, and the
loop of uvloop.

Pairs of connected sockets stay allowed: each asyncio loop wakes itself through one.
"""

from __future__ import annotations

import _posixsubprocess
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import NoReturn
from unittest import mock

import uvloop
import zmq

_NETWORK = (socket.AF_INET, socket.AF_INET6)
_ADDRESSES = ("socket.bind", "socket.connect", "socket.sendto")
_PROCESSES = ("subprocess.Popen", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.system")
#: what opens sockets and starts processes without a report: an owner and the name of its attribute
_NOT_REPORTED: tuple[tuple[ModuleType | type, str], ...] = (
    (_posixsubprocess, "fork_exec"),
    (zmq.Socket, "bind"),
    (zmq.Socket, "connect"),
    (uvloop, "Loop"),
)


class NotIsolatedError(BaseException):
    """A test in tests/unit opened a socket or started a process.

    It does not derive from Exception, which code under test may handle.
    """

    def __init__(self, attempt: str) -> None:
        super().__init__(
            f"{attempt}: unit tests open no sockets and start no processes; move this one to tests/integration"
        )


#: the attempts in each `isolated` block that is running
_running: list[list[str]] = []


@contextmanager
def isolated() -> Iterator[None]:
    """Refuse sockets and processes until the block ends.

    Raises:
        NotIsolatedError: at each attempt, and at the end of the block if the code ignored the first error.
    """
    attempts: list[str] = []
    with ExitStack() as replaced:
        for owner, name in _NOT_REPORTED:
            replaced.enter_context(mock.patch.object(owner, name, _refusal_of(f"{owner.__name__}.{name}")))
        _running.append(attempts)
        try:
            yield
        finally:
            _running.pop()
    if attempts:
        raise NotIsolatedError(attempts[0])


def _refuse(attempt: str) -> NoReturn:
    _running[-1].append(attempt)
    raise NotIsolatedError(attempt)


def _refusal_of(name: str) -> object:
    def refuse(*_: object, **__: object) -> NoReturn:
        _refuse(name)

    return refuse


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    """Refuse what is reported, in any thread, while an `isolated` block is running."""
    if not _running:
        return
    if event in _PROCESSES:
        _refuse(f"{event} {arguments[0] if arguments else ''}".rstrip())
    elif event in _ADDRESSES:
        _refuse(f"{event} {arguments[1]}")
    elif event == "socket.__new__" and arguments[1] in _NETWORK:
        _refuse(f"{event} in address family {arguments[1]}")


sys.addaudithook(_audit)

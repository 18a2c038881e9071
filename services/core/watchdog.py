"""Ends a process that hangs: its event loop, or a call in one of its threads, is overdue by minutes.

A process that hangs keeps its locks, its partitions and its clients' connections. After its end its supervisor starts
it again, and other processes of its volume take its partitions over.

A thread takes a turn each second. It asks the event loop to answer, and counts for how many turns it has not, and for
how many each call in a thread of :meth:`Watchdog.threads` has run. At the limit it writes one line with the position of
each busy thread in the code and ends the process, without cleaning up: that could hang too.

Turns are counted, not time. The watchdog stops together with a process that was stopped (SIGSTOP), a machine that was
suspended, and a container without processor time, so none of them looks like a hang afterwards.

C code that holds the interpreter's lock stops this thread as well. For that case each turn sets a timer of the kernel
that counts the process's processor time: when it expires, faulthandler writes the threads' positions to stderr, and
SIGPROF ends the process.
"""

from __future__ import annotations

import asyncio
import faulthandler
import itertools
import math
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from traceback import walk_stack
from types import FrameType, TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from services.core.command import EXIT_FAILURE
from services.core.logs import get_logger

T = TypeVar("T")
P = ParamSpec("P")

#: default of FI_WATCHDOG, seconds
WATCHDOG_SECONDS = 180.0
#: longest time between two turns, seconds
_TURN_SECONDS = 1.0
#: fewest turns that make a hang
_FEWEST_TURNS = 10
#: how long the last line may take: standard output may be what hangs, seconds
_REPORT_SECONDS = 2.0
#: functions of a stack that are logged, from the innermost one
_DEPTH = 10
#: its descriptor, whatever takes the place of ``sys.stderr``
_STDERR = 2
#: threads of the loop's own executor, as asyncio has them
_DEFAULT_THREADS = min(32, (os.cpu_count() or 1) + 4)


class Watchdog:
    """Watches the running event loop and its threads inside a ``with`` block.

    Args:
        limit: how long the loop or a call may take, seconds; 0 watches nothing.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._pause = min(_TURN_SECONDS, limit / _FEWEST_TURNS)
        self._most = math.ceil(limit / self._pause) if limit else 0
        self._calls: dict[int, list[int]] = {}  # of each call in a thread: for how many turns it has run
        self._numbers = itertools.count()
        self._answered = True
        self._late = 0  # for how many turns the loop has not answered
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def __enter__(self) -> Self:
        """Begin to watch; calls in the loop's default executor are watched from here on."""
        self._loop = asyncio.get_running_loop()
        self._loop.set_default_executor(self.threads(_DEFAULT_THREADS, "asyncio"))
        if self._limit:
            faulthandler.register(signal.SIGPROF, file=_STDERR, all_threads=True, chain=True)
            signal.setitimer(signal.ITIMER_PROF, self._limit)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Watch no longer."""
        if self._limit:
            self._left.set()
            self._thread.join()
            signal.setitimer(signal.ITIMER_PROF, 0)
            faulthandler.unregister(signal.SIGPROF)

    def threads(self, count: int, name: str) -> ThreadPoolExecutor:
        """Return an executor with *count* threads whose calls are watched."""
        return _WatchedThreads(self, count, name)

    def call(self, function: Callable[[], T]) -> T:
        """Call *function*, which is overdue when it takes longer than the limit."""
        number = next(self._numbers)
        self._calls[number] = [0]
        try:
            return function()
        finally:
            del self._calls[number]

    def _watch(self) -> None:
        while not self._left.wait(self._pause):
            signal.setitimer(signal.ITIMER_PROF, self._limit)
            if (hung := self._turn()) is not None:
                self._end(hung)

    def _turn(self) -> str | None:
        """Take a turn; return what is overdue."""
        for turns in list(self._calls.values()):
            turns[0] += 1
            if turns[0] > self._most:
                return "call in a thread"
        if self._answered:
            self._answered, self._late = False, 0
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._answer)
        self._late += 1
        return "event loop" if self._late > self._most else None

    def _answer(self) -> None:
        self._answered = True

    def _end(self, hung: str) -> None:
        # in a thread of its own: what hangs may hold the log's lock
        report = threading.Thread(target=_report, args=(hung, self._limit), daemon=True)
        report.start()
        report.join(_REPORT_SECONDS)
        os._exit(EXIT_FAILURE)


class _WatchedThreads(ThreadPoolExecutor):
    """A pool of threads whose calls a watchdog watches."""

    def __init__(self, watchdog: Watchdog, count: int, name: str) -> None:
        super().__init__(count, thread_name_prefix=name)
        self._watchdog = watchdog

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Call *fn* in a thread."""
        return super().submit(self._watchdog.call, partial(fn, *args, **kwargs))


def _report(hung: str, limit: float) -> None:
    """Write the last line: positions in the code, and no values, which may be of events."""
    get_logger("watchdog").error("PROCESS_HUNG", hung=hung, overdue_s=limit, threads=_busy_threads())


def _busy_threads() -> dict[str, list[str]]:
    """Return the innermost functions of each thread that does not just wait for work."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    own = {"watchdog", threading.current_thread().name}
    stacks = {names.get(number, str(number)): _stack(frame) for number, frame in sys._current_frames().items()}
    idle = "thread.py:_worker"
    return {
        name: [f"{file}:{line} {function}" for file, line, function in stack]
        for name, stack in stacks.items()
        if name not in own and f"{stack[0][0]}:{stack[0][2]}" != idle
    }


def _stack(frame: FrameType) -> list[tuple[str, int, str]]:
    frames: list[Any] = []
    for one, line in walk_stack(frame):
        frames.append((Path(one.f_code.co_filename).name, line, one.f_code.co_name))
        if len(frames) == _DEPTH:
            break
    return frames

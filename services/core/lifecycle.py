"""Start and stop a process: the first stop signal asks, the second kills."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fiq.errors import FiqError

T = TypeVar("T")

#: what asks a service to stop. A service's ``__main__`` blocks them before its imports, which take half a second: a
#: stop in that time would look like a failure, or be lost where the process is a container's first one.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """A request to stop that carries its reason.

    A service waits for it; a signal, a lost connection or a failed part calls :meth:`request`.
    """

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.reason = ""
        self.failed = False

    @property
    def requested(self) -> bool:
        """Whether the process should stop."""
        return self._event.is_set()

    def request(self, reason: str, *, failed: bool = False) -> None:
        """Ask to stop; the first *reason* is kept. With *failed* the exit code will be 1."""
        if not self._event.is_set():
            self.reason = reason
            self.failed = failed
            self._event.set()

    async def wait(self) -> None:
        """Wait until a stop is requested."""
        await self._event.wait()

    @property
    def exit_code(self) -> int:
        """The exit code that belongs to the reason: 0 for a signal, 1 for a failure."""
        return int(self.failed)


async def run_until_stopped(work: Coroutine[Any, Any, T], stop: Stop) -> T | None:
    """Run *work* and return its result; when a stop is requested first, cancel it and return None.

    Raises Exception: what *work* raised, also while it was being cancelled.
    """
    task = asyncio.create_task(work)
    asked = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({task, asked}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return await task
        return None
    finally:
        asked.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


@asynccontextmanager
async def background_task(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[None]:
    """Run *work* in a task called *name* while the block runs; cancel it at the end, and wait for that.

    If *work* fails, the block is cancelled.

    Raises Exception: what *work* failed with.
    """
    try:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(work, name=name)
            yield
            task.cancel()
    except ExceptionGroup as failed:
        error = failed.exceptions[0]
        raise error from error.__cause__


@asynccontextmanager
async def supervised_task(
    work: Coroutine[Any, Any, None], name: str, on_failed: Callable[[str], None]
) -> AsyncIterator[None]:
    """Run *work* in a task called *name* while the block runs; cancel it at the end, and wait for that.

    Unlike :func:`background_task` the block may be left in another task than the one that entered it, so a failure
    cannot cancel it: *on_failed* is called with the reason.
    """

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            # the text of other errors may quote data
            reason = str(error) if isinstance(error, FiqError) else f"unexpected {type(error).__name__}"
            on_failed(f"the {name} failed: {reason}")

    task = asyncio.create_task(work, name=name)
    task.add_done_callback(ended)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


async def cancellable(work: Awaitable[T]) -> T:
    """Await a library's *work* without losing a cancellation.

    Before Python 3.12 ``asyncio.wait_for``, which nats-py's requests end in, returns its result and drops a
    cancellation that arrives in the same turn of the loop (cpython gh-86296): the task would never end.

    Raises asyncio.CancelledError: the calling task was cancelled meanwhile, whatever *work* returned.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    try:
        return await work
    finally:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError


def spawn(
    tasks: set[asyncio.Task[None]], work: Coroutine[Any, Any, None], name: str | None = None
) -> asyncio.Task[None]:
    """Start *work* in a task that *tasks* holds until it is done: the loop alone keeps only weak references."""
    task = asyncio.create_task(work, name=name)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task


def freeze_garbage() -> None:
    """Exclude all objects of the start from garbage collection, and collect less often from now on.

    Messages form no cycles; looking for cycles after every 700 objects took a tenth of a persister's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def stop_on_signals(stop: Stop, *, notify: Callable[[str], None] | None = None) -> None:
    """Install handlers on the running loop: the first signal calls ``stop.request``, the next one kills the process.

    Signals that were blocked at the start (:data:`STOP_SIGNALS`) are delivered from here on.
    """
    loop = asyncio.get_running_loop()

    def handle(number: signal.Signals) -> None:
        for other in STOP_SIGNALS:
            loop.remove_signal_handler(other)
            # the kernel's own action: it also kills a process that hangs in C code, where no Python handler runs
            signal.signal(other, signal.SIG_DFL)
        if notify is not None:
            notify(number.name)
        stop.request(number.name)

    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, handle, number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

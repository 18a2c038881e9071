"""Starting and stopping a process: the first signal asks, the second kills (as procrastinate's signals.py does)."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from services.core.signals import STOP_SIGNALS, release

T = TypeVar("T")


class Stop:
    """A request to stop that carries its reason.

    A service waits on :meth:`wait`; a signal, a lost connection or a failed part calls :meth:`request`.
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
        """Wait until somebody asks to stop."""
        await self._event.wait()

    @property
    def exit_code(self) -> int:
        """The exit code that belongs to the reason: 0 for a signal, 1 for a failure."""
        return int(self.failed)


async def unless_stopped(work: Coroutine[Any, Any, T], stop: Stop) -> T | None:
    """Run *work* until it ends, and return its result, or until a stop is requested: cancel it then, and return None.

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
async def beside(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[None]:
    """Let *work* go on as a task called *name* beside what is done inside; cancel it at the end and wait for that.

    When *work* fails, the task that entered is cancelled: what is done inside does not go on without it.

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


async def cancellable(work: Awaitable[T]) -> T:
    """Await a library's *work* without losing a cancellation in it.

    Before Python 3.12 ``asyncio.wait_for``, which nats-py's requests end in, returns its result and forgets the
    cancellation when both come in one turn of the loop (cpython gh-86296): a task that was asked to end, once, would go
    on for ever, and a deadline around it would never strike.

    Raises asyncio.CancelledError: the calling task was cancelled meanwhile, whatever came of *work*.
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
    """Begin *work* in a task that *tasks* holds until it is done: the loop by itself may lose a running task."""
    task = asyncio.create_task(work, name=name)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task


def backoff(pause: float, longest: float) -> Iterator[float]:
    """Yield how long to wait before each further try: *pause*, then twice as long each time, up to *longest*."""
    while True:
        yield pause
        pause = min(2 * pause, longest)


def settle() -> None:
    """Spare the garbage collector needless work, once a service has started.

    What was made at the start lives for ever. What comes later is messages by the thousand, none of them in cycles:
    looking for cycles after every 700 of them took a tenth of a persister's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def stop_on_signals(stop: Stop, *, notify: Callable[[str], None] | None = None) -> None:
    """Install handlers on the running loop: the first signal calls ``stop.request``, the next one kills the process.

    Signals that were held (:func:`services.core.signals.hold`) are taken from here on.
    """
    loop = asyncio.get_running_loop()

    def handle(number: signal.Signals) -> None:
        for other in STOP_SIGNALS:
            loop.remove_signal_handler(other)
            # the kernel's own action: also a process that hangs in C code, where no Python handler runs, dies of it
            signal.signal(other, signal.SIG_DFL)
        if notify is not None:
            notify(number.name)
        stop.request(number.name)

    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, handle, number)
    release()

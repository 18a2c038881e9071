"""The synchronous client: the methods of :class:`AsyncClient` for programs without an event loop.

A daemon thread runs an event loop with an :class:`AsyncClient`; it starts at the first call. Each method submits its
coroutine to that loop and waits for the result. So any number of threads may use one client at the same time, even a
thread that runs an event loop of its own (which is blocked meanwhile). Ctrl-C ends the wait and cancels the request.
Iterators fetch some events ahead, because each hand-over between the threads costs some 50 µs. The caller's own
generators run in the caller's thread. After a fork the child process gets a new thread with connections of its own.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import threading
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterable
from concurrent.futures import CancelledError, Future
from contextlib import aclosing, suppress
from datetime import datetime
from functools import partial
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar
from uuid import UUID

from fiq.client.batches import EventBody, split
from fiq.client.client import AsyncClient, RetryPolicy, checked_key
from fiq.client.errors import ClientError, ClosedError
from fiq.client.records import Accepted, ConsultationSummary, StoredEvent

T = TypeVar("T")

#: events that an iterator fetches ahead of the caller
_AHEAD = 64
#: threads of the parent process. They are kept: collecting them would close their connections for the parent too
_of_parent: list[object] = []


class Client:
    """Posts, reads and follows the events of one service; a context manager.

    Any number of threads may use it at the same time. Without ``with`` call :meth:`close` at the end.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        retry: RetryPolicy | None = None,
        connections: int = 100,
        context: ssl.SSLContext | None = None,
    ) -> None:
        """Check the arguments, which are those of :class:`AsyncClient`."""
        self._make = partial(AsyncClient, url, token, retry=retry, connections=connections, context=context)
        self._client = self._make()
        self._reset()
        self._closed = False

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._thread: _LoopThread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections. Later calls raise ClosedError, and so do those that other threads wait for."""
        self._check_fork()
        with self._lock:
            self._closed = True
            thread = self._thread
        if thread is not None:
            thread.stop()

    @property
    def retries(self) -> int:
        """Requests that were sent again, so far."""
        return self._client.retries

    def post(self, consultation: str, event: EventBody, key: str | None = None) -> Accepted:
        """Store *event*; as :meth:`AsyncClient.post`."""
        return self._call(lambda client: client.post(consultation, event, key))

    def post_batch(
        self,
        consultation: str | None,
        events: Iterable[EventBody],
        key: str | None = None,
        numbers: Iterable[int] | None = None,
    ) -> list[Accepted]:
        """Store *events* and return what was accepted, in their order; as :meth:`AsyncClient.post_batch`."""
        return list(self.post_stream(consultation, events, key, numbers))

    def post_stream(
        self,
        consultation: str | None,
        events: Iterable[EventBody],
        key: str | None = None,
        numbers: Iterable[int] | None = None,
    ) -> Generator[Accepted, None, None]:
        """Store any number of *events*, and yield each after it was accepted; as :meth:`AsyncClient.post_stream`."""
        key, any_stored = checked_key(key), False
        try:
            for batch in split(events, numbers):
                yield from self._call(partial(_post, consultation, batch.bodies, key, batch.numbers))
                any_stored = True
        except ClientError as error:
            error.may_be_stored |= any_stored
            raise

    def event(
        self, consultation: str, message_id: UUID | str | None = None, *, key: str | None = None
    ) -> StoredEvent | None:
        """Return one event, or None; as :meth:`AsyncClient.event`."""
        return self._call(lambda client: client.event(consultation, message_id, key=key))

    def read(
        self,
        consultation: str,
        after: int = 0,
        *,
        page: int = 500,
        before: int | None = None,
        type: str | None = None,
        since: datetime | None = None,
    ) -> Generator[StoredEvent, None, None]:
        """Yield the events of *consultation* in order, and end; as :meth:`AsyncClient.read`."""
        self._check_fork()
        return self._iterate(self._client.read(consultation, after, page=page, before=before, type=type, since=since))

    def follow(
        self,
        consultation: str,
        after: int = 0,
        *,
        silence: float = 35.0,
        type: str | None = None,
        since: datetime | None = None,
    ) -> Generator[StoredEvent, None, None]:
        """Yield the events of *consultation*, those stored and those to come; as :meth:`AsyncClient.follow`.

        To stop, leave the loop.
        """
        self._check_fork()
        return self._iterate(self._client.follow(consultation, after, silence=silence, type=type, since=since))

    def follow_all(
        self,
        after: int | None = None,
        *,
        silence: float = 35.0,
        type: str | None = None,
        since: datetime | None = None,
    ) -> Generator[StoredEvent, None, None]:
        """Yield the events of all consultations, those to come; as :meth:`AsyncClient.follow_all`.

        To stop, leave the loop.
        """
        self._check_fork()
        return self._iterate(self._client.follow_all(after, silence=silence, type=type, since=since))

    def pipeline(self) -> dict[str, Any]:
        """Return the state of the pipeline; as :meth:`AsyncClient.pipeline`."""
        return self._call(lambda client: client.pipeline())

    def consultations(
        self, prefix: str = "", *, after: str = "", order: Literal["name", "activity"] = "name", page: int = 100
    ) -> Generator[ConsultationSummary, None, None]:
        """Yield the persisted consultations, and end; as :meth:`AsyncClient.consultations`."""
        self._check_fork()
        return self._iterate(self._client.consultations(prefix, after=after, order=order, page=page))

    def dead_letters(self, after: int = 0, *, page: int = 100) -> Generator[dict[str, Any], None, None]:
        """Yield the dead letters, without their bodies; as :meth:`AsyncClient.dead_letters`."""
        self._check_fork()
        return self._iterate(self._client.dead_letters(after, page=page))

    def dead_letter(self, sequence: int) -> dict[str, Any]:
        """Return one dead letter with its body; as :meth:`AsyncClient.dead_letter`."""
        return self._call(lambda client: client.dead_letter(sequence))

    def requeue(self, sequence: int, reason: str = "") -> dict[str, Any]:
        """Put the message of a dead letter back into the log; as :meth:`AsyncClient.requeue`."""
        return self._call(lambda client: client.requeue(sequence, reason))

    def drop(self, sequence: int, reason: str) -> dict[str, Any]:
        """Remove a dead letter for good; as :meth:`AsyncClient.drop`."""
        return self._call(lambda client: client.drop(sequence, reason))

    def _iterate(self, events: AsyncGenerator[T, None]) -> Generator[T, None, None]:
        prefetch = self._call(lambda _: _Prefetch.start(events))
        thread = self._thread
        try:
            while ready := self._call(lambda _: prefetch.take()):
                yield from ready
        finally:
            if thread is not None:
                thread.call_soon(prefetch.cancel)

    def _call(self, make: Callable[[AsyncClient], Coroutine[Any, Any, T]]) -> T:
        """Return the result of the coroutine that *make* returns; it runs in the thread."""
        self._check_fork()
        with self._lock:  # against close(): what is submitted before it is cancelled by it, and nothing is after it
            if self._closed:
                raise ClosedError("the client is closed")
            if self._thread is None:
                self._thread = _LoopThread(self._client)
                weakref.finalize(self, self._thread.stop)
            future = self._thread.submit(make(self._client))
        try:
            return future.result()
        except CancelledError:
            raise ClosedError("the client was closed", may_be_stored=True) from None
        finally:
            future.cancel()  # after Ctrl-C; does nothing when it is done

    def _check_fork(self) -> None:
        if self._pid != os.getpid():
            _of_parent.append((self._client, self._thread))
            self._client = self._make()
            self._reset()


def _post(
    consultation: str | None, bodies: list[bytes], key: str, numbers: list[int], client: AsyncClient
) -> Coroutine[Any, Any, list[Accepted]]:
    return client.post_batch(consultation, bodies, key, numbers)


class _LoopThread:
    """A thread with an event loop, in which *client* is open until it is stopped."""

    def __init__(self, client: AsyncClient) -> None:
        self._pid = os.getpid()
        self._stopping = asyncio.Event()
        started: Future[asyncio.AbstractEventLoop] = Future()
        self._thread = threading.Thread(target=self._run, args=(client, started), name="fiq-client", daemon=True)
        self._thread.start()
        self._loop = started.result()

    def _run(self, client: AsyncClient, started: Future[asyncio.AbstractEventLoop]) -> None:
        async def serve() -> None:
            async with client:
                started.set_result(asyncio.get_running_loop())
                await self._stopping.wait()

        try:
            asyncio.run(serve())  # cancels at the end what is still running
        except OSError as error:
            if started.done():
                raise
            started.set_exception(error)  # the process has no descriptor left for a loop

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call_soon(self, function: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(function)

    def stop(self) -> None:
        if self._pid == os.getpid():
            self.call_soon(self._stopping.set)
            if threading.current_thread() is not self._thread:  # in it when the client is garbage collected there
                self._thread.join()


class _Prefetch(Generic[T]):
    """Fetches some events of an asynchronous generator ahead; all of it runs in the loop."""

    def __init__(self, events: AsyncGenerator[T, None]) -> None:
        self._ready: deque[T] = deque()
        self._filled, self._room = asyncio.Event(), asyncio.Event()
        self._task = asyncio.create_task(self._fill(events))
        self._task.add_done_callback(lambda _: self._filled.set())

    @classmethod
    async def start(cls, events: AsyncGenerator[T, None]) -> _Prefetch[T]:
        return cls(events)

    async def _fill(self, events: AsyncGenerator[T, None]) -> None:
        async with aclosing(events):
            async for event in events:
                self._ready.append(event)
                self._filled.set()
                while len(self._ready) >= _AHEAD:
                    self._room.clear()
                    await self._room.wait()

    async def take(self) -> list[T]:
        """Wait for events and return all that have come; none at the end. Raises what the generator raised."""
        while not self._ready and not self._task.done():
            self._filled.clear()
            await self._filled.wait()
        taken = list(self._ready)
        self._ready.clear()
        self._room.set()
        if not taken:
            self._task.result()
        return taken

    def cancel(self) -> None:
        self._task.cancel()

"""Runs one piece of work at a time in a thread beside the one that writes."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Thread
from typing import Generic, TypeVar

from services.corpus.errors import CorpusError, CorpusFormatError, CorpusIOError

T = TypeVar("T")


class Beside(Generic[T]):
    """A piece of work under way, and what came of it.

    Args:
        name: of the thread.
        work: what to do; raises the corpus's errors.
        thread: whether it runs in a thread; else it is done when the constructor returns.

    Raises:
        CorpusIOError: the system refuses a thread; nothing was done.
    """

    def __init__(self, name: str, work: Callable[[], T], *, thread: bool) -> None:
        self._name = name
        self._work = work
        self._result: list[T] = []
        self._error: CorpusError | None = None
        #: how long it took
        self.seconds = 0.0
        self._thread = Thread(target=self._run, name=name) if thread else None
        if self._thread is not None:
            try:
                self._thread.start()
            except (RuntimeError, MemoryError) as error:
                raise CorpusIOError(f"cannot {name}: {str(error) or 'out of memory'}") from error
        else:
            self._run()

    @property
    def ended(self) -> bool:
        """Whether the outcome is there."""
        return self._thread is None or not self._thread.is_alive()

    def join(self) -> None:
        """Wait for the end."""
        if self._thread is not None:
            self._thread.join()

    def outcome(self) -> T:
        """Wait for the end and return what the work returned.

        Raises:
            CorpusError: it failed.
        """
        self.join()
        if self._error is not None:
            raise self._error
        return self._result[0]

    def _run(self) -> None:
        started = time.monotonic()
        try:
            self._result.append(self._work())
        except CorpusError as error:
            self._error = error
        except MemoryError as error:
            self._error = CorpusIOError(f"cannot {self._name}: out of memory")
            self._error.__cause__ = error
        except Exception as error:  # noqa: BLE001 - a thread's error must not be lost, whatever it is
            self._error = CorpusFormatError(f"{self._name} failed: {type(error).__name__}")
            self._error.__cause__ = error
        self.seconds = time.monotonic() - started

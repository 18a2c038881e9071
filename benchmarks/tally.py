"""Counts what the clients of a load do."""

from __future__ import annotations

import time

from benchmarks.jobs import LoadJob, Report


class Tally:
    """Answers of one load: those of the measured time with their latencies, all of them by number.

    Args:
        job: says how long and how many.
        events: that one request carries.
    """

    def __init__(self, job: LoadJob, *, events: int = 1) -> None:
        self._job = job
        self._events = events
        self._latencies: list[int] = []
        self._sent = self._accepted = self._failures = 0
        self._begin = self._end = 0.0
        self._begin_ns = self._last_ns = 0
        self._cpu = 0.0

    def start(self) -> None:
        """Begin the warm-up."""
        self._begin = time.perf_counter() + self._job.warm_up
        self._begin_ns = time.time_ns() + int(self._job.warm_up * 1e9)
        self._end = self._begin + self._job.seconds
        self._cpu = time.process_time()

    def more(self) -> bool:
        """Whether another request is to be sent; counts it."""
        if self._sent >= self._job.limit or time.perf_counter() >= self._end:
            return False
        self._sent += 1
        return True

    def count(self, started: float, *, accepted: bool) -> None:
        """Count the answer to a request that was sent at *started*."""
        done = time.perf_counter()
        if not accepted:
            self._failures += 1
            return
        self._accepted += 1
        self._last_ns = time.time_ns()
        if self._begin <= done <= self._end:
            self._latencies.append(round((done - started) * 1e6))

    def report(self) -> Report:
        """Return what was counted, now that all requests are answered."""
        return Report(
            seconds=min(time.perf_counter(), self._end) - self._begin,
            events=len(self._latencies) * self._events,
            failures=self._failures,
            latencies_us=self._latencies,
            accepted=self._accepted * self._events,
            begin_ns=self._begin_ns,
            last_ns=self._last_ns,
            cpu_seconds=time.process_time() - self._cpu,
        )

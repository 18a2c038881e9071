"""Build, count and log every answer of the event resource: one canonical line a request."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Mapping

import orjson
from aiohttp import web
from multidict import CIMultiDict

from services.contract.event import Event
from services.contract.logs import EVENT_QUEUED, get_logger
from services.eventlog.protocol import Appended
from services.ingest import metrics as outcomes
from services.ingest.metrics import Metrics
from services.ingest.problems import CONTENT_TYPE, Problem

#: what the Server header says: not which library in which version
SERVER = "fiq"
#: decimals of seconds in log lines: microseconds
_DECIMALS = 6


class Answers:
    """Makes the answers of one process.

    Attributes:
        closing: close each connection with its answer, because the service is stopping.
        in_flight: events that are being read or stored just now.
    """

    def __init__(
        self, metrics: Metrics, *, retry_after: Callable[[Problem], float], note: Callable[[int], None]
    ) -> None:
        self.closing = False
        self.in_flight = 0
        self._metrics = metrics
        self._retry_after = retry_after
        self._note = note
        self._log = get_logger("ingest").bind()
        self._idle = asyncio.Event()
        metrics.in_flight.set_function(lambda: self.in_flight)

    def enter(self) -> None:
        """Count a request as in flight."""
        self.in_flight += 1

    def leave(self) -> None:
        """Count a request as done."""
        self.in_flight -= 1
        if not self.in_flight and self.closing:
            self._idle.set()

    async def drain(self, grace: float) -> None:
        """Wait at most *grace* seconds until nothing is in flight; from now on each answer closes its connection."""
        self.closing = True
        await asyncio.sleep(0)  # requests that have been parsed get to their handler
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                while self.in_flight:
                    self._idle.clear()
                    await self._idle.wait()

    def accepted(self, event: Event, appended: Appended, started: float) -> web.Response:
        """Answer 202: *event* is safe. *started* is when the request came, on :func:`time.perf_counter`."""
        message_id = str(event.event_id)
        document = {
            "status": "accepted",
            "message_id": message_id,
            "consultation_id": event.consultation,
            "sequence": appended.sequence,
        }
        self._note(appended.sequence)
        metrics = self._metrics
        if appended.duplicate:
            document["duplicate"] = True
            metrics.duplicates.inc()
        metrics.outcomes[outcomes.DUPLICATE if appended.duplicate else outcomes.STORED].inc()
        metrics.accepted.inc()
        duration = time.perf_counter() - started
        metrics.duration.observe(duration)
        self._log.info(
            EVENT_QUEUED,
            consultation_id=event.consultation,
            message_id=message_id,
            sequence=appended.sequence,
            duplicate=appended.duplicate,
            bytes=len(event.body),
            duration_s=round(duration, _DECIMALS),
        )
        headers = CIMultiDict(
            {
                "Content-Type": "application/json",
                "Location": f"/consultations/{event.consultation}/events/{message_id}",
                "Server": SERVER,
            }
        )
        return self._finish(web.Response(status=202, body=orjson.dumps(document), headers=headers))

    def refused(
        self,
        problem: Problem,
        detail: str | None = None,
        *,
        started: float | None = None,
        headers: Mapping[str, str] | None = None,
        consultation: str | None = None,
    ) -> web.Response:
        """Answer with *problem*.

        Args:
            problem: what went wrong.
            detail: says more than the problem's own detail; must not quote the request.
            started: when the request came, on :func:`time.perf_counter`; None for what never was an event.
            headers: further headers of the answer.
            consultation: the consultation's id, once it is known to be one.
        """
        values: dict[str, object] = {"status": problem.status, "problem": problem.slug}
        self._metrics.refused[problem].inc()
        if started is not None:
            duration = time.perf_counter() - started
            self._metrics.duration.observe(duration)
            values["duration_s"] = round(duration, _DECIMALS)
        if consultation is not None:
            values["consultation_id"] = consultation
        self._log.warning("REQUEST_REFUSED", **values)
        all_headers = CIMultiDict({"Content-Type": CONTENT_TYPE, "Server": SERVER})
        if problem.retry:
            all_headers["Retry-After"] = str(math.ceil(self._retry_after(problem)))
        if headers:
            all_headers.update(headers)
        response = web.Response(status=problem.status, body=problem.render(detail), headers=all_headers)
        return self._finish(response, close=problem.close)

    def failed(self, error: BaseException) -> None:
        """Log an unexpected *error*: its class and where it arose, never its text, which could quote a body."""
        frames = []
        traceback = error.__traceback__
        while traceback is not None:
            code = traceback.tb_frame.f_code
            frames.append(f"{code.co_filename.rpartition('/')[2]}:{traceback.tb_lineno} {code.co_name}")
            traceback = traceback.tb_next
        self._log.error("REQUEST_FAILED", error=type(error).__name__, frames=frames)

    def log_refused(self, reason: str) -> None:
        """Log why the log refuses for good; the broker's *reason* says what an operator must change."""
        self._log.error("LOG_REFUSED", reason=reason)

    def _finish(self, response: web.Response, *, close: bool = False) -> web.Response:
        if close or self.closing:
            response.force_close()
        return response

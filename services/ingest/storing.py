"""Hand events to the log, and see to it that each key means one event."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

from fiq.errors import FiqError
from fiq.event import Event
from services.ingest import metrics as outcomes
from services.ingest import problems
from services.ingest.answers import Answers
from services.ingest.batch import Line
from services.ingest.keys import KeyCheck, Keys
from services.ingest.metrics import Metrics
from services.ingest.pressure import Pressure
from services.ingest.problems import Problem, RequestRefusedError
from services.log.errors import (
    DuplicateInFlightError,
    LogFullError,
    LogRefusedError,
    LogUnavailableError,
    TooManyInFlightError,
)
from services.log.protocol import Appended, EventWriter

#: what becomes of an event that the log did not take
_APPEND_ERRORS: dict[type[FiqError], tuple[Problem, str]] = {
    LogFullError: (problems.LOG_FULL, outcomes.FULL),
    LogUnavailableError: (problems.LOG_UNAVAILABLE, outcomes.UNAVAILABLE),
    DuplicateInFlightError: (problems.DUPLICATE_IN_FLIGHT, outcomes.IN_FLIGHT),
    TooManyInFlightError: (problems.TOO_MANY_IN_FLIGHT, outcomes.LIMIT),
    LogRefusedError: (problems.LOG_REFUSED, outcomes.REFUSED),
}
#: and of one whose key means another event
_KEY_OUTCOMES = {
    problems.IDEMPOTENCY_KEY_REUSED: outcomes.REUSED,
    problems.KEY_NOT_COMPARED: outcomes.NOT_COMPARED,
}
_BATCH_FAILED = "Some events of the batch may be stored, none twice: retry all of it with the same keys."


class Storing:
    """Stores events, one or a batch of them.

    Args:
        writer: takes them.
        keys: compares what comes under a key that was used before.
        metrics: counts what becomes of them.
        answers: logs why the log refuses for good.
        pressure: refuses what a partition has no room for, and is told how far the log has come.
    """

    def __init__(
        self,
        writer: EventWriter,
        keys: Keys,
        metrics: Metrics,
        answers: Answers,
        pressure: Pressure,
    ) -> None:
        self._writer = writer
        self._keys = keys
        self._metrics = metrics
        self._answers = answers
        self._pressure = pressure

    @contextlib.contextmanager
    def refusing(self, detail: str | None = None) -> Iterator[None]:
        """Count why the log, or this process, took no event inside, and raise what the client is told.

        Args:
            detail: says more than the problem's own.

        Raises RequestRefusedError: in place of an error of the log.
        """
        try:
            yield
        except tuple(_APPEND_ERRORS) as error:
            kind = next(kind for kind in _APPEND_ERRORS if isinstance(error, kind))
            problem, outcome = _APPEND_ERRORS[kind]
            self._metrics.outcomes[outcome].inc()
            if kind is LogRefusedError:
                self._answers.log_refused(str(error))
            raise RequestRefusedError(problem, detail) from None

    async def one(self, event: Event, *, keyed: bool) -> Appended:
        """Store *event*; *keyed*: the client gave it its id.

        Raises RequestRefusedError: the log did not take it, or its key means another event.
        """
        with self.refusing():
            if not keyed:
                outcome: Appended | Problem = await self._append(event)
            else:
                (check,) = checks = self._keys.check([event])
                if check.certain:
                    await self._keys.hear(checks)
                appended = None if check.first is not None else await self._append(event)
                if not check.certain:
                    await self._keys.hear(checks)
                outcome = await self._settle(check, appended)
        if isinstance(outcome, Problem):
            raise RequestRefusedError(outcome)
        self._stored([outcome])
        return outcome

    async def _append(self, event: Event) -> Appended:
        self._pressure.admit([event])
        return await self._writer.append(event)

    async def batch(self, lines: Sequence[Line]) -> list[Appended | Problem]:
        """Store the events of *lines*, and return for each where it stands, or why it is not the one under its key.

        Lines with the same id, which have the same body, are one event.

        Raises RequestRefusedError: the log did not take all of them, or a key cannot be compared now.
        """
        events: dict[tuple[str, bytes], Line] = {}
        for line in lines:
            events.setdefault(line.name, line)
        with self.refusing(_BATCH_FAILED):
            checks = self._keys.check(line.event for line in events.values() if line.keyed)
            await self._keys.hear(check for check in checks if check.certain)
            numbered = _with_none(events.values(), checks)
            new = [n for n, check in enumerate(numbered) if check is None or check.first is None]
            lines_of = list(events.values())
            fresh = [lines_of[n].event for n in new]
            self._pressure.admit(fresh)
            appended = await self._writer.append_batch(fresh) if fresh else []
            await self._keys.hear(check for check in checks if not check.certain)
            settled = await self._settle_all(numbered, dict(zip(new, appended, strict=True)))
        self._stored([outcome for outcome in settled if isinstance(outcome, Appended)])
        found = dict(zip(events, settled, strict=True))
        if problems.KEY_NOT_COMPARED in settled:
            raise RequestRefusedError(problems.KEY_NOT_COMPARED, _BATCH_FAILED)
        return [_repeated(found[line.name], line is not events[line.name]) for line in lines]

    async def _settle_all(
        self, checks: Sequence[KeyCheck | None], appended: Mapping[int, Appended]
    ) -> list[Appended | Problem]:
        """Settle each of *checks*, those together that must look for an event; *appended* has what was published."""
        looked_for = {
            n: self._settle(check, at)
            for n, check in enumerate(checks)
            if check is not None and (at := appended.get(n)) is not None and check.must_look(at)
        }
        found = dict(zip(looked_for, await asyncio.gather(*looked_for.values()), strict=True))
        settled: list[Appended | Problem] = []
        for n, check in enumerate(checks):
            if check is None:
                settled.append(appended[n])
            else:
                settled.append(found[n] if n in found else await self._settle(check, appended.get(n)))
        return settled

    async def _settle(self, check: KeyCheck, appended: Appended | None) -> Appended | Problem:
        try:
            return await check.settle(appended)
        except RequestRefusedError as refusal:
            self._metrics.outcomes[_KEY_OUTCOMES[refusal.problem]].inc()
            return refusal.problem

    def _stored(self, events: Sequence[Appended]) -> None:
        self._pressure.note(max((appended.sequence for appended in events), default=0))
        known = sum(appended.duplicate for appended in events)
        self._metrics.outcomes[outcomes.DUPLICATE].inc(known)
        self._metrics.outcomes[outcomes.STORED].inc(len(events) - known)
        self._metrics.duplicates.inc(known)


def _with_none(lines: Iterable[Line], checks: Iterable[KeyCheck]) -> list[KeyCheck | None]:
    """Return the one of *checks*, which are those of the keyed ones of *lines*, for each line."""
    rest = iter(checks)
    return [next(rest) if line.keyed else None for line in lines]


def _repeated(outcome: Appended | Problem, again: bool) -> Appended | Problem:
    """Return the outcome of a line, which is a duplicate when its event stands *again* in the batch."""
    return Appended(outcome.sequence, duplicate=True) if again and isinstance(outcome, Appended) else outcome

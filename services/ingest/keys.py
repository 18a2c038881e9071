"""Whether a key still means the event that it meant first: a retry has the same body, anything else is a mistake.

The broker knows by a message id that it has the event, within its window, but compares no bodies. So a duplicate is
compared here, with what this process remembers, else with the log, else with the corpus. A key that the broker has
forgotten is asked for while the event is being published: in the corpus, and in the log where the corpus has not come
as far as the broker's memory reaches back. That answer is waited for a moment only, because the persister, too, keeps
the first event of an id; what nobody could say is not remembered either.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable

from services.contract.event import Event
from services.eventlog.errors import CorpusAwayError, LogRefusedError, LogUnavailableError
from services.eventlog.protocol import Appended, EventReader, Held, StoredEvent
from services.ingest import problems
from services.ingest.horizon import Horizon
from services.ingest.metrics import CORPUS, LOG, MEMORY, NOBODY, Metrics
from services.ingest.problems import RequestRefusedError
from services.ingest.remembered import Known, Remembered, digest, name_of

#: a duplicate is looked for this long: replicas lag, and persisters are restarted, seconds
COMPARE_SECONDS = 1.0
#: events that are asked of the log at the same time
_QUESTIONS = 64
#: pause before it is looked for again, seconds
_PAUSE_SECONDS = 0.05
_NOTHING_SAID = Held({}, complete=False)


class Keys:
    """Compares what comes under a key with what is stored under it."""

    def __init__(self, reader: EventReader | None, metrics: Metrics, horizon: Horizon, *, wait: float) -> None:
        """Remember nothing yet.

        Args:
            reader: what can be asked; None when nobody can.
            metrics: counts who answered.
            horizon: what the broker has forgotten stands before it.
            wait: seconds for which a question may hold up an answer that the log has given; 0 asks nobody about keys
                that the broker does not know.
        """
        self._reader = reader
        self._checks = metrics.key_checks
        self._horizon = horizon
        self._wait = wait
        self._remembered = Remembered()
        self._questions = asyncio.Semaphore(_QUESTIONS)

    def check(self, events: Iterable[Event]) -> list[KeyCheck]:
        """Begin to find out what the clients' keys of *events* stand for, before they are published.

        There is one question for each consultation. End each check by all means.
        """
        checks = [KeyCheck(self, event, name := name_of(event), self._remembered.get(name)) for event in events]
        unknown: dict[str, list[KeyCheck]] = {}
        for check in checks:
            if check.known is None:
                unknown.setdefault(check.event.consultation, []).append(check)
        if self._reader is not None and self.asks:
            for consultation, of_it in unknown.items():
                ids = {check.event.event_id for check in of_it}
                lookup = asyncio.ensure_future(self._reader.held(consultation, ids, self._horizon.position))
                for check in of_it:
                    check.lookup = lookup
        return checks

    async def hear(self, checks: Iterable[KeyCheck]) -> None:
        """Wait for what is said to *checks*, which the log has answered; for a moment only, in all."""
        open_ones = {check.lookup for check in checks if check.lookup is not None and not check.lookup.done()}
        if open_ones:
            await asyncio.wait(open_ones, timeout=self._wait)

    @property
    def asks(self) -> bool:
        """Whether anybody is asked about keys that the broker does not know."""
        return self._reader is not None and self._wait > 0

    def _answered(self, by: str) -> None:
        self._checks[by].inc()


class KeyCheck:
    """One event under a client's key.

    Attributes:
        event: the event.
        known: what this process remembers of the key.
        lookup: the question what is stored under the key, if it is asked; of all keys of the consultation that came
            together.
    """

    __slots__ = ("_keys", "_name", "event", "known", "lookup")

    def __init__(self, keys: Keys, event: Event, name: bytes, known: Known | None) -> None:
        self.event = event
        self.known = known
        self.lookup: asyncio.Future[Held] | None = None
        self._keys = keys
        self._name = name

    @property
    def answered(self) -> bool:
        """Whether it has been asked what is stored, and an answer came."""
        lookup = self.lookup
        return lookup is not None and lookup.done() and not lookup.cancelled() and lookup.exception() is None

    def must_look(self, appended: Appended) -> bool:
        """Whether :meth:`settle` must look for an event that the log has, and only the log or the corpus can show."""
        known = self.known
        return appended.duplicate and (known is None or appended.sequence < known.last)

    async def settle(self, appended: Appended) -> Appended:
        """Return where the first event with this key stands, once the log has taken the event at *appended*.

        Raises:
            RequestRefusedError: the first one had another body, or there is a first one that nobody can show.
        """
        known, remembered, own = self.known, self._keys._remembered, digest(self.event.body)
        if known is not None and appended.sequence >= known.last:
            return self._compare(known, own, appended, MEMORY)
        if known is not None:  # the log has begun anew
            remembered.forget(self._name)
        if appended.duplicate:
            stored, by = await self._stored(appended.sequence)
            known = Known(stored.sequence, appended.sequence, digest(stored.event.body))
        else:
            known, by = Known(appended.sequence, appended.sequence, own), ""
        if known.digest != own and self.lookup is not None:  # the log may have shown a mistake that came second
            await asyncio.wait({self.lookup}, timeout=COMPARE_SECONDS)
        complete, first = self._heard()
        if first is not None and first.sequence < known.first:
            by = CORPUS if first.persisted else LOG
            known = Known(first.sequence, appended.sequence, digest(first.event.body))
        if complete:
            remembered.put(self._name, known)
        return self._compare(known, own, appended, by)

    def end(self) -> None:
        """Ask no more."""
        if self.lookup is not None and not self.answered:
            self.lookup.cancel()  # an exception has been looked at: nothing is reported as never retrieved

    def _compare(self, known: Known, own: bytes, appended: Appended, by: str) -> Appended:
        if by:
            self._keys._answered(by)
        if known.digest != own:
            raise RequestRefusedError(problems.IDEMPOTENCY_KEY_REUSED)
        if known.last != appended.sequence:
            self._keys._remembered.put(self._name, Known(known.first, appended.sequence, known.digest))
        return Appended(known.first, appended.duplicate or known.first != appended.sequence)

    async def _stored(self, sequence: int) -> tuple[StoredEvent, str]:
        """Return the event that the log has, or had, at *sequence*, and who showed it."""
        if self._keys._reader is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(COMPARE_SECONDS):
                    return await self._look_for(self._keys._reader, sequence)
        self._keys._answered(NOBODY)
        raise RequestRefusedError(problems.KEY_NOT_COMPARED)

    async def _look_for(self, reader: EventReader, sequence: int) -> tuple[StoredEvent, str]:
        """Ask log and corpus by turns, until one of them shows the event."""
        while True:
            with contextlib.suppress(LogUnavailableError, LogRefusedError):
                async with self._keys._questions:
                    stored = await reader.at(sequence)
                if stored is not None and stored.event.message_id == self.event.message_id:
                    return stored, LOG
            # refused: by a persister of another version, or one that cannot send so large an event just now
            with contextlib.suppress(CorpusAwayError, LogUnavailableError, LogRefusedError):
                stored = await reader.find(self.event.consultation, self.event.event_id)
                if stored is not None:
                    return stored, CORPUS
            await asyncio.sleep(_PAUSE_SECONDS)

    def _heard(self) -> tuple[bool, StoredEvent | None]:
        """Return whether there is nothing left to ask, and the first event under the key as far as anybody said."""
        if self.lookup is None:
            return not self._keys.asks, None
        held = self.lookup.result() if self.answered else _NOTHING_SAID
        first = held.events.get(self.event.event_id)
        if first is None and not held.complete:
            self._keys._answered(NOBODY)
        return held.complete, first

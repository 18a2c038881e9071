"""Whether a key still means the event that it meant first: a retry has the same body, anything else is a mistake.

The broker knows by a message id that it has the event, within its window, but compares no bodies. So a duplicate is
compared here, with what this process remembers, else with the log, else with the corpus. A key that the broker has
forgotten is asked for in the corpus, while the event is being published; that answer is waited for a moment only,
because the persister, too, keeps the first event of an id.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

from services.contract.errors import FiqError
from services.contract.event import Event
from services.eventlog.errors import CorpusAwayError, LogUnavailableError
from services.eventlog.protocol import Appended, EventReader, StoredEvent
from services.ingest import problems
from services.ingest.metrics import CORPUS, LOG, MEMORY, NOBODY, Metrics
from services.ingest.problems import RequestRefusedError
from services.ingest.remembered import Known, Remembered, digest

#: a duplicate is looked for this long: replicas lag, and persisters are restarted, seconds
COMPARE_SECONDS = 1.0
#: events that are asked of the log at the same time
_QUESTIONS = 64
#: pause before it is looked for again, seconds
_PAUSE_SECONDS = 0.05


class Keys:
    """Compares what comes under a key with what is stored under it."""

    def __init__(self, reader: EventReader | None, metrics: Metrics, *, wait: float) -> None:
        """Remember nothing yet.

        Args:
            reader: what can be asked; None when nobody can.
            metrics: counts who answered.
            wait: seconds for which the corpus may hold up an answer that the log has given; 0 never asks it about keys
                that the log does not know.
        """
        self._reader = reader
        self._checks = metrics.key_checks
        self._wait = wait
        self._remembered = Remembered()
        self._questions = asyncio.Semaphore(_QUESTIONS)

    def check(self, event: Event) -> KeyCheck:
        """Begin to ask what the client's key of *event* stands for, before it is published; end it by all means."""
        known = self._remembered.get(event)
        lookup = None
        if known is None and self._reader is not None and self._wait > 0:
            lookup = asyncio.ensure_future(self._reader.find(event.consultation, event.event_id))
        return KeyCheck(self, event, known, lookup)

    def _answered(self, by: str) -> None:
        self._checks[by].inc()


class KeyCheck:
    """One event under a client's key."""

    def __init__(
        self, keys: Keys, event: Event, known: Known | None, lookup: asyncio.Future[StoredEvent | None] | None
    ) -> None:
        self._keys = keys
        self._event = event
        self._known = known
        self._lookup = lookup

    async def settle(self, appended: Appended) -> Appended:
        """Return where the first event with this key stands, once the log has taken the event at *appended*.

        Raises:
            RequestRefusedError: the first one had another body, or there is a first one that nobody can show.
        """
        known, remembered = self._known, self._keys._remembered
        if known is not None and appended.sequence >= known.last:
            return self._compare(known, appended, MEMORY)
        if known is not None:  # the log has begun anew
            remembered.forget(self._event)
        if appended.duplicate:
            stored, by = await self._stored(appended.sequence)
            known = Known(stored.sequence, appended.sequence, digest(stored.event.body))
        else:
            known, by = Known(appended.sequence, appended.sequence, digest(self._event.body)), ""
        asked, first = await self._in_corpus()
        if first is not None and first.sequence < known.first:
            known, by = Known(first.sequence, appended.sequence, digest(first.event.body)), CORPUS
        if asked:
            remembered.put(self._event, known)
        return self._compare(known, appended, by)

    def end(self) -> None:
        """Ask no more."""
        lookup = self._lookup
        if lookup is not None and (not lookup.done() or lookup.cancelled() or lookup.exception() is not None):
            lookup.cancel()  # its exception has been looked at: nothing is reported as never retrieved

    def _compare(self, known: Known, appended: Appended, by: str) -> Appended:
        if by:
            self._keys._answered(by)
        if known.digest != digest(self._event.body):
            raise RequestRefusedError(problems.IDEMPOTENCY_KEY_REUSED)
        if known.last != appended.sequence:
            self._keys._remembered.put(self._event, Known(known.first, appended.sequence, known.digest))
        return Appended(known.first, appended.duplicate or known.first != appended.sequence)

    async def _stored(self, sequence: int) -> tuple[StoredEvent, str]:
        """Return the event that the log has, or had, at *sequence*, and who showed it."""
        reader = self._keys._reader
        end = time.monotonic() + COMPARE_SECONDS
        while reader is not None:
            with contextlib.suppress(LogUnavailableError):
                async with self._keys._questions:
                    stored = await reader.at(sequence)
                if stored is not None and stored.event.message_id == self._event.message_id:
                    return stored, LOG
            with contextlib.suppress(CorpusAwayError):
                stored = await reader.find(self._event.consultation, self._event.event_id)
                if stored is not None:
                    return stored, CORPUS
            if time.monotonic() >= end:
                break
            await asyncio.sleep(_PAUSE_SECONDS)
        self._keys._answered(NOBODY)
        raise RequestRefusedError(problems.KEY_NOT_COMPARED)

    async def _in_corpus(self) -> tuple[bool, StoredEvent | None]:
        """Wait a moment for what the corpus says; return whether there is nothing left to ask, and what it holds."""
        keys, lookup = self._keys, self._lookup
        if lookup is None:
            return keys._reader is None or keys._wait == 0, None
        if not lookup.done():
            await asyncio.wait({lookup}, timeout=keys._wait)
        if not lookup.done() or isinstance(lookup.exception(), FiqError):
            keys._answered(NOBODY)
            return False, None
        return True, lookup.result()

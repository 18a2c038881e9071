"""Whether a key still means the event that it meant first: a retry has the same body, anything else is a mistake.

The broker knows the message ids of its window (``FI_DUPLICATE_WINDOW``) but compares no bodies; what it has forgotten
only the corpus knows. So there is one question a *consultation*: which ids does the corpus hold of it? The answer is
kept as a snapshot for half the window, because the broker itself knows what came later. With a snapshot nearly every
event is known to be new without a question, and an id that the corpus holds is compared before anything is published.

Without a snapshot the question is asked while the event is being published, once for all events of the consultation,
and waited for at most ``FI_KEY_LOOKUP_WAIT`` after the log's answer: intake comes first, and the persister, too, keeps
the first event of an id. A consultation with too many ids for a snapshot is asked about id by id.

A duplicate that the broker reports is compared with what this process remembers of its own events, else with the event
in the log, else with the corpus. What could not be found out is not remembered.

An owner that leaves three questions without an answer is not waited for any more, and asked once a second at most,
until it answers again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Awaitable, Iterable
from typing import TypeVar

from fiq.event import Event
from services.core.lifecycle import spawn
from services.ingest import problems
from services.ingest.metrics import CORPUS, LOG, MEMORY, NOBODY, Metrics
from services.ingest.problems import RequestRefusedError
from services.log.errors import CorpusAwayError, LogRefusedError, LogUnavailableError
from services.log.partitions import partition_of
from services.log.protocol import Appended, EventReader, Snapshot
from services.log.questions import Stored, digest_of

#: a duplicate is looked for this long: replicas lag, and persisters are restarted, seconds
COMPARE_SECONDS = 1.0
#: events that are asked of the log at the same time
_QUESTIONS = 64
#: pause before it is looked for again, seconds
_PAUSE_SECONDS = 0.05
#: memory that snapshots may take: 8 bytes an id, and what each takes besides
SNAPSHOT_BYTES = 16 << 20
_SNAPSHOT_BYTES_EACH = 512
#: events of this process that are remembered, some 300 bytes each
REMEMBERED = 32_768
#: questions without an answer after which an owner is not waited for, and seconds between two questions from then on
SILENT_AFTER, PROBE_SECONDS = 3, 1.0

Answer = TypeVar("Answer")
#: what the log, the corpus or the way to them may raise
_AWAY = (CorpusAwayError, LogUnavailableError, LogRefusedError)


class Keys:
    """Compares what comes under a key with what is stored under it. Close it in the end."""

    def __init__(
        self, reader: EventReader | None, metrics: Metrics, *, partitions: int, window: float, wait: float
    ) -> None:
        """Know nothing yet.

        Args:
            reader: what can be asked; None when there is nothing.
            metrics: counts what showed the events that were compared.
            partitions: of the log: each has an owner of its own.
            window: seconds for which the broker knows message ids.
            wait: seconds for which a question may hold up an answer; 0 asks nothing about keys that the broker does
                not know.
        """
        self._reader = reader
        self._checks = metrics.key_checks
        self._partitions = partitions
        self._wait = wait
        self._loop = asyncio.get_running_loop()
        self._snapshots = _Snapshots(window / 2, self._loop)
        self._remembered: OrderedDict[tuple[str, int], Stored] = OrderedDict()
        self._owners = [_Owner() for _ in range(partitions)]
        self._asking: dict[str, asyncio.Task[Snapshot]] = {}
        self._lookups: set[asyncio.Task[None]] = set()
        self._turns = asyncio.Semaphore(_QUESTIONS)

    async def close(self) -> None:
        """End all questions."""
        tasks = [*self._lookups, *self._asking.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def check(self, events: Iterable[Event]) -> list[KeyCheck]:
        """Begin to find out what the clients' keys of *events* stand for, before they are published."""
        checks = [KeyCheck(self, event) for event in events]
        if self._reader is None or not self._wait:
            for check in checks:
                check.sure = True
            return checks
        groups: dict[str, list[KeyCheck]] = {}
        for check in checks:
            groups.setdefault(check.event.consultation, []).append(check)
        for consultation, of_it in groups.items():
            snapshot = self._snapshots.get(consultation)
            if snapshot is not None:
                of_it = [check for check in of_it if check.compare_with(snapshot)]
                for check in of_it:
                    check.certain = snapshot.whole
            if of_it:
                self._look_up(self._reader, consultation, of_it, snapshot)
        return checks

    async def hear(self, checks: Iterable[KeyCheck]) -> None:
        """Wait until *checks* are answered, for a moment only in all."""
        lookups = {check.lookup for check in checks if check.lookup is not None and not check.lookup.done()}
        if lookups:
            await asyncio.wait(lookups, timeout=self._wait)

    # -- questions ----------------------------------------------------------------------------------------------------

    def _look_up(
        self, reader: EventReader, consultation: str, checks: list[KeyCheck], snapshot: Snapshot | None
    ) -> None:
        owner = self._owners[partition_of(consultation, self._partitions)]
        silent = owner.silent
        if silent and not owner.is_due(self._loop.time()):
            return
        lookup = spawn(self._lookups, self._looked_up(reader, owner, consultation, checks, snapshot))
        if not silent:
            for check in checks:
                check.lookup = lookup

    async def _looked_up(
        self,
        reader: EventReader,
        owner: _Owner,
        consultation: str,
        checks: list[KeyCheck],
        snapshot: Snapshot | None,
    ) -> None:
        with contextlib.suppress(*_AWAY):
            if snapshot is None:
                snapshot = await self._asked(reader, owner, consultation)
                checks = [check for check in checks if check.compare_with(snapshot)]
            if checks:
                ids = [check.event.event_id for check in checks]
                found = await self._answer_of(owner, reader.find(consultation, ids))
                for check in checks:
                    check.first, check.sure = found.get(check.event.event_id), True

    async def _asked(self, reader: EventReader, owner: _Owner, consultation: str) -> Snapshot:
        """Ask for a snapshot, together with all who want the same one."""
        asking = self._asking.get(consultation)
        if asking is None:
            asking = self._asking[consultation] = asyncio.create_task(self._ask(reader, owner, consultation))
        return await asyncio.shield(asking)

    async def _ask(self, reader: EventReader, owner: _Owner, consultation: str) -> Snapshot:
        began = self._loop.time()
        try:
            snapshot = await self._answer_of(owner, reader.snapshot(consultation))
        finally:
            del self._asking[consultation]
        self._snapshots.put(consultation, snapshot, began)
        return snapshot

    async def _answer_of(self, owner: _Owner, asking: Awaitable[Answer]) -> Answer:
        """Return the answer to a question, and note whether *owner* gave one in time."""
        late = self._loop.call_later(self._wait, owner.miss)
        try:
            answer = await asking
        except _AWAY:
            if self._loop.time() < late.when():
                owner.miss()
            raise
        finally:
            late.cancel()
        owner.unanswered = 0
        return answer

    # -- what a check needs -------------------------------------------------------------------------------------------

    def _remember(self, event: Event, stored: Stored) -> None:
        self._remembered[event.consultation, event.event_id.int] = stored
        if len(self._remembered) > REMEMBERED:
            self._remembered.popitem(last=False)

    async def _stored(self, event: Event, sequence: int) -> tuple[Stored, str]:
        """Return what the log has, or had, at *sequence* under the id of *event*, and what showed it.

        Raises RequestRefusedError: it could not be shown within a second.
        """
        if self._reader is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(COMPARE_SECONDS):
                    return await self._look_for(self._reader, event, sequence)
        self._checks[NOBODY].inc()
        raise RequestRefusedError(problems.KEY_NOT_COMPARED)

    async def _look_for(self, reader: EventReader, event: Event, sequence: int) -> tuple[Stored, str]:
        """Ask log and corpus by turns, until one of them shows it."""
        while True:
            with contextlib.suppress(LogUnavailableError, LogRefusedError):
                async with self._turns:
                    stored = await reader.at(sequence)
                if stored is not None and stored.event.message_id == event.message_id:
                    return Stored(sequence, digest_of(stored.event.body)), LOG
            with contextlib.suppress(*_AWAY):
                found = await reader.find(event.consultation, [event.event_id])
                if event.event_id in found:
                    return found[event.event_id], CORPUS
            await asyncio.sleep(_PAUSE_SECONDS)


class KeyCheck:
    """One event under a client's key.

    Attributes:
        event: the event.
        first: what the corpus holds under the key, once it was asked.
        sure: whether the corpus was asked, so that *first* is the answer.
        certain: whether a snapshot showed at once that the corpus holds it: the answer need not wait for the log's.
        lookup: the question, while its answer is worth a wait.
    """

    __slots__ = ("_keys", "certain", "event", "first", "lookup", "sure")

    def __init__(self, keys: Keys, event: Event) -> None:
        self.event = event
        self.first: Stored | None = None
        self.sure = self.certain = False
        self.lookup: asyncio.Task[None] | None = None
        self._keys = keys

    def compare_with(self, snapshot: Snapshot) -> bool:
        """Take what *snapshot* shows; return whether the corpus must be asked for this id."""
        if not snapshot.may_hold(self.event.event_id):
            self.sure = True
            return False
        return True

    def must_look(self, appended: Appended) -> bool:
        """Whether :meth:`settle` must ask the log or the corpus for an event."""
        return appended.duplicate and self._before(appended) is None and self._remembered(appended) is None

    async def settle(self, appended: Appended | None) -> Appended:
        """Return where the first event with this key is.

        Args:
            appended: where the log has taken this one; None when it was not published, since :attr:`first` is known.

        Raises RequestRefusedError: the first one had another body, or there is a first one that could not be shown.
        """
        keys, first = self._keys, self.first if appended is None else self._before(appended)
        if first is not None:
            return self._compared(first, CORPUS, duplicate=True)
        if appended is None:
            raise ValueError("an event that was not published needs a first one")
        remembered = self._remembered(appended)
        if remembered is not None:
            same = remembered.sequence == appended.sequence
            return self._compared(remembered, MEMORY, duplicate=appended.duplicate or not same)
        if not self.sure:
            keys._checks[NOBODY].inc()
        if not appended.duplicate:
            if self.sure:
                keys._remember(self.event, Stored(appended.sequence, digest_of(self.event.body)))
            return appended
        stored, by = await keys._stored(self.event, appended.sequence)
        if stored.digest != digest_of(self.event.body) and self.lookup is not None and not self.lookup.done():
            # the log may have shown a mistake that came second
            await asyncio.wait({self.lookup}, timeout=COMPARE_SECONDS)
            first = self._before(appended)
            if first is not None:
                return self._compared(first, CORPUS, duplicate=True)
        if self.sure:
            keys._remember(self.event, stored)
        return self._compared(stored, by, duplicate=True)

    def _before(self, appended: Appended) -> Stored | None:
        """Return what the corpus holds from before *appended*; a quick persister has this very event there already."""
        last = appended.sequence if appended.duplicate else appended.sequence - 1
        return self.first if self.first is not None and self.first.sequence <= last else None

    def _remembered(self, appended: Appended) -> Stored | None:
        """Return what this process stored under the key, unless the log has begun anew since."""
        stored = self._keys._remembered.get((self.event.consultation, self.event.event_id.int))
        return stored if stored is not None and stored.sequence <= appended.sequence else None

    def _compared(self, stored: Stored, by: str, *, duplicate: bool) -> Appended:
        self._keys._checks[by].inc()
        if stored.digest != digest_of(self.event.body):
            raise RequestRefusedError(problems.IDEMPOTENCY_KEY_REUSED)
        return Appended(stored.sequence, duplicate)


class _Snapshots:
    """Snapshots of consultations, the most recently used ones, as long as they are valid.

    Args:
        seconds: how long that is.
        loop: tells the time.
    """

    def __init__(self, seconds: float, loop: asyncio.AbstractEventLoop) -> None:
        self._seconds = seconds
        self._loop = loop
        self._size = 0
        self._kept: OrderedDict[str, tuple[float, Snapshot]] = OrderedDict()

    def get(self, consultation: str) -> Snapshot | None:
        """Return the snapshot of a consultation, or None without a valid one."""
        kept = self._kept.get(consultation)
        if kept is None:
            return None
        until, snapshot = kept
        if self._loop.time() >= until:
            self._drop(consultation)
            return None
        self._kept.move_to_end(consultation)
        return snapshot

    def put(self, consultation: str, snapshot: Snapshot, began: float) -> None:
        """Keep a snapshot that was asked for at *began*, on the loop's clock."""
        self._drop(consultation)
        self._kept[consultation] = began + self._seconds, snapshot
        self._size += snapshot.size + _SNAPSHOT_BYTES_EACH
        while self._size > SNAPSHOT_BYTES and len(self._kept) > 1:
            self._drop(next(iter(self._kept)))

    def _drop(self, consultation: str) -> None:
        kept = self._kept.pop(consultation, None)
        if kept is not None:
            self._size -= kept[1].size + _SNAPSHOT_BYTES_EACH


class _Owner:
    """What is known of the persister that runs a partition.

    Attributes:
        unanswered: questions in a row that were not answered in time.
    """

    __slots__ = ("_due", "unanswered")

    def __init__(self) -> None:
        self.unanswered = 0
        self._due = 0.0

    @property
    def silent(self) -> bool:
        """Whether it is not waited for."""
        return self.unanswered >= SILENT_AFTER

    def miss(self) -> None:
        """Note that a question was not answered in time."""
        self.unanswered += 1

    def is_due(self, now: float) -> bool:
        """Return whether a silent one is to be asked again *now*; the answer is yes once a second."""
        if now < self._due:
            return False
        self._due = now + PROBE_SECONDS
        return True

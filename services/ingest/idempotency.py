"""Idempotency keys: a retry has the same body; another body under a used key is a mistake of the client.

The log knows the message ids of its window (``FI_DUPLICATE_WINDOW``) but compares no bodies. Older ids only the corpus
knows. So ingest asks the owner of the partition once a *consultation*: which ids does the corpus hold of it? The answer
is a snapshot, valid for half the window, because the log itself knows what came later. With a snapshot nearly every
event is known to be new without a question; an id in it is compared before anything is published.

Without a snapshot the question is asked while the event is being published, once for all events of the consultation,
and awaited for at most ``FI_KEY_LOOKUP_WAIT`` after the log's answer: intake comes first, and the persister keeps the
first event of an id in any case. A consultation with too many ids for a snapshot is asked about id by id.

A duplicate that the log reports is compared with what this process stored recently, else with the event in the log,
else with the corpus. A result is remembered only if the corpus answered.

An owner that leaves three questions unanswered is not awaited any more, and asked once a second at most, until it
answers again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from aiohttp import web

from fiq.event import Event
from services.core.lifecycle import spawn
from services.core.retry import retry
from services.ingest import problems
from services.ingest.metrics import CORPUS, LOG, MEMORY, NOBODY, IngestMetrics
from services.ingest.problems import ProblemType
from services.log.errors import CorpusAwayError, LogRefusedError, LogUnavailableError
from services.log.partitions import partition_of
from services.log.protocol import Appended, EventReader, StoredIds
from services.log.questions import Stored, digest_of

#: a duplicate's stored event is looked for this long: replicas lag, and persisters are restarted, seconds
COMPARE_SECONDS = 1.0
#: events that are read from the log at the same time
_MAX_READS = 64
#: how long an answer to the question whether a consultation is new may take, seconds
HOLDS_SECONDS = 1.0
#: pause before the stored event is looked for again, seconds
_PAUSE_SECONDS = 0.05
#: memory of all snapshots: 8 bytes an id, and what each takes besides
SNAPSHOT_BYTES = 16 << 20
_SNAPSHOT_BYTES_EACH = 512
#: events of this process that are remembered, some 300 bytes each
RECENT_EVENTS = 32_768
#: unanswered questions after which an owner is not awaited, and seconds between two questions from then on
SILENT_AFTER, PROBE_SECONDS = 3, 1.0

Answer = TypeVar("Answer")
#: errors of the log, the corpus and the way to them
_UNAVAILABLE = (CorpusAwayError, LogUnavailableError, LogRefusedError)


@dataclass(slots=True)
class KeyLookup:
    """What the corpus holds under the key of *event*.

    Attributes:
        event: under a client's key.
        first: what the corpus holds, once it has answered.
        answered: whether the corpus has answered.
        expected: a snapshot shows that the corpus holds the id: await the answer before publishing.
        task: the question, while its answer is worth a wait.
    """

    event: Event
    first: Stored | None = None
    answered: bool = False
    expected: bool = False
    task: asyncio.Task[None] | None = None

    def first_before(self, appended: Appended) -> Stored | None:
        """Return what the corpus holds from before *appended*: a quick persister may have this very event already."""
        last = appended.sequence if appended.duplicate else appended.sequence - 1
        return self.first if self.first is not None and self.first.sequence <= last else None


class IdempotencyKeys:
    """Compares events with what is stored under their keys: :meth:`look_up`, append, :meth:`wait`, :meth:`resolve`.

    Args:
        reader: reads log and corpus.
        metrics: counts what the events were compared with.
        partitions: of the log; each has its owner.
        window: seconds for which the log knows message ids.
        wait: seconds for which a question may delay an answer; 0 asks nothing about ids that the log does not know.
    """

    def __init__(
        self, reader: EventReader, metrics: IngestMetrics, *, partitions: int, window: float, wait: float
    ) -> None:
        self._reader = reader
        self._checks = metrics.key_checks
        self._partitions = partitions
        self._wait = wait
        self._loop = asyncio.get_running_loop()
        self._snapshots = _SnapshotCache(window / 2, self._loop)
        self._recent: OrderedDict[tuple[str, int], Stored] = OrderedDict()
        self._owners = [_PartitionOwner() for _ in range(partitions)]
        self._asking: dict[str, asyncio.Task[StoredIds]] = {}
        self._lookups: set[asyncio.Task[None]] = set()
        self._reads = asyncio.Semaphore(_MAX_READS)

    async def close(self) -> None:
        """Cancel all questions."""
        tasks = [*self._lookups, *self._asking.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def holds(self, consultation: str) -> bool | None:
        """Return whether the corpus holds anything of *consultation*; None if its owner does not answer in time."""
        snapshot = self._snapshots.get(consultation)
        owner = self._owners[partition_of(consultation, self._partitions)]
        if snapshot is None or not snapshot.size:  # an empty one may be some minutes old
            if owner.silent and not owner.is_due(self._loop.time()):
                return None
            try:
                async with asyncio.timeout(HOLDS_SECONDS):
                    snapshot = await self._shared_snapshot(owner, consultation)
            except (TimeoutError, *_UNAVAILABLE):
                return None
        return not snapshot.whole or snapshot.size > 0

    # -- before the events are published ------------------------------------------------------------------------------

    def look_up(self, events: Iterable[Event]) -> list[KeyLookup]:
        """Start to find out what the corpus holds under the keys of *events*."""
        lookups = [KeyLookup(event) for event in events]
        if not self._wait:
            for lookup in lookups:
                lookup.answered = True
            return lookups
        groups: dict[str, list[KeyLookup]] = {}
        for lookup in lookups:
            groups.setdefault(lookup.event.consultation, []).append(lookup)
        for consultation, group in groups.items():
            snapshot = self._snapshots.get(consultation)
            if snapshot is not None:
                group = _answer_from(snapshot, group)
                for lookup in group:
                    lookup.expected = snapshot.whole
            if group:
                self._ask_owner(consultation, group, snapshot)
        return lookups

    async def wait(self, lookups: Iterable[KeyLookup]) -> None:
        """Wait a moment for the answers to *lookups*."""
        tasks = {lookup.task for lookup in lookups if lookup.task is not None and not lookup.task.done()}
        if tasks:
            await asyncio.wait(tasks, timeout=self._wait)

    def _ask_owner(self, consultation: str, lookups: list[KeyLookup], snapshot: StoredIds | None) -> None:
        owner = self._owners[partition_of(consultation, self._partitions)]
        silent = owner.silent
        if silent and not owner.is_due(self._loop.time()):
            return
        task = spawn(self._lookups, self._find_all(owner, consultation, lookups, snapshot))
        if not silent:
            for lookup in lookups:
                lookup.task = task

    async def _find_all(
        self, owner: _PartitionOwner, consultation: str, lookups: list[KeyLookup], snapshot: StoredIds | None
    ) -> None:
        with contextlib.suppress(*_UNAVAILABLE):
            if snapshot is None:
                lookups = _answer_from(await self._shared_snapshot(owner, consultation), lookups)
            if lookups:
                ids = [lookup.event.event_id for lookup in lookups]
                found = await self._answer_of(owner, self._reader.find(consultation, ids))
                for lookup in lookups:
                    lookup.first, lookup.answered = found.get(lookup.event.event_id), True

    async def _shared_snapshot(self, owner: _PartitionOwner, consultation: str) -> StoredIds:
        """Ask for a snapshot, once for all that want the same one."""
        asking = self._asking.get(consultation)
        if asking is None:
            asking = self._asking[consultation] = asyncio.create_task(self._new_snapshot(owner, consultation))
        return await asyncio.shield(asking)

    async def _new_snapshot(self, owner: _PartitionOwner, consultation: str) -> StoredIds:
        began = self._loop.time()
        try:
            snapshot = await self._answer_of(owner, self._reader.snapshot(consultation))
        finally:
            del self._asking[consultation]
        self._snapshots.put(consultation, snapshot, began)
        return snapshot

    async def _answer_of(self, owner: _PartitionOwner, question: Awaitable[Answer]) -> Answer:
        """Return the answer to *question*, and note whether *owner* gave it in time."""
        late = self._loop.call_later(self._wait, owner.miss)
        try:
            answer = await question
        except _UNAVAILABLE:
            if self._loop.time() < late.when():
                owner.miss()
            raise
        finally:
            late.cancel()
        owner.unanswered = 0
        return answer

    # -- after the log's answer ---------------------------------------------------------------------------------------

    def resolve(self, lookup: KeyLookup, appended: Appended | None) -> Appended | ProblemType | None:
        """Return where the first event with the key is, or a problem if that has another body.

        Args:
            lookup: of the event.
            appended: the log's answer; None when the event was not published because :attr:`KeyLookup.first` is known.

        Returns None if :meth:`resolve_duplicate` must read the first event.
        """
        first = lookup.first if appended is None else lookup.first_before(appended)
        if first is not None:
            return self._compared(lookup, first, CORPUS, duplicate=True)
        if appended is None:
            raise ValueError("an event that was not published needs a first one")
        recent = self._recent.get((lookup.event.consultation, lookup.event.event_id.int))
        if recent is not None and recent.sequence <= appended.sequence:  # else the log has begun anew since
            duplicate = appended.duplicate or recent.sequence != appended.sequence
            return self._compared(lookup, recent, MEMORY, duplicate=duplicate)
        if not lookup.answered:
            self._checks[NOBODY].inc()
        if appended.duplicate:
            return None
        self._remember(lookup, Stored(appended.sequence, digest_of(lookup.event.body)))
        return appended

    async def resolve_duplicate(self, lookup: KeyLookup, appended: Appended) -> Appended | ProblemType:
        """Compare the event with the first one, which the log holds, or held, at the sequence of *appended*.

        Returns a problem if the first event has another body, or could not be read within a second.
        """
        try:
            async with asyncio.timeout(COMPARE_SECONDS):
                stored, source = await self._read_stored(lookup.event, appended.sequence)
        except TimeoutError:
            self._checks[NOBODY].inc()
            return problems.KEY_NOT_COMPARED
        if stored.digest != digest_of(lookup.event.body) and lookup.task is not None and not lookup.task.done():
            # what the log holds may itself be a mistake under a key that only the corpus still knows
            await asyncio.wait({lookup.task}, timeout=COMPARE_SECONDS)
            first = lookup.first_before(appended)
            if first is not None:
                return self._compared(lookup, first, CORPUS, duplicate=True)
        self._remember(lookup, stored)
        return self._compared(lookup, stored, source, duplicate=True)

    def _remember(self, lookup: KeyLookup, stored: Stored) -> None:
        if lookup.answered:
            self._recent[lookup.event.consultation, lookup.event.event_id.int] = stored
            if len(self._recent) > RECENT_EVENTS:
                self._recent.popitem(last=False)

    def _compared(self, lookup: KeyLookup, stored: Stored, source: str, *, duplicate: bool) -> Appended | ProblemType:
        self._checks[source].inc()
        same = stored.digest == digest_of(lookup.event.body)
        return Appended(stored.sequence, duplicate) if same else problems.IDEMPOTENCY_KEY_REUSED

    async def _read_stored(self, event: Event, sequence: int) -> tuple[Stored, str]:
        """Return the event that is stored under the id of *event*, and where it was read."""

        async def read() -> tuple[Stored, str]:
            with contextlib.suppress(LogUnavailableError, LogRefusedError):
                async with self._reads:
                    stored = await self._reader.at(sequence)
                if stored is not None and stored.event.message_id == event.message_id:
                    return Stored(sequence, digest_of(stored.event.body)), LOG
            return (await self._reader.find(event.consultation, [event.event_id]))[event.event_id], CORPUS

        return await retry(read, on=(KeyError, *_UNAVAILABLE), pause=_PAUSE_SECONDS)


def _answer_from(snapshot: StoredIds, lookups: list[KeyLookup]) -> list[KeyLookup]:
    """Answer those of *lookups* whose ids *snapshot* excludes; return the others."""
    rest = []
    for lookup in lookups:
        if snapshot.may_hold(lookup.event.event_id):
            rest.append(lookup)
        else:
            lookup.answered = True
    return rest


class _SnapshotCache:
    """The most recently used snapshots, each valid for *seconds* on the clock of *loop*."""

    def __init__(self, seconds: float, loop: asyncio.AbstractEventLoop) -> None:
        self._seconds = seconds
        self._loop = loop
        self._size = 0
        self._kept: OrderedDict[str, tuple[float, StoredIds]] = OrderedDict()

    def get(self, consultation: str) -> StoredIds | None:
        kept = self._kept.get(consultation)
        if kept is None:
            return None
        expires, snapshot = kept
        if self._loop.time() >= expires:
            self._drop(consultation)
            return None
        self._kept.move_to_end(consultation)
        return snapshot

    def put(self, consultation: str, snapshot: StoredIds, began: float) -> None:
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


class _PartitionOwner:
    """How well the persister of a partition answers."""

    __slots__ = ("_due", "unanswered")

    def __init__(self) -> None:
        self.unanswered = 0
        self._due = 0.0

    @property
    def silent(self) -> bool:
        """Whether its answers are not awaited."""
        return self.unanswered >= SILENT_AFTER

    def miss(self) -> None:
        """Note that a question was not answered in time."""
        self.unanswered += 1

    def is_due(self, now: float) -> bool:
        """Return whether to ask it again although it is silent: once a second."""
        if now < self._due:
            return False
        self._due = now + PROBE_SECONDS
        return True


KEYS = web.AppKey("keys", IdempotencyKeys)

"""Batches of which the stream knows some events already: a retry, as a rule, of all of them.

The broker refuses such a batch as a whole, so its events are published one by one, and it says of each whether it is
new. Two new ones of one consultation are never on their way at the same time: an election between them would change
their order. Those that are known to be stored have their places, so nothing waits for them: without that, a retry of a
large batch would need as many round trips as it has events, and never be done within the deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from uuid import UUID

from services.contract.event import Event
from services.eventlog.errors import CorpusAwayError, LogRefusedError, LogUnavailableError
from services.eventlog.protocol import Appended

#: events of one batch that are on their way at the same time
MAX_SINGLES = 64
#: share of the time that is left in which it is asked which events are known
_ASKING = 0.25

#: publishes one event until a moment on the loop's clock
AppendOne = Callable[[Event, float], Awaitable[Appended]]
#: stores a batch until a moment on the loop's clock, or tells by None that the stream knows one of its events
AppendAtOnce = Callable[[Sequence[Event], float], Awaitable[list[Appended] | None]]
#: says which ids of a consultation are stored: :meth:`services.eventlog.protocol.EventReader.known`
AskKnown = Callable[[str, Collection[UUID]], Awaitable[set[UUID]]]


class PartlyKnown:
    """Stores such batches.

    Args:
        append: publishes one event.
        at_once: stores several.
        known: says which are known; None when that cannot be asked.
    """

    def __init__(self, append: AppendOne, at_once: AppendAtOnce, known: AskKnown | None) -> None:
        self._append = append
        self._at_once = at_once
        self._ask_known = known

    async def store(self, events: Sequence[Event], end: float) -> list[Appended]:
        """Store *events*, one at least, until *end* on the loop's clock; those of a consultation in their order.

        Raises:
            Exception: as ``append``; the first one, when all that could be stored is.
        """
        run = _Run(events, end)
        known = await self._known(events, end)
        await run.lanes(self._append, ([number] for number in known))
        rest = run.left()
        if known and len(rest) > 1:
            stored = await self._at_once([events[number] for number in rest], end)
            run.found.update(zip(rest, stored or (), strict=stored is not None))
        of_each: dict[str, list[int]] = {}
        for number in run.left():
            of_each.setdefault(events[number].consultation, []).append(number)
        await run.lanes(self._append, of_each.values())
        return [run.found[number] for number in range(len(events))]

    async def _known(self, events: Sequence[Event], end: float) -> list[int]:
        """Return the numbers of events that are stored for certain; the others may be, too."""
        if self._ask_known is None:
            return []
        of_each: dict[str, list[UUID]] = {}
        for event in events:
            of_each.setdefault(event.consultation, []).append(event.event_id)
        known: set[tuple[str, UUID]] = set()
        now = asyncio.get_running_loop().time()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(now + _ASKING * (end - now)):
                await asyncio.gather(*(self._ask(self._ask_known, name, ids, known) for name, ids in of_each.items()))
        return [number for number, event in enumerate(events) if (event.consultation, event.event_id) in known]

    async def _ask(self, ask: AskKnown, consultation: str, ids: Sequence[UUID], known: set[tuple[str, UUID]]) -> None:
        # what cannot be asked is stored in order, as if it were new
        with contextlib.suppress(CorpusAwayError, LogUnavailableError, LogRefusedError):
            known.update((consultation, event_id) for event_id in await ask(consultation, ids))


class _Run:
    """One batch on its way."""

    def __init__(self, events: Sequence[Event], end: float) -> None:
        self.found: dict[int, Appended] = {}
        self._events = events
        self._end = end

    def left(self) -> list[int]:
        """Return the numbers of the events that are not stored yet."""
        return [number for number in range(len(self._events)) if number not in self.found]

    async def lanes(self, append: AppendOne, lanes: Iterable[Sequence[int]]) -> None:
        """Store the events with the numbers of each lane one after the other, lanes side by side.

        One that fails ends its lane, since it may still be stored, and what came behind it would stand before it. The
        others are stored all the same; then the first failure is raised.
        """
        failures: dict[int, Exception] = {}
        waiting = iter(lanes)

        async def work() -> None:
            for lane in waiting:
                for number in lane:
                    try:
                        self.found[number] = await append(self._events[number], self._end)
                    except Exception as error:  # noqa: BLE001  # raised below, when the others are done
                        failures[number] = error
                        break

        async with asyncio.TaskGroup() as group:
            for _ in range(min(MAX_SINGLES, len(self._events))):
                group.create_task(work())
        if failures:
            raise failures[min(failures)]

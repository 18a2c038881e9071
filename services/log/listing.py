"""Lists the consultations of all partitions: asks each owner for a page, and then what the chosen ones hold.

A page is joined from one answer of each partition. Events and times are read only for what is on the page.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

from services.log.errors import CorpusAwayError
from services.log.partitions import partition_name, partition_of
from services.log.questions import (
    Active,
    Consultations,
    Question,
    StoredConsultation,
    Summaries,
    decode_active,
    decode_consultations,
    decode_summaries,
)

T = TypeVar("T")

#: a place before all others of :meth:`ConsultationLister.by_activity`
NEWEST = 2**63 - 1, ""


class Ask(Protocol):
    """Asks the owner of a partition; *decode* reads its answer."""

    async def __call__(self, partition: int, question: Question, decode: Callable[[bytes], T], /) -> T:
        """Return the answer."""


class ConsultationLister:
    """Lists the consultations of one store; each method raises as *ask* does.

    Args:
        ask: asks an owner.
        partitions: of the log.
    """

    def __init__(self, ask: Ask, partitions: int) -> None:
        self._ask = ask
        self._partitions = partitions

    async def by_name(self, prefix: str, after: str, limit: int) -> tuple[list[StoredConsultation], bool]:
        """See :meth:`services.log.protocol.EventBrowser.consultations`."""
        question = Consultations(prefix, after, limit)
        asked = (self._ask(partition, question, decode_consultations) for partition in range(self._partitions))
        answers = await asyncio.gather(*asked)
        names = sorted(name for answer in answers for name in answer.names)
        more = len(names) > limit or any(answer.more for answer in answers)
        return await self._summaries(names[:limit]), more

    async def by_activity(
        self, prefix: str, before: tuple[int, str], limit: int
    ) -> tuple[list[StoredConsultation], tuple[int, str] | None]:
        """See :meth:`services.log.protocol.EventBrowser.active_consultations`."""
        question = Active(prefix, before, limit)
        asked = (self._ask(partition, question, decode_active) for partition in range(self._partitions))
        answers = await asyncio.gather(*asked)
        places = sorted((place for answer in answers for place in answer.places), reverse=True)
        more = len(places) > limit or any(answer.more for answer in answers)
        places = places[:limit]
        return await self._summaries([name for _, name in places]), places[-1] if more and places else None

    async def _summaries(self, names: list[str]) -> list[StoredConsultation]:
        by_partition: dict[int, list[str]] = {}
        for name in names:
            by_partition.setdefault(partition_of(name, self._partitions), []).append(name)
        answers = await asyncio.gather(*(self._summaries_of(*item) for item in by_partition.items()))
        found = {summary.consultation: summary for answer in answers for summary in answer}
        return [found[name] for name in names if name in found]

    async def _summaries_of(self, partition: int, names: list[str]) -> Iterable[StoredConsultation]:
        found: list[StoredConsultation] = []
        while names:
            answer = await self._ask(partition, Summaries(names), decode_summaries)
            if len(answer.rest) >= len(names):
                raise CorpusAwayError(f"partition {partition_name(partition)}: it answers nothing")
            found += answer.found
            names = list(answer.rest)
        return found

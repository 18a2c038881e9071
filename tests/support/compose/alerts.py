"""What the real Prometheus of a deployment says of its alerts: now, and over the time of the tests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from aiohttp import ClientError, ClientSession, ClientTimeout

from tests.support.compose.engine import PACE, EngineError
from tests.support.compose.stack import Deployment
from tests.support.polling import eventually

#: a rule's `for` (30 s, 1 minute), several looks at the broker before that, and a busy machine, seconds
FIRES = 180.0
#: the same for the end of an alert; a share of slow answers is one over two minutes
STOPS = 240.0
#: evaluations are 5 s apart: a longer gap is an end, seconds
_GAP = 14.0


@dataclass(frozen=True, slots=True)
class Alert:
    """An alert with labels that tell it from others of its name, as a selector has them: ``node="n1"``."""

    name: str
    labels: str = ""

    @property
    def selector(self) -> str:
        """The series that Prometheus writes while it fires."""
        return f'ALERTS{{alertstate="firing",alertname="{self.name}"{"," if self.labels else ""}{self.labels}}}'


@dataclass(frozen=True, slots=True)
class Told:
    """An alert that fired because of a fault, which lasted from *begin* to *end*, Unix time."""

    alert: Alert
    begin: float
    end: float


class Watch:
    """Asks Prometheus, and remembers which alerts fired for which fault.

    Args:
        deployment: whose Prometheus.
    """

    def __init__(self, deployment: Deployment) -> None:
        self.told: list[Told] = []
        self._deployment = deployment

    async def fires(self, alert: Alert, timeout: float = FIRES) -> None:
        """Wait until *alert* fires."""

        async def told() -> bool:
            return bool(await self.query(alert.selector))

        try:
            await eventually(told, timeout, PACE)
        except AssertionError:
            firing = sorted({found["metric"]["alertname"] for found in await self.query('ALERTS{alertstate="firing"}')})
            raise AssertionError(f"{alert} did not fire within {timeout:g} s, but {firing}") from None

    async def quiet(self, alert: Alert) -> None:
        """Wait until *alert* does not fire, before a fault: one that still does after the last fault tells nothing."""
        await eventually(lambda: self._quiet(alert), STOPS, PACE)

    @asynccontextmanager
    async def during(self, alert: Alert) -> AsyncIterator[None]:
        """Wait at the end of the block, within a fault, until *alert* fires; the fault ends right after it."""
        begin = time.time()
        yield
        await self.fires(alert)
        self.told.append(Told(alert, begin, time.time()))

    async def stopped(self, told: Told) -> None:
        """Wait until Prometheus's own history says that an alert fired during its fault, and stopped after it."""

        async def over() -> bool:
            spans = [span for span in await self._spans(told) if span[1] >= told.begin]
            assert spans, f"{told.alert} never fired"
            first, last = spans[0]
            assert told.begin <= first <= told.end, f"{told.alert} fired at {first:.0f}, the fault: {told}"
            return last + _GAP < time.time()

        await eventually(over, STOPS, PACE)

    async def _quiet(self, alert: Alert) -> bool:
        return bool(await self.query("up")) and not await self.query(alert.selector)

    async def query(self, expression: str) -> list[dict[str, Any]]:
        """Return what *expression* is just now; nothing while Prometheus does not answer."""
        try:
            address = await asyncio.to_thread(self._deployment.address, "prometheus", 9090)
            async with (
                ClientSession(timeout=ClientTimeout(total=10)) as session,
                session.get(f"http://{address}/api/v1/query", params={"query": expression}) as answer,
            ):
                found: list[dict[str, Any]] = (await answer.json())["data"]["result"]
                return found
        except (EngineError, ClientError, TimeoutError):
            return []

    async def _spans(self, told: Told) -> list[tuple[float, float]]:
        """Return when the alert fired since its fault began: from the first to the last evaluation of each time."""
        since = max(60, round(time.time() - told.begin))
        found = await self.query(f"{told.alert.selector}[{since}s]")
        times = sorted({float(at) for series in found for at, _ in series["values"]})
        if not times:
            return []
        starts = [times[0], *(after for before, after in pairwise(times) if after - before > _GAP)]
        ends = [*(before for before, after in pairwise(times) if after - before > _GAP), times[-1]]
        return list(zip(starts, ends, strict=True))

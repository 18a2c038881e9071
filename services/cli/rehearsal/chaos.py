"""kill -9 of the stream's leader and of a persister, in the middle of the load, and their return."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from services.cli.stack import Stack
from services.eventlog.errors import LogUnavailableError
from services.eventlog.jetstream.api import JetStreamApi
from services.eventlog.jetstream.connection import close, connect
from services.eventlog.jetstream.monitor import LogMonitor, PartitionState
from services.eventlog.jetstream.names import STREAM, filter_subject
from services.eventlog.settings import LogSettings

#: how long what was killed stays dead, seconds
DOWN_SECONDS = 2.0
#: how long an election may take, seconds
LEADER_TIMEOUT = 30.0
_POLL = 0.1


@dataclass(slots=True)
class Chaos:
    """Kills parts of a stack and starts them again.

    Attributes:
        stack: what is hurt.
        tell: called with a line for people at each step.
        killed: what was killed, in order.
    """

    stack: Stack
    tell: Callable[[str], None] = lambda _: None
    killed: list[str] = field(default_factory=list)

    async def kill_leader(self) -> None:
        """Kill the node that leads the stream, and start it again after a while."""
        cluster = self.stack.cluster
        index = await asyncio.to_thread(cluster.wait_stream_leader, STREAM, timeout=LEADER_TIMEOUT)
        name = f"{cluster.names[index]}, the stream's leader"
        await asyncio.to_thread(cluster.kill, index)
        self._note(name)
        await asyncio.sleep(DOWN_SECONDS)
        await asyncio.to_thread(cluster.start_node, index)
        self.tell(f"{cluster.names[index]} is started again")

    async def kill_persister(self, index: int) -> None:
        """Kill a persister, and start it again after a while; meanwhile another one takes its partitions."""
        service = self.stack.persisters[index]
        await asyncio.to_thread(service.process.kill)
        self._note(service.name)
        await asyncio.sleep(DOWN_SECONDS)
        await asyncio.to_thread(self.stack.restart, service)
        self.tell(f"{service.name} is started again")

    async def recovered(self) -> None:
        """Wait until every node has caught up and every service is ready.

        Raises:
            ChildFailedError: a process did not come back.
        """
        await asyncio.to_thread(self.stack.cluster.wait_ready)
        for service in self.stack.services:
            await asyncio.to_thread(self.stack.wait_ready, service)

    def _note(self, name: str) -> None:
        self.killed.append(name)
        self.tell(f"kill -9 {name}")


async def drained(settings: LogSettings, *, timeout: float, on_lag: Callable[[int], None] = lambda _: None) -> bool:
    """Wait until every partition has committed all that the stream holds for it; False when time is over.

    Args:
        settings: of the log.
        timeout: seconds.
        on_lag: called with the number of events that are still to come.
    """
    nc = await connect(settings, name="fiq rehearsal", on_closed=lambda _: None)
    monitor = LogMonitor(nc, settings)
    try:
        async with asyncio.timeout(timeout):
            while True:
                await monitor.look()
                lag = await _lag(JetStreamApi(nc), monitor.state.partitions(settings.store))
                on_lag(lag or 0)
                if lag == 0:
                    return True
                await asyncio.sleep(_POLL)
    except TimeoutError:
        return False
    finally:
        await monitor.close()
        await close(nc)


async def _lag(api: JetStreamApi, partitions: Sequence[PartitionState]) -> int | None:
    """Return how many events wait; None while that is not sure."""
    if not partitions or not all(one.owners for one in partitions):
        return None
    lag = sum(one.waiting.events for one in partitions)
    if not lag:  # as far as the owners know: they may not have got the last ones yet
        try:
            for one in partitions:
                next_of = filter_subject(one.partition)
                if await api.leader_message(STREAM, one.committed + 1, next_of=next_of) is not None:
                    lag += 1
        except LogUnavailableError:
            return None
    return lag

"""The user of ingest may do all that batches and comparing keys need."""

from __future__ import annotations

from functools import partial

from fiq.event import Event, new_event_id
from services.log.jetstream.connection import Role
from services.log.jetstream.publisher import Publisher
from services.log.jetstream.reader import JetStreamReader
from services.log.jetstream.stream import provision
from services.log.protocol import Appended
from services.log.settings import LogSettings
from tests.support.polling import eventually
from tests.support.security import Secured


async def test_ingest_appends_batches_and_reads_single_events_back(secured: Secured) -> None:
    """Atomic batches, the single events that stand for one with duplicates, and direct gets; nothing is refused."""
    sizes = {"max_bytes": 2**24, "dead_max_bytes": 2**20}
    async with secured.connected(Role.PROVISIONER) as nc:
        await provision(nc, secured.settings(Role.PROVISIONER, **sizes))
    events = [Event(f"c-{n}", new_event_id(), 1, b'{"event_type":"A"}') for n in range(20)]
    async with secured.connected(Role.INGEST) as nc:
        publisher = Publisher(nc, deadline=20, max_in_flight=10)
        await publisher.start()
        new = await publisher.append_batch(events[:10])
        known = await publisher.append_batch(events)
        stored = await eventually(partial(JetStreamReader(nc, LogSettings()).at, 1))
        await publisher.close()

    assert new == [Appended(sequence, duplicate=False) for sequence in range(1, 11)]
    assert known[:10] == [Appended(sequence, duplicate=True) for sequence in range(1, 11)]
    assert sorted(one.sequence for one in known[10:]) == list(range(11, 21))
    assert stored is not None
    assert stored.event == events[0]
    assert secured.violations() == []

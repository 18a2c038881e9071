"""Questions to one process, over a real connection: answered from what is committed, in turns, or not at all."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import nats
import nats.errors
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from services.corpus import EventStore, Lookup, Record, StoredConsultation
from services.eventlog.errors import LogRefusedError
from services.eventlog.jetstream import reading_wire as wire
from services.eventlog.jetstream.reading_corpus import CorpusReading, Found
from services.eventlog.jetstream.reading_wire import Consultations, Events, Find, Question
from services.persister import answering as answering_module
from services.persister import lookups
from services.persister.answering import MAX_WAITING, Desk
from services.persister.lookups import Job
from services.persister.metrics import Metrics
from services.persister.partition_file import PartitionFile
from tests.support.broker import plain_server, taken
from tests.support.persister import IDENTITY, Stream, delivery, reusing, rig
from tests.support.polling import eventually


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with plain_server(tmp_path_factory.mktemp("nats")) as made:
        yield made


class Asker:
    """A partition file that is answered for, and somebody who asks."""

    def __init__(
        self,
        nc: Client,
        desk: Desk,
        file: PartitionFile,
        hdf5: ThreadPoolExecutor,
        metrics: Metrics,
        work: asyncio.Task[None],
    ) -> None:
        self.nc = nc
        self.desk = desk
        self.file = file
        self.hdf5 = hdf5
        self.metrics = metrics
        self.work = work

    @property
    def store(self) -> EventStore:
        assert self.file.store is not None
        return self.file.store

    async def ask(
        self, question: Question, *, within: float = 10, patience: float | None = None, partition: int = 0
    ) -> Msg:
        subject = f"fi.corpus.main.{partition}.{wire.KIND_OF[type(question)]}"
        return await self.nc.request(subject, wire.encode_question(question, within), timeout=patience or within)

    async def events(self, consultation: str = "c1", after: int = 0, limit: int = 100) -> wire.EventsAnswer:
        return wire.decode_events((await self.ask(Events(consultation, after, limit))).data)

    async def find(self, *pairs: tuple[str, int]) -> wire.FindAnswer:
        question = Find([(consultation, UUID(int=number)) for consultation, number in pairs])
        return wire.decode_found(question, (await self.ask(question)).data)

    async def names(self, prefix: str = "", after: str = "", limit: int = 10) -> tuple[list[str], bool]:
        answer = wire.decode_consultations((await self.ask(Consultations(prefix, after, limit))).data)
        return list(answer.names), answer.more

    def count(self, kind: str, outcome: str) -> float:
        labels = {"kind": kind, "outcome": outcome}
        return self.metrics.registry.get_sample_value("fi_persister_questions_total", labels) or 0.0

    async def in_thread(self, call: object, *arguments: object) -> object:
        return await asyncio.get_running_loop().run_in_executor(self.hdf5, call, *arguments)  # type: ignore[arg-type]


@asynccontextmanager
async def answering(url: str, path: Path) -> AsyncIterator[Asker]:
    """Answer for partition 00, whose new file stands at *path*."""
    nc = await nats.connect(url)
    metrics = Metrics()
    with ThreadPoolExecutor(1) as hdf5:
        file = PartitionFile(
            lambda: EventStore.open(path, expected=IDENTITY) if path.exists() else EventStore.create(path, IDENTITY)
        )
        store = await asyncio.get_running_loop().run_in_executor(hdf5, file.open)
        desk = Desk(nc, "main", hdf5, metrics)
        await desk.open(0, file, store)
        work = asyncio.create_task(desk.run())
        await taken(nc)
        try:
            yield Asker(nc, desk, file, hdf5, metrics, work)
        finally:
            work.cancel()
            with suppress(asyncio.CancelledError):
                await work
            await desk.close(0)
            hdf5.submit(lambda: file.close(abandon=True)).result()
            await nc.close()


@pytest.fixture
async def asker(url: str, tmp_path: Path) -> AsyncIterator[Asker]:
    async with answering(url, tmp_path / "00.h5") as made:
        yield made


def record(sequence: int, body: bytes = b"") -> Record:
    return Record(sequence, 1_000 + sequence, UUID(int=sequence).bytes, body or b'{"event_type":"%d"}' % sequence)


async def fill(asker: Asker, consultation: str, sequences: range) -> None:
    def work() -> None:
        asker.store.append(consultation, [record(sequence) for sequence in sequences])
        asker.store.commit(sequences[-1])

    await asker.in_thread(work)


async def test_events_come_in_pages_with_the_position_that_the_partition_has_reached(asker: Asker) -> None:
    """What the asker adds from the stream begins behind it."""
    await fill(asker, "c1", range(1, 11))
    await fill(asker, "c2", range(11, 13))
    first = await asker.events(limit=7)
    assert ([1, 2, 3, 4, 5, 6, 7], True, 12) == ([row.sequence for row in first.rows], first.more, first.committed)
    rest = await asker.events(after=7)
    assert ([8, 9, 10], False) == ([row.sequence for row in rest.rows], rest.more)
    assert (1008, UUID(int=8), b'{"event_type":"8"}') == (
        rest.rows[0].received_ns,
        rest.rows[0].event_id,
        rest.rows[0].body,
    )
    assert [] == (await asker.events("never")).rows
    assert wire.EventsAnswer(12, [], more=False) == await asker.events(limit=0)


async def test_ids_are_found_in_many_consultations_at_once(asker: Asker) -> None:
    """One question for everything that waits."""
    await fill(asker, "c1", range(1, 101))
    await fill(asker, "c2", range(101, 111))
    answer = await asker.find(("c2", 105), ("c1", 99), ("c1", 105), ("c3", 1), ("c1", 99))
    assert ([], 110) == (answer.rest, answer.committed)
    assert {0: 105, 1: 99, 4: 99} == {index: row.sequence for index, row in answer.found.items()}
    assert b'{"event_type":"99"}' == answer.found[1].body


async def test_an_answer_is_bounded_and_says_where_it_ends(asker: Asker) -> None:
    """A message larger than max_payload would end the connection; a single large event is still told."""
    large = b'{"event_type":"' + b"x" * 200_000 + b'"}'
    largest = b'{"event_type":"' + b"x" * 900_000 + b'"}'

    def work() -> None:
        bodies = [large] * 5 + [largest]
        asker.store.append("c1", [record(number, body) for number, body in enumerate(bodies, start=1)])
        asker.store.commit(6)

    await asker.in_thread(work)
    page = await asker.events()
    assert ([1, 2], True) == ([row.sequence for row in page.rows], page.more)
    assert [largest] == [row.body for row in (await asker.events(after=5)).rows]
    answer = await asker.find(*(("c1", number) for number in (1, 2, 3, 4, 77)), ("c2", 1))
    assert (2, 3, {0, 1, 2, 3, 5}) == (len(answer.found), len(answer.rest), {*answer.found, *answer.rest})


async def test_an_event_larger_than_the_broker_takes_is_an_error_of_its_own(asker: Asker) -> None:
    """The broker's limit may have been lowered since."""
    body = b'{"event_type":"' + b"x" * 1_100_000 + b'"}'
    await asker.in_thread(asker.store.append, "c1", [record(1, body)])
    await asker.in_thread(asker.store.commit, 1)
    answer = await asker.ask(Events("c1", 0, 1))
    assert answer.headers is not None
    assert "413" == answer.headers["Nats-Service-Error-Code"]


async def test_an_event_larger_than_the_broker_takes_fails_nobody_who_asks_for_others(asker: Asker) -> None:
    """Finds of a partition share a question, so that whoever posts would get somebody else's error."""
    large = b'{"event_type":"' + b"x" * 1_100_000 + b'"}'
    await asker.in_thread(asker.store.append, "c1", [record(n, large if n == 3 else b"") for n in range(1, 12)])
    await asker.in_thread(asker.store.commit, 11)
    reading = CorpusReading(asker.nc, "main", timeout=10)
    asked = [("c1", UUID(int=number)) for number in range(1, 13)]
    found = await asyncio.gather(*(reading.find(0, *pair) for pair in asked), return_exceptions=True)
    assert {3} == {number for number, one in enumerate(found, start=1) if isinstance(one, LogRefusedError)}
    rows = [one.row for one in found if isinstance(one, Found)]
    assert [1, 2, *range(4, 12), None] == [None if row is None else row.sequence for row in rows]


async def test_an_event_that_just_fits_comes_however_many_are_asked_for(asker: Asker) -> None:
    """The list of those that must be asked for again counts, too."""
    body = b'{"event_type":"' + b"x" * (asker.nc.max_payload - 1500) + b'"}'
    await asker.in_thread(asker.store.append, "c1", [record(n, body if n == 1 else b"") for n in range(1, 1001)])
    await asker.in_thread(asker.store.commit, 1000)
    reading = CorpusReading(asker.nc, "main", timeout=10)
    found = await asyncio.gather(*(reading.find(0, "c1", UUID(int=number)) for number in range(1, 1001)))
    assert list(range(1, 1001)) == [one.row.sequence for one in found if one.row is not None]


async def test_consultations_are_sorted_and_new_ones_appear(asker: Asker) -> None:
    """Names are read once and kept up to date by the commits."""
    await fill(asker, "c-3", range(10, 11))
    await fill(asker, "c-1", range(11, 12))
    await fill(asker, "b", range(12, 13))
    assert (["b", "c-1"], True) == await asker.names(limit=2)
    assert (["c-1", "c-3"], False) == await asker.names(prefix="c-")
    assert (["c-3"], False) == await asker.names(prefix="c-", after="c-1")
    sorted_ = [delivery(20, consultation="c-2")]
    await asker.in_thread(lambda: asker.file.take(asker.store, sorted_, {}))
    assert (["c-1", "c-2", "c-3"], False) == await asker.names(prefix="c-")


async def test_absence_that_memory_proves_is_told_while_the_thread_is_busy(asker: Asker) -> None:
    """A post whose key is new waits for no batch."""
    await fill(asker, "c1", range(1, 11))
    gate = threading.Event()
    busy = asyncio.ensure_future(asker.in_thread(gate.wait, 60))
    answer = await asker.find(("c1", 77), ("c1", 78))
    assert ([], 10, {}) == (answer.rest, answer.committed, answer.found)
    assert 1.0 == asker.count("find", "memory")
    assert not busy.done()
    gate.set()
    await busy


async def test_what_is_not_committed_is_not_told(asker: Asker) -> None:
    """It might never be: an error says to ask again."""
    await asker.in_thread(lambda: asker.store.append("c1", [record(1)]))
    answer = await asker.ask(Events("c1", 0, 1))
    assert answer.headers is not None
    assert "503" == answer.headers["Nats-Service-Error-Code"]
    assert not answer.data
    await asker.in_thread(asker.store.commit, 1)
    assert [1] == [row.sequence for row in (await asker.events()).rows]


async def test_nobody_answers_for_a_partition_that_is_not_open(asker: Asker) -> None:
    """At once: the broker knows that nobody is subscribed."""
    with pytest.raises(nats.errors.NoRespondersError):
        await asker.ask(Events("c1", 0, 1), partition=1)
    await asker.desk.close(0)
    await taken(asker.nc)
    started = time.monotonic()
    with pytest.raises(nats.errors.NoRespondersError):
        await asker.ask(Events("c1", 0, 1), within=30)
    assert time.monotonic() - started < 10


async def test_a_question_nobody_waits_for_any_more_is_dropped(asker: Asker) -> None:
    """Behind a long batch there would be nothing else."""
    gate = threading.Event()
    busy = asyncio.ensure_future(asker.in_thread(gate.wait, 60))
    with pytest.raises(nats.errors.TimeoutError):
        await asker.ask(Events("c1", 0, 1), within=0.05)
    with pytest.raises(nats.errors.TimeoutError):
        await asker.ask(Events("c1", 0, 1), within=0.05)
    gate.set()
    await busy
    await eventually(lambda: asker.count("events", "stale") == 1.0)


async def test_questions_that_wait_are_bounded(asker: Asker) -> None:
    """One more is turned away at once."""
    gate = threading.Event()
    busy = asyncio.ensure_future(asker.in_thread(gate.wait, 60))
    first = asyncio.ensure_future(asker.ask(Events("c1", 0, 1), within=60))
    await eventually(lambda: asker.hdf5._work_queue.qsize() == 1)  # taken, and behind the batch
    asked = [asyncio.ensure_future(asker.ask(Events("c1", 0, 1), within=60)) for _ in range(MAX_WAITING + 10)]
    await eventually(lambda: asker.count("events", "busy") == 10.0)
    gate.set()
    answers = await asyncio.gather(first, *asked)
    assert 10 == sum(bool(answer.headers) for answer in answers)
    await busy


async def test_a_malformed_question_is_refused_and_quoted_nowhere(asker: Asker) -> None:
    """With the code of a bad request."""
    answer = await asker.nc.request("fi.corpus.main.0.events", b"secret", timeout=10)
    assert answer.headers is not None
    assert ("400", b"") == (answer.headers["Nats-Service-Error-Code"], answer.data)
    assert "secret" not in str(answer.headers)


async def test_a_damaged_consultation_is_told_and_the_partition_goes_on(
    asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader must never be able to stop the writer."""
    await fill(asker, "c1", range(1, 3))

    def damaged(*_: object) -> int:
        raise ValueError("no such chunk")

    with monkeypatch.context() as patch:
        patch.setattr(StoredConsultation, "behind", damaged)
        answer = await asker.ask(Events("c1", 0, 1))
    assert answer.headers is not None
    assert "500" == answer.headers["Nats-Service-Error-Code"]
    await fill(asker, "c1", range(3, 5))
    assert 4 == len((await asker.events()).rows)


async def test_a_long_search_lets_batches_through(asker: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn by turn: a commit waits for one of them, and not for the whole table."""
    await fill(asker, "c1", range(1, 60_001))
    await asker.desk.close(0)
    await asker.in_thread(lambda: asker.file.close(abandon=False))
    store = await asker.in_thread(asker.file.open)  # whose ids are not in memory
    assert isinstance(store, EventStore)
    await asker.desk.open(0, asker.file, store)
    await taken(asker.nc)
    order: list[str] = []
    whole = Job.turn

    def turn(self: Job) -> bytes | None:
        order.append("turn")
        return whole(self)

    monkeypatch.setattr(Job, "turn", turn)
    monkeypatch.setattr(lookups, "TURN_SECONDS", 0.0)
    searching = asyncio.ensure_future(asker.find(("c1", 70_000)))
    while not searching.done():
        await asker.in_thread(order.append, "batch")
    assert {} == (await searching).found
    first, last = order.index("turn"), len(order) - order[::-1].index("turn")
    assert order.count("turn") > 10
    assert "batch" in order[first:last]


class Handles:
    """Notes in which thread the handles of consultations that jobs look into are released."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.opened = 0
        self.released_in: list[int] = []
        whole = Lookup.consultation

        def consultation(lookup: Lookup, name: str) -> StoredConsultation | None:
            stored = whole(lookup, name)
            if stored is not None:
                self.opened += 1
                weakref.finalize(stored, lambda: self.released_in.append(threading.get_ident()))
            return stored

        patch.setattr(Lookup, "consultation", consultation)


@pytest.fixture
def handles(monkeypatch: pytest.MonkeyPatch) -> Handles:
    return Handles(monkeypatch)


async def test_a_job_that_nobody_waits_for_lets_go_of_its_handles_in_the_hdf5_thread(
    asker: Asker, handles: Handles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a commit holds h5py's global lock, closing a handle waits for it: the event loop must not."""
    await fill(asker, "c1", range(1, 11))
    gate = threading.Event()
    whole = Job.turn

    def turn(self: Job) -> bytes | None:
        answer = whole(self)
        gate.wait(60)
        return answer

    monkeypatch.setattr(Job, "turn", turn)
    monkeypatch.setattr(lookups, "TURN_SECONDS", 0.0)
    asking = asyncio.ensure_future(asker.ask(Events("c1", 0, 1), within=0.5, patience=2))
    await eventually(lambda: handles.opened == 1)
    with pytest.raises(nats.errors.TimeoutError):  # the desk's clock began later, and is over for certain
        await asking
    gate.set()
    await eventually(lambda: asker.count("events", "stale") == 1.0)
    thread = await asker.in_thread(threading.get_ident)
    assert (1, [thread]) == (handles.opened, handles.released_in)


async def test_a_job_that_is_cancelled_lets_go_of_its_handles_in_the_hdf5_thread(
    asker: Asker, handles: Handles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the process stops while batches come, so that the job waits for its next turn."""
    await fill(asker, "c1", range(1, 11))
    monkeypatch.setattr(lookups, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(answering_module, "_BUSY_SECONDS", -1.0)
    monkeypatch.setattr(answering_module, "_PAUSE_TURNS", 1e9)
    asking = asyncio.ensure_future(asker.ask(Events("c1", 0, 1), within=60))
    await eventually(lambda: handles.opened == 1)
    await asker.in_thread(int)  # its result comes to the loop behind that of the turn
    asker.work.cancel()
    with suppress(asyncio.CancelledError):
        await asker.work
    thread = await asker.in_thread(threading.get_ident)
    assert (1, [thread]) == (handles.opened, handles.released_in)
    asking.cancel()


async def test_a_job_that_fails_lets_go_of_its_handles_in_the_hdf5_thread(
    asker: Asker, handles: Handles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error keeps the variables of every function that it came through, and the loop is who drops it."""
    whole = Desk._refuse

    async def refuse(self: Desk, *arguments: Any) -> None:
        await asker.in_thread(int)  # the thread has forgotten the error, and the loop holds it
        await whole(self, *arguments)

    monkeypatch.setattr(Desk, "_refuse", refuse)
    await asker.in_thread(asker.store.append, "c1", [record(1, b'{"event_type":"' + b"x" * 1_100_000 + b'"}')])
    await asker.in_thread(asker.store.commit, 1)
    assert (await asker.ask(Events("c1", 0, 1))).headers
    thread = await asker.in_thread(threading.get_ident)
    assert (1, [thread]) == (handles.opened, handles.released_in)


async def test_a_runner_is_heard_as_long_as_its_file_is_open(url: str, tmp_path: Path) -> None:
    """From after the open to before the release; also while it answers for reused ids."""
    nc = await nats.connect(url)
    metrics = Metrics()
    stream = Stream(delivery(1), reusing(2, of=1), delivery(3))
    with rig(tmp_path, stream) as part:
        desk = Desk(nc, "main", part.runner._calls._hdf5, metrics)
        part.runner._desk = desk
        work = asyncio.create_task(desk.run())
        part.runner.start()
        await part.reach(3)
        asker = Asker(nc, desk, part.runner._file, part.runner._calls._hdf5, metrics, work)  # type: ignore[arg-type]
        assert [1, 3] == [row.sequence for row in (await asker.events()).rows]
        await part.runner.stop()
        await taken(nc)
        with pytest.raises(nats.errors.NoRespondersError):
            await asker.events()
        work.cancel()
    await nc.close()

"""Questions to one process, over a real connection: answered from what is committed, in turns, or not at all."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import nats
import nats.errors
import pytest
from nats.aio.msg import Msg

from fiq.corpus import Consultation, EventStore, KnownIds, Lookup, Record, StoreOptions
from services.log import questions as wire
from services.log.jetstream.connection import Connection
from services.log.jetstream.questions import NatsAnswering, Questions
from services.log.listing import NEWEST
from services.log.questions import (
    Active,
    ActiveAnswer,
    Consultations,
    Events,
    Find,
    Ids,
    IdSnapshot,
    Question,
    StoredConsultation,
    Summaries,
    digest_of,
)
from services.persister import answering as answering_module
from services.persister.answering import MAX_PENDING, QuestionResponder
from services.persister.metrics import PersisterMetrics
from services.persister.rounds import Hdf5Thread, PartitionFile
from tests.support.broker import connected, plain_server, taken
from tests.support.persister import IDENTITY, Stream, delivery, reusing, rig
from tests.support.polling import eventually

T = TypeVar("T")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with plain_server(tmp_path_factory.mktemp("nats")) as made:
        yield made


class Asker:
    """A responder for one partition file, and a client that asks it."""

    def __init__(
        self,
        nc: Connection,
        responder: QuestionResponder,
        file: PartitionFile,
        hdf5: Hdf5Thread,
        metrics: PersisterMetrics,
        work: asyncio.Task[None],
    ) -> None:
        self.nc = nc
        self.responder = responder
        self.file = file
        self.hdf5 = hdf5
        self.metrics = metrics
        self.work = work

    @property
    def store(self) -> EventStore:
        return self.file.store

    async def ask(
        self, question: Question, *, within: float = 10, patience: float | None = None, partition: int = 0
    ) -> Msg:
        subject = f"fi.corpus.main.{partition}.{wire.KIND_OF[type(question)]}"
        return await self.nc.request(subject, wire.encode_question(question, within), timeout=patience or within)

    async def events(
        self, consultation: str = "c1", after: int = 0, limit: int = 100, before: int | None = None
    ) -> wire.EventsAnswer:
        return wire.decode_events((await self.ask(Events(consultation, after, limit, before))).data)

    async def find(self, consultation: str, *numbers: int) -> wire.FindAnswer:
        question = Find(consultation, [UUID(int=number) for number in numbers])
        return wire.decode_found((await self.ask(question)).data)

    async def ids(self, consultation: str = "c1") -> IdSnapshot:
        return wire.decode_ids((await self.ask(Ids(consultation))).data)

    async def names(self, prefix: str = "", after: str = "", limit: int = 10) -> tuple[list[str], bool]:
        answer = wire.decode_consultations((await self.ask(Consultations(prefix, after, limit))).data)
        return list(answer.names), answer.more

    @property
    def waiting(self) -> int:
        return len(self.responder._pending)

    async def reopen(self) -> None:
        """Close the file and open it again."""
        await self.responder.close(0)
        await self.in_thread(lambda: self.file.close(abandon=False))
        path = self.store.path
        self.file = PartitionFile(await self.in_thread(lambda: EventStore.open(path, expected=IDENTITY)))
        await self.responder.open(0, self.file)
        await taken(self.nc)

    def count(self, kind: str, outcome: str) -> float:
        labels = {"kind": kind, "outcome": outcome}
        return self.metrics.registry.get_sample_value("fi_persister_questions_total", labels) or 0.0

    async def in_thread(self, call: Callable[..., T], *arguments: object) -> T:
        return await self.hdf5.run(lambda: call(*arguments))


@asynccontextmanager
async def answering(url: str, path: Path, options: StoreOptions | None = None) -> AsyncIterator[Asker]:
    """Answer questions about partition 00, from a new file at *path*."""
    nc = await connected(url)
    metrics = PersisterMetrics()
    with ThreadPoolExecutor(1) as executor:
        hdf5 = Hdf5Thread(executor)
        file = PartitionFile(await hdf5.run(lambda: EventStore.create(path, IDENTITY, options)))
        responder = QuestionResponder(NatsAnswering(nc, "main"), hdf5, metrics)
        await responder.open(0, file)
        work = asyncio.create_task(responder.run())
        await taken(nc)
        try:
            asker = Asker(nc, responder, file, hdf5, metrics, work)
            yield asker
        finally:
            work.cancel()
            with suppress(asyncio.CancelledError):
                await work
            await responder.close(0)
            await hdf5.run(lambda: asker.file.close(abandon=True))
            await nc.close()


@pytest.fixture
async def asker(url: str, tmp_path: Path) -> AsyncIterator[Asker]:
    async with answering(url, tmp_path / "00.h5") as made:
        yield made


def record(sequence: int, body: bytes = b"") -> Record:
    return Record(sequence, 1_000 + sequence, 2, UUID(int=sequence).bytes, body or b'{"event_type":"%d"}' % sequence)


async def fill(asker: Asker, consultation: str, sequences: range) -> None:
    def work() -> None:
        asker.store.append(consultation, [record(sequence) for sequence in sequences])
        asker.store.commit(sequences[-1])

    await asker.in_thread(work)


async def test_events_come_in_pages_with_the_position_that_the_partition_has_reached(asker: Asker) -> None:
    """What the asker adds from the stream begins after it."""
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


async def test_a_page_may_end_before_a_position(asker: Asker) -> None:
    """The last rows below it, in their order, and whether there are earlier ones."""
    await fill(asker, "c1", range(1, 11))
    for before, after, expected in (
        (8, 0, [5, 6, 7]),
        (3, 0, [1, 2]),
        (4, 0, [1, 2, 3]),
        (10**6, 8, [9, 10]),
        (0, 0, []),
    ):
        page = await asker.events(after=after, limit=3, before=before)
        assert (expected, expected[:1] == [5]) == ([row.sequence for row in page.rows], page.more)
        assert [b'{"event_type":"%d"}' % sequence for sequence in expected] == [row.body for row in page.rows]


async def test_ids_are_found_with_the_sequence_and_the_digest_of_the_first_body(asker: Asker) -> None:
    """Bodies do not travel to be compared."""
    await fill(asker, "c1", range(1, 101))
    await fill(asker, "c2", range(101, 111))
    answer = await asker.find("c1", 99, 105, 1, 99)
    assert ([], 110) == (answer.rest, answer.committed)
    assert {UUID(int=99): 99, UUID(int=1): 1} == {event_id: one.sequence for event_id, one in answer.found.items()}
    assert digest_of(b'{"event_type":"99"}') == answer.found[UUID(int=99)].digest
    assert {} == (await asker.find("c3", 1)).found


async def test_all_ids_of_a_consultation_are_sent_as_hashes(asker: Asker) -> None:
    """Also right after a restart, and none of one that does not exist."""
    await fill(asker, "c1", range(1, 1001))
    await fill(asker, "c2", range(1001, 1002))
    await asker.reopen()
    for _ in range(2):
        snapshot = await asker.ids()
        assert (True, 8000) == (snapshot.whole, snapshot.size)
        assert all(snapshot.may_hold(UUID(int=number)) for number in range(1, 1001))
        assert not any(snapshot.may_hold(UUID(int=number)) for number in range(1001, 2000))
        await asker.find("c1", 5)
    assert (True, 0) == ((await asker.ids("c3")).whole, (await asker.ids("c3")).size)


async def test_too_many_ids_are_reported_as_such(asker: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer is a message of the broker."""
    await fill(asker, "c1", range(1, 101))
    monkeypatch.setattr(answering_module, "MAX_IDS", 99)
    assert not (await asker.ids()).whole
    assert [7] == [one.sequence for one in (await asker.find("c1", 7, 700)).found.values()]


async def test_more_ids_than_are_kept_in_memory_are_found_all_the_same(url: str, tmp_path: Path) -> None:
    """A consultation larger than FI_KNOWN_IDS."""
    async with answering(url, tmp_path / "00.h5", StoreOptions(ids=KnownIds(100))) as asker:
        await fill(asker, "c1", range(1, 1001))
        await fill(asker, "c2", range(1001, 1021))
        assert (await asker.ids()).may_hold(UUID(int=1000))
        assert [1, 1000] == [one.sequence for one in (await asker.find("c1", 1, 1000, 1001)).found.values()]


async def test_an_answer_is_bounded_and_says_where_it_ends(asker: Asker) -> None:
    """A message larger than max_payload would end the connection; a single large event is still reported."""
    large = b'{"event_type":"' + b"x" * 200_000 + b'"}'
    largest = b'{"event_type":"' + b"x" * 900_000 + b'"}'

    def work() -> None:
        bodies = [large] * 5 + [largest]
        asker.store.append("c1", [record(number, body) for number, body in enumerate(bodies, start=1)])
        asker.store.commit(6)

    await asker.in_thread(work)
    page = await asker.events()
    assert ([1, 2], True) == ([row.sequence for row in page.rows], page.more)
    page = await asker.events(before=6)
    assert ([4, 5], True) == ([row.sequence for row in page.rows], page.more)
    assert [largest] == [row.body for row in (await asker.events(after=5)).rows]


async def test_an_event_larger_than_the_broker_takes_is_an_error_of_its_own(asker: Asker) -> None:
    """The broker's limit may have been lowered since."""
    body = b'{"event_type":"' + b"x" * 1_100_000 + b'"}'
    await asker.in_thread(asker.store.append, "c1", [record(1, body)])
    await asker.in_thread(asker.store.commit, 1)
    answer = await asker.ask(Events("c1", 0, 1))
    assert answer.headers is not None
    assert "413" == answer.headers["Nats-Service-Error-Code"]


async def test_bodies_digested_for_one_question_are_bounded(asker: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are asked for again, and a single one is compared whatever its size."""
    await fill(asker, "c1", range(1, 101))
    monkeypatch.setattr(answering_module, "DIGESTED_BYTES", 30)
    answer = await asker.find("c1", 5, 6, 7, 700)
    assert ([UUID(int=5)], [UUID(int=6), UUID(int=7)]) == (list(answer.found), answer.rest)
    found, committed = await Questions(asker.nc, "main", timeout=10).find(0, "c1", [UUID(int=n) for n in range(1, 102)])
    assert (100, list(range(1, 101))) == (committed, sorted(one.sequence for one in found.values()))


async def test_consultations_are_sorted_and_new_ones_appear(asker: Asker) -> None:
    """A page begins after the last id, and ends with the prefix."""
    await fill(asker, "c-3", range(10, 11))
    await fill(asker, "c-1", range(11, 12))
    await fill(asker, "b", range(12, 13))
    assert (["b", "c-1"], True) == await asker.names(limit=2)
    assert (["c-1", "c-3"], False) == await asker.names(prefix="c-")
    assert (["c-3"], False) == await asker.names(prefix="c-", after="c-1")
    assert ([], True) == await asker.names(limit=0)
    assert ([], False) == await asker.names(prefix="c-", after="d")
    assert ([], False) == await asker.names(prefix="zz")
    await fill(asker, "c-2", range(20, 21))
    assert (["c-1", "c-2", "c-3"], False) == await asker.names(prefix="c-")


async def test_summaries_are_read_for_some_time_only(asker: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are asked for again; one that does not exist is left out."""
    await fill(asker, "c-1", range(1, 101))
    await fill(asker, "c-2", range(101, 102))
    monkeypatch.setattr(answering_module, "SUMMARY_SECONDS", 0.0)
    names = ["c-2", "none", "c-1"]
    first = wire.decode_summaries((await asker.ask(Summaries(names))).data)
    assert (["c-2"], names[1:]) == ([one.consultation for one in first.found], first.rest)
    ((_, received), *_) = [(one.consultation, one.first_received_ns) for one in first.found]
    assert first.found == [StoredConsultation("c-2", 1, received, received)]
    monkeypatch.setattr(answering_module, "SUMMARY_SECONDS", 60.0)
    rest = wire.decode_summaries((await asker.ask(Summaries(first.rest))).data)
    assert [("c-1", 100)] == [(one.consultation, one.events) for one in rest.found]
    assert rest.found[0].first_received_ns < rest.found[0].last_received_ns
    assert [] == rest.rest


async def test_the_consultations_with_the_newest_events_come_first(asker: Asker) -> None:
    """Page by page, by prefix."""
    for name, sequence in (("c-1", 1), ("c-2", 2), ("b", 3), ("c-3", 4), ("c-1", 5)):
        await fill(asker, name, range(sequence, sequence + 1))

    async def active(prefix: str, before: tuple[int, str], limit: int) -> ActiveAnswer:
        return wire.decode_active((await asker.ask(Active(prefix, before, limit))).data)

    first = await active("", NEWEST, 2)
    assert (["c-1", "c-3"], True) == ([name for _, name in first.places], first.more)
    rest = await active("", first.places[-1], 10)
    assert (["b", "c-2"], False) == ([name for _, name in rest.places], rest.more)
    assert ["c-1", "c-3", "c-2"] == [name for _, name in (await active("c-", NEWEST, 10)).places]
    await asker.reopen()
    assert ["c-1", "c-3", "b", "c-2"] == [name for _, name in (await active("", NEWEST, 10)).places]


async def test_what_is_not_committed_is_not_told(asker: Asker) -> None:
    """It might never be: an error says to ask again."""
    await asker.in_thread(lambda: asker.store.append("c1", [record(1)]))
    answer = await asker.ask(Events("c1", 0, 1))
    assert answer.headers is not None
    assert "503" == answer.headers["Nats-Service-Error-Code"]
    assert not answer.data
    await asker.in_thread(asker.store.commit, 1)
    assert [1] == [row.sequence for row in (await asker.events()).rows]


async def test_a_question_about_a_partition_that_is_not_open_fails(asker: Asker) -> None:
    """At once: the broker knows that there is no subscriber."""
    with pytest.raises(nats.errors.NoRespondersError):
        await asker.ask(Events("c1", 0, 1), partition=1)
    await asker.responder.close(0)
    await taken(asker.nc)
    started = time.monotonic()
    with pytest.raises(nats.errors.NoRespondersError):
        await asker.ask(Events("c1", 0, 1), within=30)
    assert time.monotonic() - started < 10


async def test_a_question_whose_client_no_longer_waits_is_dropped(asker: Asker) -> None:
    """Behind a long batch there would be nothing else."""
    gate = threading.Event()
    busy = asyncio.ensure_future(asker.in_thread(gate.wait, 60))
    with pytest.raises(nats.errors.TimeoutError):
        await asker.ask(Events("c1", 0, 1), within=0.05)
    with pytest.raises(nats.errors.TimeoutError):
        await asker.ask(Events("c1", 0, 1), within=0.05)
    await asyncio.sleep(0.5)  # its time begins when it arrives, which may be later than when it was asked
    gate.set()
    await busy
    await eventually(lambda: asker.count("events", "stale") == 2.0)


async def test_questions_that_wait_are_bounded(asker: Asker) -> None:
    """One more is turned away at once."""
    gate = threading.Event()
    busy = asyncio.ensure_future(asker.in_thread(gate.wait, 60))
    asked = [asyncio.ensure_future(asker.ask(Events("c1", 0, 1), within=60)) for _ in range(MAX_PENDING + 10)]
    await eventually(lambda: asker.count("events", "busy") == 10.0)
    gate.set()
    answers = await asyncio.gather(*asked)
    assert 10 == sum(bool(answer.headers) for answer in answers)
    await busy


async def test_a_malformed_question_is_refused_and_quoted_nowhere(asker: Asker) -> None:
    """With the code of a bad request."""
    answer = await asker.nc.request("fi.corpus.main.0.events", b"secret", timeout=10)
    assert answer.headers is not None
    assert ("400", b"") == (answer.headers["Nats-Service-Error-Code"], answer.data)
    assert "secret" not in str(answer.headers)


async def test_a_damaged_consultation_is_reported_and_the_partition_goes_on(
    asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader must never be able to stop the writer."""
    await fill(asker, "c1", range(1, 3))

    def damaged(*_: object) -> int:
        raise ValueError("no such chunk")

    with monkeypatch.context() as patch:
        patch.setattr(Consultation, "first_after", damaged)
        answer = await asker.ask(Events("c1", 0, 1))
    assert answer.headers is not None
    assert "500" == answer.headers["Nats-Service-Error-Code"]
    await fill(asker, "c1", range(3, 5))
    assert 4 == len((await asker.events()).rows)


async def test_a_job_ends_after_some_milliseconds(asker: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits is answered in one go, and a round comes in between when that gets long."""
    monkeypatch.setattr(answering_module, "JOB_SECONDS", 0.0)
    await fill(asker, "c1", range(1, 3))
    gate = threading.Event()
    order: list[str] = []
    busy = asyncio.ensure_future(asker.in_thread(gate.wait, 60))
    whole = QuestionResponder._answer_some

    def answer_some(self: QuestionResponder, pending: Any) -> Any:
        made = whole(self, pending)
        order.append(f"job {len(made)}")
        return made

    monkeypatch.setattr(QuestionResponder, "_answer_some", answer_some)
    asked = [asyncio.ensure_future(asker.ids()) for _ in range(3)]
    await eventually(lambda: asker.waiting == 3)
    gate.set()
    await asyncio.gather(busy, *asked)
    assert ["job 1"] * 3 == order
    monkeypatch.setattr(answering_module, "JOB_SECONDS", 60.0)
    order.clear()
    gate.clear()
    busy = asyncio.ensure_future(asker.in_thread(gate.wait, 60))
    asked = [asyncio.ensure_future(asker.ids()) for _ in range(9)]
    await eventually(lambda: asker.waiting == 9)
    gate.set()
    await asyncio.gather(busy, *asked)
    assert 9 == sum(int(one[4:]) for one in order)
    assert len(order) <= 2


class Handles:
    """Notes in which thread the handles of consultations that jobs look into are released."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.opened = 0
        self.released_in: list[int] = []
        whole = Lookup.consultation

        def consultation(lookup: Lookup, name: str) -> Consultation | None:
            stored = whole(lookup, name)
            if stored is not None:
                self.opened += 1
                weakref.finalize(stored, lambda: self.released_in.append(threading.get_ident()))
            return stored

        patch.setattr(Lookup, "consultation", consultation)


@pytest.fixture
def handles(monkeypatch: pytest.MonkeyPatch) -> Handles:
    return Handles(monkeypatch)


async def test_a_question_releases_its_handles_in_the_hdf5_thread(asker: Asker, handles: Handles) -> None:
    """Closing one waits for h5py's lock, which a commit may have: the event loop must not. Errors hold handles, too."""
    await asker.in_thread(asker.store.append, "c1", [record(1, b'{"event_type":"' + b"x" * 1_100_000 + b'"}')])
    await asker.in_thread(asker.store.commit, 1)
    assert (await asker.ask(Events("c1", 0, 1))).headers
    thread = await asker.in_thread(threading.get_ident)
    assert (1, [thread]) == (handles.opened, handles.released_in)


async def test_a_runner_answers_while_its_file_is_open(url: str, tmp_path: Path) -> None:
    """From its opening to its release."""
    nc = await connected(url)
    stream = Stream(delivery(1), reusing(2, of=1), delivery(3))
    async with rig(tmp_path, stream, answering=NatsAnswering(nc, "main")) as part:
        assert part.responder is not None
        work = asyncio.create_task(part.responder.run())
        part.runner.start()
        await part.reach(3)
        assert part.store is not None
        asker = Asker(nc, part.responder, PartitionFile(part.store), part.rounds.hdf5, part.metrics, work)
        assert [1, 3] == [row.sequence for row in (await asker.events()).rows]
        await part.runner.stop()
        await taken(nc)
        with pytest.raises(nats.errors.NoRespondersError):
            await asker.events()
        work.cancel()
    await nc.close()

"""A key means the first event under it, whether the broker or a persister still knows it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from fiq.event import Event, event_id_from_key
from services.log.protocol import SequencedEvent
from services.log.settings import LogSettings
from tests.support.ingest import Edge, MemoryLog, MemoryReader, Reply, running_edge
from tests.support.polling import eventually

BODY = b'{"event_type":"A","payload":1}'
OTHER = b'{"event_type":"A","payload":2}'


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    async with running_edge() as edge:
        yield edge


def reader_of(edge: Edge) -> MemoryReader:
    return edge.log.reader


def outcome(reply: Reply) -> tuple[int, str | int, bool]:
    """Return status, sequence or problem, and whether it is called a duplicate."""
    document = reply.json
    return reply.status, document.get("sequence") or document["type"], document.get("duplicate", False)


REUSED = (422, "/problems/idempotency-key-reused", False)


def persisted(key: str, body: bytes, sequence: int = 7) -> SequencedEvent:
    return SequencedEvent(sequence, Event("c-1", event_id_from_key(key), 1, body), written_ns=2)


def log_from(sequence: int) -> MemoryLog:
    """Return a log whose next event gets *sequence*."""
    return MemoryLog(events=[Event("c-0", event_id_from_key(f"{n}"), 1, BODY) for n in range(1, sequence)])


async def test_a_key_with_another_body_is_refused_and_the_first_event_stays(edge: Edge) -> None:
    """422: one of the two would be lost silently otherwise."""
    await edge.post("c-1", BODY, Idempotency_Key="k")

    assert outcome(await edge.post("c-1", OTHER, Idempotency_Key="k")) == REUSED
    assert outcome(await edge.post("c-1", BODY, Idempotency_Key="k")) == (202, 1, True)
    assert [BODY] == [event.body for event in edge.log.events]
    assert edge.metric("fi_ingest_publishes_total", outcome="key_reused") == 1.0
    assert edge.metric("fi_ingest_duplicates_total") == 1.0


async def test_bodies_are_compared_as_they_are_stored(edge: Edge) -> None:
    """A raw line break is a space there, so the two are one event."""
    await edge.post("c-1", b'{"event_type":"A",\n"payload":1}', Idempotency_Key="k")

    assert outcome(await edge.post("c-1", b'{"event_type":"A", "payload":1}', Idempotency_Key="k")) == (202, 1, True)


async def test_what_this_process_stored_lately_is_compared_without_asking_anybody(edge: Edge) -> None:
    """Most retries come soon, and to the same process."""
    await edge.post("c-1", BODY, Idempotency_Key="k")
    asked = list(reader_of(edge).asked)

    await edge.post("c-1", BODY, Idempotency_Key="k")
    await edge.post("c-1", OTHER, Idempotency_Key="k")

    assert reader_of(edge).asked == asked
    assert edge.metric("fi_ingest_key_checks_total", by="memory") == 2.0


async def test_what_another_process_stored_is_compared_with_the_log(edge: Edge) -> None:
    """By the position that the broker names."""
    edge.log.events.append(Event("c-1", event_id_from_key("k"), 1, BODY))

    assert outcome(await edge.post("c-1", OTHER, Idempotency_Key="k")) == REUSED
    assert outcome(await edge.post("c-1", BODY, Idempotency_Key="k")) == (202, 1, True)
    assert edge.metric("fi_ingest_key_checks_total", by="log") == 1.0


async def test_what_was_trimmed_from_the_log_is_compared_with_the_corpus(edge: Edge) -> None:
    """The broker still knows the id, its message is gone."""
    edge.log.events.append(Event("c-1", event_id_from_key("k"), 1, BODY))
    reader_of(edge).trimmed.add(1)
    reader_of(edge).corpus.append(persisted("k", BODY, sequence=1))

    assert outcome(await edge.post("c-1", OTHER, Idempotency_Key="k")) == REUSED
    assert outcome(await edge.post("c-1", BODY, Idempotency_Key="k")) == (202, 1, True)
    assert edge.metric("fi_ingest_key_checks_total", by="corpus") == 2.0


async def test_a_duplicate_that_cannot_be_read_is_503(edge: Edge) -> None:
    """202 might be a lie, 422 too. The same key is safe to retry."""
    edge.log.events.append(Event("c-1", event_id_from_key("k"), 1, BODY))
    reader_of(edge).silent = True

    reply = await edge.post("c-1", BODY, Idempotency_Key="k")

    assert outcome(reply) == (503, "/problems/key-not-compared", False)
    assert reply.headers["Retry-After"] == "2"
    reader_of(edge).silent = False
    assert outcome(await edge.post("c-1", BODY, Idempotency_Key="k")) == (202, 1, True)


async def test_a_replica_that_lags_is_asked_again(edge: Edge) -> None:
    """Any replica answers, and the newest events may not be there yet."""
    edge.log.events.append(Event("c-1", event_id_from_key("k"), 1, BODY))
    reader_of(edge).trimmed.add(1)
    asyncio.get_running_loop().call_later(0.2, reader_of(edge).trimmed.clear)

    assert outcome(await edge.post("c-1", BODY, Idempotency_Key="k")) == (202, 1, True)


async def test_a_key_that_the_broker_has_forgotten_is_found_in_the_corpus() -> None:
    """The first sequence is the answer, however long ago that was; the copy in the log is dropped by the persister."""
    async with running_edge(log_from(10)) as edge:
        reader_of(edge).corpus += [persisted("k", BODY), persisted("l", BODY)]

        assert outcome(await edge.post("c-1", BODY, Idempotency_Key="k")) == (202, 7, True)
        assert outcome(await edge.post("c-1", OTHER, Idempotency_Key="l")) == REUSED


async def test_the_first_body_counts_also_when_the_second_one_is_sent_again() -> None:
    """The second one waits in the log for the persister to set it aside; it must not look like the first."""
    async with running_edge(log_from(10)) as edge:
        reader_of(edge).corpus.append(persisted("k", BODY))

        replies = [await edge.post("c-1", body, Idempotency_Key="k") for body in (OTHER, OTHER, BODY)]

        assert [outcome(reply) for reply in replies] == [REUSED, REUSED, (202, 7, True)]


async def test_the_first_body_counts_also_for_a_process_that_only_sees_the_second_one() -> None:
    """Another process has published the second one: log and corpus disagree, and the corpus has the first."""
    async with running_edge(log_from(10)) as edge:
        edge.log.events.append(Event("c-1", event_id_from_key("k"), 1, OTHER))
        reader_of(edge).corpus.append(persisted("k", BODY))

        assert outcome(await edge.post("c-1", OTHER, Idempotency_Key="k")) == REUSED


async def test_an_event_that_was_persisted_before_its_answer_is_new(edge: Edge) -> None:
    """A quick persister: what the corpus holds is this very event."""
    reader_of(edge).corpus.append(persisted("k", BODY, sequence=1))

    assert outcome(await edge.post("c-1", BODY, Idempotency_Key="k")) == (202, 1, False)


async def test_a_slow_corpus_delays_an_answer_only_so_long() -> None:
    """FI_KEY_LOOKUP_WAIT; then the log's word is the answer, and the persister sees to the rest."""
    async with running_edge(log_from(10), key_lookup_wait=0.1) as edge:
        reader_of(edge).gate = gate = asyncio.Event()
        reader_of(edge).corpus.append(persisted("k", OTHER))

        started = time.monotonic()
        reply = await edge.post("c-1", BODY, Idempotency_Key="k")

        assert outcome(reply) == (202, 10, False)
        assert 0.1 <= time.monotonic() - started < 5
        assert edge.metric("fi_ingest_key_checks_total", by="nobody") == 1.0
        gate.set()
        assert outcome(await edge.post("c-1", BODY, Idempotency_Key="k")) == REUSED  # nothing wrong was remembered


async def test_what_could_not_be_found_out_is_not_remembered() -> None:
    """Persisters are away when the key comes again, and hold it all the same."""
    async with running_edge(log_from(10)) as edge:
        reader_of(edge).silent = True
        reader_of(edge).corpus.append(persisted("k", OTHER))

        assert outcome(await edge.post("c-1", BODY, Idempotency_Key="k")) == (202, 10, False)
        assert edge.metric("fi_ingest_key_checks_total", by="nobody") == 1.0
        reader_of(edge).silent = False
        assert outcome(await edge.post("c-1", BODY, Idempotency_Key="k")) == REUSED
        assert edge.metric("fi_ingest_key_checks_total", by="memory") == 0.0


async def test_there_is_one_question_for_a_consultation() -> None:
    """Its answer is good for half of the broker's window, whatever comes meanwhile."""
    async with running_edge() as edge:
        for consultation in ("c-1", "c-2"):
            for number in range(20):
                await edge.post(consultation, BODY, Idempotency_Key=f"k{number}")

        assert reader_of(edge).asked == ["snapshot", "snapshot"]


async def test_events_that_come_together_share_the_question() -> None:
    """Also while there is no answer yet."""
    async with running_edge() as edge:
        reader_of(edge).gate = gate = asyncio.Event()
        posts = [asyncio.create_task(edge.post("c-1", BODY, Idempotency_Key=f"k{number}")) for number in range(20)]
        await eventually(lambda: len(edge.log.events) == 20)
        gate.set()
        replies = await asyncio.gather(*posts)

        assert [202] * 20 == [reply.status for reply in replies]
        assert reader_of(edge).asked == ["snapshot"]


async def test_a_snapshot_is_renewed_before_the_broker_forgets_what_came_after_it() -> None:
    """Half of FI_DUPLICATE_WINDOW."""
    async with running_edge(log_settings=LogSettings(duplicate_window=0.2)) as edge:
        await edge.post("c-1", BODY, Idempotency_Key="k")

        async def asked_again() -> bool:
            await edge.post("c-1", BODY, Idempotency_Key="l")
            return reader_of(edge).asked == ["snapshot", "snapshot"]

        await eventually(asked_again)


async def test_snapshots_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The consultation that was unused for longest is asked about again."""
    monkeypatch.setattr("services.ingest.idempotency.SNAPSHOT_BYTES", 2000)
    async with running_edge() as edge:
        for consultation in ("c-1", "c-2", "c-3", "c-1", "c-4", "c-1", "c-2"):
            await edge.post(consultation, BODY, Idempotency_Key="k")

        assert 5 == len(reader_of(edge).asked)


async def test_what_a_snapshot_shows_is_compared_and_not_published(edge: Edge) -> None:
    """The event is committed: the answer is its first sequence, and the log gets no copy."""
    reader_of(edge).corpus += [persisted("k", BODY), persisted("l", BODY)]
    await edge.post("c-1", BODY, Idempotency_Key="other")

    assert outcome(await edge.post("c-1", BODY, Idempotency_Key="k")) == (202, 7, True)
    assert outcome(await edge.post("c-1", OTHER, Idempotency_Key="l")) == REUSED
    assert 1 == len(edge.log.events)
    assert reader_of(edge).asked == ["snapshot", "find", "find"]
    assert edge.metric("fi_ingest_key_checks_total", by="corpus") == 2.0


async def test_what_the_corpus_does_not_hold_after_all_is_published(edge: Edge) -> None:
    """A snapshot holds hashes: one in many million is wrong."""
    reader_of(edge).corpus.append(persisted("k", BODY))
    await edge.post("c-1", BODY, Idempotency_Key="other")
    reader_of(edge).corpus.clear()

    assert outcome(await edge.post("c-1", BODY, Idempotency_Key="k")) == (202, 2, False)


async def test_of_too_many_ids_each_is_asked_for_while_its_event_is_published() -> None:
    """A snapshot of a huge consultation would not fit into a message."""
    async with running_edge(log_from(10)) as edge:
        reader_of(edge).too_many = True
        reader_of(edge).corpus.append(persisted("k", BODY))

        replies = [await edge.post("c-1", BODY, Idempotency_Key=key) for key in ("a", "b", "k")]

        assert [(202, 10, False), (202, 11, False), (202, 7, True)] == [outcome(reply) for reply in replies]
        assert reader_of(edge).asked == ["snapshot", "find", "find", "find"]


async def test_an_owner_that_does_not_answer_is_not_waited_for_after_three_questions() -> None:
    """A frozen persister, a hung disk; when it answers again keys are compared again."""
    async with running_edge(log_from(10), key_lookup_wait=0.2, log_settings=LogSettings(partitions=1)) as edge:
        reader_of(edge).gate = gate = asyncio.Event()
        reader_of(edge).corpus.append(persisted("k", OTHER))

        async def seconds(number: int) -> float:
            started = time.monotonic()
            await edge.post("c-1", BODY, Idempotency_Key=f"k{number}")
            return time.monotonic() - started

        # one question a consultation: the three that wait are of three
        for number in range(3):
            started = time.monotonic()
            await edge.post(f"d-{number}", BODY, Idempotency_Key="k")
            assert time.monotonic() - started >= 0.2
        assert sum([await seconds(number) for number in range(20)]) < 2.0
        assert edge.metric("fi_ingest_key_checks_total", by="nobody") >= 20.0
        gate.set()

        async def compared() -> bool:
            return outcome(await edge.post("c-1", BODY, Idempotency_Key="k")) == REUSED

        await eventually(compared)


async def test_with_no_wait_the_corpus_is_never_asked_about_new_keys() -> None:
    """FI_KEY_LOOKUP_WAIT=0."""
    async with running_edge(key_lookup_wait=0.0) as edge:
        await edge.post("c-1", BODY, Idempotency_Key="k")

        assert reader_of(edge).asked == []


async def test_an_event_without_a_key_asks_no_persister(edge: Edge) -> None:
    """Its id was made a moment ago."""
    await edge.post("c-1", BODY)

    assert reader_of(edge).asked == []


async def test_no_question_outlives_the_service() -> None:
    """Whatever became of the event."""
    async with running_edge() as edge:
        reader_of(edge).gate = asyncio.Event()
        edge.log.error = RuntimeError("x")
        await edge.post("c-1", BODY, Idempotency_Key="k")

    assert not [task for task in asyncio.all_tasks() if "Keys." in repr(task)]


def batch(*payloads: int) -> bytes:
    return b"\n".join(b'{"event_type":"A","payload":%d}' % payload for payload in payloads)


async def post_batch(edge: Edge, body: bytes, key: str = "k") -> Reply:
    headers = {"Content-Type": "application/x-ndjson", "Idempotency-Key": key}
    return await edge.request("POST", "/consultations/c-1/events/batch", data=body, headers=headers)


async def test_all_lines_of_a_consultation_are_one_question(edge: Edge) -> None:
    """A thousand questions for each new batch would cost more than reading it."""
    await post_batch(edge, batch(1, 2, 3))
    assert reader_of(edge).asked == ["snapshot"]

    own = b'{"event_type":"A","event_id":"a"}\n{"event_type":"A","event_id":"b"}\n'
    await post_batch(edge, own + batch(4, 5), key="l")
    assert reader_of(edge).asked == ["snapshot"]


async def test_a_line_is_known_although_the_first_one_is_new() -> None:
    """The batch before it was torn by a deadline, or had other lines: each line is looked for itself."""
    async with running_edge(log_from(10)) as edge:
        reader_of(edge).corpus += [persisted("k:2", batch(2), sequence=2), persisted("k:3", batch(3), sequence=3)]

        again = await post_batch(edge, batch(1, 2, 9))

        assert [(result.get("sequence"), result.get("duplicate")) for result in again.json["results"]] == [
            (10, None),
            (2, True),
            (None, None),
        ]
        assert (422, [3]) == (again.status, [wrong["line"] for wrong in again.json["lines"]])


async def test_a_batch_that_the_broker_has_forgotten_is_found_line_by_line() -> None:
    """Each line's first sequence, and the line that is another event now."""
    async with running_edge(log_from(10)) as edge:
        first = [persisted(f"k:{n}", batch(n), sequence=n) for n in (1, 2, 3)]
        reader_of(edge).corpus += first

        again = await post_batch(edge, batch(1, 2, 3))
        assert [(1, True), (2, True), (3, True)] == [
            (result["sequence"], result["duplicate"]) for result in again.json["results"]
        ]
        other = await post_batch(edge, batch(1, 9, 3))
        assert (422, [2]) == (other.status, [wrong["line"] for wrong in other.json["lines"]])

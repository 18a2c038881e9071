"""Ingest and the owner of a partition over real sockets."""

from __future__ import annotations

import asyncio
import stat
import time
from pathlib import Path

import pytest
import zmq

from services.log.errors import LogAccessError, LogFullError, LogRefusedError, LogUnavailableError
from services.log.protocol import Appended, Fate, Outcome
from services.log.zeromq import wire
from services.log.zeromq.links import SILENT_SECONDS, Link, ZeroMqWriter
from services.log.zeromq.log import GONE_SECONDS
from services.log.zeromq.sockets import Address
from services.log.zeromq.wire import State
from tests.support.polling import eventually
from tests.support.zeromq import event, links_to, make_keys, owner_of


def ipc(folder: Path) -> Address:
    return Address(f"zmq+ipc://{folder}/s", "main")


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


async def up(link: Link) -> None:
    await eventually(lambda: link.up)


async def test_an_append_returns_the_sequence_after_the_commit(tmp_path: Path) -> None:
    """And not before: nothing is answered while nothing is acknowledged."""
    async with owner_of(ipc(tmp_path), after=41) as owner, links_to(ipc(tmp_path)) as links:
        await up(links[0])
        owner.commits.clear()

        first = links[0].append(event(), soon())
        second = links[0].append(event(), soon())
        await eventually(lambda: owner.follower.ready == 2)
        assert not first.done()
        owner.commits.set()

        assert [Appended(42, False), Appended(43, False)] == [await first, await second]


async def test_an_append_says_what_became_of_the_event(tmp_path: Path) -> None:
    """A copy has the first one's sequence, also one with another body; poison is refused."""
    async with owner_of(ipc(tmp_path)) as owner, links_to(ipc(tmp_path)) as links:
        await up(links[0])
        owner.outcomes |= {
            1: Outcome(Fate.DUPLICATE, 7),
            2: Outcome(Fate.CONFLICT, 8),
            3: Outcome(Fate.POISON),
        }

        assert Appended(7, True) == await links[0].append(event(), soon())
        assert Appended(8, True) == await links[0].append(event(), soon())
        with pytest.raises(LogRefusedError):
            await links[0].append(event(), soon())


async def test_without_an_owner_an_append_fails_at_once(tmp_path: Path) -> None:
    """Nothing is queued for an owner that may never come."""
    async with owner_of(ipc(tmp_path), partition=1), links_to(ipc(tmp_path)) as links:
        await up(links[1])

        with pytest.raises(LogUnavailableError, match="partition 00: no persister has it open"):
            links[0].append(event(), soon())
        assert 0 == links[0].in_flight


async def test_the_end_of_an_owner_is_seen_at_once_and_the_next_one_gets_what_was_not_answered(tmp_path: Path) -> None:
    """In the order in which it was sent, under the same ids."""
    bodies = [b'{"event_type":"%d"}' % n for n in range(20)]
    async with links_to(ipc(tmp_path)) as links:
        async with owner_of(ipc(tmp_path)) as owner:
            await up(links[0])
            owner.commits.clear()
            answers = [links[0].append(event(body=body), soon(20)) for body in bodies]
            await eventually(lambda: owner.follower.ready == 20)
        began = time.monotonic()
        await eventually(lambda: not links[0].up)
        assert time.monotonic() - began < 0.5
        with pytest.raises(LogUnavailableError):
            links[0].append(event(), soon())

        async with owner_of(ipc(tmp_path), after=5) as owner:
            done = await asyncio.gather(*answers)

            assert bodies == owner.stored
            assert [Appended(n, False) for n in range(6, 26)] == done


async def test_a_silent_owner_gets_nothing_more(tmp_path: Path) -> None:
    """Its connection may be up although its process hangs."""
    address = ipc(tmp_path)
    address.prepare()
    state = State("i", 0, 0, 10, 1000, "main", "v-1", 2, {})
    with zmq.Context() as context, context.socket(zmq.ROUTER) as owner:
        owner.linger = 0
        address.bind(owner, 0)
        async with links_to(address) as links:
            client, *_ = await asyncio.to_thread(owner.recv_multipart)
            owner.send_multipart([client, *wire.encode_state(state)])
            await up(links[0])

            await eventually(lambda: not links[0].up, timeout=2 * SILENT_SECONDS)
            with pytest.raises(LogUnavailableError, match="silent"):
                links[0].append(event(), soon())


async def test_an_owner_with_another_number_of_partitions_or_store_gets_nothing(tmp_path: Path) -> None:
    """It would put the events of a consultation into another partition's file."""
    address = ipc(tmp_path)
    address.prepare()
    for wrong in (State("i", 0, 0, 10, 1000, "main", "v-1", 4, {}), State("i", 0, 0, 10, 1000, "other", "v-1", 2, {})):
        with zmq.Context() as context, context.socket(zmq.ROUTER) as owner:
            owner.linger = 0
            address.bind(owner, 0)
            async with links_to(address) as links:
                client, *_ = await asyncio.to_thread(owner.recv_multipart)
                owner.send_multipart([client, *wire.encode_state(wrong)])
                await eventually(lambda links=links: links[0].mismatch)  # type: ignore[misc]
                with pytest.raises(LogUnavailableError, match="FI_PARTITIONS=2"):
                    links[0].append(event(), soon())


async def test_a_process_that_was_frozen_for_long_goes_on(tmp_path: Path) -> None:
    """The owner has forgotten it, and takes its events all the same."""
    async with owner_of(ipc(tmp_path)) as owner, links_to(ipc(tmp_path)) as links:
        await up(links[0])
        owner.follower.look(time.monotonic() + 2 * GONE_SECONDS)
        assert Appended(1, False) == await links[0].append(event(), soon())


async def test_an_append_without_an_answer_fails_at_its_deadline(tmp_path: Path) -> None:
    """The event may be stored all the same, so the error is the one that allows a retry."""
    async with owner_of(ipc(tmp_path)) as owner, links_to(ipc(tmp_path)) as links:
        await up(links[0])
        owner.commits.clear()

        with pytest.raises(LogUnavailableError, match="in time"):
            await links[0].append(event(), soon(0.3))
        assert 0 == links[0].in_flight


async def test_what_is_in_flight_stays_within_the_credit(tmp_path: Path) -> None:
    """In events and in bytes, for each process; what an owner holds is bounded."""
    address = ipc(tmp_path)
    async with owner_of(address, buffer_events=32, buffer_bytes=4000) as owner, links_to(address) as links:
        await up(links[0])
        owner.commits.clear()

        small = [links[0].append(event(), soon()) for _ in range(32)]
        with pytest.raises(LogFullError):
            links[0].append(event(), soon())
        owner.commits.set()
        await asyncio.gather(*small)

        owner.commits.clear()
        large = [links[0].append(event(body=b"x" * 1900), soon()) for _ in range(2)]
        with pytest.raises(LogFullError):
            links[0].append(event(body=b"x" * 1900), soon())
        owner.commits.set()
        await asyncio.gather(*large)


async def test_credit_is_divided_among_the_processes_that_send(tmp_path: Path) -> None:
    """One that only watches takes no part."""
    address = ipc(tmp_path)
    async with owner_of(address, buffer_events=100), links_to(address) as one, links_to(address, watches=True) as eye:
        await up(one[0])
        await up(eye[0])
        await eventually(lambda: one[0].state is not None and one[0].state.credit_events == 100)
        async with links_to(address) as other:
            await up(other[0])
            await eventually(lambda: one[0].state is not None and one[0].state.credit_events == 50)
        await eventually(lambda: one[0].state is not None and one[0].state.credit_events == 100)
        assert eye[0].state is not None
        assert 0 == eye[0].state.credit_events


async def test_a_batch_larger_than_the_credit_goes_as_fast_as_it_is_committed(tmp_path: Path) -> None:
    """In order, and only what does not fit until the deadline is refused."""
    async with owner_of(ipc(tmp_path), buffer_events=16) as owner, links_to(ipc(tmp_path)) as links:
        await up(links[0])
        batch = [event("c-1", b'{"event_type":"%d"}' % n) for n in range(100)]  # c-1 is in partition 0
        writer = ZeroMqWriter(links, deadline=5, max_in_flight=1)
        assert [Appended(n, False) for n in range(1, 101)] == await writer.append_batch(batch)
        assert [one.body for one in batch] == owner.stored

        owner.commits.clear()
        with pytest.raises(LogFullError):
            await ZeroMqWriter(links, deadline=0.3, max_in_flight=1).append_batch(batch)


async def test_sockets_are_private(tmp_path: Path) -> None:
    """Directory 0700, sockets 0600; a directory that others may enter is refused."""
    address = ipc(tmp_path)
    async with owner_of(address):
        assert [address.path(0)] == list(address.directory.iterdir())
        assert 0o600 == stat.S_IMODE(address.path(0).stat().st_mode)
        assert 0o700 == stat.S_IMODE(address.directory.stat().st_mode)
    assert [] == list(address.directory.iterdir())

    address.directory.chmod(0o750)
    with pytest.raises(LogAccessError, match="chmod 700"):
        async with owner_of(address):
            pass


async def test_a_former_owner_does_not_remove_the_socket_of_the_next(tmp_path: Path) -> None:
    """It may still be closing when the next one has bound."""
    address = ipc(tmp_path)
    async with links_to(address) as links:
        async with owner_of(address):
            inode = address.path(0).stat().st_ino
            async with owner_of(address) as second:
                await eventually(lambda: address.path(0).stat().st_ino != inode)
                await second.follower.close()
        async with owner_of(address):
            await asyncio.sleep(0.3)
            await up(links[0])
            assert Appended(1, False) == await links[0].append(event(), soon())


async def test_only_allowed_keys_get_in(tmp_path: Path, unused_tcp_port: int) -> None:
    """Over TCP, with CURVE: a key that the owner does not know is refused; so is an owner without the right key."""
    address = Address(f"zmq+tcp://127.0.0.1:{unused_tcp_port}", "main")
    owners, allowed, stranger = make_keys(tmp_path)
    async with (
        owner_of(address, keys=owners),
        links_to(address, keys=allowed) as good,
        links_to(address, keys=stranger) as bad,
    ):
        await up(good[0])
        assert Appended(1, False) == await good[0].append(event(), soon())
        await asyncio.sleep(0.5)
        with pytest.raises(LogUnavailableError):
            bad[0].append(event(), soon())
    (tmp_path / "other").mkdir()
    false, _, _ = make_keys(tmp_path / "other")
    async with owner_of(address, keys=false), links_to(address, keys=allowed) as links:
        await asyncio.sleep(1.0)
        assert not links[0].up


async def test_plain_clients_and_owners_get_nowhere_with_encrypted_ones(tmp_path: Path, unused_tcp_port: int) -> None:
    """There is no way to speak to an encrypted side without keys."""
    address = Address(f"zmq+tcp://127.0.0.1:{unused_tcp_port}", "main")
    owners, allowed, _ = make_keys(tmp_path)
    async with owner_of(address, keys=owners), links_to(address) as links:
        await asyncio.sleep(0.5)
        assert not links[0].up
    async with owner_of(address), links_to(address, keys=allowed) as links:
        await asyncio.sleep(0.5)
        assert not links[0].up

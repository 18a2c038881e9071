"""Each role is refused what it must not do, at once and in words that say what to do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fiq.event import Event, new_event_id
from services.cli.init.deployment import PERMISSIONS
from services.log.errors import LogForbiddenError, ProvisionError
from services.log.jetstream.api import JetStreamApi
from services.log.jetstream.connection import Connection, Role, close, connect
from services.log.jetstream.follower import Budget, JetStreamFollower
from services.log.jetstream.placement import BucketPlacements, read_stores
from services.log.jetstream.publisher import Publisher
from services.log.jetstream.stream import STREAM, provision
from services.log.protocol import LogIdentity, Position
from tests.support.polling import eventually
from tests.support.security import PORTS, Secured, fiq, run

#: what a refusal takes at most on a busy machine: below the deadlines of those who are refused, seconds
QUICK = 20.0

#: role -> subjects that its user must not publish on
FORBIDDEN = {
    Role.INGEST: [
        "fi.nodes.connz",
        "fi.dead.0",
        "fi.events",
        "fi.events.1.c1",
        "fi.corpus.main.1.write",
        "fi.corpus.main.1",
        "$JS.API.DIRECT.GET.fi-dead",
        "$JS.API.STREAM.PURGE.fi-dead",
        "$JS.API.STREAM.DELETE.fi-dead",
        "$JS.API.CONSUMER.CREATE.fi-dead.mine",
        "$JS.API.INFO",
        "$JS.API.STREAM.CREATE.fi-events",
        "$JS.API.STREAM.UPDATE.fi-events",
        "$JS.API.STREAM.DELETE.fi-events",
        "$JS.API.STREAM.PURGE.fi-events",
        "$JS.API.STREAM.MSG.DELETE.fi-events",
        "$JS.API.STREAM.SNAPSHOT.fi-events",
        "$JS.API.CONSUMER.CREATE.fi-events.mine",
        "$JS.API.CONSUMER.RESET.fi-events.fi-workers-main-00",
        "$JS.API.CONSUMER.MSG.NEXT.fi-events.fi-workers-main-00",
        "$JS.API.CONSUMER.LIST.fi-events",
        "$JS.ACK.fi-events.fi-workers-main-00.1.1.1.1.0",
        "$KV.fi-partitions.main.00",
        "_INBOX_persister.x",
        "$SYS.REQ.SERVER.PING",
    ],
    Role.PERSISTER: [
        "fi.nodes.connz",
        "fi.events.c1",
        "fi.corpus.main.1.events",
        "fi.events.1.c1",
        "$JS.API.INFO",
        "$JS.API.STREAM.CREATE.fi-events",
        "$JS.API.STREAM.UPDATE.fi-events",
        "$JS.API.STREAM.DELETE.fi-events",
        "$JS.API.STREAM.PURGE.fi-dead",
        "$JS.API.STREAM.MSG.DELETE.fi-events",
        "$JS.API.STREAM.MSG.DELETE.fi-dead",
        "$JS.API.STREAM.RESTORE.fi-events",
        "$JS.API.CONSUMER.CREATE.fi-events.mine",
        "$JS.API.CONSUMER.CREATE.fi-dead.mine",
        "$JS.API.CONSUMER.CREATE.KV_fi-partitions.mine.$KV.fi-partitions.>",
        "$JS.API.CONSUMER.RESET.fi-events.fi-workers-main-00-1",
        "$JS.API.CONSUMER.LIST.fi-events",
        "$JS.API.CONSUMER.INFO.fi-events.fi-workers-main-00-1",
        "$JS.API.STREAM.PURGE.KV_fi-partitions",
        "$JS.API.STREAM.DELETE.KV_fi-partitions",
        "_INBOX_ops.x",
        "$SYS.REQ.SERVER.PING",
    ],
    Role.PROVISIONER: [
        "fi.nodes.varz",
        "fi.events.c1",
        "fi.corpus.main.1.events",
        "fi.dead.0",
        "$JS.API.STREAM.CREATE.other",
        "$JS.API.STREAM.DELETE.fi-events",
        "$JS.API.STREAM.PURGE.fi-events",
        "$JS.API.STREAM.MSG.GET.fi-events",
        "$JS.API.DIRECT.GET.fi-events",
        "$JS.API.STREAM.SNAPSHOT.fi-events",
        "$JS.API.CONSUMER.CREATE.fi-events.mine",
        "$JS.API.CONSUMER.DELETE.fi-events.fi-workers-main-00",
        "$KV.fi-partitions.main.00",
        "$JS.API.STREAM.DELETE.KV_fi-partitions",
        "$JS.API.STREAM.MSG.GET.KV_fi-partitions",
        "$SYS.REQ.SERVER.PING",
    ],
    Role.OPS: [
        "fi.nodes.connz",
        "$SYS.REQ.SERVER.PING.VARZ",
        "fi.events.c1",
        "fi.corpus.main.1.find",
        "fi.dead.0",
        "$JS.API.STREAM.CREATE.fi-events",
        "$JS.API.STREAM.UPDATE.fi-events",
        "$JS.API.STREAM.DELETE.fi-events",
        "$JS.API.STREAM.PURGE.fi-events",
        "$JS.API.STREAM.MSG.DELETE.fi-events",
        "$JS.API.STREAM.RESTORE.fi-events",
        "$JS.API.CONSUMER.CREATE.fi-events.mine",
        "$JS.API.CONSUMER.CREATE.fi-events.fi-workers-main-00-1.fi.events.0.*",
        "$JS.API.CONSUMER.RESET.fi-events.fi-workers-main-00-1",
        "$JS.API.STREAM.PURGE.KV_fi-partitions",
        "$JS.API.STREAM.DELETE.KV_fi-partitions",
        "$JS.API.CONSUMER.DELETE.fi-events.fi-workers-main-00",
        "$JS.API.CONSUMER.MSG.NEXT.fi-events.fi-workers-main-00",
        "$JS.ACK.fi-events.fi-workers-main-00.1.1.1.1.0",
        "$KV.fi-partitions.main.00",
        "_INBOX_placement.x",
        "$SYS.REQ.SERVER.PING",
    ],
    Role.PLACEMENT: [
        "fi.nodes.connz",
        "fi.events.c1",
        "fi.corpus.main.1.find",
        "fi.dead.0",
        "$JS.API.INFO",
        "$JS.API.STREAM.UPDATE.KV_fi-partitions",
        "$JS.API.STREAM.PURGE.KV_fi-partitions",
        "$JS.API.STREAM.MSG.DELETE.KV_fi-partitions",
        "$JS.API.STREAM.MSG.GET.fi-events",
        "$JS.API.CONSUMER.CREATE.KV_fi-partitions.mine.$KV.fi-partitions.>",
        "$JS.API.CONSUMER.CREATE.fi-events.mine",
        "_INBOX_placement.x",
        "_INBOX_ops.x",
        "$SYS.REQ.USER.INFO",
        "$SYS.REQ.SERVER.PING",
    ],
}
#: what no role may do: administration of the cluster, which can stop or delay the pipeline
OPERATIONS = [
    "$JS.API.META.LEADER.STEPDOWN",
    "$JS.API.SERVER.REMOVE",
    "$JS.API.STREAM.LEADER.STEPDOWN.fi-events",
    "$JS.API.STREAM.PEER.REMOVE.fi-events",
    "$JS.API.CONSUMER.LEADER.STEPDOWN.fi-events.fi-workers-main-00",
    "$JS.API.CONSUMER.PAUSE.fi-events.fi-workers-main-00",
]
#: subjects to which no role may subscribe; its own inbox is allowed
UNHEARD = ["fi.events.>", "fi.dead.>", ">", "_INBOX.>", "$JS.ACK.>", "$JS.API.>", "$SYS.>"]


@pytest.mark.parametrize(
    ("role", "subject"),
    [(role, subject) for role, subjects in FORBIDDEN.items() for subject in [*subjects, *OPERATIONS]],
)
async def test_a_role_may_not_publish_what_is_not_its_own(secured: Secured, role: Role, subject: str) -> None:
    """The request ends with an error that names the subject, long before its time-out."""
    async with secured.connected(role) as nc:
        with pytest.raises(LogForbiddenError) as refused:
            await nc.request(subject, b"", timeout=60)
    assert f"may not publish on {subject.lower()}" in str(refused.value)


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("subject", [*UNHEARD, "another's inbox"])
async def test_a_role_may_not_listen_to_others(secured: Secured, role: Role, subject: str) -> None:
    """Neither to events as they are published nor to answers for other clients."""
    if subject == "another's inbox":
        subject = f"_INBOX_{Role.OPS if role is Role.INGEST else Role.INGEST}.>"
    async with secured.connected(role) as nc:
        await nc.subscribe(subject)
        await eventually(lambda: nc.violations)
        assert f'subscription to "{subject.lower()}"' in nc.violations[0]


@pytest.mark.parametrize("role", [role for role in Role if role is not Role.PERSISTER])
async def test_only_a_persister_hears_questions_about_the_corpus(secured: Secured, role: Role) -> None:
    """A client that receives them could answer with forged events."""
    async with secured.connected(role) as nc:
        await nc.subscribe("fi.corpus.main.1.*")
        await eventually(lambda: nc.violations)


@pytest.mark.parametrize("role", list(Role))
def test_no_role_has_everything(role: Role) -> None:
    """An empty list would mean that to nats-server."""
    granted = PERMISSIONS[role]
    assert granted.publish
    assert granted.subscribe
    assert not {">", "*", "$JS.>", "$JS.API.>"} & {*granted.publish, *granted.subscribe}


@pytest.fixture
async def stranger(secured: Secured) -> AsyncIterator[Connection]:
    """A connection as ingest, to try with what is not ingest's."""
    async with secured.connected(Role.INGEST) as nc:
        yield nc


async def test_a_wrong_inbox_is_told_with_the_first_request_and_with_all_that_follow(secured: Secured) -> None:
    """A process with another role's seed: its questions arrive, the answers never would."""
    settings = secured.settings(Role.INGEST)
    nc = await connect(settings, name="test", role=Role.OPS, on_closed=pytest.fail)
    for _ in range(2):
        with pytest.raises(LogForbiddenError, match="may not subscribe to _inbox_ops"):
            await JetStreamApi(nc, timeout=60).stream_info(STREAM)
    publisher = Publisher(nc, deadline=60, max_in_flight=1)
    with pytest.raises(LogForbiddenError, match="may not subscribe to _inbox_ops"):
        await publisher.start()
    with pytest.raises(LogForbiddenError, match="may not subscribe to _inbox_ops"):
        await publisher.append(Event("c1", new_event_id(), 1, b"{}"))
    await publisher.close()
    await close(nc)


async def test_provisioning_says_who_may(stranger: Connection, secured: Secured) -> None:
    """Not a time-out after half a minute."""
    started = time.monotonic()
    with pytest.raises(ProvisionError, match=r"may not provision.*run `fiq provision`"):
        await provision(stranger, secured.settings(Role.INGEST))
    assert time.monotonic() - started < QUICK


async def test_placement_says_what_is_missing(stranger: Connection, secured: Secured) -> None:
    """A claim by a user who may read the bucket and not write it."""
    await _identity(secured)
    with pytest.raises(LogForbiddenError, match=r"may not publish on \$kv\.fi-partitions\.main\.00"):
        await BucketPlacements(stranger, secured.settings(Role.INGEST)).claim(0, "volume", 1, begins=1)


async def test_a_persister_places_and_placement_places_anew(secured: Secured) -> None:
    """Each with its own user: claim, progress and the hint of it; then what `fiq restore` does; all roles read it."""
    await _identity(secured)
    async with secured.connected(Role.PERSISTER) as owner, secured.connected(Role.PLACEMENT) as placing:
        placements = BucketPlacements(owner, secured.settings(Role.PERSISTER, store="placing"))
        news: list[None] = []
        async with placements.watching(lambda: news.append(None)):
            claimed = await placements.progress(await placements.claim(0, "volume", 1, begins=1), 10)
            await placements.form({"volume"})
            await placements.read()
            news.clear()
            anew = BucketPlacements(placing, secured.settings(Role.PLACEMENT, store="placing"))
            renewed = await anew.renew(claimed, epoch=2, committed=5)
            await eventually(lambda: news)
        assert renewed == await placements.get(0)
        assert not owner.violations
        assert not placing.violations
    async with secured.connected(Role.OPS) as ops:
        bucket = await ops.jetstream().key_value("fi-partitions")
        assert {"placing", "placing.00"} <= set(await bucket.keys())
        assert 3 == len(await bucket.history("placing.00"))
        assert not ops.violations
    async with secured.connected(Role.INGEST) as reader:
        assert {0: renewed} == (await read_stores(reader))["placing"].partitions
        assert not reader.violations


async def test_a_publisher_says_what_is_missing(secured: Secured) -> None:
    """And does not try until its deadline; others' messages in flight are not affected."""
    async with secured.connected(Role.OPS) as nc:
        publisher = Publisher(nc, deadline=60, max_in_flight=10)
        await publisher.start()
        with pytest.raises(LogForbiddenError, match=r"may not publish on fi\.events\.c1"):
            await publisher.append(Event("C1", new_event_id(), 1, b"{}"))
        assert 0 == publisher.in_flight
        await publisher.close()


async def test_a_follower_says_what_is_missing(secured: Secured) -> None:
    """Silence of the log would look like an idle partition."""
    identity = await _identity(secured)
    async with secured.connected(Role.OPS) as nc:
        follower = JetStreamFollower(nc, "main", 0, identity, budget=Budget(64, 2**20))
        with pytest.raises(LogForbiddenError, match=r"consumer\.create\.fi-events\.fi-workers-main-00"):
            await asyncio.wait_for(follower.start(Position(0)), QUICK)
        await follower.close()


async def _identity(secured: Secured) -> LogIdentity:
    async with secured.connected(Role.PROVISIONER) as nc:
        return await provision(nc, secured.settings(Role.PROVISIONER, max_bytes=2**24, dead_max_bytes=2**20))


@pytest.mark.parametrize(("module", "role"), [("services.ingest", Role.INGEST), ("services.persister", Role.PERSISTER)])
def test_a_service_with_another_roles_seed_ends_with_one_line(
    secured: Secured, tmp_path: Path, module: str, role: Role
) -> None:
    """It could not hear a single answer: known at the start, not with the first event."""
    wrong = {"FI_NATS_SEED_FILE": str(secured.layout.seed(Role.OPS)), "FI_DATA_DIR": str(tmp_path / "data")}

    done = run(module, secured.environment(role) | wrong | PORTS)

    assert 1 == done.code
    assert 1 == len(done.errors), done.errors
    assert f"may not subscribe to _inbox_{role}" in done.errors[0]


def test_a_command_with_another_roles_seed_ends_with_one_line(secured: Secured) -> None:
    """`fiq provision` as ops."""
    own = secured.environment(Role.OPS)

    done = fiq(own, "provision")

    assert 1 == done.code
    assert 1 == len(done.errors), done.errors
    assert "may not provision" in done.errors[0]

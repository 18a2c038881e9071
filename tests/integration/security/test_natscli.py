"""What each command of docs/nats-cli.md sends, by the sources of natscli and jsm.go: its user may, and is answered.

natscli itself cannot be had on the machines of the tests, so its requests are written down here: subjects and bodies.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import nats
import nats.errors
import orjson
import pytest
from nats.aio.client import Client

from services.core.retry import retry
from services.log.errors import LogForbiddenError, LogUnavailableError
from services.log.jetstream.api import JetStreamApi
from services.log.jetstream.connection import Connection, Role, tls_context
from services.log.jetstream.stream import BUCKET_STREAM, DEAD_STREAM, STREAM, cursor_config, cursor_name
from tests.support.polling import eventually
from tests.support.security import Secured, fiq

PAGE = (Path(__file__).parents[3] / "docs" / "nats-cli.md").read_text(encoding="utf-8")
LOG = {"FI_PARTITIONS": "4", "FI_STREAM_MAX_BYTES": "64MiB", "FI_DEAD_MAX_BYTES": "16MiB"}
CURSOR = cursor_name("main", 3, 1)
_SECOND = 10**9
#: the marker of an idle heartbeat and of flow control in a push consumer's inbox
_STATUS = "Status"


@pytest.fixture(scope="module")
def provisioned(secured: Secured) -> Secured:
    """The streams, an event, a dead letter, a cursor and two keys."""
    done = fiq(secured.environment(Role.PROVISIONER) | LOG, "provision")
    assert (0, []) == (done.code, done.errors)
    asyncio.run(_fill(secured))
    return secured


async def _fill(secured: Secured) -> None:
    async with secured.connected(Role.INGEST) as nc:
        await nc.request("fi.events.c-0001", b'{"event_type":"A"}', timeout=10)
    async with secured.connected(Role.PERSISTER) as nc:
        await nc.request("fi.dead.3", b"bad", timeout=10)
        create = partial(JetStreamApi(nc).create_consumer, STREAM, cursor_config("main", 3, 1, 1), timeout=2)
        await retry(create, on=LogUnavailableError, pause=0.1)  # without an answer it may have taken effect
        for key in ("main.03", "main"):
            await nc.request(f"$KV.fi-partitions.{key}", b"{}", timeout=10)


@pytest.fixture
async def ops(provisioned: Secured) -> AsyncIterator[Connection]:
    """A connection as the user of the page, which is refused nothing."""
    async with provisioned.connected(Role.OPS) as nc:
        yield nc
        assert [] == nc.violations


# -- what the commands send --------------------------------------------------------------------------------------------


async def asked(nc: Client, subject: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the answer to a request, which must not be an error."""

    async def answer() -> dict[str, Any]:
        message = await nc.request(subject, b"" if body is None else orjson.dumps(body), timeout=10)
        return dict(orjson.loads(message.data))

    found: dict[str, Any] = await eventually(answer)
    assert "error" not in found, found
    return found


async def _api(nc: Client, suffix: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    return await asked(nc, f"$JS.API.{suffix}", body)


async def _direct(nc: Client, suffix: str) -> bytes:
    message = await nc.request(f"$JS.API.DIRECT.GET.{suffix}", b"", timeout=10)
    assert message.headers is None or _STATUS not in message.headers, message.headers
    return message.data


async def _stream_info(nc: Client, name: str) -> None:
    assert name == (await _api(nc, f"STREAM.INFO.{name}"))["config"]["name"]


async def _subjects(nc: Client) -> None:
    found = await _api(nc, f"STREAM.INFO.{STREAM}", {"subjects_filter": "fi.events.*.*", "offset": 0})
    assert 1 == len(found["state"]["subjects"])


async def _get(nc: Client, request: dict[str, Any]) -> None:
    assert "message" in await _api(nc, f"STREAM.MSG.GET.{STREAM}", request)


async def _view_dead(nc: Client) -> None:
    """A durable pull consumer, a page, an acknowledgement of each message, and its end."""
    name = "jsm_stream_pager_1"
    config = {"durable_name": name, "name": name, "ack_policy": "explicit", "deliver_policy": "all"}
    await _api(nc, f"CONSUMER.CREATE.{DEAD_STREAM}.{name}", {"stream_name": DEAD_STREAM, "config": config})
    subscription = await nc.subscribe(inbox := nc.new_inbox())
    await nc.publish(f"$JS.API.CONSUMER.MSG.NEXT.{DEAD_STREAM}.{name}", b"20", reply=inbox)
    message = await subscription.next_msg(timeout=10)
    assert b"bad" == message.data
    await message.ack()
    await _api(nc, f"CONSUMER.DELETE.{DEAD_STREAM}.{name}")


async def _report(nc: Client) -> None:
    await _stream_info(nc, STREAM)
    found = await _api(nc, f"CONSUMER.LIST.{STREAM}", {"offset": 0})
    assert [CURSOR] == [one["name"] for one in found["consumers"]]


async def _watched(nc: Client, key: str, **config: object) -> None:
    """An ordered push consumer, its first message, and its end; `kv ls`, `history` and `watch` differ in *config*."""
    await _stream_info(nc, BUCKET_STREAM)
    subscription = await nc.subscribe(inbox := nc.new_inbox())
    name, subject = inbox.rpartition(".")[2], f"$KV.fi-partitions.{key}"
    ordered = {
        "name": name,
        "deliver_subject": inbox,
        "ack_policy": "none",
        "max_deliver": 1,
        "ack_wait": 22 * 3600 * _SECOND,
        "replay_policy": "instant",
        "filter_subject": subject,
        "flow_control": True,
        "idle_heartbeat": 5 * _SECOND,
        "num_replicas": 1,
        "mem_storage": True,
        **config,
    }
    asked_for = {"stream_name": BUCKET_STREAM, "config": ordered}
    await _api(nc, f"CONSUMER.CREATE.{BUCKET_STREAM}.{name}.{subject}", asked_for)
    message = await subscription.next_msg(timeout=10)
    assert message.subject.startswith("$KV.fi-partitions.")
    await nc.publish(f"$JS.FC.{BUCKET_STREAM}.{name}.1")  # the answer when the server asks for flow control
    await _api(nc, f"CONSUMER.DELETE.{BUCKET_STREAM}.{name}")


async def _kv_get(nc: Client) -> None:
    await _stream_info(nc, BUCKET_STREAM)
    assert b"{}" == await _direct(nc, f"{BUCKET_STREAM}.$KV.fi-partitions.main.03")


async def _service(nc: Client, *subjects: str) -> None:
    """Ask the persisters' service; here no process of it runs, which the server says."""
    for subject in subjects:
        with pytest.raises(nats.errors.NoRespondersError):
            await nc.request(subject, b"", timeout=10)


async def _backup(nc: Client) -> None:
    await _stream_info(nc, STREAM)
    subscription = await nc.subscribe(inbox := nc.new_inbox())
    request = {"deliver_subject": inbox, "no_consumers": True, "chunk_size": 512 * 1024}
    await _api(nc, f"STREAM.SNAPSHOT.{STREAM}", request)
    while (chunk := await subscription.next_msg(timeout=10)).data:
        if chunk.reply:
            await chunk.respond(b"")


async def _check_stream(nc: Client, name: str, expected: str) -> None:
    """`nats server check stream` takes its thresholds from the metadata, and exits with *expected*."""

    async def look() -> bool:
        found = check_stream(await _api(nc, f"STREAM.INFO.{name}"))
        assert expected == found[0], found
        return True

    await eventually(look)


def check_stream(info: dict[str, Any]) -> tuple[str, list[str]]:
    """Judge a stream by its metadata as jsm.go's monitor does: peers, then subjects."""
    limits = {
        key.removeprefix("io.nats.monitor."): value
        for key, value in info["config"]["metadata"].items()
        if key.startswith("io.nats.monitor.")
    }
    assert not {"lag-critical", "seen-critical"} & limits.keys(), "these make it look for a mirror"
    cluster, critical, warn = info["cluster"], list[str](), list[str]()
    if (peers := 1 + len(cluster["replicas"])) != int(limits.get("peer-expect", 0)):
        critical.append(f"Expected {limits.get('peer-expect', 0)} replicas got {peers}")
    for peer in cluster["replicas"]:
        if peer.get("offline") or peer.get("lag", 0) > int(limits["peer-lag-critical"]):
            critical.append(f"{peer['name']} is offline or lags")
        if peer["active"] > int(limits["peer-seen-critical"].removesuffix("s")) * _SECOND:
            critical.append(f"{peer['name']} is inactive")
    if "subjects-warn" in limits:
        low, high = int(limits["subjects-warn"]), int(limits["subjects-critical"])
        assert low < high, "otherwise fewer subjects are worse"
        subjects = info["state"].get("num_subjects", 0)
        (critical if subjects >= high else warn if subjects >= low else []).append(f"{subjects} subjects")
    return ("CRITICAL" if critical else "WARNING" if warn else "OK"), critical + warn


async def _check_consumer(nc: Client) -> None:
    found = await _api(nc, f"CONSUMER.INFO.{STREAM}.{CURSOR}")
    limits = found["config"]["metadata"]
    assert found["num_ack_pending"] < int(limits["io.nats.monitor.outstanding-ack-critical"])
    assert found["num_pending"] < int(limits["io.nats.monitor.unprocessed-critical"])
    assert found["num_redelivered"] < int(limits["io.nats.monitor.redelivery-critical"])


async def _check_kv(nc: Client) -> None:
    await _stream_info(nc, BUCKET_STREAM)
    assert b"{}" == await _direct(nc, f"{BUCKET_STREAM}.$KV.fi-partitions.main")


async def _check_jetstream(nc: Client) -> None:
    await _api(nc, "INFO")
    assert 3 == (await _api(nc, "STREAM.LIST", {"offset": 0}))["total"]


async def _check_connection(nc: Client) -> None:
    """It sends a message to its own inbox."""
    subscription = await nc.subscribe(inbox := nc.new_inbox())
    await nc.publish(inbox, b"x" * 100)
    assert b"x" * 100 == (await subscription.next_msg(timeout=10)).data


async def _account_info(nc: Client) -> None:
    found = await asked(nc, "$SYS.REQ.USER.INFO")
    assert "FI" == found["data"]["account"]
    await _api(nc, "INFO")


Sends = Callable[[Client], Awaitable[None]]
#: commands of the page for the user `ops`
OPS: dict[str, Sends] = {
    "nats stream info fi-events": lambda nc: _stream_info(nc, STREAM),
    "nats stream info fi-dead": lambda nc: _stream_info(nc, DEAD_STREAM),
    "nats stream subjects fi-events 'fi.events.3.*' --sort name": _subjects,
    "nats stream get fi-events 4711": lambda nc: _get(nc, {"seq": 1}),
    "nats stream get fi-events -S fi.events.3.c-0001": lambda nc: _get(nc, {"last_by_subj": "fi.events.*.c-0001"}),
    "nats consumer report fi-events": _report,
    "nats kv ls fi-partitions": lambda nc: _watched(nc, ">", deliver_policy="last_per_subject", headers_only=True),
    "nats kv get fi-partitions main.03": _kv_get,
    "nats kv history fi-partitions main.03": lambda nc: _watched(nc, "main.03", deliver_policy="all"),
    "nats kv watch fi-partitions": lambda nc: _watched(nc, ">", deliver_policy="last_per_subject"),
    "nats micro ls fi-persister": lambda nc: _service(nc, "$SRV.INFO.fi-persister", "$SRV.PING"),
    "nats micro info fi-persister ID": lambda nc: _service(
        nc, "$SRV.INFO.fi-persister.ID", "$SRV.STATS.fi-persister.ID"
    ),
    "nats backup stream fi-events DIR --no-consumers": _backup,
    "nats server check stream --stream fi-events": lambda nc: _check_stream(nc, STREAM, "OK"),
    "nats server check stream --stream fi-dead": lambda nc: _check_stream(nc, DEAD_STREAM, "WARNING"),
    "nats server check stream --stream KV_fi-partitions": lambda nc: _check_stream(nc, BUCKET_STREAM, "OK"),
    "nats server check consumer --stream fi-events --consumer fi-workers-main-03-1": _check_consumer,
    "nats server check kv --bucket fi-partitions --key main": _check_kv,
    "nats server check jetstream": _check_jetstream,
    "nats server check connection": _check_connection,
    "nats account info": _account_info,
}
#: for the user `system`, and the subjects that they ask
SYSTEM = {
    "nats server report jetstream": ("$SYS.REQ.SERVER.PING.JSZ", {"accounts": True, "streams": True, "consumer": True}),
    "nats server report health": ("$SYS.REQ.SERVER.PING.HEALTHZ", {}),
    "nats server ping": ("$SYS.REQ.SERVER.PING", None),
}
#: needs a permission that docs/security.md lends; tested there
LENT = {"nats backup restore stream DIR"}


def commands_of_the_page() -> set[str]:
    """Return each command in its examples."""
    blocks = re.findall(r"^```sh\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL)
    return {line.strip() for block in blocks for line in block.splitlines() if line.strip().startswith("nats ")}


def test_each_command_of_the_page_is_replayed() -> None:
    """And nothing else: a command that is not on the page needs no permission."""
    assert commands_of_the_page() == OPS.keys() | SYSTEM.keys() | LENT


@pytest.mark.parametrize("command", [*OPS])
async def test_ops_may_run_what_the_page_says(ops: Connection, command: str) -> None:
    """Every request is answered without an error, and no node refuses a subject."""
    await OPS[command](ops)


async def test_ops_pages_through_the_dead_letters(ops: Connection) -> None:
    """`nats stream view fi-dead 20`."""
    await _view_dead(ops)


async def test_ops_may_not_write_where_partitions_are_and_placement_may(provisioned: Secured) -> None:
    """`nats kv put` and `nats kv del`, which publish; the latter an empty message with a header."""
    subject = "$KV.fi-partitions.testing.00"
    for headers in (None, {"KV-Operation": "DEL"}):
        async with provisioned.connected(Role.OPS) as nc:
            with pytest.raises(LogForbiddenError, match=r"may not publish on \$kv\.fi-partitions\.testing\.00"):
                await nc.request(subject, b"", timeout=10, headers=headers)
        async with provisioned.connected(Role.PLACEMENT) as nc:
            await _stream_info(nc, BUCKET_STREAM)
            assert BUCKET_STREAM == orjson.loads((await nc.request(subject, b"", 10, headers=headers)).data)["stream"]
            assert [] == nc.violations


@pytest.mark.parametrize("role", [Role.PROVISIONER, Role.PLACEMENT])
async def test_the_commands_that_fiq_nats_context_proposes_are_allowed(provisioned: Secured, role: Role) -> None:
    """`stream info` for the provisioner, `kv get` for placement."""
    async with provisioned.connected(role) as nc:
        await (_kv_get(nc) if role is Role.PLACEMENT else _stream_info(nc, STREAM))
        assert [] == nc.violations


@pytest.mark.parametrize("command", [*SYSTEM])
async def test_the_system_account_reports_about_servers(provisioned: Secured, command: str) -> None:
    """Every node answers; the account has no streams."""
    secured, (subject, body) = provisioned, SYSTEM[command]
    nc = await nats.connect(
        secured.cluster.urls,
        tls=tls_context(secured.settings(Role.OPS)),
        tls_handshake_first=True,
        nkeys_seed=str(secured.layout.seed("system")),
    )
    try:
        subscription = await nc.subscribe(inbox := nc.new_inbox())
        await nc.publish(subject, b"" if body is None else orjson.dumps(body), reply=inbox)
        answers = [orjson.loads((await subscription.next_msg(timeout=10)).data) for _ in range(3)]
    finally:
        await nc.close()
    assert {"n1", "n2", "n3"} == {answer["server"]["name"] for answer in answers}

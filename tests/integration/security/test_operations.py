"""What operators run, as the user `ops` of a secured deployment: nothing of it is refused by any node."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import nats.errors
import orjson
import pytest
from nats.aio.msg import Msg
from prometheus_client import CollectorRegistry
from typer.testing import CliRunner

from services.cli.main import app
from services.log.errors import LogAccessError, LogForbiddenError
from services.log.jetstream.api import JetStreamApi
from services.log.jetstream.connection import Connection, Role
from services.log.jetstream.monitor import PROCESSES_SUBJECT, LogMonitor, monitoring
from services.log.jetstream.publisher import Publisher
from services.log.jetstream.stream import BUCKET_STREAM, DEAD_STREAM, STREAM, provision
from services.log.metrics import LogMetrics
from services.persister.volume import Volume
from tests.support.cluster import reload
from tests.support.persisters import Log, Persister, persisted
from tests.support.polling import eventually
from tests.support.security import Outcome, Secured, fiq

#: the deployment's settings of the log
LOG = {"FI_PARTITIONS": "4", "FI_STREAM_MAX_BYTES": "64MiB", "FI_DEAD_MAX_BYTES": "16MiB"}
_CHANGES = {"partitions": 4, "max_bytes": 64 * 2**20, "dead_max_bytes": 16 * 2**20}
#: docs/security.md, "A command that no user may run"
LENDING = (
    (Path(__file__).parents[3] / "docs" / "security.md")
    .read_text(encoding="utf-8")
    .partition("### A command that no user may run\n")[2]
    .partition("\n## ")[0]
)


def lent_subjects() -> Iterator[str]:
    """Yield each subject of the section's list."""
    for subjects in re.findall(r"^- `nats .*?: (.*)$", LENDING, re.MULTILINE):
        yield from re.findall(r"`([^`]+)`", subjects)


@pytest.fixture(scope="module")
def provisioned(secured: Secured) -> Secured:
    """The streams, made by the provisioner as an operator does it."""
    done = fiq(secured.environment(Role.PROVISIONER) | LOG, "provision")
    assert (0, []) == (done.code, done.errors)
    return secured


async def ops(secured: Secured, *arguments: object) -> Outcome:
    environment = secured.environment(Role.OPS) | LOG
    return await asyncio.to_thread(fiq, environment, *map(str, arguments))


async def placing(secured: Secured, *arguments: object) -> Outcome:
    environment = secured.environment(Role.PLACEMENT) | LOG
    return await asyncio.to_thread(fiq, environment, *map(str, arguments))


async def test_what_operators_run_needs_no_more_than_their_users_may(provisioned: Secured, tmp_path: Path) -> None:
    """A lost volume comes back, twice; the doctor finds certificates, and nothing wrong but the user of all roles."""
    secured, data, saved = provisioned, tmp_path / "data", tmp_path / "saved"
    own = {**secured.environment(Role.PERSISTER), **LOG}
    async with secured.connected(Role.INGEST) as nc, secured.connected(Role.PROVISIONER) as provisioner:
        identity = await provision(provisioner, secured.settings(Role.PROVISIONER, **_CHANGES))
        publisher = Publisher(nc, deadline=20, max_in_flight=100)
        await publisher.start()
        log = Log(secured.cluster, nc, secured.settings(Role.INGEST, **_CHANGES), identity, publisher)
        with Persister(tmp_path / "a", secured.cluster, data, **own) as persister:
            await persister.ready()
            before = await log.publish(20)
            await persisted(data, before)
            done = await ops(secured, "backup", saved, "--corpus", data)
            assert 0 == done.code, done.errors
            after = await log.publish(20)
            await persisted(data, before, after)

            done = await ops(secured, "doctor", "--corpus", data, "--json")
            report = orjson.loads(done.out)
            wrong = [one["what"] for one in report["findings"] if one["level"] != "ok"]
            assert (0, "warning", 1) == (done.code, report["worst"], len(wrong)), wrong
            assert wrong[0].startswith("containers share a user: ")  # the secrets were made for one owner
            certificates = [one["what"] for one in report["findings"] if one["check"] == "certificates"]
            assert 4 == len(certificates)  # three nodes and the authority
            # reported through the log: the monitoring port is open to the node alone
            looked_at = sorted(one["check"] for one in report["findings"] if one["what"].startswith(("n1", "n2", "n3")))
            assert sorted(["clocks", "nodes", "sync_interval"] * 3) == looked_at
            assert all("is good until" in what for what in certificates)
            persister.process.kill()
            await asyncio.to_thread(persister.process.wait)
        shutil.rmtree(data)
        done = await ops(secured, "restore", saved, "--to", data)
        assert (1, True) == (done.code, "may not subscribe to _inbox_placement" in done.errors[0])
        done = await placing(secured, "restore", saved, "--to", data)
        assert 0 == done.code, done.errors
        with Persister(tmp_path / "b", secured.cluster, data, **own) as persister:
            await persister.ready()
            await persisted(data, before, after)
            assert 0 == await persister.end()
        volume = Volume.open(data, "main").uuid
        shutil.rmtree(data)
        done = await placing(secured, "give-up", volume, "--to", data, "--yes")
        assert 0 == done.code, done.errors
        with Persister(tmp_path / "c", secured.cluster, data, **own) as persister:
            await persister.ready()
            await persisted(data, before, after)
            assert 0 == await persister.end()
        await publisher.close()
    assert [] == secured.violations()


@pytest.mark.parametrize("role", [Role.INGEST, Role.PERSISTER])
async def test_each_service_shows_the_memory_and_the_storage_of_every_node(provisioned: Secured, role: Role) -> None:
    """Asked through the log, as the service's own user."""
    registry = CollectorRegistry()
    async with provisioned.connected(role) as nc:
        settings = provisioned.settings(role, **_CHANGES)
        async with monitoring(nc, settings, LogMetrics(registry), pytest.fail):

            def seen() -> bool:
                for node in ("n1", "n2", "n3"):
                    value = partial(registry.get_sample_value, labels={"node": node})
                    assert (value("fi_node_memory_bytes") or 0) > 2**20
                    assert (value("fi_node_storage_limit_bytes") or 0) > (value("fi_node_storage_bytes") or 0)
                    assert 1 == value("fi_node_jetstream")
                return True

            await eventually(seen)
        assert [] == nc.violations


async def test_a_persister_that_gets_two_questions_before_it_answers_is_heard(provisioned: Secured) -> None:
    """`fiq status` and `fiq doctor` look twice in a row; a persister may send one answer to each reply subject."""
    settings = provisioned.settings(Role.OPS, **_CHANGES)
    async with provisioned.connected(Role.PERSISTER) as persister, provisioned.connected(Role.OPS) as nc:
        questions: list[Msg] = []

        async def keep(question: Msg) -> None:
            questions.append(question)

        await persister.subscribe(PROCESSES_SUBJECT, cb=keep)
        await persister.flush()
        # the nodes tell each other of the subscription
        monitor = LogMonitor(nc, settings)

        async def asked() -> bool:
            await monitor.look(whole=False)
            return len(questions) >= 2

        await eventually(asked)
        for question in questions:
            await question.respond(orjson.dumps({"id": "one", "metadata": {"store": "main"}}))
        await persister.flush()
        await eventually(lambda: monitor._answers)
        await monitor.close()
        assert [] == persister.violations


async def test_a_user_that_may_not_ask_is_told_instead_of_a_sound_cluster(provisioned: Secured) -> None:
    """The provisioner may not look at who runs: the rest is still looked at."""
    environment = provisioned.environment(Role.PROVISIONER) | LOG
    done = await asyncio.to_thread(fiq, environment, "doctor", "--json")
    assert 1 == done.code
    found = orjson.loads(done.out)["findings"]
    assert ["this user may not ask"] == [
        one["what"].partition(":")[0] for one in found if (one["check"], one["level"]) == ("permissions", "error")
    ]
    assert {"ok"} == {one["level"] for one in found if one["check"] == "certificates"}


async def test_a_stream_that_the_provisioners_user_changed_is_an_error_until_it_is_provisioned_again(
    provisioned: Secured,
) -> None:
    """That user can have each event copied to itself, which no permission prevents: it is found, and undone."""
    secured, copied = provisioned, "_INBOX_provisioner.copied"
    own = secured.environment(Role.PROVISIONER) | LOG
    async with secured.connected(Role.PROVISIONER) as thief, secured.connected(Role.INGEST) as ingest:
        # given
        heard = await thief.subscribe(f"{copied}.>")
        await _edit(thief, STREAM, republish={"src": ">", "dest": f"{copied}.>"}, placement={"cluster": "fiq"})
        await _edit(thief, DEAD_STREAM, sources=[{"name": STREAM}])
        await _edit(thief, BUCKET_STREAM, max_age=3600 * 10**9)
        await ingest.request("fi.events.c1", b'{"event_type":"secret"}', timeout=10)
        assert b'{"event_type":"secret"}' == (await heard.next_msg(timeout=10)).data

        # when
        done = await ops(secured, "doctor", "--json")

        # then
        assert 1 == done.code
        errors = [
            one for one in orjson.loads(done.out)["findings"] if (one["check"], one["level"]) == ("stream", "error")
        ]
        assert [f"stream {name} was changed by hand" for name in (STREAM, DEAD_STREAM, BUCKET_STREAM)] == [
            one["what"].partition(":")[0] for one in errors
        ]
        assert 'republish is {"src":">","dest":"_INBOX_provisioner.copied.>"}' in errors[0]["what"]
        assert "placement is" in errors[0]["what"]
        assert "sources is" in errors[1]["what"]
        assert "max_age is 3600000000000" in errors[2]["what"]
        assert all("`fiq provision` undoes it" in one["action"] for one in errors)

        # when
        done = await asyncio.to_thread(fiq, own, "provision")

        # then
        assert (0, []) == (done.code, [line for line in done.errors if "LOG_STREAM_CHANGED" not in line])
        await ingest.request("fi.events.c1", b"unheard", timeout=10)
        with pytest.raises(nats.errors.TimeoutError):
            await heard.next_msg(timeout=0.5)
        found = orjson.loads((await ops(secured, "doctor", "--json")).out)["findings"]
        assert {"ok"} == {one["level"] for one in found if one["check"] == "stream"}


async def _edit(nc: Connection, stream: str, **fields: object) -> None:
    """Do what `nats stream edit` does."""
    api = JetStreamApi(nc)
    info = await eventually(lambda: api.stream_info(stream))
    assert info is not None
    await api.request(f"STREAM.UPDATE.{stream}", {**info["config"], **fields})


@pytest.mark.parametrize("subject", list(lent_subjects()))
async def test_a_subject_is_lent_to_ops_and_taken_back(provisioned: Secured, subject: str) -> None:
    """With the commands of docs/security.md: refused, let in by every node, and refused again."""
    secured, accounts = provisioned, provisioned.layout.nats / "accounts.conf"
    (script,) = re.findall(r"```sh\n(.*?)```", LENDING, re.DOTALL)
    script, changed = re.subn(r"^ *subject='.*'$", f"subject='{subject}'", script, flags=re.MULTILINE)
    before = accounts.read_bytes()
    assert 1 == changed
    await _all_say(secured, subject, let_in=False)

    await asyncio.to_thread(subprocess.run, ["sh", "-euc", script], cwd=secured.layout.folder, check=True, timeout=10)
    await asyncio.to_thread(reload, secured.cluster)
    await _all_say(secured, subject, let_in=True)

    done = CliRunner().invoke(app, ["init", str(secured.layout.folder)])
    assert [f"wrote {accounts}"] == done.output.splitlines()
    assert before == accounts.read_bytes()
    await asyncio.to_thread(reload, secured.cluster)
    await _all_say(secured, subject, let_in=False)


async def _all_say(secured: Secured, subject: str, *, let_in: bool) -> None:
    async def said() -> bool:
        return all([await _lets_in(secured, server, subject) is let_in for server in secured.cluster.urls])

    await eventually(said)


async def _lets_in(secured: Secured, server: str, subject: str) -> bool | None:
    """Say whether the node at *server* lets ops publish on *subject*, for something that does not exist or is empty.

    None: during a reload, when a node knows no user for a moment.
    """
    try:
        async with secured.connected(Role.OPS, servers=(server,)) as nc:
            await nc.request(subject.replace("*", "nothing-of-that-name"), timeout=10)
    except nats.errors.NoRespondersError:
        return True
    except LogForbiddenError:
        return False
    except LogAccessError:
        return None
    return True

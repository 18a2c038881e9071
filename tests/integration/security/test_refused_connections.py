"""A node refuses clients without TLS 1.3 and a key; the client logs the reason in one line and exits with a code."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fiq.errors import ConfigurationError
from services.cli.embedded.processes import Cluster
from services.cli.errors import ChildFailedError
from services.log.errors import LogAccessError, LogUnavailableError
from services.log.jetstream.connection import CONNECT_DEADLINE_SECONDS, Role, close, connect
from services.log.settings import LogSettings
from tests.support.security import PORTS, Secured, fiq, make_deployment, replace_certificate, run

#: a node gives a handshake this long (`timeout` of its tls block) and some more, seconds
HANDSHAKE = 20.0
CONNECT_LINE = b'CONNECT {"verbose":true}\r\nPING\r\n'

LOCAL = ["localhost", "127.0.0.1"]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of another deployment: its authority and its users are as good, and not ours."""
    return make_deployment(tmp_path_factory.mktemp("elsewhere")).folder


@pytest.fixture(scope="module")
def expired(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """A node whose certificate ended yesterday."""
    layout = make_deployment(tmp_path_factory.mktemp("expired"))
    past = datetime.now(UTC) - timedelta(days=9)
    replace_certificate(layout, "n1", start=past, lifetime=timedelta(days=8), hosts=LOCAL)
    with Cluster(tmp_path_factory.mktemp("node"), nodes=1, security=layout.folder) as cluster:
        yield Secured(cluster, layout)


def ports(secured: Secured) -> dict[str, int]:
    """Return the ports of the first node that take connections from other machines."""
    node = secured.cluster.ports[0]
    return {"client": node.client, "route": node.cluster}


# -- the wire ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("port", ["client", "route"])
async def test_a_node_answers_nothing_without_tls(secured: Secured, port: str) -> None:
    """Not even which server it is: the first byte on the wire is a handshake's."""
    reader, writer = await asyncio.open_connection("127.0.0.1", ports(secured)[port])
    writer.write(CONNECT_LINE)

    async with asyncio.timeout(HANDSHAKE):
        answer = await _all(reader)

    assert not {b"INFO", b"PONG", b"+OK", b"n1"} & set(answer.split())
    writer.close()


@pytest.mark.parametrize("port", ["client", "route"])
async def test_tls_1_2_is_refused(secured: Secured, port: str) -> None:
    """Also with the right authority."""
    context = ssl.create_default_context(cafile=secured.layout.ca_certificate)
    context.load_cert_chain(secured.layout.node_certificate("n1"), secured.layout.node_key("n1"))
    context.maximum_version = ssl.TLSVersion.TLSv1_2

    with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
        await asyncio.open_connection("127.0.0.1", ports(secured)[port], ssl=context)


async def test_tls_1_3_is_spoken(secured: Secured) -> None:
    """What the other tests are refused is there for who has the authority."""
    context = ssl.create_default_context(cafile=secured.layout.ca_certificate)
    reader, writer = await asyncio.open_connection("127.0.0.1", ports(secured)["client"], ssl=context)

    assert (await reader.readline()).startswith(b"INFO ")
    assert "TLSv1.3" == writer.get_extra_info("ssl_object").version()
    writer.close()
    with contextlib.suppress(ssl.SSLError, ConnectionError):
        await writer.wait_closed()


async def test_a_client_without_a_user_is_refused(secured: Secured) -> None:
    """TLS alone opens nothing: there is no anonymous user."""
    context = ssl.create_default_context(cafile=secured.layout.ca_certificate)
    reader, writer = await asyncio.open_connection("127.0.0.1", ports(secured)["client"], ssl=context)
    await reader.readline()
    writer.write(CONNECT_LINE)

    async with asyncio.timeout(HANDSHAKE):
        answer = await _all(reader)

    assert b"-ERR 'Authorization Violation'\r\n" == answer
    writer.close()


async def test_a_route_without_a_certificate_is_refused(secured: Secured) -> None:
    """A node that anybody could add would get a copy of everything."""
    context = ssl.create_default_context(cafile=secured.layout.ca_certificate)

    assert b"" == await _after_handshake(secured, context)


async def test_a_route_with_a_certificate_of_another_authority_is_refused(secured: Secured, elsewhere: Path) -> None:
    """Both sides of a route verify the other."""
    context = ssl.create_default_context(cafile=secured.layout.ca_certificate)
    nodes = elsewhere / "secrets/nodes"
    context.load_cert_chain(nodes / "n1.pem", nodes / "n1.key")

    assert b"" == await _after_handshake(secured, context)


async def _after_handshake(secured: Secured, context: ssl.SSLContext) -> bytes:
    """Return what a node says on its route port behind the handshake; in TLS 1.3 it refuses a certificate there."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", ports(secured)["route"], ssl=context)
    except (ssl.SSLError, ConnectionError):
        return b""
    writer.write(CONNECT_LINE)
    async with asyncio.timeout(HANDSHAKE):
        answer = await _all(reader)
    writer.close()
    return answer


async def _all(reader: asyncio.StreamReader) -> bytes:
    answer = b""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while chunk := await reader.read(65536):
            answer += chunk
    return answer


# -- our own processes ------------------------------------------------------------------------------------------------


async def test_the_right_files_open_the_door_and_the_socket_has_its_timeout(secured: Secured) -> None:
    """TLS is on top of the same socket settings."""
    async with secured.connected(Role.INGEST) as nc:
        writer = nc._transport._io_writer  # type: ignore[union-attr]
        assert "TLSv1.3" == writer.get_extra_info("ssl_object").version()
        assert 4000 == writer.get_extra_info("socket").getsockopt(6, 18)


async def test_an_unknown_authority_is_told_at_once(secured: Secured, elsewhere: Path) -> None:
    """And not tried until the deadline: time does not help."""
    settings = secured.settings(Role.INGEST, ca_file=str(elsewhere / "secrets/ca.pem"))

    error = await refusal(settings)

    assert f"its certificate is not from the authority in FI_NATS_CA_FILE={elsewhere}/secrets/ca.pem" in error
    assert all(url in error for url in secured.cluster.urls)


async def test_an_unknown_user_is_told_at_once_with_its_public_key(secured: Secured, elsewhere: Path) -> None:
    """The operator compares it with accounts.conf."""
    settings = secured.settings(Role.INGEST, seed_file=str(elsewhere / "secrets/users/ingest.seed"))

    error = await refusal(settings)

    assert "it does not know the user of FI_NATS_SEED_FILE" in error
    assert "public key U" in error


async def test_no_user_is_told_at_once(secured: Secured) -> None:
    """Anonymous clients are refused, ours too."""
    error = await refusal(secured.settings(Role.INGEST, seed_file=""))

    assert "set FI_NATS_SEED_FILE" in error


async def test_an_expired_certificate_is_told_at_once(expired: Secured) -> None:
    """With what renews it."""
    error = await refusal(expired.settings(Role.INGEST))

    assert "its certificate has expired: run `fiq init FOLDER --rotate certificates`" in error


async def test_a_name_that_the_certificate_does_not_have_is_told_at_once(secured: Secured) -> None:
    """The same node by another name of loopback."""
    servers = tuple(url.replace("127.0.0.1", "127.1") for url in secured.cluster.urls)

    error = await refusal(secured.settings(Role.INGEST, servers=servers))

    assert "its certificate has other names" in error
    assert "--hosts" in error


async def test_a_node_without_tls_is_told_at_once(single_node: Cluster, secured: Secured) -> None:
    """No downgrade: with an authority in the settings nothing is said in plain text."""
    settings = secured.settings(Role.INGEST, servers=tuple(single_node.urls))

    error = await refusal(settings)

    assert "it does not speak TLS from the first byte" in error


async def test_a_process_without_an_authority_is_told_what_it_lacks(secured: Secured) -> None:
    """The nodes say nothing to it, so only the time tells."""
    settings = secured.settings(Role.INGEST, ca_file="", seed_file="")

    with pytest.raises(LogUnavailableError, match="nodes that speak TLS need FI_NATS_CA_FILE"):
        await connect(settings, name="test", role=Role.INGEST, on_closed=pytest.fail, deadline=1)


async def test_one_node_that_can_be_trusted_is_enough(secured: Secured, expired: Secured, tmp_path: Path) -> None:
    """An expired certificate on one of several nodes is no reason to stay outside."""
    both = tmp_path / "ca.pem"
    both.write_bytes(secured.layout.ca_certificate.read_bytes() + expired.layout.ca_certificate.read_bytes())
    servers = (*expired.cluster.urls, secured.cluster.urls[0])

    for _ in range(5):  # in random order
        settings = secured.settings(Role.INGEST, servers=servers, ca_file=str(both))
        nc = await connect(settings, name="test", role=Role.INGEST, on_closed=pytest.fail)
        assert nc.is_connected
        await close(nc)


async def test_servers_that_were_not_tried_are_known_for_later(secured: Secured) -> None:
    """The first connect takes one; the others must be there when that one goes."""
    async with secured.connected(Role.INGEST) as nc:
        assert {url.removeprefix("nats://") for url in secured.cluster.urls} == {
            server.uri.netloc for server in nc._server_pool
        }


@pytest.mark.parametrize(("field", "variable"), [("ca_file", "FI_NATS_CA_FILE"), ("seed_file", "FI_NATS_SEED_FILE")])
@pytest.mark.parametrize(
    "content", [None, b"", b"garbage", b"SUAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"]
)
async def test_a_file_that_cannot_be_used_is_a_wrong_setting(
    secured: Secured, tmp_path: Path, field: str, variable: str, content: bytes | None
) -> None:
    """Missing, empty, something else, a seed with a typing error: told without any node."""
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    settings = secured.settings(Role.INGEST, **{field: str(path)})

    with pytest.raises(ConfigurationError) as wrong:
        await connect(settings, name="test", role=Role.INGEST, on_closed=pytest.fail)

    assert 1 == len(wrong.value.problems)
    assert f"{variable}={path}: " in str(wrong.value)
    assert "AAAA" not in str(wrong.value)


async def refusal(settings: LogSettings) -> str:
    """Return why a connection is refused, which must be known long before the deadline."""
    started = time.monotonic()
    with pytest.raises(LogAccessError) as caught:
        await connect(settings, name="test", role=Role.INGEST, on_closed=pytest.fail, deadline=60)
    assert time.monotonic() - started < 4 * CONNECT_DEADLINE_SECONDS
    return str(caught.value)


# -- whole processes --------------------------------------------------------------------------------------------------

#: what is wrong -> what the one line says
WRONG = {
    "authority": "its certificate is not from the authority in FI_NATS_CA_FILE",
    "user": "it does not know the user of FI_NATS_SEED_FILE",
    "no user": "set FI_NATS_SEED_FILE",
    "missing authority": "FI_NATS_CA_FILE=/nowhere/ca.pem: No such file or directory",
    "missing user": "FI_NATS_SEED_FILE=/nowhere/seed: No such file or directory",
}


def environment(secured: Secured, elsewhere: Path, wrong: str) -> dict[str, str]:
    """Return the variables of an ingest process with one mistake."""
    other = elsewhere / "secrets"
    change = {
        "authority": {"FI_NATS_CA_FILE": str(other / "ca.pem")},
        "user": {"FI_NATS_SEED_FILE": str(other / "users/ingest.seed")},
        "no user": {"FI_NATS_SEED_FILE": ""},
        "missing authority": {"FI_NATS_CA_FILE": "/nowhere/ca.pem"},
        "missing user": {"FI_NATS_SEED_FILE": "/nowhere/seed"},
    }
    return {**secured.environment(Role.INGEST), **PORTS, **change[wrong]}


@pytest.mark.parametrize("wrong", WRONG)
def test_ingest_ends_with_one_line_and_a_code(secured: Secured, elsewhere: Path, wrong: str) -> None:
    """Wrong settings end it with 2, a closed door with 1; nothing hangs."""
    done = run("services.ingest", environment(secured, elsewhere, wrong))

    assert (2 if wrong.startswith("missing") else 1) == done.code
    assert 1 == len(done.errors), done.errors
    assert WRONG[wrong] in done.errors[0]


@pytest.mark.parametrize("wrong", ["authority", "user", "no user", "missing user"])
def test_a_persister_ends_with_one_line_and_a_code(
    secured: Secured, elsewhere: Path, tmp_path: Path, wrong: str
) -> None:
    """The same."""
    done = run("services.persister", environment(secured, elsewhere, wrong) | {"FI_DATA_DIR": str(tmp_path / "data")})

    assert (2 if wrong.startswith("missing") else 1) == done.code
    assert 1 == len(done.errors), done.errors
    assert WRONG[wrong] in done.errors[0]


@pytest.mark.parametrize("wrong", ["authority", "user", "no user", "missing authority"])
def test_a_command_ends_with_one_line_and_a_code(secured: Secured, elsewhere: Path, wrong: str) -> None:
    """`fiq status` in the hands of an operator."""
    done = fiq(environment(secured, elsewhere, wrong), "status")

    assert 1 == done.code
    assert 1 == len(done.errors), done.errors
    assert WRONG[wrong] in done.errors[0]


@pytest.mark.parametrize(
    ("role", "command"),
    [
        (Role.INGEST, ["services.ingest"]),
        (Role.PERSISTER, ["services.persister"]),
        (Role.OPS, ["services.cli.main", "status"]),
    ],
    ids=["ingest", "persister", "fiq status"],
)
def test_each_ends_with_one_line_when_the_certificate_has_expired(
    expired: Secured, tmp_path: Path, role: Role, command: list[str]
) -> None:
    """What an operator reads on the morning after."""
    module, *arguments = command
    environment = expired.environment(role) | PORTS | {"FI_DATA_DIR": str(tmp_path / "data")}
    done = run(module, environment, *arguments)

    assert 1 == done.code
    assert 1 == len(done.errors), done.errors
    assert "its certificate has expired" in done.errors[0]


def test_a_node_with_a_missing_file_does_not_start_and_says_which(tmp_path: Path) -> None:
    """nats-server itself: one line, and a code."""
    layout = make_deployment(tmp_path / "deployment")
    layout.node_key("n1").unlink()

    with pytest.raises(ChildFailedError, match=r"ended with code 1(.|\n)*n1\.key"):
        Cluster(tmp_path / "node", nodes=1, security=layout.folder).start()

"""Who gets through, over the real server: tokens, scopes, prefixes, and what is told of a refusal."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator, MutableMapping, Sequence
from contextlib import asynccontextmanager
from ipaddress import IPv4Network, ip_network
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web
from structlog.testing import capture_logs

from fiq.errors import ConfigurationError
from services.core import logs
from services.core.tokens import Scope, Token, digest_of, render
from services.ingest import access, service
from services.ingest.access import ACCESS, GRANT, OPEN, TokenStore
from services.ingest.problems import REFUSALS
from services.ingest.service import make_app
from services.ingest.settings import Settings
from tests.support.ingest import Edge, MemoryLog, Reply, running_edge
from tests.support.polling import eventually

ALL = frozenset(Scope)
STRUCTURED = "application/cloudevents+json"
SECRETS = {name: f"{name}-secret" for name in ("writer", "reader", "ward", "ended")}
TOKENS = {
    "writer": Token("writer", digest_of(SECRETS["writer"]), frozenset({Scope.WRITE})),
    "reader": Token("reader", digest_of(SECRETS["reader"]), frozenset({Scope.READ})),
    "ward": Token("ward", digest_of(SECRETS["ward"]), ALL, "ward-"),
}
ENDED = f"ended {digest_of(SECRETS['ended'])} read,write * 2020-01-01\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(render(TOKENS) + ENDED)
    path.chmod(0o600)
    return path


@pytest.fixture
async def edge(file: Path) -> AsyncIterator[Edge]:
    async with running_edge(token_file=str(file)) as edge:
        yield edge


def bearer(name: str) -> dict[str, Any]:
    return {"Authorization": f"Bearer {SECRETS[name]}"}


def told(reply: Reply) -> tuple[int, str, str]:
    """Status, type of the problem, and challenge."""
    return reply.status, reply.json.get("type", ""), reply.headers.get("WWW-Authenticate", "")


def test_no_time_tells_how_close_a_token_is_to_one_of_ours(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token is compared once, in constant time; a client cannot compute what is looked up before that."""
    known, other = TokenStore(str(file)), TokenStore(str(file))
    compared: list[tuple[str, str]] = []

    def compare(ours: str, theirs: str) -> bool:
        compared.append((ours, theirs))
        return hmac.compare_digest(ours, theirs)

    monkeypatch.setattr(access, "compare_digest", compare)
    for each in (known, other):
        each.load()
    for secret in (SECRETS["writer"], SECRETS["ward"], SECRETS["ended"], "nobody's", "", "\udc80"):
        mine = secret in {SECRETS["writer"], SECRETS["ward"]}
        compared.clear()
        assert (digest_of(secret) if mine else None) == known.find(secret)
        assert [digest_of(secret)] == [theirs for _, theirs in compared]
        assert {len(digest_of(secret))} == {len(ours) for ours, _ in compared}
    assert not {*known._blinded} & {*other._blinded, *(token.digest for token in TOKENS.values())}


async def test_a_token_with_the_scope_gets_through(edge: Edge) -> None:
    """The scheme is not case-sensitive (RFC 9110, section 11.1)."""
    assert 202 == (await edge.post(**bearer("writer"))).status
    assert 202 == (await edge.post(Authorization=f"bearer {SECRETS['writer']}")).status


@pytest.mark.parametrize(
    ("value", "challenge"),
    [
        (None, 'Bearer realm="fiq"'),
        ("", 'Bearer realm="fiq", error="invalid_token"'),
        ("Bearer", 'Bearer realm="fiq", error="invalid_token"'),
        ("Bearer nobody", 'Bearer realm="fiq", error="invalid_token"'),
        (f"Bearer {digest_of(SECRETS['writer'])}", 'Bearer realm="fiq", error="invalid_token"'),
        (f"Bearer {SECRETS['ended']}", 'Bearer realm="fiq", error="invalid_token"'),
        (f"Basic {SECRETS['writer']}", 'Bearer realm="fiq", error="invalid_token"'),
        (SECRETS["writer"], 'Bearer realm="fiq", error="invalid_token"'),
    ],
)
async def test_without_a_good_token_it_is_401_with_a_challenge(edge: Edge, value: str | None, challenge: str) -> None:
    """None, a wrong one, its hash, one that has ended (RFC 6750, section 3): nothing is stored."""
    headers: dict[str, Any] = {} if value is None else {"Authorization": value}
    reply = await edge.post(**headers)
    assert (401, "/problems/unauthorized", challenge) == told(reply)
    assert [] == edge.log.events


async def test_two_tokens_are_none(edge: Edge) -> None:
    """Which of them counts must not depend on what stands between client and service."""
    headers = [("Authorization", f"Bearer {SECRETS['writer']}"), ("Authorization", f"Bearer {SECRETS['ward']}")]
    assert 401 == (await edge.request("POST", "/consultations/c/events", data=b"{}", headers=headers)).status


async def test_a_token_without_the_scope_is_403(edge: Edge) -> None:
    """The challenge names the scope that is missing."""
    challenge = 'Bearer realm="fiq", error="insufficient_scope", scope="write"'
    assert (403, "/problems/forbidden", challenge) == told(await edge.post(**bearer("reader")))
    assert [] == edge.log.events


async def test_a_token_is_for_consultations_with_its_prefix(edge: Edge) -> None:
    """The id's beginning, not a part of it."""
    assert 202 == (await edge.post("ward-7", **bearer("ward"))).status
    for other in ("war", "Ward-7", "x-ward-7", "7"):
        assert 403 == (await edge.post(other, **bearer("ward"))).status


async def test_a_403_names_the_one_reason(edge: Edge) -> None:
    """The scope, the prefix, or that the resource is for tokens of all consultations."""
    batch = b'{"event_type":"A","consultation_id":"c-1"}'
    headers = bearer("ward") | {"Content_Type": "application/x-ndjson"}
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    for reply, detail in (
        (await edge.post(**bearer("reader")), "The token lacks the scope write."),
        (await edge.post("c-1", **bearer("ward")), "The token is for consultations with the prefix ward- only."),
        (
            await edge.request("POST", "/events/batch", data=batch, headers=headers),
            "The token is for consultations with the prefix ward- only.",
        ),
    ):
        assert (403, detail) == (reply.status, reply.json["detail"])


async def test_a_refused_client_is_not_asked_for_its_body(edge: Edge) -> None:
    """Expect: 100-continue is answered by the refusal itself."""
    head = b"POST /consultations/c-1/events HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"Expect: 100-continue\r\nContent-Length: 18\r\n"
    answer = await edge.raw(head + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 401 ")
    token = f"Authorization: Bearer {SECRETS['writer']}\r\n\r\n".encode()
    answer = await edge.raw(head + token + b'{"event_type":"A"}')
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 202 ")


@pytest.mark.parametrize(("method", "path"), [("GET", "/nope"), ("PUT", "/consultations/c-1/events")])
async def test_strangers_do_not_learn_which_paths_there_are(edge: Edge, method: str, path: str) -> None:
    """Who has a token does."""
    assert 401 == (await edge.request(method, path)).status
    assert (await edge.request(method, path, headers=bearer("reader"))).status in {404, 405}


async def test_the_meaning_of_a_problem_needs_no_token(edge: Edge) -> None:
    """Also that of the refusal."""
    assert 200 == (await edge.request("GET", "/problems/unauthorized")).status


def test_every_route_says_what_it_takes() -> None:
    """And only what must be is open."""
    app = make_app(Settings(), MemoryLog().open)
    routes = [route for route in app.router.routes() if route.resource is not None]
    rules = {(route.method, route.resource.canonical): app[ACCESS].rule(route) for route in routes if route.resource}
    assert rules
    assert [] == [route for route, rule in rules.items() if rule is None]
    opened = {route for route, rule in rules.items() if rule is not None and rule.scope is OPEN}
    options = {("OPTIONS", path) for _, path in rules}
    without_data = ("/", "/problems", "/problems/{slug}", "/openapi.json", "/docs", "/ui", "/ui/{file}", "/token")
    assert options | {(method, path) for method in ("GET", "HEAD") for path in without_data} == opened


@pytest.mark.parametrize(("path", "content_type"), [("/events/batch", "application/x-ndjson"), ("/events", STRUCTURED)])
async def test_events_that_name_their_consultations_need_a_token_for_each(
    edge: Edge, path: str, content_type: str
) -> None:
    """One that is not for the token's prefix, and nothing is stored; the refusal is audited."""

    def body(*consultations: str) -> bytes:
        if path == "/events":
            (name,) = consultations[-1:]
            return orjson.dumps({"specversion": "1.0", "id": name, "source": "/t", "type": "A", "subject": name})
        return b"\n".join(orjson.dumps({"event_type": "A", "consultation_id": name}) for name in consultations)

    async def post(*consultations: str) -> Reply:
        headers = bearer("ward") | {"Content-Type": content_type}
        return await edge.request("POST", path, data=body(*consultations), headers=headers)

    challenge = 'Bearer realm="fiq", error="insufficient_scope", scope="write"'
    assert (403, "/problems/forbidden", challenge) == told(await post("ward-1", "c-1"))
    assert 1.0 == edge.metric("fi_ingest_access_refused_total", reason="prefix")
    assert [] == edge.log.events
    assert 202 == (await post("ward-1", "ward-2")).status


@pytest.mark.parametrize(
    ("prefix", "shown"), [("", ["ward-1", "ward-2"]), ("w", ["ward-1", "ward-2"]), ("ward-2", ["ward-2"]), ("c", [])]
)
async def test_a_list_shows_only_what_the_token_is_for(edge: Edge, prefix: str, shown: list[str]) -> None:
    """Whatever prefix is asked for; the names of others would be told otherwise."""
    for name in ("c-1", "ward-1", "ward-2"):
        assert 202 == (await edge.post(name, **bearer("ward" if name.startswith("ward") else "writer"))).status
    edge.log.persisted = 3
    reply = await edge.request("GET", f"/consultations?prefix={prefix}", headers=bearer("ward"))
    assert shown == [one["consultation_id"] for one in reply.json["consultations"]]


@pytest.mark.usefixtures("quick")
async def test_following_ends_with_the_token(edge: Edge, file: Path) -> None:
    """What comes after it was revoked is not shown."""
    assert 202 == (await edge.post(**bearer("writer"))).status
    headers = bearer("reader") | {"Accept": "text/event-stream"}
    async with edge.client.get(f"{edge.url}/consultations/c-1/events?follow=1", headers=headers) as answer:
        while not (await answer.content.readline()).startswith(b"data:"):
            pass
        change(file, render([TOKENS["writer"]]))

        async def revoked() -> bool:
            return (await edge.request("GET", "/consultations", headers=bearer("reader"))).status == 401

        await eventually(revoked)
        assert 202 == (await edge.post(**bearer("writer"))).status
        assert b"data:" not in await answer.content.read()


async def test_a_batch_counts_as_many_events_as_it_has(file: Path) -> None:
    """One request is within the rate; the next waits until all the events of the batch have been worth it."""
    async with running_edge(token_file=str(file), rate=10.0, rate_burst=5) as edge:
        lines = b"\n".join([b'{"event_type":"A"}'] * 50)
        headers = bearer("writer") | {"Content-Type": "application/x-ndjson"}
        assert (
            202 == (await edge.request("POST", "/consultations/c-1/events/batch", data=lines, headers=headers)).status
        )
        reply = await edge.post(**bearer("writer"))
        assert (429, "/problems/rate-limited", "5") == (reply.status, reply.json["type"], reply.headers["Retry-After"])
        assert 50 == len(edge.log.events)


@asynccontextmanager
async def extended(token_file: Path | None) -> AsyncIterator[Edge]:
    """Run an application with routes that do not name one consultation."""

    async def handler(request: web.Request) -> web.Response:
        grant = request[GRANT]
        may = {name: grant.may(Scope.READ, name) for name in ("ward-1", "c-1")}
        return web.json_response(may | {"name": grant.name})

    def extend(app: web.Application) -> None:
        app.router.add_get("/silent", handler)
        app[ACCESS].add(app, "GET", "/whole", handler, Scope.READ)
        app[ACCESS].add(app, "GET", "/each", handler, Scope.READ, each=True)

    async with running_edge(extend=extend, token_file="" if token_file is None else str(token_file)) as edge:
        yield edge


@pytest.mark.parametrize("tokens", [True, False])
async def test_a_route_without_a_scope_is_refused_to_every_client(file: Path, tokens: bool) -> None:
    """Locked by default, also without tokens: a developer who adds a route notices at once."""
    async with extended(file if tokens else None) as edge:
        assert 403 == (await edge.request("GET", "/silent", headers=bearer("ward"))).status
        assert 1.0 == edge.metric("fi_ingest_access_refused_total", reason="unstated")


async def test_a_route_without_a_consultation_is_for_tokens_of_all(file: Path) -> None:
    """Unless its handler asks about each consultation by itself."""
    async with extended(file) as edge:
        assert 200 == (await edge.request("GET", "/whole", headers=bearer("reader"))).status
        assert 403 == (await edge.request("GET", "/whole", headers=bearer("ward"))).status
        reply = await edge.request("GET", "/each", headers=bearer("ward"))
        assert {"ward-1": True, "c-1": False, "name": "ward"} == reply.json


async def test_without_a_file_every_client_has_every_scope(file: Path) -> None:
    """As it is on loopback."""
    async with extended(None) as edge:
        assert {"ward-1": True, "c-1": True, "name": ""} == (await edge.request("GET", "/each")).json
        assert 202 == (await edge.post()).status


def change(path: Path, text: str | None) -> None:
    """Write *text* into the file, or remove it."""
    if text is None:
        path.unlink()
    else:
        path.write_text(text)


# -- the file ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the file more often than each second."""
    monkeypatch.setattr(service, "RELOAD_SECONDS", 0.02)


@pytest.mark.usefixtures("quick")
async def test_a_changed_file_counts_without_a_restart(edge: Edge, file: Path) -> None:
    """Replaced or written over; a grant that was given before loses what its token loses."""
    change(file, None)
    change(file, render([TOKENS["reader"]]))

    async def status(name: str) -> int:
        return (await edge.post(**bearer(name))).status

    async def revoked() -> bool:
        return await status("writer") == 401

    await eventually(revoked)
    change(file, render([TOKENS["writer"]]))

    async def back() -> bool:
        return await status("writer") == 202

    await eventually(back)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("damage", ["", "no line of ours\n", None])
async def test_a_broken_file_leaves_the_tokens_as_they_were(
    edge: Edge, file: Path, damage: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """An operator's mistake must not lock all clients out; one log line and a metric report it."""
    change(file, damage)
    await eventually(lambda: edge.metric("fi_ingest_token_file_broken") == 1.0)
    assert 202 == (await edge.post(**bearer("writer"))).status
    assert 401 == (await edge.post()).status
    change(file, render(TOKENS))
    await eventually(lambda: edge.metric("fi_ingest_token_file_broken") == 0.0)
    assert 1 == capsys.readouterr().out.count("FILE_REFUSED")


@pytest.mark.usefixtures("quick")
async def test_a_fault_in_the_reading_does_not_end_the_watch(
    edge: Edge, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that is revoked later must count all the same."""

    def fails(*_: object) -> str:
        raise OverflowError("secret-token")

    with monkeypatch.context() as patched:
        patched.setattr(access, "_read", fails)
        change(file, render([TOKENS["reader"]]))
        await eventually(lambda: edge.metric("fi_ingest_token_file_broken") == 1.0)
    await eventually(lambda: edge.metric("fi_ingest_token_file_broken") == 0.0)
    assert 401 == (await edge.post(**bearer("writer"))).status


@pytest.mark.usefixtures("quick")
async def test_a_revoked_token_ends_what_it_has_begun(edge: Edge, file: Path) -> None:
    """A stream that follows a consultation asks its grant now and then."""
    grants = []

    async def handler(request: web.Request) -> web.Response:
        grants.append(request[GRANT])
        return web.Response()

    async with running_edge(
        extend=lambda app: app[ACCESS].add(app, "GET", "/follow", handler, Scope.READ), token_file=str(file)
    ) as other:
        await other.request("GET", "/follow", headers=bearer("reader"))
        (grant,) = grants
        assert grant.may(Scope.READ)
        change(file, render([]))
        await eventually(lambda: not grant.may(Scope.READ))


@pytest.mark.parametrize("content", [None, "", "broken"])
def test_a_bad_file_at_the_start_is_a_configuration_error(tmp_path: Path, content: str | None) -> None:
    """With the setting's name and the file's."""
    path = tmp_path / "tokens"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigurationError, match=f"FI_TOKEN_FILE={path}: "):
        make_app(Settings(token_file=str(path)), MemoryLog().open)


# -- what is told -----------------------------------------------------------------------------------------------------


def refusals(entries: Sequence[MutableMapping[str, Any]]) -> list[MutableMapping[str, Any]]:
    return [entry for entry in entries if entry["event"] == "ACCESS_REFUSED"]


#: where the tests' clients come from
PROXY = (ip_network("127.0.0.0/8"),)


async def test_each_refused_access_is_a_line_without_a_token(file: Path) -> None:
    """Who, from where, what and why; of the path the template, of a proxy's word an address or nothing."""
    with capture_logs() as entries:
        async with running_edge(token_file=str(file), trusted_proxies=PROXY) as edge:
            await edge.post("secret-id", Authorization="Bearer guessed-secret", X_Forwarded_For="evil, 192.0.2.7")
            await edge.post("c-1", X_Forwarded_For="<script>", **bearer("reader"))
            await edge.request("PROPFIND", "/secret-path")
    keys = ("reason", "token", "remote", "forwarded", "method", "path")
    events = "/consultations/{consultation}/events"
    assert [
        ("unknown", None, "127.0.0.1", "192.0.2.7", "POST", events),
        ("scope", "reader", "127.0.0.1", None, "POST", events),
        ("missing", None, "127.0.0.1", None, "another one", None),
    ] == [tuple(entry.get(key) for key in keys) for entry in refusals(entries)]
    assert "secret" not in str(entries)


async def test_a_flood_of_refusals_does_not_fill_the_log(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The metric counts all of them."""
    monkeypatch.setattr(logs, "THROTTLE_RATE", 1e-9)
    monkeypatch.setattr(logs, "THROTTLE_BURST", 2)
    with capture_logs() as entries:
        async with running_edge(token_file=str(file)) as edge:
            for _ in range(4):
                await edge.post()
            assert 4.0 == edge.metric("fi_ingest_access_refused_total", reason="missing")
    assert 2 == len(refusals(entries))


@pytest.fixture
def bursts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the test takes, no further lines are allowed."""
    monkeypatch.setattr(logs, "THROTTLE_RATE", 1e-9)
    monkeypatch.setattr(access, "_ADDRESS_RATE", 1e-9)


@pytest.mark.usefixtures("bursts_only")
async def test_strangers_hide_nothing_that_is_done_with_a_token(file: Path) -> None:
    """Their lines are bounded together; all are counted."""
    with capture_logs() as entries:
        async with running_edge(token_file=str(file), trusted_proxies=PROXY) as edge:
            for number in range(61):
                await edge.post(X_Forwarded_For=f"192.0.2.{number}")
            await edge.post(**bearer("reader"))
            assert 61.0 == edge.metric("fi_ingest_access_refused_total", reason="missing")
    found = refusals(entries)
    assert [f"192.0.2.{number}" for number in range(50)] == [
        entry["forwarded"] for entry in found if "token" not in entry
    ]
    assert ["reader"] == [entry["token"] for entry in found if "token" in entry]


@pytest.mark.usefixtures("bursts_only")
async def test_a_stranger_does_not_use_up_the_lines_of_others(file: Path) -> None:
    """Each address has a part of them, of IPv6 each network."""
    with capture_logs() as entries:
        async with running_edge(token_file=str(file), trusted_proxies=PROXY) as edge:
            for number in range(1, 31):
                await edge.post(X_Forwarded_For=f"2001:db8::{number:x}")
            await edge.post(X_Forwarded_For="2001:db8:0:1::1")
            await edge.post(X_Forwarded_For="192.0.2.1")
    found = [entry["forwarded"] for entry in refusals(entries)]
    assert [*(f"2001:db8::{number:x}" for number in range(1, 11)), "2001:db8:0:1::1", "192.0.2.1"] == found


@pytest.mark.usefixtures("bursts_only")
@pytest.mark.parametrize("proxies", [(), (ip_network("192.0.2.0/24"),)])
async def test_a_client_does_not_choose_its_own_address(file: Path, proxies: tuple[IPv4Network, ...]) -> None:
    """X-Forwarded-For is believed from proxies that are configured, and from no one else."""
    with capture_logs() as entries:
        async with running_edge(token_file=str(file), trusted_proxies=proxies) as edge:
            for number in range(20):
                await edge.post(X_Forwarded_For=f"192.0.2.{number}")
    assert [("127.0.0.1", None)] * 10 == [(one["remote"], one.get("forwarded")) for one in refusals(entries)]


@pytest.mark.usefixtures("bursts_only")
async def test_a_flood_of_refused_requests_does_not_fill_the_log() -> None:
    """Of one problem; another one's line is there, and the metric counts all."""
    with capture_logs() as entries:
        async with running_edge() as edge:
            for _ in range(200):
                await edge.post(body=b"{")
            await edge.post("bad id")
            assert 200.0 == edge.metric("fi_ingest_requests_total", status="400", problem="invalid-json")
            edge.app[REFUSALS].throttle.rate = 1e9
            await edge.post(body=b"{")
    refused = [entry for entry in entries if entry["event"] == "REQUEST_REFUSED"]
    flood = [entry for entry in refused if entry["problem"] == "invalid-json"]
    assert 51 == len(flood)
    assert 201 == len(flood) + sum(entry.get("left_out", 0) for entry in flood)
    assert 1 == sum(entry["problem"] == "invalid-consultation-id" for entry in refused)


# -- rates ------------------------------------------------------------------------------------------------------------


async def test_a_token_over_its_rate_gets_429_and_the_others_do_not(file: Path) -> None:
    """With the seconds after which there is room again; nothing is stored."""
    async with running_edge(token_file=str(file), rate=0.1, rate_burst=2) as edge:
        replies = [await edge.post(**bearer("writer")) for _ in range(3)]
        assert [202, 202, 429] == [reply.status for reply in replies]
        assert "/problems/rate-limited" == replies[2].json["type"]
        assert 8 <= int(replies[2].headers["Retry-After"]) <= 10
        assert 202 == (await edge.post("ward-1", **bearer("ward"))).status
        assert 3 == len(edge.log.events)


async def test_a_batch_counts_its_events(file: Path) -> None:
    """The handler counts them when it knows how many; a batch may exceed the rate, the next request is refused."""

    async def handler(request: web.Request) -> web.Response:
        request[GRANT].count_events(int(request.query["more"]))
        return web.Response()

    async with running_edge(
        extend=lambda app: app[ACCESS].add(app, "GET", "/batch", handler, Scope.READ),
        token_file=str(file),
        rate=0.01,
        rate_burst=10,
    ) as edge:
        statuses = [
            (await edge.request("GET", f"/batch?more={more}", headers=bearer("reader"))).status for more in (5, 7, 2, 1)
        ]
        assert [200, 200, 429, 429] == statuses


# -- the name of the service, while no token is required ---------------------------------------------------------------

REBOUND = [b"evil.example", b"evil.example:7001", b"localhost.evil.example", b"127.0.0.1.evil.example:7001"]
ODD = [b"", b":7001", b"localhost:x", b"[::1", b"::1", b"10.0.0.1", b"[2001:db8::1]:7001", b"localhost@evil.example"]
PATHS = [b"GET /consultations", b"GET /docs", b"GET /problems/not-found", b"GET /nope", b"OPTIONS /consultations"]


def asked(line: bytes, host: bytes) -> bytes:
    return line + b" HTTP/1.1\r\nConnection: close\r\nHost: " + host + b"\r\n\r\n"


@pytest.mark.parametrize("host", [*REBOUND, *ODD])
async def test_a_web_page_cannot_read_a_service_without_tokens(host: bytes) -> None:
    """A page whose name points to 127.0.0.1 is of one origin with it, but its requests name the page's own host."""
    async with running_edge() as edge:
        for line in PATHS:
            answer = await edge.raw(asked(line, host))
            assert answer.startswith(b"HTTP/1.1 421 "), line
            assert b"/problems/unknown-host" in answer
            assert b"FI_ALLOWED_HOSTS" in answer
        post = asked(b"POST /consultations/c-1/events", host)[:-2]
        post += b"Content-Type: application/json\r\nContent-Length: 18\r\nExpect: 100-continue\r\n\r\n"
        assert (await edge.raw(post)).startswith(b"HTTP/1.1 421 ")


@pytest.mark.parametrize(
    "host", [b"localhost", b"LocalHost:1", b"127.0.0.1", b"127.0.0.1:7001", b"[::1]", b"[::1]:7001", b"127.0.0.2"]
)
async def test_the_names_of_this_machine_are_served(host: bytes) -> None:
    """With any port: a tunnel may have another one."""
    async with running_edge() as edge:
        assert (await edge.raw(asked(PATHS[0], host))).startswith(b"HTTP/1.1 200 ")


async def test_further_names_can_be_allowed() -> None:
    """And no others; without a name it is no browser."""
    async with running_edge(allowed_hosts=("fiq.example", "[2001:db8::1]")) as edge:
        for host in (b"fiq.example", b"FIQ.example:80", b"[2001:db8::1]:7001", b"localhost"):
            assert (await edge.raw(asked(PATHS[0], host))).startswith(b"HTTP/1.1 200 ")
        assert (await edge.raw(asked(PATHS[0], b"other.example"))).startswith(b"HTTP/1.1 421 ")
        assert (await edge.raw(b"GET /consultations HTTP/1.0\r\n\r\n")).startswith(b"HTTP/1.0 200 ")


def readable_by_others(file: Path) -> bool:
    return bool(file.stat().st_mode & 0o077)


@pytest.fixture(params=[0o600, 0o640, 0o604], ids=oct)
def file_of_mode(file: Path, request: pytest.FixtureRequest) -> Path:
    file.chmod(request.param)
    return file


async def test_a_token_file_that_others_can_read_is_warned_of(
    file_of_mode: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its hashes are not the tokens, but its names and prefixes tell who the clients are."""
    async with running_edge(token_file=str(file_of_mode)):
        assert readable_by_others(file_of_mode) == ("SECRET_READABLE" in capsys.readouterr().out)


async def test_without_tokens_a_page_of_another_origin_cannot_change_anything() -> None:
    """A browser sends a POST without a body to any address, and says which page asked for it."""
    async with running_edge() as edge:
        requeue = asked(b"POST /dead-letters/1/requeue", b"127.0.0.1:7001")[:-2]
        for origin in (b"https://evil.example", b"null", b"http://127.0.0.1:8080"):
            answer = await edge.raw(requeue + b"Content-Length: 0\r\nOrigin: " + origin + b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 403 ")
            assert b"/problems/cross-origin" in answer
        for own in (b"", b"Origin: http://127.0.0.1:7001\r\n"):
            answer = await edge.raw(requeue + b"Content-Length: 0\r\n" + own + b"\r\n")
            assert answer.startswith(b"HTTP/1.1 404 ")
        read = asked(PATHS[0], b"127.0.0.1:7001")[:-2] + b"Origin: https://evil.example\r\n\r\n"
        assert (await edge.raw(read)).startswith(b"HTTP/1.1 200 ")


async def test_with_tokens_any_name_is_served(file: Path) -> None:
    """A web page has no token."""
    async with running_edge(token_file=str(file)) as edge:
        head = asked(PATHS[0], b"fiq.example")[:-2] + b"Authorization: Bearer reader-secret\r\n\r\n"
        assert (await edge.raw(head)).startswith(b"HTTP/1.1 200 ")
        assert (await edge.raw(asked(PATHS[0], b"evil.example"))).startswith(b"HTTP/1.1 401 ")

"""The page's files as they are served, and `GET /token`, without a browser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from services.core.tokens import digest_of
from services.ingest import ui
from tests.support.ingest import running_edge

PAGE = Path(ui.__file__).parent / "page"
FILES = sorted(PAGE.iterdir())
SCRIPTS = [path for path in FILES if path.suffix == ".js"]
#: of the page's own code, uncompressed
MOST_BYTES = 150_000
#: a token and its SHA-256, as in a token file
SECRET = "0123456789abcdef0123456789abcdef0123456789a"


def dictionary(language: str) -> dict[str, str]:
    """Return the texts of a language by their keys."""
    text = (PAGE / "texts.js").read_text()
    part = re.search(rf"^const {language} = \{{\n(.*?)^\}};", text, re.MULTILINE | re.DOTALL)
    assert part is not None
    found = re.findall(r'^\t"?([\w-]+)"?: "((?:[^"\\]|\\.)*)",$', part[1], re.MULTILINE)
    lines = [line for line in part[1].splitlines() if not line.strip().startswith("//")]
    assert len(lines) == len(found) == len(dict(found)), "a line is no entry, or a key is there twice"
    return dict(found)


def test_both_languages_have_the_same_texts() -> None:
    """With the same values in them; none is empty."""
    english, spanish = dictionary("en"), dictionary("es")
    assert english.keys() == spanish.keys()
    for key, text in english.items():
        assert text
        assert spanish[key]
        assert sorted(re.findall(r"\{\w+\}", text)) == sorted(re.findall(r"\{\w+\}", spanish[key])), key


def test_every_text_is_used_and_every_used_text_exists() -> None:
    """A misspelt key would throw in the browser, a leftover costs bytes."""
    source = "\n".join(path.read_text() for path in SCRIPTS if path.name != "texts.js")
    known = dictionary("en").keys()
    used = set(re.findall(r'\bt\("([\w-]+)"', source))
    assert set() == used - known
    parts = (*re.findall(r"\bt\(`([\w-]+)\$\{", source), "requeue", "drop")  # t(`${action}Title`)
    assert set() == {key for key in known if f'"{key}"' not in source and not key.startswith(parts)}


def test_the_page_is_small_and_loads_nothing_from_elsewhere() -> None:
    """It works without any other host; nothing in it is a script or a style of the markup's own."""
    assert sum(path.stat().st_size for path in FILES) < MOST_BYTES
    for path in FILES:
        text = path.read_text()
        hosts = set(re.findall(r"https?://[^\s\"'`)]+", text)) - {"http://www.w3.org/2000/svg"}
        assert set() == hosts, path.name
        assert not re.search(r"\b(innerHTML|outerHTML|insertAdjacentHTML|eval|document\.write|localStorage)\b", text)
        assert not re.search(r"sessionStorage|indexedDB|document\.cookie|setAttribute\(\"style\"", text)
    markup = (PAGE / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\bsrc=)", markup)


def test_the_first_view_s_scripts_are_all_named_in_the_markup() -> None:
    """The browser asks for them at once, instead of for each one when it has read the script that imports it."""

    def imported(script: str) -> set[str]:
        return set(re.findall(r'^import [^;]*?"\./(\w+\.js)";$', (PAGE / script).read_text(), re.MULTILINE))

    needed, found = set[str](), {"app.js"}
    while found:
        needed |= found
        found = set().union(*map(imported, found)) - needed
    preloaded = re.findall(r'rel="modulepreload" href="ui/(\w+\.js)"', (PAGE / "index.html").read_text())
    assert sorted(needed) == sorted(preloaded)
    assert "consultations.js" in needed


async def test_the_files_come_with_a_strict_policy_and_an_entity_tag() -> None:
    """Nothing may run, load or frame but what this origin serves; text can become neither markup nor code."""
    async with running_edge() as edge:
        for path in [ui.UI_PATH, *(f"{ui.UI_PATH}/{name}" for name in ui.names())]:
            reply = await edge.request("GET", path)
            assert 200 == reply.status
            policy = dict(part.partition(" ")[::2] for part in reply.headers["Content-Security-Policy"].split("; "))
            assert {
                "default-src": "'none'",
                "script-src": "'self'",
                "style-src": "'self'",
                "img-src": "'self'",
                "connect-src": "'self'",
                "form-action": "'none'",
                "frame-ancestors": "'none'",
                "base-uri": "'none'",
                "require-trusted-types-for": "'script'",
                "trusted-types": "'none'",
            } == policy
            assert ("nosniff", "no-referrer") == (
                reply.headers["X-Content-Type-Options"],
                reply.headers["Referrer-Policy"],
            )
            async with edge.client.get(edge.url + path) as first:
                tag = first.headers["ETag"]
            async with edge.client.get(edge.url + path, headers={"If-None-Match": f'"x", {tag}'}) as again:
                assert (304, b"") == (again.status, await again.read())


@pytest.mark.parametrize("name", ["index.html", "nothing.js", "..%2Fui.py", "%00"])
async def test_no_other_file_is_served(name: str) -> None:
    """The names are those that were read at the start."""
    async with running_edge() as edge:
        assert 404 == (await edge.request("GET", f"{ui.UI_PATH}/{name}")).status


@pytest.mark.parametrize(("masked", "shown"), [(True, b'data-bodies="hidden"'), (False, b'data-bodies="shown"')])
async def test_the_deployment_chooses_whether_bodies_are_masked(masked: bool, shown: bytes) -> None:
    """FI_UI_MASKED; by default a body is shown only on demand."""
    async with running_edge(ui_masked=masked) as edge:
        assert shown in (await edge.request("GET", ui.UI_PATH)).content


async def test_the_page_knows_without_asking_whether_a_token_is_needed(tmp_path: Path) -> None:
    """So it asks for its first view's data, or for the token, as soon as its scripts run."""
    async with running_edge() as edge:
        assert b'data-token="optional"' in (await edge.request("GET", ui.UI_PATH)).content
    (tmp_path / "tokens").write_text(f"ward-3 {digest_of(SECRET)} read ward-3-*\n")
    async with running_edge(token_file=str(tmp_path / "tokens")) as edge:
        assert b'data-token="required"' in (await edge.request("GET", ui.UI_PATH)).content


# -- the token --------------------------------------------------------------------------------------------------------


async def test_where_no_token_is_needed_everything_is_allowed() -> None:
    """As for every other request."""
    async with running_edge() as edge:
        found = (await edge.request("GET", "/token")).json
        assert (False, "", "") == (found["required"], found["name"], found["prefix"])
        assert {"read", "write", "ops", "admin"} == set(found["scopes"])


async def test_a_token_s_holder_reads_what_it_allows(tmp_path: Path) -> None:
    """Without a token the answer only says that one is needed; a wrong or expired one is refused."""
    tokens = tmp_path / "tokens"
    tokens.write_text(
        f"ward-3 {digest_of(SECRET)} read,write ward-3-* 2099-01-01T00:00:00Z\n"
        f"old {digest_of('old')} read * 2001-01-01T00:00:00Z\n"
    )
    async with running_edge(token_file=str(tokens)) as edge:

        async def ask(token: str | None) -> object:
            headers = {} if token is None else {"Authorization": f"Bearer {token}"}
            reply = await edge.request("GET", "/token", headers=headers)
            assert reply.status == 401 or reply.headers["Cache-Control"] == "no-store"
            return reply.json if reply.status == 200 else reply.status

        nothing = {"required": True, "name": "", "scopes": [], "prefix": "", "expires": None}
        assert nothing == await ask(None)
        allowed = {"name": "ward-3", "scopes": ["read", "write"], "prefix": "ward-3-"}
        assert nothing | allowed | {"expires": "2099-01-01T00:00:00Z"} == await ask(SECRET)
        assert [401, 401] == [await ask("old"), await ask("wrong")]

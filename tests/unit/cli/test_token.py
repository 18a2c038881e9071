"""`fiq token`: made once, kept as hashes, changed under the eyes of a running service."""

from __future__ import annotations

import json
import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from services.cli.init.files import Layout
from services.cli.main import app
from services.core.tokens import Scope, Token, digest_of, parse


def fiq(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """A deployment."""
    assert 0 == fiq("init", tmp_path, "--owner", f"{os.geteuid()}:{os.getegid()}").exit_code
    return Layout(tmp_path)


def test_a_new_token_is_printed_once_and_kept_as_a_hash(layout: Layout) -> None:
    """The other tokens stay; stdout has only the token."""
    done = fiq("token", "new", "ward", "--scopes", "read,write", "--prefix", "ward-", "--deployment", layout.folder)
    assert 0 == done.exit_code
    secret = done.stdout.strip()
    found = parse(layout.tokens.read_text())
    token = found[digest_of(secret)]
    assert Token("ward", digest_of(secret), frozenset({Scope.READ, Scope.WRITE}), "ward-") == token
    assert ["default", "ward"] == [one.name for one in found.values()]
    assert not [path for path in layout.secrets.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    ("value", "expected"),
    [("90d", timedelta(days=90)), ("12h", timedelta(hours=12)), ("2100-01-31", datetime(2100, 1, 31, tzinfo=UTC))],
)
def test_a_token_may_end(layout: Layout, value: str, expected: timedelta | datetime) -> None:
    """After a time, or at one."""
    done = fiq("token", "new", "ward", "--expires", value, "--deployment", layout.folder)
    end = parse(layout.tokens.read_text())[digest_of(done.stdout.strip())].expires
    wanted = expected if isinstance(expected, datetime) else datetime.now(UTC) + expected
    assert end is not None
    assert abs(end - wanted) < timedelta(minutes=1)


@pytest.mark.parametrize(
    "value", ["2020-01-31", "2020-01-31T12:00:00Z", datetime.now(UTC).isoformat()], ids=["day", "time", "now"]
)
def test_a_token_that_has_expired_already_is_not_made(layout: Layout, value: str) -> None:
    """Its client would be refused from the first request on, and its operator would look for the reason elsewhere."""
    before = layout.tokens.read_text()
    done = fiq("token", "new", "ward", "--expires", value, "--deployment", layout.folder)
    assert (2, "") == (done.exit_code, done.stdout)
    assert f"--expires {value} is in the past" in " ".join(done.stderr.split())
    assert before == layout.tokens.read_text()


@pytest.mark.parametrize("value", ["tomorrow", "0d", "-5d", "2027-01-31T12:00:00"])
def test_a_malformed_expiry_is_told_what_is_expected(layout: Layout, value: str) -> None:
    """Spans too, which the file does not know."""
    done = fiq("token", "new", "ward", f"--expires={value}", "--deployment", layout.folder)
    assert 2 == done.exit_code
    said = " ".join(done.stderr.split())
    assert f"--expires {value}: expected a span such as 90d or 12h, a date, or a time with its zone" in said


def test_the_file_is_replaced_as_a_whole_and_stays_its_owners(layout: Layout) -> None:
    """A service that reads meanwhile sees the old one or the new one; an operator's comments stay."""
    layout.tokens.write_text(layout.tokens.read_text() + "# for the night\n")
    with layout.tokens.open() as old:
        before = old.read()
        fiq("token", "new", "ward", "--deployment", layout.folder)
        old.seek(0)
        assert before == old.read()
    assert layout.tokens.read_text().startswith(before)
    assert 0o600 == stat.S_IMODE(layout.tokens.stat().st_mode)
    assert ["tokens"] == [path.name for path in layout.api.iterdir()]


def test_the_list_shows_what_each_is_for_and_no_hash(layout: Layout) -> None:
    """For people and as JSON."""
    fiq("token", "new", "ward", "--prefix", "ward-", "--expires", "2100-01-31", "--deployment", layout.folder)
    shown = fiq("token", "list", "--deployment", layout.folder).output
    for part in ("default", "read, write", "ward-*", "2100-01-31", "never"):
        assert part in shown
    rows = json.loads(fiq("token", "list", "--json", "--deployment", layout.folder).output)
    assert {"name": "ward", "scopes": ["write"], "prefix": "ward-", "expires": "2100-01-31T00:00:00+00:00"} == rows[1]
    assert not [digest for digest in parse(layout.tokens.read_text()) if digest in shown + str(rows)]


def test_a_revoked_token_is_gone_also_from_the_clients(layout: Layout) -> None:
    """The last one too: with a file without tokens every request is refused."""
    assert 0 == fiq("token", "revoke", "default", "--deployment", layout.folder).exit_code
    assert {} == parse(layout.tokens.read_text())
    assert not layout.token("default").exists()


def test_a_file_of_its_own_needs_no_deployment(tmp_path: Path) -> None:
    """For an ingest that runs without a deployment."""
    path = tmp_path / "tokens"
    secret = fiq("token", "new", "me", "--file", path).stdout.strip()
    assert [digest_of(secret)] == list(parse(path.read_text()))
    refused = fiq("token", "new", "me", "--file", tmp_path / "missing" / "tokens")
    assert (1, True) == (refused.exit_code, "missing does not exist: make that folder first" in refused.stderr)
    assert 0o600 == stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["new", "default"], "has a token called default"),
        (["new", "a/b"], "a name is"),
        (["new", "a", "--scopes", "all"], "scopes are"),
        (["new", "a", "--prefix", "a*"], "a prefix is"),
        (["new", "a", "--expires", "soon"], "expected a span"),
        (["new", "a", "--expires", "2100"], "expected a span"),
        (["new", "a", "--scopes", "read,ops", "--prefix", "ward-"], "leave --prefix out"),
        (["revoke", "nobody"], "has no token called nobody"),
        (["revoke", "../x"], "a name is"),
    ],
)
def test_what_cannot_be_done_is_told_and_changes_nothing(layout: Layout, arguments: list[str], expected: str) -> None:
    """Exit code 1 or 2, one line."""
    before = layout.tokens.read_text()
    done = fiq("token", *arguments, "--deployment", layout.folder)
    assert ("called" not in expected) + 1 == done.exit_code  # 2: the arguments are wrong
    assert expected in done.output
    assert before == layout.tokens.read_text()


@pytest.mark.parametrize("command", [["new", "a"], ["list"], ["revoke", "a"]])
def test_without_a_deployment_it_says_how_to_make_one(tmp_path: Path, command: list[str]) -> None:
    """A token in a file that no service reads is useless."""
    done = fiq("token", *command, "--deployment", tmp_path)
    assert 1 == done.exit_code
    assert "fiq init" in done.output

"""The context file for the `nats` command line (ADR-21)."""

from __future__ import annotations

import json
import os
import pwd
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.cli.errors import CommandError
from services.cli.init.deployment import Deployment
from services.cli.init.files import FileOwner
from services.cli.main import app
from services.cli.nats_context import context_path, write_context

URL = "nats://127.0.0.1:4222,nats://127.0.0.1:4223"


def test_the_file_stands_where_the_nats_command_line_looks(tmp_path: Path) -> None:
    """XDG_CONFIG_HOME decides; the default is .config in the home of the password database, whatever HOME says."""
    assert tmp_path / "nats/context/fiq.json" == context_path("fiq", {"XDG_CONFIG_HOME": str(tmp_path)})
    home = Path(pwd.getpwuid(os.getuid()).pw_dir)
    assert home / ".config/nats/context/fiq.json" == context_path("fiq", {"HOME": str(tmp_path)})


def test_a_user_without_an_entry_in_the_password_database_has_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the uid of a container has none; Go's library then takes HOME, too."""
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)
    assert tmp_path / ".config/nats/context/fiq.json" == context_path("fiq", {"HOME": str(tmp_path)})


@pytest.mark.parametrize("name", ["", "..", "a/b", "../x", "a\0b"])
def test_a_name_cannot_lead_out_of_the_folder(name: str) -> None:
    """A name is one path component."""
    with pytest.raises(CommandError, match="name of a context"):
        context_path(name, {"XDG_CONFIG_HOME": "/nowhere"})


def test_the_command_writes_and_selects_a_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file holds the URLs, is private, and --select names it in context.txt."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    result = CliRunner().invoke(app, ["nats-context", "--server", URL, "--name", "here", "--select"])

    path = tmp_path / "nats/context/here.json"
    assert result.exit_code == 0, result.output
    assert json.loads(path.read_text())["url"] == URL
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (tmp_path / "nats/context.txt").read_text() == "here"
    assert [path] == list(path.parent.iterdir())


def test_nothing_is_selected_without_being_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own choice of a default context stays."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    result = CliRunner().invoke(app, ["nats-context", "--server", URL])

    assert result.exit_code == 0, result.output
    assert not (tmp_path / "nats/context.txt").exists()
    assert "--context fiq" in result.output


def test_a_context_of_ours_is_written_again(tmp_path: Path) -> None:
    """Ports change from run to run: a second write replaces the first."""
    path = tmp_path / "fiq.json"

    write_context(path, "nats://127.0.0.1:1", {}, force=False)
    write_context(path, "nats://127.0.0.1:2", {}, force=False)

    assert json.loads(path.read_text())["url"] == "nats://127.0.0.1:2"


@pytest.mark.parametrize("content", ['{"description": "mine", "url": "nats://elsewhere"}', "{}", "[]", "no JSON"])
def test_a_foreign_context_is_replaced_with_force_only(tmp_path: Path, content: str) -> None:
    """What fiq did not write is not fiq's to overwrite."""
    path = tmp_path / "fiq.json"
    path.write_text(content)

    with pytest.raises(CommandError, match="--force"):
        write_context(path, URL, {}, force=False)
    assert path.read_text() == content

    write_context(path, URL, {}, force=True)
    assert json.loads(path.read_text())["url"] == URL


def test_a_user_of_a_deployment_brings_seed_authority_and_inbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ADR-21 names nkey, ca, tls_first and inbox_prefix; paths are absolute, and no secret is copied."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    Deployment(tmp_path / "deployment", FileOwner.myself()).complete()
    secrets = tmp_path / "deployment/secrets"
    monkeypatch.chdir(tmp_path)

    result = CliRunner().invoke(app, ["nats-context", "--server", URL, "--user", "ops", "--deployment", "deployment"])

    assert result.exit_code == 0, result.output
    context = json.loads((tmp_path / "nats/context/fiq.json").read_text())
    del context["description"]
    expected = {
        "url": URL,
        "nkey": str(secrets / "users/ops.seed"),
        "ca": str(secrets / "ca.pem"),
        "tls_first": True,
        "inbox_prefix": "_INBOX_ops",
    }
    assert expected == context


@pytest.mark.parametrize(
    ("user", "command"),
    [
        ("ops", "stream info fi-events"),
        ("provisioner", "stream info fi-events"),
        ("placement", "kv get fi-partitions main.00"),
        ("system", "server report jetstream"),
    ],
)
def test_it_proposes_what_the_user_may_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: str, command: str
) -> None:
    """The system account has no streams, and the streams' users may not ask for servers."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    Deployment(tmp_path / "deployment", FileOwner.myself()).complete()
    own = ["--user", user, "--deployment", str(tmp_path / "deployment")]

    result = CliRunner().invoke(app, ["nats-context", "--server", URL, "--name", "mine", *own])

    assert f"try  nats --context mine {command}\n" in result.output


def test_a_user_without_a_seed_is_an_error_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the wrong folder there is nothing to write."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    arguments = ["nats-context", "--server", URL, "--user", "ops", "--deployment", str(tmp_path)]

    result = CliRunner().invoke(app, arguments)

    assert result.exit_code == 1
    assert f"{tmp_path}/secrets/users/ops.seed does not exist" in result.output
    assert not (tmp_path / "nats").exists()

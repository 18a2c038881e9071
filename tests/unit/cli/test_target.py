"""Which cluster, which service, and which corpus a command is about."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.cli.embedded.stack import DEFAULT_FOLDER, StackFolder, StackState
from services.cli.errors import CommandError, NotRunningError
from services.cli.main import app
from services.cli.target import find_cluster, find_corpus, find_service

STATE = StackState(pid=1, log_url="nats://127.0.0.1:10", ingest_url="http://127.0.0.1:2", data_dir="/data", members=())
ENV = {"FI_LOG_URL": "nats://127.0.0.1:20", "FI_STORE": "second"}
SERVER = "nats://127.0.0.1:30"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def test_the_option_comes_before_everything() -> None:
    """--server wins over the folder and the environment; the other settings stay."""
    target = find_cluster(SERVER, Path("elsewhere"), env=ENV)

    assert target.settings.servers == (SERVER,)
    assert target.settings.store == "second"
    assert target.state is None


def test_a_named_folder_comes_before_the_environment() -> None:
    """--folder names the cluster that runs in it."""
    folder = StackFolder(Path("elsewhere"))
    with folder.held():
        folder.write(STATE)
        target = find_cluster(None, folder.path, env=ENV)

    assert target.settings.servers == (STATE.log_url,)
    assert target.state == STATE


def test_the_environment_comes_before_the_default_folder() -> None:
    """FI_LOG_URL means the same as for the services."""
    folder = StackFolder(DEFAULT_FOLDER)
    with folder.held():
        folder.write(STATE)

        assert find_cluster(None, None, env=ENV).settings.servers == (ENV["FI_LOG_URL"],)
        assert find_cluster(None, None, env={}).settings.servers == (STATE.log_url,)


def test_nothing_is_created_in_a_cluster_that_nobody_named() -> None:
    """Whatever listens on the usual port may be somebody else's."""
    done = CliRunner(env={"FI_LOG_URL": None}).invoke(app, ["provision"])

    assert 1 == done.exit_code
    assert "or a cluster with --server" in " ".join(done.stderr.split())


def test_without_any_cluster_only_some_commands_guess() -> None:
    """The usual address is tried where that was asked for."""
    with pytest.raises(NotRunningError):
        find_cluster(None, None, env={})

    assert find_cluster(None, None, env={}, fallback=True).settings.servers == ("nats://127.0.0.1:4222",)


def test_the_corpus_is_looked_for_from_the_option_to_the_default() -> None:
    """--corpus, --folder, FI_DATA_DIR, ./.fiq/corpus, ./corpus."""
    env = {"FI_DATA_DIR": "data"}
    for name in ("option", "folder/corpus", "data", "corpus"):
        Path(name).mkdir(parents=True)

    assert Path("option") == find_corpus(Path("option"), Path("folder"), env=env)
    assert Path("folder/corpus") == find_corpus(None, Path("folder"), env=env)
    assert Path("data") == find_corpus(None, None, env=env)
    assert Path("corpus") == find_corpus(None, None, env={})

    (DEFAULT_FOLDER / "corpus").mkdir(parents=True)
    assert find_corpus(None, None, env={}) == DEFAULT_FOLDER / "corpus"


def test_a_missing_corpus_names_the_places() -> None:
    """The error says where it looked and how to name another place."""
    with pytest.raises(CommandError, match=r"\.fiq/corpus and corpus.*--corpus"):
        find_corpus(None, None, env={})


def test_a_service_is_named_and_never_guessed() -> None:
    """By --url, --folder, FI_URL or ./.fiq, in this order; events go to no address that nobody named."""
    env = {"FI_URL": "http://127.0.0.1:3", "FI_TOKEN": "t"}
    with pytest.raises(NotRunningError, match="--url or FI_URL"):
        find_service(None, None, None, env={})
    folder = StackFolder(DEFAULT_FOLDER)
    with folder.held():
        folder.write(STATE)

        assert "http://127.0.0.1:4 (--url)" == str(find_service("http://127.0.0.1:4", DEFAULT_FOLDER, None, env=env))
        assert f"{STATE.ingest_url} (`fiq up` in .fiq)" == str(find_service(None, DEFAULT_FOLDER, None, env=env))
        assert "http://127.0.0.1:3 (FI_URL)" == str(find_service(None, None, None, env=env))
        assert STATE.ingest_url == find_service(None, None, None, env={}).url


def test_a_folder_that_was_named_is_not_replaced() -> None:
    """Nothing runs there: FI_URL is another service."""
    with pytest.raises(NotRunningError, match="elsewhere"):
        find_service(None, Path("elsewhere"), None, env={"FI_URL": "http://127.0.0.1:3"})

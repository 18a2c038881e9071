"""The stack as tests and the demonstration use it: parts that can be killed and started again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest

from services.cli.embedded import stack as module
from services.cli.embedded.processes import free_ports, is_free
from services.cli.embedded.stack import Stack
from services.cli.errors import ChildFailedError, PortTakenError
from tests.support.certificates import CertificateFiles
from tests.support.polling import eventually_sync


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The cheapest stack: one node, two persisters."""
    with Stack(tmp_path_factory.mktemp("stack"), nodes=1) as running:
        yield running


def test_each_part_is_announced_when_it_is_ready(tmp_path: Path) -> None:
    """A progress display knows all parts from the beginning, and hears of each once."""
    announced: list[str] = []
    stack = Stack(tmp_path, nodes=1, persisters=1)
    try:
        stack.start(announced.append)
    finally:
        killed = stack.stop()

    assert sorted(announced) == sorted(stack.parts)
    assert killed == []
    assert [process.running for process in stack.processes] == [False, False, False]


def test_all_services_are_ready(stack: Stack) -> None:
    """Started means that events can be posted and are persisted."""
    assert [service.is_ready() for service in stack.services] == [True, True, True]
    assert len(stack.persisters) == 2


def test_a_killed_persister_comes_back_on_its_port(stack: Stack) -> None:
    """The same process description is started again, as an operator's supervisor would."""
    victim = stack.persisters[0]
    url, pid = victim.url, victim.process.pid

    victim.process.kill()
    assert not victim.is_ready()
    stack.restart(victim)
    stack.wait_ready(victim)

    assert victim.url == url
    assert victim.process.pid != pid


def test_a_service_that_ends_at_once_shows_why(tmp_path: Path) -> None:
    """The error carries what the service said last, and nothing is left running."""
    stack = Stack(tmp_path, nodes=1, env={"FI_PARTITIONS": "many"})

    with pytest.raises(ChildFailedError, match="FI_PARTITIONS='many'"):
        stack.start()

    assert not any(process.running for process in stack.processes)


def test_settings_reach_the_services(tmp_path: Path) -> None:
    """What is passed on top of the environment counts; addresses and directories stay the stack's own."""
    env = {"FI_PARTITIONS": "3", "FI_PORT": "1", "FI_DATA_DIR": "/nowhere", "FI_ALLOW_EPHEMERAL": "0"}
    with Stack(tmp_path, nodes=1, persisters=1, env=env) as stack:
        files = eventually_sync(lambda: sorted(path.name for path in stack.data_dir.glob("[0-9][0-9].h5")))

    assert files == ["00.h5", "01.h5", "02.h5"]


def test_with_a_certificate_the_urls_are_https(tmp_path: Path) -> None:
    """Also in the file that tells the other commands where the stack is."""
    files = CertificateFiles(tmp_path)
    env = {f"FI_{name.upper()}": path for name, path in files.settings.items()}
    with Stack(tmp_path / "stack", nodes=1, persisters=1, env=env) as stack:
        url = stack.state().ingest_url
        assert url.startswith("https://127.0.0.1:")
        with urlopen(url, context=files.trust()) as answer:
            assert 200 == answer.status


def test_a_port_that_is_taken_is_refused_before_anything_starts(stack: Stack, tmp_path: Path) -> None:
    """No cluster comes up in vain."""
    second = Stack(tmp_path, port=stack.ingest.port)

    with pytest.raises(PortTakenError, match=f"{stack.ingest.port} is taken"):
        second.start()

    assert second.processes == []


def test_another_stack_on_the_port_is_not_taken_for_ours(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that start together may choose one port: who comes second takes another, and does not post to the first."""
    looks = iter([True])  # the port looked free when it was chosen
    monkeypatch.setattr(module, "PREFERRED_PORT", stack.ingest.port)
    monkeypatch.setattr(module, "is_free", lambda port: next(looks, None) or is_free(port))

    with Stack(tmp_path, nodes=1, persisters=1) as second:
        assert second.ingest.port != stack.ingest.port
        assert second.ingest.is_ready()


def test_a_port_that_was_asked_for_is_used(tmp_path: Path) -> None:
    """--port is kept."""
    (port,) = free_ports(1)

    with Stack(tmp_path, nodes=1, persisters=1, port=port) as stack:
        assert stack.ingest.url == f"http://127.0.0.1:{port}"

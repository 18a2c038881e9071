"""Where the embedded cluster finds its server and its configuration."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pytest

from services.cli.embedded import processes
from services.cli.embedded.processes import find_nats_conf, find_nats_server
from services.cli.errors import MissingServerError


def make_server(folder: Path) -> Path:
    folder.mkdir()
    server = folder / "nats-server"
    server.write_text("#!/bin/sh\n")
    server.chmod(0o755)
    return server


def test_the_server_beside_the_running_python_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheel's server is taken even when another one is on PATH."""
    wheel, other = make_server(tmp_path / "venv"), make_server(tmp_path / "other")
    monkeypatch.setattr(sys, "executable", str(wheel.parent / "python"))
    monkeypatch.setenv("PATH", str(other.parent))

    assert wheel == find_nats_server()


def test_the_server_on_path_is_taken_without_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation without the extra may use the machine's own nats-server."""
    other = make_server(tmp_path / "other")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setenv("PATH", str(other.parent))

    assert other == find_nats_server()


def test_a_missing_server_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any server the error names the command that brings one."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(MissingServerError, match=r'pip install "fiq\[services,embedded\]"'):
        find_nats_server()


def test_the_configuration_in_the_wheel_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed, nats.conf lies in the package; in a checkout, where compose finds it too."""
    packaged, checkout = tmp_path / "a.conf", tmp_path / "b.conf"
    monkeypatch.setattr(processes, "_CONFIGURATIONS", (packaged, checkout))
    checkout.touch()
    assert checkout == find_nats_conf()

    packaged.touch()
    assert packaged == find_nats_conf()


def test_a_missing_configuration_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged installation has another message than a missing server."""
    monkeypatch.setattr(processes, "_CONFIGURATIONS", (tmp_path / "a.conf", tmp_path / "b.conf"))

    with pytest.raises(MissingServerError, match="reinstall"):
        find_nats_conf()

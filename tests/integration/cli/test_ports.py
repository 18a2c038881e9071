"""The choice of ports on loopback."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from services.cli.embedded import processes
from services.cli.embedded.processes import LOOPBACK, free_block, free_ports, is_free
from services.cli.errors import CommandError


def test_chosen_ports_are_different_and_free() -> None:
    """A choice of several never names one twice."""
    chosen = free_ports(20)

    assert len(set(chosen)) == 20
    assert all(is_free(port) for port in chosen)


def test_a_port_with_a_listener_is_not_free() -> None:
    """A listening socket is seen, a closed one is forgotten."""
    with socket.create_server((LOOPBACK, 0)) as server:
        port = server.getsockname()[1]
        assert not is_free(port)
    assert is_free(port)


def test_chosen_ports_lie_below_the_range_of_outgoing_connections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No client can be given the port of a node that is down."""
    ranges = tmp_path / "range"
    ranges.write_text("20000\t60999\n")
    monkeypatch.setattr(processes, "_EPHEMERAL_RANGE", ranges)

    assert max(free_ports(50)) < 20000


@pytest.mark.parametrize("content", [None, "nonsense\n", "1024 65535\n"])
def test_the_default_range_stands_in_for_an_unknown_or_a_total_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    """Other systems have no such file, and some machines give every port away."""
    ranges = tmp_path / "range"
    if content is not None:
        ranges.write_text(content)
    monkeypatch.setattr(processes, "_EPHEMERAL_RANGE", ranges)

    assert max(free_ports(50)) < 32768


def test_a_machine_without_free_ports_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says that something else must stop."""
    monkeypatch.setattr(processes, "is_free", lambda _: False)

    with pytest.raises(CommandError, match="stop something"):
        free_ports(1)


def test_a_block_of_ports_with_a_listener_is_left_for_the_next_free_one() -> None:
    """Ten ports further on, and the same one again when it is free."""
    first = free_block(free_ports(1)[0], 3)[0]
    with socket.create_server((LOOPBACK, first + 1)):
        assert first < free_block(first, 3)[0]
        assert 0 == (free_block(first, 3)[0] - first) % 10
    assert [first, first + 1, first + 2] == free_block(first, 3)


def test_a_hundred_taken_blocks_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something else is wrong then."""
    monkeypatch.setattr(processes, "is_free", lambda _: False)

    with pytest.raises(CommandError, match="from 4222 on"):
        free_block(4222, 3)

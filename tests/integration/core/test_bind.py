"""Binding a service's address."""

from __future__ import annotations

import socket

import pytest

from fiq.errors import BindError
from services.core.management import bind


def test_a_port_that_is_taken_is_one_clear_error() -> None:
    """It names the settings."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BindError, match=rf"cannot listen on 127\.0\.0\.1:{port} \(FI_HOST, FI_PORT\): "):
            bind("127.0.0.1", port, "FI_HOST, FI_PORT")


def test_an_address_of_another_host_is_one_clear_error() -> None:
    """192.0.2.0/24 is for documentation: no host has it (RFC 5737)."""
    with pytest.raises(BindError, match="FI_HOST"):
        bind("192.0.2.1", 0, "FI_HOST, FI_PORT")


def test_a_bound_socket_takes_no_connections_yet() -> None:
    """While the service waits for its cluster a load balancer must not send it anything."""
    with bind("127.0.0.1", 0, "FI_HOST, FI_PORT") as sock, pytest.raises(ConnectionRefusedError):
        socket.create_connection(sock.getsockname(), timeout=5)

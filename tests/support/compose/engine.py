"""The Docker engine of this machine: is it there, what must be cleaned up, which images exist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

#: names of the tests' compose projects begin with this and the pid of their process
PREFIX = "fiqtest"
#: between two checks of the engine, seconds: each is a process, which slows the tests that run at the same time
PACE = 0.5
#: a command of the engine that takes longer hangs, seconds
TIMEOUT = 120.0
ROOT = Path(__file__).parents[3]
#: where `.ci/standins.sh` puts the Compose plugin on machines that have none
_PLUGIN = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fiq-standins" / "docker"
_PROJECT = "com.docker.compose.project"
_SERVICE = "com.docker.compose.service"


class EngineError(Exception):
    """Raised when a command of the engine fails; with what it wrote to stderr."""


def docker(*arguments: str, timeout: float = TIMEOUT, cwd: Path | None = None) -> str:
    """Run ``docker ARGUMENT…`` and return its output.

    Raises:
        EngineError: it failed.
    """
    return run("docker", *arguments, timeout=timeout, cwd=cwd)


def run(*command: str, timeout: float = TIMEOUT, cwd: Path | None = None) -> str:
    """Run a command and return its output.

    Raises:
        EngineError: it failed.
    """
    # what the suite sets for its own processes must not reach containers: their volumes are on a disk
    env = {name: value for name, value in os.environ.items() if name != "FI_ALLOW_EPHEMERAL"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=cwd, env=env, check=False)
    if done.returncode:
        raise EngineError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def missing() -> str | None:
    """Return why no stack of containers can be started here, or None. Finds the Compose plugin of CI."""
    if os.environ.get("FIQ_NO_DOCKER") == "1":
        return "FIQ_NO_DOCKER=1"
    if shutil.which("docker") is None:
        return "there is no docker command"
    try:
        docker("version", "--format", "{{.Server.Version}}", timeout=20)
    except (EngineError, subprocess.TimeoutExpired) as error:
        return f"no Docker engine answers: {error}"
    try:
        docker("compose", "version")
    except EngineError:
        if not (_PLUGIN / "cli-plugins" / "docker-compose").exists():
            return "there is no Compose v2: install docker-compose-plugin, or run .ci/docker"
        os.environ["DOCKER_CONFIG"] = str(_PLUGIN)
    return None


def missing_image(images: list[str]) -> str | None:
    """Return why one of *images* is not to be had, or None; pulls what is not there."""
    for image in images:
        try:
            docker("image", "inspect", image)
        except EngineError:
            try:
                docker("pull", "-q", image, timeout=600)
            except EngineError:
                return f"{image} is neither here nor in a registry: .ci/docker makes a stand-in"
    return None


def build(tag: str) -> None:
    """Build the product's image from this checkout."""
    run(str(ROOT / ".ci" / "image"), tag, timeout=600)


def projects() -> set[str]:
    """Return the compose projects of tests that left something, by whatever process."""
    found: set[str] = set()
    for what in (("ps", "-a"), ("network", "ls"), ("volume", "ls")):
        labels = docker(*what, "--filter", f"label={_PROJECT}", "--format", f'{{{{.Label "{_PROJECT}"}}}}')
        found.update(labels.split())
    return {name for name in found if name.startswith(PREFIX)}


def containers_of(project: str) -> dict[str, str]:
    """Return the containers of *project*, stopped ones too, and the service of each; none of ``compose run``.

    As ``docker compose ps`` does, for a tenth of the processor's time.
    """
    lasting = ("--filter", f"label={_PROJECT}={project}", "--filter", "label=com.docker.compose.oneoff=False")
    listed = docker("ps", "-a", *lasting, "--format", f'{{{{.ID}}}} {{{{.Label "{_SERVICE}"}}}}')
    return dict(line.split() for line in listed.splitlines())


def clean_up(project: str) -> None:
    """Remove the containers, networks and volumes of *project*. Idempotent."""
    label = f"label={_PROJECT}={project}"
    for listing, removal in (
        (("ps", "-aq"), ("rm", "-fv")),
        (("network", "ls", "-q"), ("network", "rm")),
        (("volume", "ls", "-q"), ("volume", "rm", "-f")),
    ):
        found = docker(*listing, "--filter", label).split()
        if found:
            docker(*removal, *found)


def clean_up_after_the_dead() -> None:
    """Remove what test processes left that were killed."""
    for project in projects():
        match = re.match(rf"{PREFIX}-(\d+)", project)
        if match is not None and not Path("/proc", match[1]).exists():
            clean_up(project)

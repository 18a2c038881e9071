"""The product's image: what is in it, what is not, and what can get into it."""

from __future__ import annotations

import os
import tarfile
import tomllib
from pathlib import Path

import orjson

from tests.support.compose.engine import PREFIX, ROOT, EngineError, docker, run
from tests.support.compose.leftovers import left_in

#: megabytes that the image may have: a third more than it has
LARGEST = 300
#: what the build takes, some of each
TAKEN = {
    "README.md",
    "pyproject.toml",
    "requirements/image.txt",
    "services/ingest/service.py",
    "deploy/nats-cluster/nats.conf",
    ".docker-build/ca.pem",  # for the first stage only
}
#: files of a working directory, and those that `fiq init` makes
HELD_BACK = (
    ".env",
    ".fiq/corpus/00.h5",
    ".git/config",
    "secrets/ca.key",
    "deploy/nats-cluster/.env",
    "deploy/nats-cluster/secrets/ca.key",
    "deploy/nats-cluster/secrets/users/ops.seed",
    "requirements/.env",
    "services/.env",
    "services/ingest/secrets/api/tokens",
    "tests/conftest.py",
)


def test_the_image_has_nothing_that_only_its_building_needs(image: str) -> None:
    """No pip, compiler, cache, certificate bundle or index of the machine that built it."""
    assert {} == left_in(image)
    history = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", image)
    assert [] == [word for word in ("PIP_", "ca.pem", "find-links", "index-url") if word in history]
    assert int(docker("image", "inspect", "--format", "{{.Size}}", image)) < LARGEST * 10**6


def test_no_process_compiles_what_it_imports(image: str) -> None:
    """Its file system is read-only: each health check, too, would compile the library that it needs anew."""
    code = (
        "import sys, pathlib, services.persister.__main__, services.ingest.service; "
        "modules = [m.__spec__ for m in list(sys.modules.values()) if getattr(m, '__spec__', None)]; "
        "print([s.name for s in modules if s.cached and not pathlib.Path(s.cached).exists()])"
    )
    assert "[]\n" == docker("run", "--rm", image, "python3", "-c", code)


def test_the_image_has_labels_and_runs_as_an_unprivileged_user(image: str) -> None:
    """A number that is the same everywhere, so that the owner of a volume is, too."""
    config = orjson.loads(docker("image", "inspect", image))[0]["Config"]
    assert "10001:10001" == config["User"]
    assert "fiq" == config["Labels"]["org.opencontainers.image.title"]
    assert config["Healthcheck"]["Test"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == config["Labels"]["org.opencontainers.image.version"]
    assert _revision() == config["Labels"]["org.opencontainers.image.revision"].removesuffix("-dirty")
    assert docker("run", "--rm", "--read-only", image, "fiq", "version").startswith("fiq ")


def _revision() -> str:
    """Return the commit of this checkout; ``unknown`` in a copy without git."""
    try:
        return run("git", "rev-parse", "HEAD", cwd=ROOT).strip()
    except (EngineError, FileNotFoundError):
        return "unknown"


def test_no_secret_gets_into_the_build(engine: None, tmp_path: Path) -> None:
    """What is in the folder of the checkout and not wanted is not even sent to the engine: .dockerignore."""
    context = tmp_path / "context"
    for path in (*TAKEN, *HELD_BACK):
        (context / path).parent.mkdir(parents=True, exist_ok=True)
        (context / path).write_text("planted")
    (context / ".dockerignore").write_bytes((ROOT / ".dockerignore").read_bytes())
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /context\n")

    image = docker("build", "-q", "-f", str(tmp_path / "Dockerfile"), str(context)).strip()
    try:
        assert TAKEN == _files(image, tmp_path / "image.tar")
    finally:
        docker("rmi", image)


def _files(image: str, archive: Path) -> set[str]:
    """Return what an image without any program has in its folder /context."""
    label = f"com.docker.compose.project={PREFIX}-{os.getpid()}-lone"
    container = docker("create", "--label", label, image, "nothing").strip()
    try:
        docker("export", "-o", str(archive), container)
    finally:
        docker("rm", container)
    with tarfile.open(archive) as found:
        files = [one.name for one in found if one.isfile()]
    return {name.removeprefix("context/") for name in files if name.startswith("context/")}

"""What `pip install fiq` and each extra promise, in an environment that has nothing else.

The packages come from the environment of the tests, packed as wheels again: no index is asked, and the versions are
those of the lock files. The installer resolves the metadata of fiq's own wheel as it would at a user's.
"""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.tags import sys_tags

from fiq.corpus import EventStore
from tests.support.corpus import IDENTITY, commit_range, consultation_of
from tests.support.scripted_http import accepted, serving

ROOT = Path(__file__).parents[2]
UV = Path(sys.executable).with_name("uv")
#: installs extras of fiq, such as "[corpus]", and returns the interpreter of the environment
Install = Callable[[str], Path]


def run(*command: object, cwd: Path | None = None) -> str:
    """Run *command* without the variables and packages of the tests, and return what it prints."""
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
        check=False,
    )
    assert 0 == done.returncode, done.stderr
    return done.stdout.strip()


def closure(wanted: Iterable[Requirement]) -> dict[str, Distribution]:
    """Return the packages that *wanted* need here, themselves included, from the environment of the tests."""
    found: dict[str, Distribution] = {}
    seen: set[str] = set()
    waiting = list(wanted)
    while waiting:
        one = waiting.pop()
        if one.name == "fiq" or str(one) in seen:
            continue
        seen.add(str(one))
        package = found[one.name] = distribution(one.name)
        for requirement in map(Requirement, package.requires or ()):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in one.extras | {""}):
                waiting.append(requirement)
    return found


def pack(package: Distribution, folder: Path) -> None:
    """Make a wheel of an installed package; scripts that are no entry points, as nats-server, are kept."""
    tags = {line.removeprefix("Tag: ") for line in (package.read_text("WHEEL") or "").splitlines()}
    tag = next(tag for tag in map(str, sys_tags()) if tag in tags)
    name = f"{package.name.replace('-', '_')}-{package.version}"
    scripts = {entry.name for entry in package.entry_points}
    records = []
    with zipfile.ZipFile(folder / f"{name}-{tag}.whl", "w") as wheel:
        for path in package.files or ():
            outside = path.parts[0] == ".."
            if path.suffix == ".pyc" or path.name == "RECORD" or (outside and path.name in scripts):
                continue
            content = path.read_binary()
            target = f"{name}.data/scripts/{path.name}" if outside else str(path)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            records.append(f"{target},sha256={digest},{len(content)}")
            wheel.writestr(target, content)
        info = next(path for path in package.files or () if path.name == "METADATA").parent
        wheel.writestr(f"{info}/RECORD", "\n".join([*records, f"{info}/RECORD,,"]))


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel of fiq, and those of every package that it may need."""
    folder = tmp_path_factory.mktemp("wheels")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (built,) = folder.glob("fiq-*.whl")
    with zipfile.ZipFile(built) as wheel:
        metadata = next(name for name in wheel.namelist() if name.endswith("METADATA"))
        lines = wheel.read(metadata).decode().splitlines()
    prefix = "Requires-Dist: "
    for package in closure(
        Requirement(line.removeprefix(prefix)) for line in lines if line.startswith(prefix)
    ).values():
        pack(package, folder)
    return folder


@pytest.fixture
def install(tmp_path: Path, wheels: Path) -> Install:
    def installed(extras: str) -> Path:
        python = tmp_path / "env" / "bin" / "python"
        run(UV, "venv", "-q", "--offline", "--no-project", "--python", sys.executable, tmp_path / "env")
        offline = ("--offline", "--no-index", "--find-links", wheels, "--cache-dir", tmp_path / "cache")
        run(UV, "pip", "install", "-q", "--python", python, *offline, f"fiq{extras}")
        return python

    return installed


#: imports each module of a package but those that it names
WALK = """
import importlib, pkgutil, sys
top = importlib.import_module(sys.argv[1])
names = [module.name for module in pkgutil.walk_packages(top.__path__, top.__name__ + ".")]
names = [name for name in names if not name.endswith("__main__") and not name.startswith(tuple(sys.argv[2:]))]
for name in names:
    importlib.import_module(name)
assert len(names) > 3
"""


def test_the_base_has_the_clients(install: Install, tmp_path: Path) -> None:
    """With aiohttp and orjson; the corpus and the command say what to install."""
    python = install("")
    run(python, "-c", WALK + "assert 'services' not in sys.modules", "fiq", "fiq.corpus")
    for statement in ("import fiq; fiq.open_corpus('.')", "import fiq.corpus", "from fiq.corpus import open_corpus"):
        missing = f"try: {statement}\nexcept ModuleNotFoundError as error: print(error)\n"
        assert run(python, "-c", missing).endswith("pip install 'fiq[corpus]'")
    done = subprocess.run([python.with_name("fiq"), "up"], capture_output=True, text=True, timeout=60, check=False)
    assert (1, True) == (done.returncode, done.stderr.startswith("fiq: ")), done.stderr
    assert done.stderr.endswith("run  pip install 'fiq[services]'\n")


@pytest.mark.parametrize("package", [True, False], ids=["a package", "without __init__.py"])
def test_a_backend_with_services_of_its_own_uses_the_client(package: bool, install: Install, tmp_path: Path) -> None:
    """Its top-level folder has the name of ours, and its modules are found."""
    backend = tmp_path / "backend"
    (backend / "services").mkdir(parents=True)
    if package:
        (backend / "services" / "__init__.py").touch()
    (backend / "services" / "visits.py").write_text(
        "from fiq import Client\n\n\n"
        "def close(url):\n"
        "    with Client(url) as client:\n"
        "        return client.post('visit-17', {'event_type': 'VISIT_CLOSED'}).sequence\n"
    )
    (backend / "main.py").write_text("import sys\nfrom services import visits\nprint(visits.close(sys.argv[1]))\n")
    python = install("")
    with serving(accepted(7)) as server:
        assert "7" == run(python, "main.py", server.url, cwd=backend)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with one event."""
    path = tmp_path_factory.mktemp("corpus") / "00.h5"
    with EventStore.create(path, IDENTITY) as store:
        commit_range(store, range(1, 2))
    return path


@pytest.mark.parametrize(("extra", "then"), [("[corpus]", ""), ("[pandas]", ".to_frame()")])
def test_analysts_open_a_corpus(extra: str, then: str, install: Install, corpus: Path) -> None:
    """With h5py and numpy; as a table with pandas, too."""
    python = install(extra)
    run(python, "-c", WALK + "assert 'services' not in sys.modules", "fiq")
    run(python, "-c", "import sys, fiq.client; assert not {'h5py', 'numpy'} & sys.modules.keys()")
    name = consultation_of(1, 7)
    read = f"import sys; from fiq import open_corpus; print(len(open_corpus(sys.argv[1])[{name!r}]{then}))"
    assert "1" == run(python, "-c", read, corpus)


def test_the_services_have_all_that_they_and_the_command_import(install: Install) -> None:
    """Each of their modules can be imported."""
    python = install("[services]")
    run(python, "-c", WALK, "services")
    assert "fiq 0" in run(python.with_name("fiq"), "version")


def test_the_embedded_cluster_has_its_server(install: Install) -> None:
    """A binary on the environment's path."""
    python = install("[embedded]")
    assert "nats-server" in run(python.with_name("nats-server"), "--version")


def test_tracing_has_the_exporter(install: Install) -> None:
    """It is asked for by OpenTelemetry's own variables."""
    python = install("[services,tracing]")
    spans = (
        "from services.core.tracing import open_spans\n"
        "with open_spans('fi-ingest', {'OTEL_TRACES_EXPORTER': 'otlp'}) as spans: assert spans is not None"
    )
    assert "" == run(python, "-c", spans)

"""Runs the examples of README.md and docs/client.md, in their order, each against a stack of the test's own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser
from sybil.region import Lexeme
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# where the machine forbids it, each worker would compile, and rewrite the assertions of, all modules of the tests
sys.dont_write_bytecode = False

#: so much memory must be free, and may be used for files, that tests write there, bytes; a run leaves one to two GB
_ROOM = 6 * 2**30
_MEMORY = Path("/dev/shm")
if (
    "TMPDIR" not in os.environ
    and _MEMORY.is_dir()
    and min(shutil.disk_usage(_MEMORY).free, psutil.virtual_memory().available) >= _ROOM
):
    # no test asks whether a disk keeps what it was told to keep, and all wait for it: brokers sync each event
    os.environ["TMPDIR"] = str(_MEMORY)
    tempfile.tempdir = None


#: the tests of containers with a stack of their own
_OWN_STACK = "tests/compose/test_hosts.py"


class FilesAndContainers(LoadScopeScheduling):  # type: ignore[misc]  # it has no types
    """Lets each worker of pytest-xdist run whole files; those of containers that share a stack are one."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        shared = file.startswith("tests/compose/") and file != _OWN_STACK
        return "tests/compose" if shared else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> FilesAndContainers:
    """Tell pytest-xdist how to share the tests out."""
    return FilesAndContainers(config, log)


_BIN = Path(sys.executable).parent
#: where the examples say that the service is
_URL = "http://127.0.0.1:7001"


def _run_python(example: Example) -> None:
    url = example.namespace["readme_stack"].ingest.url
    example.parsed = Lexeme(example.parsed.replace(_URL, url), example.parsed.offset, example.parsed.line_offset)
    PythonEvaluator()(example)


def _need(tool: str) -> None:
    if shutil.which(tool) is None:
        assert "CI" not in os.environ, f"CI has {tool}"
        pytest.skip(f"the examples need {tool}")


def _run_bash(example: Example) -> None:
    stack = example.namespace["readme_stack"]
    script = str(example.parsed).replace(_URL, stack.ingest.url)
    if script.startswith("h5dump"):
        _need("h5dump")
    env = os.environ | {"PATH": f"{_BIN}{os.pathsep}{os.environ['PATH']}"}
    # what has been accepted is committed a moment later
    command = f"for try in $(seq 50); do ({script}) && exit 0; sleep 0.2; done; exit 1"
    done = subprocess.run(["bash", "-euc", command], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


pytest_collect_file = Sybil(
    parsers=[CodeBlockParser("python", _run_python), CodeBlockParser("bash", _run_bash)],
    patterns=["README.md", "docs/client.md"],
    fixtures=["readme_stack"],
).pytest()


@pytest.fixture(scope="module")
def readme_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """A stack in ``./.fiq``, as `fiq up` makes it, in a working directory of its own."""
    from services.cli.embedded.stack import Stack, StackFolder

    _need("curl")
    before = Path.cwd()
    place = tmp_path_factory.mktemp("readme")
    os.chdir(place)
    home = StackFolder(place / ".fiq")
    try:
        with home.held(), Stack(place / ".fiq") as stack:
            home.write(stack.state())
            yield stack
            home.clear()
    finally:
        os.chdir(before)

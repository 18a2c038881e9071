"""Which package may import which (DESIGN, section 4)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOWED: dict[str, set[str]] = {
    "fiq": set(),
    "fiq.client": {"fiq"},
    "fiq.corpus": {"fiq"},
    "services.core": {"fiq"},
    "services.log": {"fiq", "services.core"},
    "services.ingest": {"fiq", "services.core", "services.log"},
    "services.persister": {"fiq", "fiq.corpus", "services.core", "services.log"},
    "services.cli": {
        *("fiq", "fiq.client", "fiq.corpus"),
        *("services.core", "services.log", "services.ingest", "services.persister"),
    },
}
#: the library's front door re-exports its two halves
FRONT_DOOR = Path("fiq/__init__.py")
MODULES = sorted(
    path.relative_to(ROOT)
    for top in ("fiq", "services")
    for path in (ROOT / top).rglob("*.py")
    if path.relative_to(ROOT) not in (FRONT_DOOR, Path("services/__init__.py"))
)


def imported(path: Path, root: Path = ROOT) -> Iterator[str]:
    """Yield the dotted name of each module that the file at *path* imports, wherever in it."""
    package = path.parent.parts
    for node in ast.walk(ast.parse((root / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def package_of(name: str) -> str | None:
    """Return the package of ours that the module or object *name* belongs to; None when it is another project's."""
    parts = name.split(".")
    if parts[0] == "fiq":
        return "fiq." + parts[1] if len(parts) > 1 and parts[1] in ("client", "corpus") else "fiq"
    return ".".join(parts[:2]) if parts[0] == "services" and len(parts) > 1 else None


def foreign(path: Path, root: Path = ROOT) -> set[str]:
    """Return the project's packages, other than its own, that the file at *path* imports."""
    packages = {package_of(name) for name in imported(path, root)}
    return {package for package in packages if package is not None} - {package_of(".".join(path.parts))}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_module_imports_only_what_its_package_may(path: Path) -> None:
    """Ingest and persister meet in the core and the log only; the library imports no service."""
    assert foreign(path) <= ALLOWED[str(package_of(".".join(path.parts)))]


def test_the_write_ahead_log_knows_bytes_and_no_events() -> None:
    """Of the corpus it imports the errors and itself: it could hold any HDF5 file."""
    modules = [path for path in MODULES if path.is_relative_to("fiq/corpus/wal")]
    names = {name for path in modules for name in imported(path) if name.startswith("fiq.")}
    assert modules
    assert set() == {name for name in names if not name.startswith(("fiq.corpus.errors.", "fiq.corpus.wal."))}
    assert not any(name.startswith("h5py") for path in modules for name in imported(path))


LOGS = ("services.log.jetstream", "services.log.zeromq")
#: what of the command line is about one log: the nodes and their users, the doctor, placements, files and keys
KNOWS_ITS_LOG = {
    "backup/cluster.py", "backup/restore.py", "doctor/cluster.py", "doctor/command.py", "init/deployment.py",
    "nats_context.py", "status.py", "target.py",
}  # fmt: skip


def logs_named_in(path: Path) -> set[str]:
    """Return what the file at *path* imports of a certain log."""
    return {name for name in imported(path) if name.startswith(LOGS)}


@pytest.mark.parametrize(
    "path", [path for path in MODULES if path.parts[1] in ("ingest", "persister", "core")], ids=str
)
def test_a_service_does_not_know_which_log_it_uses(path: Path) -> None:
    """It goes through `services.log.open_log` and the protocol; what keeps the log is behind that."""
    assert set() == logs_named_in(path)


def test_the_seam_does_not_know_what_is_behind_it() -> None:
    """Only `open_log` names a log, when it opens it."""
    seam = [path for path in MODULES if path.parent == Path("services/log")]
    assert {"__init__.py"} == {path.name for path in seam if logs_named_in(path)}


def test_one_log_does_not_know_the_other() -> None:
    """What both need is in `services.log`."""
    of_each = {log: [path for path in MODULES if path.is_relative_to(log.replace(".", "/"))] for log in LOGS}
    assert all(of_each.values())
    named = {log: {name for path in paths for name in logs_named_in(path)} for log, paths in of_each.items()}
    assert [] == [name for log, names in named.items() for name in names if not name.startswith(log)]


def test_few_modules_of_the_command_line_know_a_certain_log() -> None:
    """A new one needs a decision: most commands work with any log."""
    cli = Path("services/cli")
    found = {str(path.relative_to(cli)) for path in MODULES if path.is_relative_to(cli) and logs_named_in(path)}
    assert KNOWS_ITS_LOG == found


def test_every_package_has_its_rule() -> None:
    """A new package needs a decision."""
    assert {package_of(".".join(path.parts)) for path in MODULES} == set(ALLOWED)


def test_the_check_sees_imports_of_every_form(tmp_path: Path) -> None:
    """Plain, from, relative, and inside a function."""
    module = Path("services/ingest/handlers/x.py")
    (tmp_path / module).parent.mkdir(parents=True)
    (tmp_path / module).write_text(
        "import fiq.corpus.store\nfrom services import cli\nfrom ...persister import runner\n"
        "from . import y\ndef f():\n    from services.log.errors import LogFullError\n"
    )
    assert foreign(module, tmp_path) == {"fiq.corpus", "services.cli", "services.persister", "services.log"}


def test_a_public_class_has_a_name_of_its_own() -> None:
    """A name means one thing in the whole project."""
    where: dict[str, list[str]] = {}
    for path in MODULES:
        for node in ast.parse((ROOT / path).read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                where.setdefault(node.name, []).append(str(path))
    assert {} == {name: paths for name, paths in where.items() if len(paths) > 1}

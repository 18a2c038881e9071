"""Which package may import which (DESIGN, section 4)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SERVICES = Path(__file__).parents[2] / "services"
ALLOWED: dict[str, set[str]] = {
    "contract": set(),
    "corpus": set(),
    "eventlog": {"contract"},
    "ingest": {"contract", "eventlog"},
    "persister": {"contract", "eventlog", "corpus"},
    "client": {"contract"},
    "cli": {"contract", "eventlog", "ingest", "persister", "corpus", "client"},
}
MODULES = sorted(path for path in SERVICES.rglob("*.py") if path.parent != SERVICES)


def imported(path: Path) -> Iterator[str]:
    """Yield the dotted name of each module that the file at *path* imports, wherever in it."""
    package = ("services", *path.relative_to(SERVICES).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def foreign(path: Path) -> set[str]:
    """Return the project's packages, other than its own, that the file at *path* imports."""
    own = path.relative_to(SERVICES).parts[0]
    names = [name.split(".") for name in imported(path)]
    return {parts[1] for parts in names if parts[0] == "services" and len(parts) > 1} - {own}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SERVICES)))
def test_a_module_imports_only_what_its_package_may(path: Path) -> None:
    """Ingest and persister meet in the contract and the log, nowhere else."""
    package = path.relative_to(SERVICES).parts[0]
    assert foreign(path) <= ALLOWED[package]


def test_every_package_has_its_rule() -> None:
    """A new package needs a decision."""
    packages = {path.name for path in SERVICES.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert packages == set(ALLOWED)


def test_the_check_sees_imports_of_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain, from, relative, and inside a function."""
    module = tmp_path / "ingest" / "handlers" / "x.py"
    module.parent.mkdir(parents=True)
    module.write_text(
        "import services.corpus.store\nfrom services import cli\nfrom ...persister import runner\n"
        "from . import y\ndef f():\n    from services.eventlog.errors import LogFullError\n"
    )
    monkeypatch.setattr(f"{__name__}.SERVICES", tmp_path)
    assert foreign(module) == {"corpus", "cli", "persister", "eventlog"}

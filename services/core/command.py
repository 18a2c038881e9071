"""What the command lines of the services share: ``--help`` with all settings, ``--version``, exit codes."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from fiq.errors import ConfigurationError, FiqError
from services.core.settings import load, variables

#: files with a container's memory limit: cgroup v2, then v1
_MEMORY_FILES = ("memory.max", "memory/memory.limit_in_bytes")
#: larger numbers mean no limit in v1, bytes
_UNLIMITED = 2**60
T = TypeVar("T")

#: exit code of a failure
EXIT_FAILURE = 1
#: exit code of wrong settings and wrong usage, the same as argparse's
EXIT_USAGE = 2

_WIDTH = 100


def product_version() -> str:
    """Return the version of the installed distribution, or ``unknown`` in a bare checkout."""
    try:
        return version("fiq")
    except PackageNotFoundError:
        return "unknown"


def parser(program: str, description: str, settings: type[Any]) -> argparse.ArgumentParser:
    """Make the parser of a service whose settings class is *settings*."""
    result = argparse.ArgumentParser(
        prog=program,
        description=description,
        epilog="settings, all of them environment variables:\n\n" + describe(settings),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--version", action="version", version=f"fiq {product_version()}")
    return result


def describe(settings: type[Any]) -> str:
    """Return a paragraph for each variable of *settings*: name, default, meaning."""
    paragraphs = []
    for variable in variables(settings):
        indent = "      "
        text = textwrap.fill(variable.doc, _WIDTH, initial_indent=indent, subsequent_indent=indent)
        paragraphs.append(f"  {variable.name} (default: {format_default(variable.default)})\n{text}")
    return "\n".join(paragraphs)


def format_default(default: object) -> str:
    """Return a setting's *default* as it is written in the environment."""
    if isinstance(default, bool):
        return "1" if default else "0"
    if isinstance(default, tuple):
        return ",".join(str(part) for part in default)
    if isinstance(default, float):
        return f"{default:g}"
    return str(default)


def load_or_exit(program: str, settings: type[T], env: Mapping[str, str]) -> T:
    """Return the settings, or end the process with code 2 and one line on stderr for each problem."""
    try:
        return load(settings, env)
    except ConfigurationError as error:
        raise SystemExit(report_error(program, error)) from None


def report_error(program: str, error: FiqError) -> int:
    """Write *error* to stderr, one line for each problem, and return the exit code."""
    if isinstance(error, ConfigurationError):
        for problem in error.problems:
            sys.stderr.write(f"{program}: {problem}\n")
        return EXIT_USAGE
    sys.stderr.write(f"{program}: {error}\n")
    return EXIT_FAILURE


def memory_limit(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the container's memory limit, bytes; None without one.

    Args:
        root: where control groups are mounted; in a container it is the container's own group.
    """
    for name in _MEMORY_FILES:
        try:
            text = (root / name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        return int(text) if text.isdigit() and int(text) < _UNLIMITED else None
    return None

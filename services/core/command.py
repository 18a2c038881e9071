"""What the command lines of the services share: ``--help`` with all settings, ``--version``, exit codes."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Mapping
from difflib import get_close_matches
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
_SETTINGS = """
ALLOWED_HOSTS ALLOW_ANONYMOUS ALLOW_EPHEMERAL ANSWER_TIMEOUT BATCH_BYTES BATCH_EVENTS BODY_TIMEOUT BUFFER_BYTES
BUFFER_EVENTS DATA_DIR DEAD_MAX_BYTES DISK_RESERVE DUPLICATE_WINDOW FOLLOW_INTERVAL HEADER_TIMEOUT HOST
KEY_LOOKUP_WAIT KNOWN_IDS LOG_LEVEL LOG_URL MANAGEMENT_HOST MANAGEMENT_PORT MAX_BACKLOG MAX_BATCHED_EVENTS
MAX_BATCH_BYTES MAX_CONNECTIONS MAX_EVENT_BYTES MAX_FOLLOWERS MAX_IN_FLIGHT MAX_IN_FLIGHT_BYTES MAX_JSON_DEPTH
MAX_WINDOW_EVENTS NATS_CA_FILE NATS_SEED_FILE NEW_CONSULTATIONS_BURST NEW_CONSULTATIONS_RATE OPEN_CONSULTATIONS
PARTITIONS PERSISTER_HOST PERSISTER_PORT POISON_STREAK PORT PROVISION PUBLISH_DEADLINE RATE RATE_BURST REPLICAS
RETENTION RETRY_AFTER SHUTDOWN_GRACE STARTUP_TIMEOUT STORE STREAM_MAX_BYTES TLS_CERT TLS_KEY TOKEN TOKEN_FILE
TRUSTED_PROXIES UI_MASKED URL VOLUMES WATCHDOG ZMQ_CLIENT_KEYS ZMQ_KEY_FILE ZMQ_SERVER_KEY
"""
#: every setting of the services and of `fiq`, without FI_: they may share one file of variables. A test compares
SETTINGS = frozenset(_SETTINGS.split())


def product_version() -> str:
    """Return the version of the installed distribution, or ``unknown`` in a bare checkout."""
    from importlib.metadata import PackageNotFoundError, version  # `fiq` imports this module for each command

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


def unknown_variables(env: Mapping[str, str]) -> list[str]:
    """Return the names of variables in *env* that look like settings and are none, each with the nearest setting."""
    unknown = sorted(name for name in env if name.startswith("FI_") and name.removeprefix("FI_") not in SETTINGS)
    nearest = {name: get_close_matches(name, [f"FI_{one}" for one in SETTINGS], 1) for name in unknown}
    return [f"{name} ({match[0]}?)" if match else name for name, match in nearest.items()]


def warn_of_unknown(log: Any, env: Mapping[str, str]) -> None:
    """Log the unknown variables in *env*, if there are any."""
    if unknown := unknown_variables(env):
        log.warning("SETTINGS_UNKNOWN", variables=unknown, action="they have no effect: correct or remove them")


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

"""This machine: versions, limits, the data directory, secrets."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import resource
import shutil
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version as installed
from pathlib import Path

import h5py
from rich.filesize import decimal

from fiq.corpus import UnsupportedFileSystemError
from fiq.corpus.wal.storage import check_file_system
from services.cli.doctor.finding import Finding, error, ok, warning
from services.core.command import product_version
from services.persister.settings import PersisterSettings

#: oldest h5py with what the corpus calls, as pyproject.toml asks for
MINIMUM_H5PY = (3, 14)
MINIMUM_PYTHON = (3, 11)
#: descriptors of a process: a connection for each event in flight, and some
ENOUGH_FILES = 4096
#: a sync that takes longer makes commits slow, seconds
SLOW_SYNC = 0.1
#: variables that name files with secrets
SECRETS = ("FI_NATS_SEED_FILE",)

_CHECK = "versions"
#: what a persister takes without its buffers and caches, bytes
_BASE_MEMORY = 96 << 20
_OPEN_CONSULTATION, _KNOWN_ID = 35 << 10, 12
_LITTLE_SPACE, _NO_SPACE = 2 << 30, 256 << 20


def versions(python: tuple[int, ...] | None = None, h5: str | None = None) -> Iterator[Finding]:
    """Look at what this program runs on; arguments replace what is found."""
    python = python or tuple(int(part) for part in platform.python_version_tuple()[:2])
    h5 = h5 or h5py.version.version
    what = (
        f"fiq {product_version()}, Python {'.'.join(map(str, python))}, h5py {h5}, HDF5 {h5py.version.hdf5_version}, "
        f"nats-py {installed('nats-py')}"
    )
    if python[:2] < MINIMUM_PYTHON or tuple(int(part) for part in h5.split(".")[:2]) < MINIMUM_H5PY:
        wanted = f"Python {'.'.join(map(str, MINIMUM_PYTHON))} and h5py {'.'.join(map(str, MINIMUM_H5PY))}"
        yield error(_CHECK, what, f"fiq needs {wanted} or newer", "install fiq with its own requirements")
    else:
        yield ok(_CHECK, what)


def limits(files: int | None = None) -> Iterator[Finding]:
    """Look at the number of descriptors that a process started here may have."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if files is None else files
    if 0 <= soft < ENOUGH_FILES:
        yield warning(
            "limits",
            f"a process may open {soft} files (nofile)",
            "ingest refuses connections beyond that, and a node of the cluster takes no more clients",
            f"raise it to {ENOUGH_FILES} or more: LimitNOFILE= of the unit, ulimits: of the container, `ulimit -n`",
        )
    else:
        yield ok("limits", f"a process may open {soft if soft >= 0 else 'any number of'} files")


def memory(settings: PersisterSettings, available: int | None = None) -> Iterator[Finding]:
    """Compare the memory that there is, or what the container is given, with what the settings let a persister take."""
    needed = (
        _BASE_MEMORY
        + 2 * settings.buffer_bytes
        + settings.open_consultations * _OPEN_CONSULTATION
        + settings.known_ids * _KNOWN_ID
    )
    have = memory_limit(Path("/sys/fs/cgroup"), Path("/proc/meminfo")) if available is None else available
    what = f"{decimal(have)} of memory; by its settings a persister takes up to {decimal(needed)}"
    if have < needed:
        yield error(
            "limits",
            what,
            "the kernel ends it when it gets there; nothing is lost, but it starts again and again",
            "give it more, or lower FI_BUFFER_BYTES, FI_OPEN_CONSULTATIONS and FI_KNOWN_IDS",
        )
    else:
        yield ok("limits", what)


def memory_limit(cgroup: Path, meminfo: Path) -> int:
    """Return the memory of this container, or of the machine where that is less or nothing limits it, bytes."""
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    total = int(lines["MemTotal"].split()[0]) * 1024
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            stated = (cgroup / name).read_text().strip()
        except OSError:
            continue
        if stated.isdigit():
            return min(total, int(stated))
    return total


def secrets(env: Mapping[str, str]) -> Iterator[Finding]:
    """Look at the files with secrets that the environment names."""
    for name in SECRETS:
        path = Path(env[name]) if env.get(name) else None
        if path is None:
            continue
        try:
            mode = path.stat().st_mode & 0o777
            path.open("rb").close()
        except OSError as problem:
            yield error(
                "permissions",
                f"{name}={path}: {problem.strerror}",
                "the process that needs it cannot log in to the cluster",
                "put the file there, readable by the user of the services",
            )
            continue
        if mode & 0o077:
            yield error(
                "permissions",
                f"{path} has mode {mode:04o}",
                "others than its owner can read a secret",
                f"chmod 600 {path}; then renew the secret, somebody may have read it",
            )
        else:
            yield ok("permissions", f"{path} is for its owner only")


def data_directory(directory: Path) -> Iterator[Finding]:
    """Look at who may read and write the data directory, and at the disk below it."""
    yield from _modes(directory)
    try:
        check_file_system(directory)
    except UnsupportedFileSystemError as problem:
        yield error("disks", str(problem), "commits may be lost or torn", "move the data directory")
    yield from _space(directory)
    yield from _probe(directory)


def _modes(directory: Path) -> Iterator[Finding]:
    open_to_all = [path for path in (directory, *sorted(directory.glob("*.h5*"))) if path.stat().st_mode & 0o007]
    if not all(parent.stat().st_mode & 0o001 for parent in directory.absolute().parents):
        open_to_all = []  # nobody else gets that far
    if open_to_all:
        yield error(
            "permissions",
            f"everybody on this machine can read {open_to_all[0]}"
            + (f" and {len(open_to_all) - 1} more" if len(open_to_all) > 1 else ""),
            "the corpus is medical data",
            f"chmod -R o-rwx {directory}",
        )
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        yield error(
            "permissions",
            f"this user may not write {directory}",
            "persisters of this user stand still",
            "run fiq as the user of the persisters, or correct the owner of the directory",
        )
    elif not open_to_all:
        yield ok("permissions", f"{directory} is for its owner and group only, and can be written")


def _space(directory: Path) -> Iterator[Finding]:
    usage = shutil.disk_usage(directory)
    what = f"{decimal(usage.free)} of {decimal(usage.total)} free below {directory}"
    if usage.free < min(_NO_SPACE, usage.total // 20):
        action = "make room, or extend the disk; persisters go on by themselves then"
        yield error("disks", what, "persisters stop committing when it is full; events wait in the stream", action)
    elif usage.free < min(_LITTLE_SPACE, usage.total // 10):
        yield warning("disks", what, "the corpus grows with every event", "plan for a larger disk")
    else:
        yield ok("disks", what)


def _probe(directory: Path) -> Iterator[Finding]:
    """Try the two calls on which commits rest, with a file of our own."""
    probe = directory / f".doctor-{os.getpid()}"
    try:
        with probe.open("wb") as one:
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
            excluded = _is_excluded(probe)
            one.write(bytes(4096))
            one.flush()
            started = time.monotonic()
            os.fdatasync(one.fileno())
            seconds = time.monotonic() - started
    except OSError as problem:
        yield error(
            "disks", f"{directory} cannot be written: {problem.strerror}", "persisters stand still", "see above"
        )
        return
    finally:
        with contextlib.suppress(OSError):  # a read-only file system refuses that, too
            probe.unlink()
    if not excluded:
        action = "use a local file system, such as ext4 or XFS"
        yield error("disks", "flock excludes nobody here", "two writers could destroy a partition file", action)
    elif seconds > SLOW_SYNC:
        action = "a faster disk, or fewer writers on it"
        yield warning("disks", f"fdatasync took {seconds:.2f} s", "every commit takes that long", action)
    else:
        yield ok("disks", f"flock and fdatasync work below {directory} ({seconds * 1e3:.1f} ms)")


def _is_excluded(probe: Path) -> bool:
    with probe.open("rb") as other:
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False

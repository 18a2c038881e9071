"""What ``fiq doctor`` checks of this machine: versions, limits, secrets, the data directory, and its persisters."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import resource
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version as installed
from pathlib import Path

import h5py
from prometheus_client.parser import text_string_to_metric_families
from rich.filesize import decimal

from fiq.corpus import CorpusError, UnsupportedFileSystemError, open_corpus
from fiq.corpus.reader import PartitionInfo
from fiq.corpus.wal.storage import check_file_system, ephemeral_file_system
from fiq.words import count
from services.cli import monitoring
from services.cli.backup.backup import read_volume
from services.cli.doctor.cluster import TIMEOUT
from services.cli.errors import BackupError, CommandError
from services.cli.init.files import ContainerRole, Layout, container_users
from services.cli.status import ClusterSnapshot, Worker
from services.core.command import memory_limit, product_version
from services.log.findings import Finding, error, ok, unknown, warning
from services.log.partitions import partition_name
from services.persister.settings import PersisterSettings
from services.persister.volume import backed_up_at

#: oldest versions with what fiq calls, as in pyproject.toml
MINIMUM_H5PY = (3, 14)
MINIMUM_PYTHON = (3, 11)
#: descriptors of a process: a connection for each event in flight, and a margin
ENOUGH_FILES = 4096
#: a sync that takes longer makes commits slow, seconds
SLOW_SYNC = 0.1
#: variables that name files with secrets
SECRETS = ("FI_NATS_SEED_FILE", "FI_TOKEN_FILE", "FI_TLS_KEY", "FI_ZMQ_KEY_FILE")
#: checkpoints that wait for so long are held back, seconds
HELD_BACK = 60.0
#: an older backup is a warning, hours
BACKUP_HOURS = 24
#: what a persister takes besides its buffers and caches, bytes
_BASE_MEMORY = 96 << 20
_OPEN_CONSULTATION, _KNOWN_ID = 35 << 10, 12
_LITTLE_SPACE, _NO_SPACE = 2 << 30, 256 << 20
_WAITING = "fi_persister_checkpoint_waiting_seconds"


def check_versions(python: tuple[int, ...] | None = None, h5: str | None = None) -> Iterator[Finding]:
    """Check the versions of Python and h5py; arguments replace the installed ones."""
    python = python or tuple(int(part) for part in platform.python_version_tuple()[:2])
    h5 = h5 or h5py.version.version
    what = (
        f"fiq {product_version()}, Python {'.'.join(map(str, python))}, h5py {h5}, HDF5 {h5py.version.hdf5_version}, "
        f"nats-py {installed('nats-py')}"
    )
    if python[:2] < MINIMUM_PYTHON or tuple(int(part) for part in h5.split(".")[:2]) < MINIMUM_H5PY:
        wanted = f"Python {'.'.join(map(str, MINIMUM_PYTHON))} and h5py {'.'.join(map(str, MINIMUM_H5PY))}"
        yield error("versions", what, f"fiq needs {wanted} or newer", "install fiq with its own requirements")
    else:
        yield ok("versions", what)


def check_open_files(files: int | None = None) -> Iterator[Finding]:
    """Check how many descriptors a process may have."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if files is None else files
    if 0 <= soft < ENOUGH_FILES:
        what = f"a process may open {soft} files (nofile)"
        meaning = "ingest refuses connections beyond that, and a node of the cluster accepts no more clients"
        action = f"raise it to {ENOUGH_FILES} or more: LimitNOFILE= of the unit, ulimits: of the container, `ulimit -n`"
        yield warning("limits", what, meaning, action)
    else:
        yield ok("limits", f"a process may open {soft if soft >= 0 else 'any number of'} files")


def check_memory(settings: PersisterSettings, available: int | None = None) -> Iterator[Finding]:
    """Compare the memory of this machine or container with what a persister may take by its settings."""
    needed = (
        _BASE_MEMORY
        + 2 * settings.buffer_bytes
        + settings.open_consultations * _OPEN_CONSULTATION
        + settings.known_ids * _KNOWN_ID
    )
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    have = min(total, memory_limit() or total) if available is None else available
    what = f"{decimal(have)} of memory; by its settings a persister takes up to {decimal(needed)}"
    if have < needed:
        meaning = "the kernel kills it when it gets there; nothing is lost, but it restarts again and again"
        action = "give it more, or lower FI_BUFFER_BYTES, FI_OPEN_CONSULTATIONS and FI_KNOWN_IDS"
        yield error("limits", what, meaning, action)
    else:
        yield ok("limits", what)


def check_secrets(env: Mapping[str, str]) -> Iterator[Finding]:
    """Check the files with secrets that the environment names."""
    for name in SECRETS:
        path = Path(env[name]) if env.get(name) else None
        if path is None:
            continue
        try:
            mode = path.stat().st_mode & 0o777
            path.open("rb").close()
        except OSError as problem:
            meaning = "the process that needs it does not start"
            action = "put the file there, readable by the user of the services"
            yield error("permissions", f"{name}={path}: {problem.strerror}", meaning, action)
            continue
        if mode & 0o077:
            action = f"chmod 600 {path}; then renew the secret, another user may have read it"
            meaning = "users other than its owner can read a secret"
            yield error("permissions", f"{path} has mode {mode:04o}", meaning, action)
        else:
            yield ok("permissions", f"only its owner can read {path}")


def check_users(env: Mapping[str, str]) -> Iterator[Finding]:
    """Check that each role of a deployment has a user of its own.

    The container `ops` has the users of all in its environment. Elsewhere they are in the .env of the deployment whose
    seed FI_NATS_SEED_FILE names; without one nothing is checked.
    """
    users = {role: env[role.variable] for role in ContainerRole if env.get(role.variable)}
    seed = Path(env.get("FI_NATS_SEED_FILE", "")).absolute()
    layout = Layout(seed.parents[2]) if len(seed.parents) > 2 else None
    if not users and layout is not None and seed.parent == layout.users:
        try:
            users = {role: str(user) for role, user in (container_users(layout) or {}).items()}
        except CommandError as problem:
            yield unknown("permissions", str(problem), "see the message; then run fiq doctor again")
    if not users:
        return
    roles: dict[str, list[str]] = {}
    for role, user in users.items():
        roles.setdefault(user.partition(":")[0], []).append(role)
    if shared := [f"{', '.join(names)} as {uid}" for uid, names in roles.items() if len(names) > 1]:
        meaning = "an intruder in one of them reaches the secrets and data of all"
        action = "give each role a user of its own, as root: docs/security.md, `Users of the containers`"
        yield warning("permissions", f"containers share a user: {'; '.join(shared)}", meaning, action)
    else:
        each = ", ".join(f"{role} {user}" for role, user in users.items())
        yield ok("permissions", f"each role has a user of its own: {each}")


# -- The data directory ----------------------------------------------------------------------------------------------


def check_directory(directory: Path, settings: PersisterSettings) -> Iterator[Finding]:
    """Check who may read and write the data directory, and its disk; *settings* are those of the persisters."""
    yield from _modes(directory)
    try:
        check_file_system(directory)
    except UnsupportedFileSystemError as problem:
        yield error("disks", str(problem), "commits may be lost or torn", "move the data directory")
    yield from _durability(directory, allowed=settings.allow_ephemeral)
    yield from _space(directory, settings.disk_reserve)
    yield from _probe(directory)


def _modes(directory: Path) -> Iterator[Finding]:
    open_to_all = [path for path in (directory, *sorted(directory.glob("*.h5*"))) if path.stat().st_mode & 0o007]
    if not all(parent.stat().st_mode & 0o001 for parent in directory.absolute().parents):
        open_to_all = []  # a closed folder above protects them
    if open_to_all:
        more = f" and {len(open_to_all) - 1} more" if len(open_to_all) > 1 else ""
        what = f"every user of this machine can read {open_to_all[0]}{more}"
        yield error("permissions", what, "the corpus is medical data", f"chmod -R o-rwx {directory}")
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        action = "run fiq as the user of the persisters, or correct the owner of the directory"
        what = f"this user may not write {directory}"
        yield error("permissions", what, "persisters of this user cannot work", action)
    elif not open_to_all:
        yield ok("permissions", f"only its owner and group can read {directory}, and it can be written")


def _durability(directory: Path, *, allowed: bool) -> Iterator[Finding]:
    if not (kind := ephemeral_file_system(directory)):
        return
    what = f"{directory} is on {kind}"
    meaning = "its files are lost when the machine restarts or the container is removed"
    if allowed:
        yield ok("disks", f"{what}, which FI_ALLOW_EPHEMERAL allows: {meaning}")
    else:
        action = "set FI_DATA_DIR to a directory on a disk, in a container to one on a volume, and move the files there"
        yield error("disks", what, f"{meaning}; persisters do not start", action)


def _space(directory: Path, reserve: float) -> Iterator[Finding]:
    usage = shutil.disk_usage(directory)
    what = f"{decimal(usage.free)} of {decimal(usage.total)} free in {directory}"
    if usage.free < max(min(_NO_SPACE, usage.total // 20), usage.total * reserve / 100):
        meaning = f"persisters write nothing below FI_DISK_RESERVE ({reserve:g} %); events wait in the stream"
        yield error("disks", what, meaning, "make room, or extend the disk; persisters then continue by themselves")
    elif usage.free < max(min(_LITTLE_SPACE, usage.total // 10), usage.total * reserve / 50):
        yield warning("disks", what, "the corpus grows with every event", "plan for a larger disk")
    else:
        yield ok("disks", what)


def _probe(directory: Path) -> Iterator[Finding]:
    """Try the two calls that commits depend on, with a file of our own."""
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
            "disks", f"{directory} cannot be written: {problem.strerror}", "persisters cannot work", "see above"
        )
        return
    finally:
        with contextlib.suppress(OSError):  # a read-only file system refuses that, too
            probe.unlink()
    if not excluded:
        action = "use a local file system, such as ext4 or XFS"
        yield error("disks", "flock does not exclude a second process here", "two writers could destroy a file", action)
    elif seconds > SLOW_SYNC:
        action = "a faster disk, or fewer writers on it"
        yield warning("disks", f"fdatasync took {seconds:.2f} s", "every commit takes that long", action)
    else:
        yield ok("disks", f"flock and fdatasync work in {directory} ({seconds * 1e3:.1f} ms)")


def _is_excluded(probe: Path) -> bool:
    with probe.open("rb") as other:
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


# -- Its files, compared with the cluster ----------------------------------------------------------------------------


def check_files(directory: Path, snapshot: ClusterSnapshot | None) -> Iterator[Finding]:
    """Compare the partition files with the placement of their partitions.

    Args:
        directory: a data directory.
        snapshot: of the cluster; None when it could not be asked.
    """
    try:
        volume, _ = read_volume(directory / "volume.json")
        with open_corpus(directory, strict=True) as corpus:
            infos = {info.identity.partition: info for info in corpus.partitions}
    except (BackupError, CorpusError) as problem:
        yield error("corpus", str(problem), "its partitions are stopped, or will be at the next start", "see message")
        return
    found = list(_volume(infos, volume)) + ([] if snapshot is None else list(_placed(volume, infos, snapshot)))
    yield from found
    if not found:
        events = sum(info.events for info in infos.values())
        held = f"{count(len(infos), 'partition file')}, {count(events, 'event')}"
        yield ok("corpus", f"volume {volume}: {held}; `fiq verify` reads them")


def _volume(infos: Mapping[int, PartitionInfo], volume: str) -> Iterator[Finding]:
    for info in infos.values():
        if info.identity.volume != volume:
            what = f"{info.path.name} belongs to volume {info.identity.volume}, volume.json says {volume}"
            yield error("corpus", what, "persisters refuse it", "move the file and its journal back to their volume")
        if not info.has_journal and not info.archived:
            meaning = "commits that only it held are lost, and persisters refuse the file"
            yield error("corpus", f"{info.path.name} has no journal", meaning, "put the journal back, or `fiq restore`")


def _placed(volume: str, infos: Mapping[int, PartitionInfo], snapshot: ClusterSnapshot) -> Iterator[Finding]:
    stream = snapshot.stream
    for one in snapshot.partitions:
        name, info, placement = partition_name(one.partition), infos.get(one.partition), one.placement
        if info is None:
            if placement is not None and placement.volume == volume:
                meaning = "it is stopped: an empty file instead would split the history"
                action = "put the file and its journal back, or `fiq restore` the volume"
                yield error("corpus", f"partition {name} is placed here, but {name}.h5 is gone", meaning, action)
            continue
        if placement is not None and (placement.volume, placement.epoch) != (volume, info.identity.epoch):
            what = (
                f"{name}.h5 is here (epoch {info.identity.epoch}), but the partition is on {placement.volume} (epoch "
                f"{placement.epoch})"
            )
            action = "move the file and its journal away"
            if placement.volume == volume:
                action = "stop this directory's persisters; docs/operations.md, `A lost disk comes back`"
            yield error("corpus", what, "it is a stale copy, persisters refuse it", action)
        if stream is None:
            continue
        if info.identity.stream_created != stream.created:
            what = f"{name}.h5 belongs to the stream created at {info.identity.stream_created}, not {stream.created}"
            meaning = "the stream was deleted and created again: persisters refuse the file"
            action = "start a new data directory, and keep this one: docs/operations.md, `A lost stream`"
            yield error("corpus", what, meaning, action)
        elif info.committed > stream.last_sequence:
            what = f"{name}.h5 holds sequence {info.committed}, the stream ends at {stream.last_sequence}"
            yield error("corpus", what, "the stream lost events: persisters refuse it", "see docs/operations.md")
        elif placement is not None and info.committed < placement.committed:
            what = f"{name}.h5 ends at {info.committed}, its key says that it had reached {placement.committed}"
            meaning = "the file is an old copy: events between may be gone from the stream"
            yield error("corpus", what, meaning, "put the newest copy back")


def check_backup(directory: Path, snapshot: ClusterSnapshot | None) -> Iterator[Finding]:
    """Check the age of the volume's newest backup: with one store it is the only other copy."""
    made = backed_up_at(directory)
    stores = 1 if snapshot is None else len(snapshot.log.stores or ())
    in_stream = snapshot is None or snapshot.log.has_stream
    try:
        began = (directory / "volume.json").stat().st_mtime
    except OSError:
        return  # check_files reports it
    hours = (time.time() - (made or began)) / 3600
    what = (
        f"the newest backup of this volume is {count(round(hours), 'hour')} old"
        if made
        else "this volume was never backed up"
    )
    if stores > 1 or hours <= BACKUP_HOURS:
        yield ok("backup", f"{what}; stores: {stores}")
    else:
        meaning = f"{'events older than FI_RETENTION' if in_stream else 'all events'} are on this disk only"
        yield warning("backup", what, meaning, "run `fiq backup` daily, or run a second store: docs/operations.md")


# -- Persisters ------------------------------------------------------------------------------------------------------


def check_workers(workers: Sequence[Worker], directory: Path | None, held_back: float = HELD_BACK) -> Iterator[Finding]:
    """Ask the persisters that this machine can reach whether they are ready, and whether checkpoints wait."""
    for worker in workers:
        url = _url(worker)
        status, body = monitoring.get(url, "/readyz", timeout=TIMEOUT) if url else (0, b"")
        label = f"persister {worker.name} (pid {worker.pid} on {worker.host})"
        if not status:
            yield unknown("persisters", f"{label}: its port is not reachable from here", "run fiq doctor on its host")
            continue
        if status == 200:
            runs = f"partitions {', '.join(worker.partitions)}" if worker.partitions else "no partition"
            yield ok("persisters", f"{label} is ready and runs {runs}")
        else:
            reason = monitoring.reasons(body) or f"/readyz answers {status}"
            action = "docs/operations.md says what each reason means"
            yield error("persisters", f"{label} is not ready: {reason}", "events of those partitions wait", action)
        yield from _held_back(url, directory, held_back)


def _url(worker: Worker) -> str:
    """Return the URL of a persister's endpoints; empty when it listens on loopback of another host."""
    host, _, port = worker.address.rpartition(":")
    if not port.isdigit():
        return ""
    local = worker.host == socket.gethostname()
    if host in {"127.0.0.1", "::1", "localhost"}:
        return f"http://{host}:{port}" if local else ""
    wildcard = host in {"0.0.0.0", "::", "*", ""}  # noqa: S104 - compared, not bound
    return f"http://{('127.0.0.1' if local else worker.host) if wildcard else host}:{port}"


def _held_back(url: str, directory: Path | None, limit: float) -> Iterator[Finding]:
    status, body = monitoring.get(url, "/metrics", timeout=TIMEOUT)
    if status != 200:
        return
    for family in text_string_to_metric_families(body.decode("utf-8")):
        for sample in family.samples:
            if sample.name == _WAITING and sample.value >= limit:
                name = sample.labels["partition"]
                pids = readers(directory / f"{name}.h5") if directory is not None else []
                who = f"; it is held by pid {', '.join(map(str, pids))}" if pids else ""
                yield warning(
                    "checkpoints",
                    f"checkpoints of partition {name} have waited for {sample.value:.0f} s{who}",
                    "stock readers see an older state, and the journal grows; commits continue",
                    f"close the program that has {name}.h5 open (`lsof {name}.h5`), or make room on the disk",
                )


def readers(path: Path, locks: Path = Path("/proc/locks")) -> list[int]:
    """Return the processes other than its writer that hold a shared lock on a partition file (Linux)."""
    try:
        file, journal = path.stat(), path.with_name(path.name + ".wal").stat()
        lines = locks.read_text().splitlines()
    except OSError:
        return []
    # "1: FLOCK  ADVISORY  READ 18259 fe:00:10018838 0 EOF"
    words = [line.replace("->", "").split() for line in lines]
    held = [(one[3], int(one[4]), one[5]) for one in words if len(one) > 5 and one[1] == "FLOCK"]
    writers = {pid for kind, pid, inode in held if kind == "WRITE" and inode == _inode(journal)}
    return sorted({pid for kind, pid, inode in held if kind == "READ" and inode == _inode(file)} - writers - {0, -1})


def _inode(stat: os.stat_result) -> str:
    return f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}:{stat.st_ino}"

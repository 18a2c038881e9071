"""The files on this machine and the processes that write them: whether they fit the cluster, and what they wait for."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from fiq.corpus import CorpusError, open_corpus
from fiq.corpus.reader import PartitionInfo
from services.cli.backup.making import read_volume
from services.cli.doctor.finding import Finding, error, ok, unknown, warning
from services.cli.doctor.log import LogView
from services.cli.doctor.nodes import get
from services.cli.errors import BackupError
from services.cli.overview import Worker
from services.log.partitions import partition_name
from services.persister.volume import backed_up_at

#: checkpoints that wait for so long are held back, seconds
HELD_BACK = 60.0
#: a backup that is older is worth a warning, hours
BACKUP_HOURS = 24
_WAITING = "fi_persister_checkpoint_waiting_seconds"


def check_files(directory: Path, seen: LogView | None) -> Iterator[Finding]:
    """Compare the partition files with where the cluster has their partitions.

    Args:
        directory: a data directory.
        seen: what the broker answered; None when it could not be asked.
    """
    try:
        volume, _ = read_volume(directory / "volume.json")
        with open_corpus(directory) as corpus:
            infos = {info.identity.partition: info for info in corpus.partitions}
    except (BackupError, CorpusError) as problem:
        yield error("corpus", str(problem), "its partitions stand still, or will at the next start", "see what it says")
        return
    found = list(_volume(infos, volume)) + ([] if seen is None else list(_places(volume, infos, seen)))
    yield from found
    if not found:
        events = sum(info.events for info in infos.values())
        yield ok("corpus", f"volume {volume}: {len(infos)} partition files, {events} events; `fiq verify` reads them")


def _volume(infos: Mapping[int, PartitionInfo], volume: str) -> Iterator[Finding]:
    for info in infos.values():
        if info.identity.volume != volume:
            meaning = "persisters refuse it"
            what = f"{info.path.name} belongs to volume {info.identity.volume}, volume.json says {volume}"
            yield error("corpus", what, meaning, "move the pair back to where it belongs")
        if not info.has_journal and not info.archived:
            meaning = "commits that only it held are lost, and persisters refuse the file"
            yield error("corpus", f"{info.path.name} has no journal", meaning, "put the journal back, or `fiq restore`")


def _places(volume: str, infos: Mapping[int, PartitionInfo], seen: LogView) -> Iterator[Finding]:
    stream = seen.log.stream
    for one in seen.partitions:
        name, info, place = partition_name(one.partition), infos.get(one.partition), one.placement
        if info is None:
            if place is not None and place.volume == volume:
                meaning = "it stands still: an empty file in its place would split the history"
                action = "put the pair back, or `fiq restore` the volume"
                yield error("corpus", f"partition {name} lives here, but {name}.h5 is gone", meaning, action)
            continue
        if place is not None and (place.volume, place.epoch) != (volume, info.identity.epoch):
            what = (
                f"{name}.h5 lies here (epoch {info.identity.epoch}), the partition on {place.volume} (epoch "
                f"{place.epoch})"
            )
            action = "move the pair away"
            if place.volume == volume:
                action = "stop this directory's persisters; docs/operations.md, `A lost disk comes back`"
            yield error("corpus", what, "it is a stale copy, persisters refuse it", action)
        if stream is None:
            continue
        if info.identity.stream_created != stream.created:
            what = f"{name}.h5 belongs to the stream created at {info.identity.stream_created}, not {stream.created}"
            action = "begin a new data directory, and keep this one: docs/operations.md, `A lost stream`"
            yield error("corpus", what, "the stream was deleted and made anew: persisters refuse the file", action)
        elif info.committed > stream.last_sequence:
            what = f"{name}.h5 holds sequence {info.committed}, the stream ends at {stream.last_sequence}"
            yield error("corpus", what, "the stream lost events: persisters refuse it", "see docs/operations.md")
        elif place is not None and info.committed < place.committed:
            what = f"{name}.h5 ends at {info.committed}, its key says that it had reached {place.committed}"
            meaning = "the file is an old copy: events between may be gone from the stream"
            yield error("corpus", what, meaning, "put the newest copy back")


def check_backup(directory: Path, seen: LogView | None) -> Iterator[Finding]:
    """Look how old the newest backup of the volume in *directory* is: with one store it is the only other copy."""
    made = backed_up_at(directory)
    stores = 1 if seen is None else len(seen.log.stores or ())
    try:
        began = (directory / "volume.json").stat().st_mtime
    except OSError:
        return  # said above
    hours = (time.time() - (made or began)) / 3600
    what = f"the newest backup of this volume is {hours:.0f} hours old" if made else "this volume was never backed up"
    if stores > 1 or hours <= BACKUP_HOURS:
        yield ok("backup", f"{what}; {stores} store(s)")
    else:
        meaning = "events older than FI_RETENTION are on this disk only"
        yield warning("backup", what, meaning, "run `fiq backup` daily, or run a second store: docs/operations.md")


def check_workers(workers: Sequence[Worker], directory: Path | None, held_back: float = HELD_BACK) -> Iterator[Finding]:
    """Ask the persisters that can be reached from here whether they are ready, and what they wait for."""
    for worker in workers:
        url = _url(worker)
        status, body = get(url, "/readyz") if url else (0, b"")
        label = f"persister {worker.name} (pid {worker.pid} on {worker.host})"
        if not status:
            yield unknown("persisters", f"{label}: its port is not reachable from here", "run fiq doctor on its host")
            continue
        if status == 200:
            yield ok("persisters", f"{label} is ready: partition {', '.join(worker.partitions) or '(none)'}")
        else:
            reason = body.decode("utf-8", "replace").strip()[:500]
            action = "docs/operations.md says what each reason means"
            yield error("persisters", f"{label} is not ready: {reason}", "events of those partitions wait", action)
        yield from _held_back(url, directory, held_back)


def _url(worker: Worker) -> str:
    """Return where a persister's endpoints are; empty when it listens on loopback of another host."""
    host, _, port = worker.address.rpartition(":")
    if not port.isdigit():
        return ""
    local = worker.host == socket.gethostname()
    if host in {"127.0.0.1", "::1", "localhost"}:
        return f"http://{host}:{port}" if local else ""
    wildcard = host in {"0.0.0.0", "::", "*", ""}  # noqa: S104 - compared, not bound
    return f"http://{('127.0.0.1' if local else worker.host) if wildcard else host}:{port}"


def _held_back(url: str, directory: Path | None, limit: float) -> Iterator[Finding]:
    status, body = get(url, "/metrics")
    if status != 200:
        return
    for family in text_string_to_metric_families(body.decode("utf-8")):
        for sample in family.samples:
            if sample.name == _WAITING and sample.value >= limit:
                name = sample.labels["partition"]
                holders = readers(directory / f"{name}.h5") if directory is not None else []
                who = f"; it is held by pid {', '.join(map(str, holders))}" if holders else ""
                yield warning(
                    "checkpoints",
                    f"checkpoints of partition {name} have waited for {sample.value:.0f} s{who}",
                    "stock readers see an older state, and the journal grows; commits go on",
                    f"close the program that has {name}.h5 open (`lsof {name}.h5`), or make room on the disk",
                )


def readers(path: Path, locks: Path = Path("/proc/locks")) -> list[int]:
    """Return the processes other than its writer that hold a shared lock on a partition file, as Linux tells."""
    try:
        stat = path.stat()
        journal = path.with_name(path.name + ".wal").stat()
        lines = locks.read_text().splitlines()
    except OSError:
        return []
    # "1: FLOCK  ADVISORY  READ 18259 fe:00:10018838 0 EOF"
    held = [line.replace("->", "").split() for line in lines]
    found = [(words[3], int(words[4]), words[5]) for words in held if len(words) > 5 and words[1] == "FLOCK"]
    writers = {pid for kind, pid, place in found if kind == "WRITE" and place == _place(journal)}
    return sorted({pid for kind, pid, place in found if kind == "READ" and place == _place(stat)} - writers - {0, -1})


def _place(stat: os.stat_result) -> str:
    return f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}:{stat.st_ino}"

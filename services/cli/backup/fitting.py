"""Whether a backup fits the cluster as it is now: what stands against a restore, what it means, what to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from services.cli.backup.cluster import ClusterView
from services.cli.backup.manifest import Manifest
from services.log.jetstream.stream import STREAM
from services.log.partitions import partition_name
from services.log.status import Placement


@dataclass(frozen=True, slots=True)
class Gap:
    """Sequences of one partition that neither the backup nor the stream has, both ends included.

    With *partly* the stream may have some of them still: nobody knows which of them trim deleted in its middle.
    """

    partition: int
    first: int
    last: int
    partly: bool = False

    def __str__(self) -> str:
        tail = ", as far as the stream lacks them" if self.partly else ""
        return f"partition {partition_name(self.partition)}, sequences {self.first} to {self.last}{tail}"


@dataclass(frozen=True, slots=True)
class Fit:
    """What a comparison found.

    Attributes:
        fatal: why nothing may be restored, whatever the operator says.
        problems: why nothing is restored unless the operator insists.
        gaps: what is lost for good if he does.
        unborn: partitions that live on this volume and have no file in the backup: they begin anew.
        places: of this volume's partitions: what their keys become, so that files left elsewhere are refused, and
            nothing is trimmed that the restored ones lack.
        remarks: what an operator should know all the same.
    """

    fatal: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    gaps: tuple[Gap, ...] = ()
    unborn: tuple[int, ...] = ()
    places: tuple[Placement, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def epochs(self) -> dict[int, int]:
        """The epoch that each partition gets."""
        return {place.partition: place.epoch for place in self.places}


def compare(manifest: Manifest, seen: ClusterView | None) -> Fit:
    """Compare a backup with the cluster; None stands for a cluster that has no stream."""
    if seen is None:
        problem = (
            f"the cluster has no stream {STREAM}, so it cannot bring what the backup lacks. Is it the right cluster? "
            "If the stream is lost: docs/operations.md, `A lost stream`"
        )
        return Fit(problems=(problem,))
    fatal = seen.alive_on(manifest.volume)
    if seen.created != manifest.stream_created:
        return Fit(fatal, (_created_anew(manifest, seen),))
    unborn = _unborn(manifest, seen)
    gaps = tuple(_gaps(manifest, unborn, seen))
    problems = [*_misplaced(manifest, seen), *_ahead(manifest, seen)]
    if gaps:
        problems.append(_trimmed(gaps, seen))
    places = tuple(_places(manifest, unborn, seen))
    return Fit(fatal, tuple(problems), gaps, unborn, places, (*_unplaced(manifest, seen), *_renewed(manifest, seen)))


def _places(manifest: Manifest, unborn: Sequence[int], seen: ClusterView) -> Iterator[Placement]:
    for entry in manifest.contents:
        known = seen.placed.get(entry.partition)
        if known is None or known.volume == manifest.volume:
            epoch = max(entry.epoch, seen.highest_epoch(entry.partition)) + 1
            yield Placement(entry.partition, manifest.volume, epoch, entry.committed, entry.begins, 0)
    yield from begun_anew(unborn, seen)


def begun_anew(partitions: Sequence[int], seen: ClusterView) -> Iterator[Placement]:
    """Yield what the keys of placed *partitions* become whose files are to be empty: they begin with the stream."""
    for partition in partitions:
        known = seen.placed[partition]
        yield Placement(partition, known.volume, known.epoch + 1, seen.first - 1, seen.first, 0)


def _created_anew(manifest: Manifest, seen: ClusterView) -> str:
    return (
        f"the backup belongs to the stream created at {manifest.stream_created}, but the cluster's {STREAM} was "
        f"created at {seen.created}: it was deleted and made anew, or restored from a backup of its own, which makes "
        "it a new one, too. Its sequences may mean other events, so no persister will go on with these files. Read the "
        "backup where it is (`fiq show ID --corpus BACKUP`), and let persisters begin a new data directory for the new "
        "stream: docs/operations.md, `A lost stream`"
    )


def _misplaced(manifest: Manifest, seen: ClusterView) -> Iterator[str]:
    for entry in manifest.contents:
        place = seen.placed.get(entry.partition)
        if place is not None and place.volume != manifest.volume:
            yield (
                f"partition {partition_name(entry.partition)} lives on volume {place.volume}, epoch "
                f"{place.epoch} by now; the backup has it of volume {manifest.volume}, epoch {entry.epoch}: it is "
                "a stale copy, which persisters refuse"
            )


def _ahead(manifest: Manifest, seen: ClusterView) -> Iterator[str]:
    most = max((entry.committed for entry in manifest.contents), default=0)
    if most > seen.last:
        yield (
            f"the backup holds sequence {most} but stream {STREAM} ends at {seen.last}: the stream lost events, or was "
            "restored from an older backup than this one. Persisters refuse that; take an older backup of the corpus, "
            "or begin a new data directory"
        )


def _unborn(manifest: Manifest, seen: ClusterView) -> tuple[int, ...]:
    held = {entry.partition for entry in manifest.contents}
    return tuple(partition for partition in seen.placed_on(manifest.volume) if partition not in held)


def _gaps(manifest: Manifest, unborn: Sequence[int], seen: ClusterView) -> Iterator[Gap]:
    held = [(entry.partition, entry.epoch, entry.committed) for entry in manifest.contents]
    for partition, epoch, committed in sorted([*held, *((partition, 0, 0) for partition in unborn)]):
        if committed < seen.first - 1:
            yield Gap(partition, committed + 1, seen.first - 1)
        behind, reached = max(committed, seen.first - 1), min(seen.last, seen.reached(partition, since=epoch))
        if seen.holes and behind < reached:
            yield Gap(partition, behind + 1, reached, partly=True)


def _trimmed(gaps: Sequence[Gap], seen: ClusterView) -> str:
    return (
        f"the stream begins at sequence {seen.first} by now and lacks {seen.holes} events after that; what is gone was "
        f"trimmed, because every store had committed it. The backup lacks it ({'; '.join(map(str, gaps))}). Take a "
        "newer backup, or recover the files of the lost volume, or copy the consultations from another store. With "
        "--force these sequences are given up for good"
    )


def _renewed(manifest: Manifest, seen: ClusterView) -> Iterator[str]:
    """Tell of a restore or a giving up since: it is one history, so the backup and the stream decide what is lost."""
    names = [
        partition_name(entry.partition)
        for entry in manifest.contents
        if entry.partition in seen.placed and seen.placed[entry.partition].epoch != entry.epoch
    ]
    if names:
        yield (
            f"the volume was restored or given up since the backup: what it then had of partition {', '.join(names)} "
            "is replaced by what the backup and the stream have"
        )


def _unplaced(manifest: Manifest, seen: ClusterView) -> Iterator[str]:
    names = [partition_name(entry.partition) for entry in manifest.contents if entry.partition not in seen.placed]
    if names:
        yield f"partition {', '.join(names)} had no key in the bucket: it was placed on this volume"

"""`fiq backup` and `fiq restore` without a cluster: what they write and refuse, and that nothing half done counts."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fiq.corpus import EventStore, verify_corpus
from services.cli.backup import backup
from services.cli.main import app
from services.persister.errors import VolumeBusyError, VolumeError
from services.persister.volume import Volume
from tests.support.commands import killed_in
from tests.support.corpus import IDENTITY, commit_range, expected, record, stock_contents
from tests.support.damage import change_body, damage
from tests.support.small_disk import small_disk


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A data directory of two partitions; what the second one holds is in its journal only."""
    directory = tmp_path / "data"
    made = Volume.open(directory, "main")
    identity = replace(IDENTITY, volume=made.uuid)
    with EventStore.create(made.file(0), identity) as store:
        commit_range(store, range(1, 101))
    store = EventStore.create(made.file(1), replace(identity, partition=1))
    for sequence in range(101, 151):
        store.append(f"other-{sequence % 7}", [record(sequence)])
    store.commit(150)
    store.abandon()
    return directory


@pytest.fixture
def saved(volume: Path, tmp_path: Path) -> Path:
    """A backup of it."""
    assert (0, "") == _outcome(run("backup", tmp_path / "saved", "--corpus", volume, "--offline"))
    return tmp_path / "saved"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _outcome(result: Result) -> tuple[int, str]:
    return result.exit_code, result.stderr


def refused(result: Result, reason: str) -> None:
    """Assert that a command ended with one message that has *reason*."""
    assert 1 == result.exit_code, result.stdout
    assert re.search(reason, result.stderr), result.stderr


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def edit(saved: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    change(manifest)
    (saved / "manifest.json").write_text(json.dumps(manifest))


# -- backup -----------------------------------------------------------------------------------------------------------


def test_a_backup_is_a_corpus_that_every_reader_opens(volume: Path, tmp_path: Path) -> None:
    """Stock h5py sees what only the journal of the original holds; a table and one line tell what was done."""
    done = run("backup", tmp_path / "saved", "--corpus", volume, "--offline")
    assert (0, "") == _outcome(done)
    assert ["00.h5", "100", "7", "100"] == done.stdout.splitlines()[1].split()[:4]
    assert ["01.h5", "150", "7", "50"] == done.stdout.splitlines()[2].split()[:4]
    assert "150 events" in done.stdout
    assert "must still begin at sequence 101 or before" in done.stdout
    assert (100, expected(100)) == stock_contents(tmp_path / "saved" / "00.h5")
    assert 150 == stock_contents(tmp_path / "saved" / "01.h5")[0]
    assert verify_corpus(tmp_path / "saved").clean


def test_the_manifest_says_what_the_backup_is_and_where_it_belongs(volume: Path, saved: Path) -> None:
    """With a checksum and a size for every file, and no path of the machine."""
    manifest = json.loads((saved / "manifest.json").read_text())
    stated = json.loads((volume / "volume.json").read_text())
    assert (stated["volume"], "main") == (manifest["volume"], manifest["store"])
    assert ("fi-events", IDENTITY.stream_created, 16) == (
        manifest["stream"],
        manifest["stream_created"],
        manifest["partitions"],
    )
    assert manifest["placement"] is None
    assert [("00.h5", 100, 1), ("01.h5", 150, 1)] == [
        (entry["file"], entry["committed"], entry["epoch"]) for entry in manifest["contents"]
    ]
    files = {"00.h5", "00.h5.wal", "01.h5", "01.h5.wal", "corpus.h5", "volume.json.saved"}
    assert files == {entry["name"] for entry in manifest["files"]}
    assert files | {"manifest.json"} == set(names(saved))
    assert str(volume) not in (saved / "manifest.json").read_text()


def test_only_owner_and_group_may_read_a_backup(saved: Path) -> None:
    """It holds what the corpus holds."""
    assert 0o750 == saved.stat().st_mode & 0o777
    assert {0o640} == {path.stat().st_mode & 0o777 for path in saved.iterdir()}


def test_no_persister_takes_a_backup_for_a_volume(saved: Path) -> None:
    """Two directories with one identity would fight for the partitions."""
    with pytest.raises(VolumeError, match=r"no volume\.json"):
        Volume.open(saved, "main")


def test_a_backup_is_never_written_over_anything(volume: Path, saved: Path) -> None:
    """The existing directory stays as it is."""
    before = (saved / "manifest.json").read_bytes()
    refused(run("backup", saved, "--corpus", volume, "--offline"), "exists: a backup is never written over")
    assert before == (saved / "manifest.json").read_bytes()


@pytest.mark.parametrize("step", ["copy_pair", "verify_corpus", "digest", "_publish"])
def test_a_backup_that_fails_at_any_step_leaves_nothing(
    volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """No directory under the name, none under another."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(backup, step, fail)
    before = names(tmp_path)
    refused(run("backup", tmp_path / "saved", "--corpus", volume, "--offline"), "No space left")
    assert before == names(tmp_path)


@pytest.mark.parametrize("step", ["verify_corpus", "_publish"])
def test_what_a_backup_killed_with_9_leaves_does_not_look_like_one(volume: Path, tmp_path: Path, step: str) -> None:
    """A hidden directory without a manifest, which restore refuses; the next backup does not mind it."""
    code = killed_in(
        f"services.cli.backup.backup.{step}", "backup", tmp_path / "saved", "--corpus", volume, "--offline"
    )
    assert -signal.SIGKILL == code
    (left,) = tmp_path.glob(".saved.*.new")
    assert not (tmp_path / "saved").exists()
    refused(run("restore", left, "--to", tmp_path / "new", "--offline"), r"is not a backup: it has no manifest\.json")
    assert (0, "") == _outcome(run("backup", tmp_path / "saved", "--corpus", volume, "--offline"))


def test_a_damaged_corpus_is_not_backed_up(volume: Path, tmp_path: Path) -> None:
    """A copy of damage is no backup; the older one stays the best there is."""
    damage(volume / "00.h5", change_body)
    refused(run("backup", tmp_path / "saved", "--corpus", volume, "--offline"), "damaged, so no backup was made")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda d: (d / "volume.json").unlink(), r"there is no .*volume\.json"),
        (lambda d: (d / "volume.json").write_text("{"), r"volume\.json is damaged"),
        (lambda d: (d / "01.h5.wal").unlink(), r"01\.h5 has no journal"),
        (lambda d: [path.unlink() for path in d.glob("0?.h5*")], "nothing to back up"),
    ],
)
def test_what_is_no_whole_volume_is_refused(
    volume: Path, tmp_path: Path, spoil: Callable[[Path], object], reason: str
) -> None:
    """The message names the file."""
    spoil(volume)
    refused(run("backup", tmp_path / "saved", "--corpus", volume, "--offline"), reason)
    assert not (tmp_path / "saved").exists()


def test_a_backup_that_cannot_fit_is_refused_before_it_begins(volume: Path, tmp_path: Path) -> None:
    """Half a copy on a full disk is useless."""
    with small_disk("tmpfs", tmp_path / "disk", size=2) as disk:
        refused(run("backup", disk / "saved", "--corpus", volume, "--offline"), r"free, the backup needs about")
        assert [] == names(disk)


# -- restore ----------------------------------------------------------------------------------------------------------


def test_a_restored_volume_is_the_one_that_was_lost(volume: Path, saved: Path, tmp_path: Path) -> None:
    """The same identity, the same events; a persister opens and continues it."""
    identity = (volume / "volume.json").read_bytes()
    target = tmp_path / "new"
    done = run("restore", saved, "--to", target, "--offline")
    assert (0, "") == _outcome(done)
    assert "Start the persisters: the stream brings what came since" in done.stdout
    assert identity == (target / "volume.json").read_bytes()
    assert verify_corpus(target).clean
    again = Volume.open(target, "main")
    with EventStore.open(again.file(1), expected=replace(IDENTITY, volume=again.uuid, partition=1)) as store:
        assert 150 == store.committed
        store.append("other-1", [record(151)])
        store.commit(151)
    files = {"00.h5", "00.h5.wal", "01.h5", "01.h5.wal", "corpus.h5", "volume.json", "volume.lock"}
    assert files == set(names(target))


def test_a_log_without_a_stream_brings_nothing(tmp_path: Path) -> None:
    """The volume of a ZeroMQ log is the only copy: neither command says that a stream brings what the backup lacks."""
    made = Volume.open(tmp_path / "data", "main")
    with EventStore.create(made.file(0), replace(IDENTITY, volume=made.uuid, stream_created=made.uuid)) as store:
        commit_range(store, range(1, 11))
    backed_up = run("backup", tmp_path / "saved", "--corpus", tmp_path / "data", "--offline")
    assert (0, "") == _outcome(backed_up)
    assert "Events that are accepted from now on are not in it" in backed_up.stdout
    restored = run("restore", tmp_path / "saved", "--to", tmp_path / "new", "--offline")
    assert (0, "") == _outcome(restored)
    assert "without the events that came since: a ZeroMQ log has no other copy" in restored.stdout
    assert "the stream" not in backed_up.stdout + restored.stdout


def test_an_empty_volume_that_a_restarted_persister_made_gives_way(saved: Path, tmp_path: Path) -> None:
    """Whatever restarts persisters makes a new, empty volume in the lost one's place."""
    stranger = Volume.open(tmp_path / "new", "main")
    stranger.workers.mkdir()
    assert (0, "") == _outcome(run("restore", saved, "--to", tmp_path / "new", "--offline"))
    assert stranger.uuid != Volume.open(tmp_path / "new", "main").uuid


@pytest.mark.parametrize("name", ["00.h5", "07.h5.wal", "03.claim", "notes.txt"])
def test_a_directory_with_anything_in_it_is_refused(saved: Path, tmp_path: Path, name: str) -> None:
    """It may be what is left of the corpus, and is worth more than a backup."""
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / name).write_bytes(b"precious")
    refused(run("restore", saved, "--to", tmp_path / "new", "--offline"), rf"is not empty \({re.escape(name)}\)")
    assert b"precious" == (tmp_path / "new" / name).read_bytes()


def test_a_directory_at_which_a_persister_works_is_refused(saved: Path, tmp_path: Path) -> None:
    """Each process holds a lock of its own."""
    (tmp_path / "new" / "workers").mkdir(parents=True)
    with (tmp_path / "new" / "workers" / "abc.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(run("restore", saved, "--to", tmp_path / "new", "--offline"), "a persister runs in")


def test_a_persister_that_starts_during_a_restore_has_to_wait(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim lock is held from the first look to the last rename."""
    monkeypatch.setattr("services.persister.volume.LOCK_TIMEOUT_SECONDS", 0.0)
    from services.cli.backup.restore import reserved

    with reserved(tmp_path / "new"), pytest.raises(VolumeBusyError):
        Volume.open(tmp_path / "new", "main")


@pytest.mark.parametrize("name", ["00.h5", "01.h5.wal", "corpus.h5", "volume.json.saved"])
def test_a_changed_byte_in_any_file_is_found(saved: Path, tmp_path: Path, name: str) -> None:
    """Before anything is put in place: the target does not even come to be."""
    content = bytearray((saved / name).read_bytes())
    content[len(content) // 2] ^= 1
    (saved / name).write_bytes(content)
    refused(run("restore", saved, "--to", tmp_path / "new", "--offline"), f"{name} differs from the manifest")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda d: (d / "00.h5.wal").unlink(), r"lacks 00\.h5\.wal"),
        (lambda d: (d / "02.h5").write_bytes(b""), r"has 02\.h5, which its manifest does not list"),
        (lambda d: (d / "00.h5").write_bytes(bytes(5)), r"00\.h5 has \d+ bytes, the manifest says"),
        (lambda d: (d / "manifest.json").write_text("{"), "is damaged: it is not JSON"),
        (lambda d: (d / "manifest.json").write_text("{}"), "is not the manifest of a fiq backup"),
        (lambda d: edit(d, lambda m: m.update(format=2)), "has format 2"),
        (lambda d: edit(d, lambda m: m.pop("volume")), "is damaged"),
        (lambda d: edit(d, lambda m: m["files"][0].update(name="../x")), "a backup cannot hold a file"),
        (lambda d: edit(d, lambda m: m["files"].pop(1)), r"00\.h5\.wal is not listed"),
        (lambda d: edit(d, lambda m: m["contents"][0].update(committed=99)), "does not describe these files"),
        (lambda d: edit(d, lambda m: m["contents"].pop()), "does not describe these files"),
        (lambda d: edit(d, lambda m: m.update(stream_created="2026-01-01T00:00:00Z")), "of another volume or stream"),
    ],
)
def test_a_manifest_and_files_that_disagree_are_refused(
    saved: Path, tmp_path: Path, spoil: Callable[[Path], object], reason: str
) -> None:
    """Half of one backup and half of another are none."""
    spoil(saved)
    refused(run("restore", saved, "--to", tmp_path / "new", "--offline"), reason)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("number", [1, 2, 5])
def test_what_a_restore_killed_with_9_leaves_is_refused_by_every_command(
    saved: Path, tmp_path: Path, number: int
) -> None:
    """After any number of the moves: persisters miss the identity, and the next restore says what to do."""
    target = tmp_path / "new"
    move = "fiq.corpus.wal.storage.StorageIO.rename"
    assert -signal.SIGKILL == killed_in(move, "restore", saved, "--to", target, "--offline", after=number)
    assert number == len([name for name in names(target) if ".h5" in name])
    with pytest.raises(VolumeError, match=r"no volume\.json"):
        Volume.open(target, "main")
    refused(run("restore", saved, "--to", target, "--offline"), "was interrupted: remove everything in it")
    shutil.rmtree(target)
    assert (0, "") == _outcome(run("restore", saved, "--to", target, "--offline"))

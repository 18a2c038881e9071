"""A data directory and what makes it a volume."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from fiq.corpus.wal import storage
from services.persister.errors import VolumeBusyError, VolumeError
from services.persister.volume import Volume, check_durable


def test_a_new_directory_gets_an_identity_that_stays(tmp_path: Path) -> None:
    """Keys and partition files name the volume's UUID."""
    first = Volume.open(tmp_path / "data", "main")
    again = Volume.open(tmp_path / "data", "main")
    assert first == again
    assert {"format": 1, "volume": first.uuid, "store": "main"} == json.loads(
        (tmp_path / "data" / "volume.json").read_text()
    )


def test_another_stores_directory_is_refused(tmp_path: Path) -> None:
    """Two stores in one place would be no two copies."""
    Volume.open(tmp_path, "main")
    with pytest.raises(VolumeError, match="volume of store 'main', not 'second'"):
        Volume.open(tmp_path, "second")


def test_partition_files_without_an_identity_are_refused(tmp_path: Path) -> None:
    """A new UUID would orphan them: their keys name the old one."""
    (tmp_path / "03.h5").touch()
    with pytest.raises(VolumeError, match=r"no volume\.json"):
        Volume.open(tmp_path, "main")
    assert not (tmp_path / "volume.json").exists()


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": 1, "volume": "no", "store": "main"}'])
def test_a_damaged_identity_is_refused(tmp_path: Path, content: str) -> None:
    """It is never replaced."""
    (tmp_path / "volume.json").write_text(content)
    with pytest.raises(VolumeError, match="damaged"):
        Volume.open(tmp_path, "main")
    assert content == (tmp_path / "volume.json").read_text()


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    """An older fiq must not guess."""
    volume = Volume.open(tmp_path, "main")
    (tmp_path / "volume.json").write_text(json.dumps({"format": 2, "volume": volume.uuid, "store": "main"}))
    with pytest.raises(VolumeError, match="format 2"):
        Volume.open(tmp_path, "main")


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """The operator sees the path and the system's reason."""
    (tmp_path / "file").touch()
    with pytest.raises(VolumeError, match="cannot use the data directory"):
        Volume.open(tmp_path / "file" / "data", "main")


def test_a_volume_remembers_that_its_store_was_formed(tmp_path: Path) -> None:
    """A bucket that got lost must not look like a store that begins."""
    volume = Volume.open(tmp_path, "main")
    assert "" == volume.formed_in()
    volume.note_formed("2026-11-23T10:00:00Z")
    again = Volume.open(tmp_path, "main")
    assert (volume.uuid, "2026-11-23T10:00:00Z") == (again.uuid, again.formed_in())


def test_a_volume_whose_identity_went_is_told(tmp_path: Path) -> None:
    """It remembers nothing then, and must not claim."""
    volume = Volume.open(tmp_path, "main")
    (tmp_path / "volume.json").unlink()
    with pytest.raises(VolumeError, match="gone or damaged"):
        volume.formed_in()


async def test_only_one_process_claims_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quota is counted under the lock; a process that hangs with it is named instead of waited for."""
    monkeypatch.setattr("services.persister.volume.LOCK_TIMEOUT_SECONDS", 0.1)
    volume = Volume.open(tmp_path, "main")
    async with volume.claiming():
        with pytest.raises(VolumeBusyError, match="is it stopped or hanging"):
            async with volume.claiming():
                raise AssertionError("two at once")
    async with volume.claiming():
        pass


def test_open_leaves_no_descriptor_open(tmp_path: Path) -> None:
    """Volumes are opened at each start of each process."""
    Volume.open(tmp_path, "main")
    before = len(list(Path("/proc/self/fd").iterdir()))
    Volume.open(tmp_path, "main")
    assert before == len(list(Path("/proc/self/fd").iterdir()))


def test_room_is_what_the_file_system_says(tmp_path: Path) -> None:
    """As `df` shows it: what is left for this user, and all of it."""
    volume = Volume.open(tmp_path, "main")
    expected = shutil.disk_usage(tmp_path)
    free, size = volume.room()
    assert expected.total == size
    assert 0 < free <= size


@pytest.mark.parametrize(("kind", "name"), [(0x01021994, "tmpfs"), (0x858458F6, "ramfs"), (0x794C7630, "overlay")])
def test_a_file_system_that_loses_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: int, name: str
) -> None:
    """Before anything is created there; the message says what to do, in a container too."""
    monkeypatch.setattr(storage, "_file_system_type", lambda _: kind)
    with pytest.raises(VolumeError, match=f"is on {name}: .* Set FI_DATA_DIR .* FI_ALLOW_EPHEMERAL=1"):
        check_durable(tmp_path / "not" / "yet")
    assert [] == list(tmp_path.iterdir())


def test_a_file_system_on_a_disk_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ext4; the type of a relative path's nearest folder counts."""
    asked: list[Path] = []

    def ext4(path: Path) -> int:
        asked.append(path)
        return 0xEF53

    monkeypatch.setattr(storage, "_file_system_type", ext4)
    check_durable(tmp_path / "not" / "yet")
    monkeypatch.chdir(tmp_path)
    check_durable(Path("not/yet"))
    assert [tmp_path, tmp_path] == asked


@pytest.mark.parametrize(("source", "expected"), [("fuse-overlayfs", "overlay"), ("sshfs#host:", "")])
def test_the_overlay_of_a_rootless_container_is_one_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, expected: str
) -> None:
    """It is in user space, so the type alone does not say it; other file systems there pass."""
    mounts, device = tmp_path / "mountinfo", tmp_path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    mounts.write_text(f"1 0 0:1 / /other rw - tmpfs none rw\n2 0 {number} / / rw,relatime - fuse.x {source} rw\n")
    mounted_as = storage._mounted_as
    monkeypatch.setattr(storage, "_file_system_type", lambda _: 0x65735546)
    monkeypatch.setattr(storage, "_mounted_as", lambda device: mounted_as(device, mounts))
    assert expected == storage.ephemeral_file_system(tmp_path)

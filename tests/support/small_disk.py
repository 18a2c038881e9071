"""A file system of a few MiB, to be filled for real."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

#: what is tried: (name, commands that mount a disk of {size} MiB at {place})
KINDS = {
    "tmpfs": [["mount", "-t", "tmpfs", "-o", "size={size}m", "tmpfs", "{place}"]],
    "ext4": [
        ["truncate", "-s", "{size}M", "{place}.image"],
        ["mkfs.ext4", "-q", "-F", "-m", "0", "{place}.image"],
        ["mount", "-o", "loop", "{place}.image", "{place}"],
    ],
}
_BLOCK = 4096


@contextmanager
def small_disk(kind: str, place: Path, *, size: int) -> Iterator[Path]:
    """Mount a file system of *size* MiB at *place*; skip the test where that is impossible.

    On CI as root it must be possible: there the skip is a failure.
    """
    place.mkdir()
    for command in KINDS[kind]:
        words = [word.format(size=size, place=place) for word in command]
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            problem = done.stderr.strip() if done.returncode else ""
        except FileNotFoundError:
            problem = f"{words[0]} is not installed"
        if problem:
            _give_up(f"no {kind} can be mounted here: {problem}", required=kind == "tmpfs")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def fill(disk: Path) -> Path:
    """Fill *disk* to the last block; return the file that does."""
    ballast = disk / "ballast"
    fd = os.open(ballast, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        for size in (256 * _BLOCK, 16 * _BLOCK, _BLOCK):
            _write_until_full(fd, size)
    finally:
        os.close(fd)
    return ballast


def _write_until_full(fd: int, size: int) -> None:
    block = bytes(size)
    try:
        while True:
            os.write(fd, block)
            os.fsync(fd)  # ext4 may notice only then
    except OSError:
        return


def _give_up(reason: str, *, required: bool) -> None:
    if required and os.environ.get("CI") == "true" and os.geteuid() == 0:
        pytest.fail(reason)
    pytest.skip(reason)

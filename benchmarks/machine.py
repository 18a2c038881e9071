"""What a run was measured on. Says nothing that names the machine or its owner."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import h5py
import psutil

from benchmarks.results import middle
from services.cli.embedded.processes import find_nats_server

_SYNCS = 100


def describe(folder: Path) -> dict[str, str]:
    """Return what a reader needs to judge the figures; *folder* is on the disk that is used."""
    libraries = ("nats-py", "aiohttp", "uvloop", "h5py")
    return {
        "processor": f"{os.cpu_count()} cores of {_cpu_model()}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "disk": f"fdatasync of 4 KiB takes {_sync_ms(folder):.2f} ms (median)",
        "kernel": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "HDF5": h5py.version.hdf5_version,
        "nats-server": _nats_server_version(),
        **{library: version(library) for library in libraries},
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _nats_server_version() -> str:
    done = subprocess.run([find_nats_server(), "--version"], capture_output=True, text=True, check=True)
    return done.stdout.rpartition("v")[2].strip()


def _sync_ms(folder: Path) -> float:
    path = folder / "sync"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        times = []
        for number in range(_SYNCS):
            os.pwrite(descriptor, os.urandom(4096), 4096 * number)
            started = time.perf_counter()
            os.fdatasync(descriptor)
            times.append((time.perf_counter() - started) * 1000)
        return middle(times)
    finally:
        os.close(descriptor)
        path.unlink()

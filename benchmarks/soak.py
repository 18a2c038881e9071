"""Soak: the load of the product at work for minutes, and what each process holds meanwhile.

``python -m benchmarks.soak [--seconds 300] [--clients 20]``. A node remembers each message id for as long as the
duplicate window, so its memory rises until that is over; the window is one minute here instead of two.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.bench import CONSULTATIONS
from benchmarks.load import LoadJob, run
from benchmarks.memory import resident
from services.cli.embedded.stack import Stack
from tests.support.dialogues import DATA

#: seconds for which the broker remembers message ids
_WINDOW = 60
#: parts of the soak at whose ends memory is noted
_PARTS = 5


def main() -> None:
    """Run it, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="how long clients post")
    parser.add_argument("--clients", type=int, default=20, help="concurrent clients")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fiq-soak-") as folder:
        settings = {"FI_DUPLICATE_WINDOW": str(_WINDOW), "FI_RETENTION": str(_WINDOW), "FI_STREAM_MAX_BYTES": "2GiB"}
        stack = Stack(Path(folder), env=settings)
        stack.start()
        try:
            print("\n".join(_soak(stack, options.seconds, options.clients)))
        finally:
            stack.stop()


def _soak(stack: Stack, seconds: float, clients: int) -> list[str]:
    processes = {name: node.pid for name, node in zip(stack.cluster.names, stack.cluster.nodes, strict=True)}
    processes |= {service.name: service.process.pid for service in stack.services}
    held: dict[str, list[int]] = {name: [] for name in processes}
    began = time.monotonic()

    def look() -> None:
        for part in range(_PARTS + 1):
            time.sleep(max(0.0, began + seconds * part / _PARTS - time.monotonic()))
            for name, pid in processes.items():
                held[name].append(resident(pid or 0))

    watch = threading.Thread(target=look, daemon=True)
    watch.start()
    job = LoadJob(
        target=str(stack.ingest.port),
        clients=clients,
        seconds=seconds - 2,
        warm_up=1.0,
        limit=10**8,
        folder=str(DATA),
        consultations=CONSULTATIONS,
        name="soak",
        pause=0.0,
    )
    report = run("http", job, seconds=seconds)
    watch.join()
    heads = [f"after {seconds * part / _PARTS:.0f} s" for part in range(_PARTS + 1)]
    rows = [f"| {name} | " + " | ".join(f"{size / 1e6:.0f}" for size in sizes) + " |" for name, sizes in held.items()]
    refusals = "".join(f", {count:,} answered {refusal}" for refusal, count in report.refusals.items())
    return [
        (
            f"{report.accepted:,} events accepted, {report.rate:,.0f} a second, {report.failures} failures{refusals}; "
            "resident MB:"
        ),
        "",
        f"| process | {' | '.join(heads)} |",
        f"| --- |{' ---: |' * len(heads)}",
        *rows,
    ]


if __name__ == "__main__":
    main()

"""Run the persister: ``python -m services.persister [--workers N]``, one process or a supervisor of several workers.

``--workers N`` starts N persister processes under one parent, each with its own partitions of the same volume. The
parent imports neither HDF5 nor the log: it stays small.
"""

from __future__ import annotations

import gc
import os
import signal

if __name__ == "__main__":
    # before the imports, which take half a second: a stop waits until the service can take it (core.lifecycle)
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    gc.disable()  # what imports make stays: searching it for garbage takes a fifth of their time
    # numpy's linear algebra, which nobody here calls, would start a thread for each core
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import asyncio
import contextlib
import ctypes
import sys
from collections.abc import Mapping

import uvloop

from fiq.errors import ConfigurationError, FiqError
from services.core import logs
from services.core.command import EXIT_USAGE, load_or_exit, memory_limit, parser, report_error, warn_of_unknown
from services.core.lifecycle import Stop, stop_on_signals
from services.persister.settings import PersisterSettings, bounds, fit_memory, needed_bytes

PROGRAM = "fiq-persister"
#: a larger number of processes on one volume is a mistake
MAX_WORKERS = 64
#: the last TCP port; worker i takes FI_PERSISTER_PORT + i
MAX_PORT = 65535
#: pauses before a worker that ended is started again, seconds; the last one repeats
RESTART_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
#: after a worker has run this long the pauses begin with the first again, seconds
STABLE_SECONDS = 60.0

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str] | None = None) -> int:
    """Persist until a signal comes, and return the exit code."""
    options = _parser().parse_args(arguments)
    settings = load_or_exit(PROGRAM, PersisterSettings, os.environ)
    if settings.port + options.workers - 1 > MAX_PORT:
        problem = f"FI_PERSISTER_PORT={settings.port}: no {options.workers} ports"
        return report_error(PROGRAM, ConfigurationError([problem]))
    logs.configure("persister", level=settings.log_level)
    if options.worker_of is None:
        warn_of_unknown(logs.get_logger("persister"), os.environ)
    try:
        return uvloop.run(_run(_bounded(settings, options.workers), options))
    except FiqError as error:
        return report_error(PROGRAM, error)


def _parser() -> argparse.ArgumentParser:
    result = parser(PROGRAM, "Follows the log and writes its events into HDF5.", PersisterSettings)
    result.add_argument(
        "--workers",
        type=_workers,
        default=1,
        metavar="N",
        help="processes that share the volume's partitions; one a core is a good number (default: 1)",
    )
    result.add_argument("--worker-of", type=int, help=argparse.SUPPRESS)
    return result


def _workers(value: str) -> int:
    if not value.isdigit() or not 1 <= int(value) <= MAX_WORKERS:
        raise argparse.ArgumentTypeError(f"a whole number from 1 to {MAX_WORKERS}")
    return int(value)


def _bounded(settings: PersisterSettings, workers: int) -> PersisterSettings:
    """Return *settings* with bounds that fit *workers* processes into the container's memory."""
    limit = memory_limit()
    bounded = fit_memory(settings, None if limit is None else limit // workers)
    if bounded != settings:
        log = logs.get_logger("persister")
        log.warning("MEMORY_BOUNDED", limit=limit, workers=workers, needed=needed_bytes(settings), **bounds(bounded))
    return bounded


async def _run(settings: PersisterSettings, options: argparse.Namespace) -> int:
    stop = Stop()
    stop_on_signals(stop)
    if options.workers > 1:
        gc.enable()
        await Supervisor(options.workers, port=settings.port, env=os.environ | bounds(settings), stop=stop).run()
    else:
        # not at the top: these imports take a while, and from here on a signal stops the process in an orderly way
        from services.core.tracing import open_spans
        from services.persister.service import serve

        gc.enable()
        if options.worker_of is not None:
            _stop_with_parent(options.worker_of)
        with open_spans(PROGRAM, os.environ) as spans:
            await serve(settings, stop, spans=spans)
    return stop.exit_code


class Supervisor:
    """Starts the workers, restarts those that end, and stops all of them.

    Args:
        workers: how many.
        port: of the first worker's management endpoints; worker i gets port + i, and 0 gives each a free one.
        env: environment of the workers.
        stop: ends all of them.
    """

    def __init__(self, workers: int, *, port: int, env: Mapping[str, str], stop: Stop) -> None:
        self._workers = workers
        self._port = port
        self._env = dict(env)
        self._stop = stop
        self._log = logs.get_logger("supervisor")

    async def run(self) -> None:
        """Run the workers until a stop is requested, then wait until each has finished its batch."""
        async with asyncio.TaskGroup() as group:
            for index in range(self._workers):
                group.create_task(self._keep(index))

    async def _keep(self, index: int) -> None:
        attempt = 0
        loop = asyncio.get_running_loop()
        while not self._stop.requested:
            started = loop.time()
            try:
                process = await self._start(index)
            except OSError as error:  # out of memory or processes
                exit_code: int | None = error.errno
            else:
                exit_code = await self._wait(process)
            if exit_code is None:
                return
            if exit_code == EXIT_USAGE:
                self._stop.request("the settings are wrong", failed=True)
                return
            attempt = 0 if loop.time() - started > STABLE_SECONDS else attempt
            pause = RESTART_SECONDS[min(attempt, len(RESTART_SECONDS) - 1)]
            attempt += 1
            self._log.error("WORKER_ENDED", worker=index, exit_code=exit_code, restart_in_s=pause)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stop.wait()

    async def _start(self, index: int) -> asyncio.subprocess.Process:
        port = self._port + index if self._port else 0
        # a session of its own: Ctrl-C must reach the parent only, or the workers would get two signals
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.persister", "--worker-of", str(os.getpid())),
            env=self._env | {"FI_PERSISTER_PORT": str(port)},
            start_new_session=True,
        )

    async def _wait(self, process: asyncio.subprocess.Process) -> int | None:
        """Return the exit code of *process*; None if a stop was requested, which is passed on to it."""
        end = asyncio.create_task(process.wait())
        asked = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({end, asked}, return_when=asyncio.FIRST_COMPLETED)
            if not end.done():
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
            code = await end
            return None if asked.done() else code
        finally:
            asked.cancel()


def _stop_with_parent(parent: int) -> None:
    """Ask the kernel for SIGTERM when *parent* dies, so that a killed supervisor leaves no workers running (Linux)."""
    if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())

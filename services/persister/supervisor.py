"""``--workers N``: N persister processes under one parent, each with its own partitions of the same volume."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Mapping

from services.core.command import EXIT_USAGE
from services.core.lifecycle import Stop
from services.core.logs import get_logger

#: pauses before a worker that ended is started again, seconds; the last one repeats
RESTART_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
#: a worker that lived for this long starts the row of pauses anew, seconds
STABLE_SECONDS = 60.0

_PR_SET_PDEATHSIG = 1


class Supervisor:
    """Starts the workers, starts them again when they end, stops them in order.

    Args:
        workers: how many.
        port: of the first worker's management endpoints; worker i gets port + i, and 0 gives each a free one.
        env: the environment that they get.
        stop: ends it all.
    """

    def __init__(self, workers: int, *, port: int, env: Mapping[str, str], stop: Stop) -> None:
        self._workers = workers
        self._port = port
        self._env = dict(env)
        self._stop = stop
        self._log = get_logger("supervisor")

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
            except OSError as error:  # no memory or no process to be had just now
                exit_code: int | None = error.errno
            else:
                exit_code = await self._ended(process)
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
            sys.executable,
            "-m",
            "services.persister",
            "--worker-of",
            str(os.getpid()),
            env=self._env | {"FI_PERSISTER_PORT": str(port)},
            start_new_session=True,
        )

    async def _ended(self, process: asyncio.subprocess.Process) -> int | None:
        """Wait for the end of *process* and return its exit code; pass a stop on to it, and return None then."""
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


def stop_with_parent(parent: int) -> None:
    """Ask the kernel for SIGTERM when *parent* dies, so that a killed supervisor leaves no workers behind (Linux)."""
    if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)

"""A service of the product as a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from tests.support.polling import eventually_sync

#: a service that does not end by itself in this time is killed, seconds
END_TIMEOUT = 20.0


class Service:
    """``python -m MODULE``, with the settings given and none of the machine's; a context manager that kills it."""

    def __init__(self, folder: Path, module: str, *arguments: str, **settings: str) -> None:
        self.log_path = folder / f"{module.rpartition('.')[2]}.log"
        self.error_path = self.log_path.with_suffix(".err")
        env = {name: value for name, value in os.environ.items() if not name.startswith(("FI_", "OTEL_"))}
        # another process of the machine may have ingest's usual port; folders of tests may be in memory
        env |= {"FI_MANAGEMENT_PORT": "0", "FI_ALLOW_EPHEMERAL": "1"} | settings
        with self.log_path.open("wb") as out, self.error_path.open("wb") as err:
            command = [sys.executable, "-m", module, *arguments]
            self.process = subprocess.Popen(command, env=env, stdout=out, stderr=err)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Whole lines of the log so far."""
        text = self.log_path.read_bytes()
        return [orjson.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]

    @property
    def errors(self) -> str:
        """What it wrote to stderr."""
        return self.error_path.read_text()

    def wait_for(self, event: str) -> dict[str, Any]:
        """Wait for a line with this event name, and return the first one."""

        def find() -> dict[str, Any] | None:
            found = next((line for line in self.lines if line["event"] == event), None)
            if found is None and self.process.poll() is not None:
                raise RuntimeError(f"ended with {self.process.returncode} before {event}: {self.errors}")
            return found

        found = eventually_sync(find)
        assert found is not None
        return found

    def terminate(self) -> None:
        """Ask it to stop."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Wait for its end and return the exit code.

        Raises:
            AssertionError: it did not end; with the last lines of its log.
        """
        try:
            return self.process.wait(END_TIMEOUT)
        except subprocess.TimeoutExpired:
            last = "\n".join(str(line) for line in self.lines[-20:])
            raise AssertionError(f"did not end within {END_TIMEOUT:g} s; its last lines:\n{last}") from None

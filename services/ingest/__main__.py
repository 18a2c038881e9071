"""Run the HTTP edge: ``python -m services.ingest``."""

from __future__ import annotations

import sys

from services.core import signals


def main(arguments: list[str] | None = None) -> int:
    """Serve until a signal comes, and return the exit code."""
    from services.ingest import command  # not above: a signal must find the process holding it

    return command.main(arguments)


if __name__ == "__main__":
    signals.hold()
    sys.exit(main())

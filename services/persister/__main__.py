"""Run the persister: ``python -m services.persister [--workers N]``."""

from __future__ import annotations

import sys

from services.core import signals


def main(arguments: list[str] | None = None) -> int:
    """Persist until a signal comes, and return the exit code."""
    from services.persister import command  # not above: a signal must find the process holding it

    return command.main(arguments)


if __name__ == "__main__":
    signals.hold()
    sys.exit(main())

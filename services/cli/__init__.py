"""The ``fiq`` command, and the embedded cluster and stack that it and the tests run."""

import sys


def command() -> None:
    """Run the ``fiq`` command; without its requirements, say what to install."""
    try:
        from services.cli.main import main

        main()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("fiq", "services"):
            raise
        sys.exit(f"fiq: {error.name} is not installed: run  pip install 'fiq[services]'")

"""Run the HTTP edge: ``python -m services.ingest``."""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":
    # before the imports, which take most of a second: a stop waits until the service can take it (core.lifecycle)
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    from services.ingest.service import main

    sys.exit(main())

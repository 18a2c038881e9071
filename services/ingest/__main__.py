"""Run the HTTP edge: ``python -m services.ingest``."""

from __future__ import annotations

import gc
import signal
import sys

if __name__ == "__main__":
    # before the imports, which take half a second: a stop waits until the service can take it (core.lifecycle)
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    gc.disable()  # what imports make stays: searching it for garbage takes a fifth of their time
    from services.ingest.service import main

    gc.enable()
    sys.exit(main())

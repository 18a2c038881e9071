"""The embedded cluster of a checkout, run with that checkout's Python: ``python nodes.py FOLDER MAX_FILE_STORE``.

It needs nothing of the benchmarks, so that the nodes have the configuration of the product that is measured. It prints
one line of JSON when the nodes are ready, and stops them on SIGTERM.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from services.cli.embedded.processes import Cluster


def main(folder: str, max_file_store: str) -> None:
    """Run the nodes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with Cluster(Path(folder), max_file_store=max_file_store) as cluster:
        print(json.dumps({"urls": cluster.urls, "pids": [node.pid for node in cluster.nodes]}), flush=True)
        while True:
            signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The ``fiq`` command, and the embedded cluster and stack that it and the tests run."""

"""The embedded cluster and the pipeline on it: what ``fiq up`` and ``fiq demo`` run on one machine."""

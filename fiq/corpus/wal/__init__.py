"""Files whose commits are atomic: pages, journal, checkpoints, recovery. Knows bytes, not events."""

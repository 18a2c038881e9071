"""fiq: the Free Intelligence event pipeline."""

"""Backups of a live corpus, and what is done after a volume or its placement was lost."""

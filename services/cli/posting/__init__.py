"""Posting a file of events, for `fiq post`: its lines, who sends them, and how far it came."""

"""What both sides of the log agree on: the event, its ids, errors, settings, logging, lifecycle."""

"""The HTTP edge: takes events, appends them to the log, answers when they are stored, and reads them back."""

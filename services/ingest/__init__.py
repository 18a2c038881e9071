"""The HTTP edge: takes events, appends them to the log, and answers when they are safe."""

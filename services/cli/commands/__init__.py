"""The commands of ``fiq``, one module each."""

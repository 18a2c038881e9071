"""The persister: follows partitions of the log and writes them into HDF5, exactly once and in order."""

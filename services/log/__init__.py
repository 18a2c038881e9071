"""The durable log between ingest and the persisters: the protocol here, its first implementation in ``jetstream``."""

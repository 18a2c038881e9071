"""The log on NATS JetStream: names, connection, definitions, provisioning, publisher, follower, placement, report."""

"""The secrets of a deployment: its authority, the nodes' certificates, the users' nkeys, and what nats-server reads."""

"""The bus: the connection to NATS, the streams, the pull loop, settlement and publishing.

`consumer.jobs` uses this package through the Protocols in `consumer.ports` only. This module
imports nothing, because a command that only sends a request needs the connection alone.
"""

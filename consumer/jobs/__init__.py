"""One delivery through its stages, from its bytes to its settlement.

This package uses NATS, S3 and the model through the Protocols of `consumer.ports` only.
"""

"""One delivery through its stages, from its bytes to its settlement.

Nothing here knows NATS, S3 or a model: only the Protocols of `consumer.ports`.
"""

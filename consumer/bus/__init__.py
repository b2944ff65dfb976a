"""The bus: the connection to NATS, the streams, the pull loop, settling and publishing.

Only this package imports nats. What the life of a job needs of it is in `consumer.ports`. Nothing
is imported here: a command that only sends needs the connection alone.
"""

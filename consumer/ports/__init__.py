"""Ports: Protocols and plain values for the services that a job uses, one module per service.

`consumer.jobs` uses the bus, the object store, the image codec and the model only through these
Protocols. Tests can therefore drive a job to every outcome with in-memory implementations, and the
code that decides about outcomes does not depend on a client library.
"""

"""Ports: what a job needs from the outside, as Protocols and plain values, by the service behind.

`execution` knows the bus, the store, the image codec and the model only through these. So a job can
be driven through every outcome with in-memory ports, and none of the libraries behind them reaches
the part that decides.
"""

"""The bus: the connection to NATS, the streams, the pull loop, settling and publishing.

Only this package imports nats. What the life of a job needs of it is in `consumer.ports`.
"""

from consumer.bus.connection import Bus, BusUnavailable, connect
from consumer.bus.publishing import JetStreamEvents
from consumer.bus.pull import PullLoop
from consumer.bus.requesting import QueueFull, Requester
from consumer.bus.topology import Durable, Topology, TopologyError

__all__ = [
    "Bus",
    "BusUnavailable",
    "Durable",
    "JetStreamEvents",
    "PullLoop",
    "QueueFull",
    "Requester",
    "Topology",
    "TopologyError",
    "connect",
]

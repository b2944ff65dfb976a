"""The bus: the connection to NATS, the streams, the pull loop, settling and publishing.

Only this package imports nats. What the life of a job needs of it is in `consumer.ports`.
"""

from consumer.bus.connection import Bus, BusUnavailable, connect
from consumer.bus.dead_letters import DeadLetters, NoSuchLetter, StoredLetter
from consumer.bus.delivery import Custody, JetStreamDelivery
from consumer.bus.front_door import Backend, FrontDoor
from consumer.bus.notes import Notes
from consumer.bus.publishing import JetStreamEvents
from consumer.bus.pull import PullLoop
from consumer.bus.queue import BroadcastWorkers, JetStreamQueue
from consumer.bus.replaying import NotReplayed, Replay, Replayer
from consumer.bus.standby import Standby
from consumer.bus.stranded import find_stranded
from consumer.bus.topology import Durable, Topology, TopologyError

__all__ = [
    "Backend",
    "BroadcastWorkers",
    "Bus",
    "BusUnavailable",
    "Custody",
    "DeadLetters",
    "Durable",
    "FrontDoor",
    "JetStreamDelivery",
    "JetStreamEvents",
    "JetStreamQueue",
    "NoSuchLetter",
    "NotReplayed",
    "Notes",
    "PullLoop",
    "Replay",
    "Replayer",
    "Standby",
    "StoredLetter",
    "Topology",
    "TopologyError",
    "connect",
    "find_stranded",
]

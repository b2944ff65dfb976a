"""The development stack: real servers as child processes on loopback, without Docker.

`consumer up`, `consumer demo` and the tests run nats-server and an S3 server from wheels (the extra
`devstack`), with `consumer run` daemons and a `consumer gateway`. All servers listen on 127.0.0.1
only, the S3 server requires credentials, and no child outlives the process that started it. The
stack is for development: its internal gRPC ports trust every local user.
"""

from consumer.devstack.daemon import Daemon
from consumer.devstack.errors import (
    ChildEndedError,
    DevStackError,
    DirectoryInUseError,
    NoSpaceError,
    PortTakenError,
    ServerMissingError,
    StartFailedError,
)
from consumer.devstack.gateway import GatewayServer
from consumer.devstack.loopback import free_ports
from consumer.devstack.nats_server import NatsServer
from consumer.devstack.object_store import ObjectStore
from consumer.devstack.process import ChildProcess
from consumer.devstack.stack import DevStack

__all__ = [
    "ChildEndedError",
    "ChildProcess",
    "Daemon",
    "DevStack",
    "DevStackError",
    "DirectoryInUseError",
    "GatewayServer",
    "NatsServer",
    "NoSpaceError",
    "ObjectStore",
    "PortTakenError",
    "ServerMissingError",
    "StartFailedError",
    "free_ports",
]

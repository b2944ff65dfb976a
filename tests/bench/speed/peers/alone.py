"""No queue and no server: `python -m tests.bench.speed.peers.alone device|serial SOCKET`.

`device` is the physical limit: the stand-in in a loop. `serial` is the loop of a script: device,
encode, upload. The number of jobs arrives through a socket, one number a line, so that these
systems are started, warmed up and measured like the others.
"""

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

from tests.bench.speed.peers.job import PeerJob, say_ready
from tests.bench.speed.rows import Row
from tests.bench.speed.stand_in import NOTES, StandIn


def serve(work: Callable[[], object], address: str) -> None:
    """Run the requested number of jobs until the client disconnects."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        say_ready()
        connection, _ = listening.accept()
    with connection, connection.makefile("rw") as commands:
        for line in commands:
            for _ in range(int(line)):
                work()
            commands.write("done\n")
            commands.flush()


def main() -> None:
    kind, address = sys.argv[1:]
    if kind == "device":
        device = StandIn(Row.from_environment(os.environ), Path(os.environ[NOTES]))
        serve(device.run, address)
    else:
        job = PeerJob()
        serve(lambda: job(uuid4().hex), address)


if __name__ == "__main__":
    main()

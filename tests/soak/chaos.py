"""Faults of a soak: processes are killed at random and restarted."""

import asyncio
import os
import random
import signal
import time
from dataclasses import dataclass
from enum import StrEnum

from consumer.devstack import Daemon, NatsServer, ObjectStore

POLL_INTERVAL = 0.05  # seconds between two checks of a worker's process
DOWNTIME = (0.2, 3.0)  # seconds until a server is restarted


class Kind(StrEnum):
    """A kind of fault: the signal and the process."""

    KILL_WORKER = "kill -9 worker"
    TERM_WORKER = "SIGTERM worker"
    KILL_NATS = "kill -9 nats-server"
    TERM_NATS = "SIGTERM nats-server"
    KILL_STORE = "kill -9 store"


PER_MINUTE: dict[Kind, float] = {
    Kind.KILL_WORKER: 6,
    Kind.TERM_WORKER: 2,
    Kind.KILL_NATS: 3,
    Kind.TERM_NATS: 1,
    Kind.KILL_STORE: 2,
}
AT_LEAST = 2  # faults of each kind, also in a short soak


@dataclass(frozen=True)
class Fault:
    """One injected fault.

    Attributes:
        at: `time.time()` of the signal.
        recovered_at: `time.time()` when the server was ready again; for a worker, `at`.
    """

    kind: Kind
    at: float
    recovered_at: float


@dataclass(frozen=True, order=True)
class _PlannedFault:
    offset: float  # seconds after the start of the soak
    kind: Kind
    downtime: float  # seconds; for servers
    worker: int


class Supervised:
    """A worker process that is restarted whenever it exits, as a supervisor does.

    Attributes:
        exit_codes: Exit codes of its processes, in order.
        pids: Process ids of its processes, in order. Each process leads a new session.
    """

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.exit_codes: list[int] = []
        self.pids = [daemon.pid]

    async def run(self) -> None:
        """Restart the worker whenever it exits, until cancelled."""
        while True:
            await asyncio.sleep(POLL_INTERVAL)
            if (code := self.daemon.returncode) is not None:
                self.exit_codes.append(code)
                self.daemon.start()  # takes milliseconds without a signal in between
                self.pids.append(self.daemon.pid)

    def send_signal(self, number: signal.Signals) -> bool:
        """Send a signal to the process, not to its children; return False if it has exited."""
        if self.daemon.alive:
            os.kill(self.daemon.pid, number)
            return True
        return False


class Chaos:
    """Draws faults and injects them.

    Args:
        nats: Killed and restarted. The faults of one process follow one another.
        store: Killed and restarted.
        workers: Killed; their supervisors restart them.
        seed: Determines the times and the processes.
        seconds: Duration over which the faults are spread.

    Attributes:
        faults: The injected faults.
    """

    def __init__(
        self,
        nats: NatsServer,
        store: ObjectStore,
        workers: list[Supervised],
        *,
        seed: int,
        seconds: float,
    ) -> None:
        self._nats = nats
        self._store = store
        self._workers = workers
        self._draw = random.Random(f"{seed} chaos")
        self._seconds = seconds
        self.faults: list[Fault] = []

    async def run(self) -> None:
        """Inject all faults; every server is ready when this returns."""
        drawn = sorted(fault for kind in Kind for fault in self._draw_faults(kind))
        await asyncio.gather(
            *(
                self._inject([fault for fault in drawn if process in fault.kind])
                for process in ("worker", "nats-server", "store")
            )
        )

    def _draw_faults(self, kind: Kind) -> list[_PlannedFault]:
        count = max(AT_LEAST, round(PER_MINUTE[kind] * self._seconds / 60))
        return [
            _PlannedFault(
                offset=self._draw.uniform(0.0, self._seconds),
                kind=kind,
                downtime=self._draw.uniform(*DOWNTIME),
                worker=self._draw.randrange(len(self._workers)),
            )
            for _ in range(count)
        ]

    async def _inject(self, faults: list[_PlannedFault]) -> None:
        began = time.monotonic()
        for fault in faults:
            await asyncio.sleep(max(0.0, began + fault.offset - time.monotonic()))
            at = recovered_at = time.time()
            match fault.kind:
                case Kind.KILL_WORKER:
                    await self._signal_worker(fault.worker, signal.SIGKILL)
                case Kind.TERM_WORKER:
                    await self._signal_worker(fault.worker, signal.SIGTERM)
                case Kind.KILL_NATS | Kind.TERM_NATS:
                    kill = fault.kind is Kind.KILL_NATS
                    recovered_at = await self._restart(self._nats, fault.downtime, kill=kill)
                case Kind.KILL_STORE:
                    recovered_at = await self._restart(self._store, fault.downtime, kill=True)
            self.faults.append(Fault(fault.kind, at, recovered_at))

    async def _signal_worker(self, worker: int, number: signal.Signals) -> None:
        while not self._workers[worker].send_signal(number):  # noqa: ASYNC110 - until its restart
            await asyncio.sleep(POLL_INTERVAL)

    async def _restart(
        self, server: NatsServer | ObjectStore, downtime: float, *, kill: bool
    ) -> float:
        await asyncio.to_thread(server.kill if kill else server.stop)
        await asyncio.sleep(downtime)
        await asyncio.to_thread(server.start)
        await asyncio.to_thread(server.wait_ready)
        return time.time()

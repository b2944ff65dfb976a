"""What happens to the processes of a soak: killed at random, each started again."""

import asyncio
import os
import random
import signal
import time
from dataclasses import dataclass
from enum import StrEnum

from consumer.devstack import Daemon, NatsServer, ObjectStore

LOOK_EVERY = 0.05  # seconds; how soon a supervisor sees that its worker has ended
AWAY = (0.2, 3.0)  # seconds until a server is started again


class Kind(StrEnum):
    """What is done, and to whom."""

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
AT_LEAST = 2  # of each kind, however short the soak


@dataclass(frozen=True)
class Blow:
    """One thing that was done.

    Attributes:
        at: `time.time()` when the process was hit.
        back: `time.time()` when a server was ready again; for a worker, when it was hit.
    """

    kind: Kind
    at: float
    back: float


@dataclass(frozen=True, order=True)
class _Drawn:
    moment: float  # seconds after the beginning
    kind: Kind
    away: float  # seconds; of a server
    worker: int


class Supervised:
    """A worker that is started again whenever it ends, as a supervisor does.

    Attributes:
        ends: Its exit codes, in order.
        pids: Of all its processes, in order. Each leads a session of its own.
    """

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.ends: list[int] = []
        self.pids = [daemon.pid]

    async def run(self) -> None:
        """Keep it running until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY)
            if (code := self.daemon.returncode) is not None:
                self.ends.append(code)
                self.daemon.start()  # takes milliseconds; nobody can signal it meanwhile
                self.pids.append(self.daemon.pid)

    def hit(self, number: signal.Signals) -> bool:
        """Send a signal to the process alone, not to what it has started; whether there is one."""
        if self.daemon.alive:
            os.kill(self.daemon.pid, number)
            return True
        return False


class Chaos:
    """Draws blows and deals them.

    Args:
        nats: What is killed and started again; all blows to one process come one after another.
        store: The same.
        workers: What is killed; their supervisors start them again.
        seed: Decides the moments and the victims.
        seconds: Over which they are spread.

    Attributes:
        blows: Those that have been dealt.
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
        self.blows: list[Blow] = []

    async def run(self) -> None:
        """Deal all blows; every server is ready again afterwards."""
        drawn = sorted(blow for kind in Kind for blow in self._draw_blows(kind))
        await asyncio.gather(
            *(
                self._deal([blow for blow in drawn if victim in blow.kind])
                for victim in ("worker", "nats-server", "store")
            )
        )

    def _draw_blows(self, kind: Kind) -> list[_Drawn]:
        count = max(AT_LEAST, round(PER_MINUTE[kind] * self._seconds / 60))
        return [
            _Drawn(
                moment=self._draw.uniform(0.0, self._seconds),
                kind=kind,
                away=self._draw.uniform(*AWAY),
                worker=self._draw.randrange(len(self._workers)),
            )
            for _ in range(count)
        ]

    async def _deal(self, blows: list[_Drawn]) -> None:
        began = time.monotonic()
        for blow in blows:
            await asyncio.sleep(max(0.0, began + blow.moment - time.monotonic()))
            at = back = time.time()
            match blow.kind:
                case Kind.KILL_WORKER:
                    await self._hit(blow.worker, signal.SIGKILL)
                case Kind.TERM_WORKER:
                    await self._hit(blow.worker, signal.SIGTERM)
                case Kind.KILL_NATS | Kind.TERM_NATS:
                    kill = blow.kind is Kind.KILL_NATS
                    back = await self._restart(self._nats, blow.away, kill=kill)
                case Kind.KILL_STORE:
                    back = await self._restart(self._store, blow.away, kill=True)
            self.blows.append(Blow(blow.kind, at, back))

    async def _hit(self, worker: int, number: signal.Signals) -> None:
        while not self._workers[worker].hit(number):  # noqa: ASYNC110 - its supervisor is at it
            await asyncio.sleep(LOOK_EVERY)

    async def _restart(self, server: NatsServer | ObjectStore, away: float, *, kill: bool) -> float:
        await asyncio.to_thread(server.kill if kill else server.stop)
        await asyncio.sleep(away)
        await asyncio.to_thread(server.start)
        await asyncio.to_thread(server.wait_ready)
        return time.time()

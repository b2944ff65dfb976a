"""The standby itself: `python -m consumer.bus.standby_process`, started by `consumer.bus.standby`.

It reads what the worker says of its leases, renews those about which the worker has gone silent,
and kills the worker after too long a silence. It ends when its input does.
"""

import asyncio
import os
import signal
import sys
import time
from dataclasses import dataclass

import structlog
from nats.errors import Error
from pydantic_core import from_json

from consumer.bus.connection import Bus, BusUnavailable, connect
from consumer.bus.standby import Charge
from consumer.settings import Settings
from consumer.telemetry import configure_logging

log = structlog.get_logger()

TICKS_PER_ACK_WAIT = 20
BEATS_PER_ACK_WAIT = 5  # as the worker's own
SILENCE_BEATS = 1.5  # intervals without a word after which the worker is stood in for
TICK_MOST = 1.0  # seconds
LOOK_EVERY = 5.0  # seconds between two looks for the worker while it holds no lease
CONNECT_WITHIN = 30.0  # seconds for one try
LAST_WORDS = 1.0  # seconds for the worker to write down where its threads are


@dataclass
class Lease:
    """One lease of the worker's.

    Attributes:
        ack_wait: Seconds that it lasts.
        silence: Seconds since the worker's last word about it, counted while this process ran.
        unrenewed: Seconds since anyone's last renewal.
    """

    ack_wait: float
    silence: float = 0.0
    unrenewed: float = 0.0

    @property
    def interval(self) -> float:
        """Seconds between two renewals."""
        return self.ack_wait / BEATS_PER_ACK_WAIT


class StandbyProcess:
    """Watches over the leases of one worker.

    Args:
        charge: What the worker has said first.
        words: The worker's lines.
    """

    def __init__(self, charge: Charge, words: asyncio.StreamReader) -> None:
        self._charge = charge
        self._words = words
        self._leases: dict[str, Lease] = {}
        self._held = asyncio.Event()  # set while there is a lease
        self._bus: Bus | None = None

    async def run(self) -> None:
        """Go on until the worker's end."""
        listening = asyncio.create_task(self._listen(), name="listen")
        others = [
            asyncio.create_task(self._connect(), name="connect"),
            asyncio.create_task(self._watch(), name="watch"),
        ]
        try:
            ended, _ = await asyncio.wait([listening, *others], return_when=asyncio.FIRST_COMPLETED)
            for one in ended:
                one.result()  # not foreseen: the worker starts another standby
        finally:
            for one in (listening, *others):
                one.cancel()
            await asyncio.gather(listening, *others, return_exceptions=True)
            if self._bus is not None:
                await self._bus.close()

    async def _listen(self) -> None:
        while line := await self._words.readline():
            word = from_json(line)
            if "over" in word:
                self._leases.pop(word["over"], None)
            else:
                self._leases[word["renewed"]] = Lease(word["ack_wait"])
            if self._leases:
                self._held.set()
            else:
                self._held.clear()

    async def _connect(self) -> None:
        settings = Settings(**self._charge.nats)
        while True:
            try:
                bus = await connect(
                    settings,
                    name=f"generation standby {self._charge.parent}",
                    within=CONNECT_WITHIN,
                )
            except BusUnavailable as error:
                log.warning("standby_not_connected", reason=str(error))
                continue
            self._bus = bus
            log.info("standby_connected")
            await bus.closed.wait()
            self._bus = None

    async def _watch(self) -> None:
        # The parent is looked for too: a process that it has forked may keep the input open.
        while os.getppid() == self._charge.parent:
            # One that is over at once may be gone by the time at which this is told of it.
            if not await self._lease_within(LOOK_EVERY) or not self._leases:
                continue
            shortest = min(lease.ack_wait for lease in self._leases.values())
            tick = min(TICK_MOST, shortest / TICKS_PER_ACK_WAIT)
            before = time.monotonic()
            await asyncio.sleep(tick)
            # A frozen or suspended process has not waited: the worker was frozen along with it.
            passed = min(time.monotonic() - before, 2 * tick)
            for subject, lease in list(self._leases.items()):
                lease.silence += passed
                lease.unrenewed += passed
                await self._look_after(subject, lease)

    async def _lease_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._held.wait()
        except TimeoutError:
            return False
        return True

    async def _look_after(self, subject: str, lease: Lease) -> None:
        if lease.silence > self._charge.patience + lease.interval:
            await self._end_worker()
        elif lease.silence > SILENCE_BEATS * lease.interval and lease.unrenewed > lease.interval:
            lease.unrenewed = 0.0
            if self._bus is None or not self._bus.connected:
                return
            try:
                await self._bus.client.publish(subject, b"+WPI")
            except (Error, OSError) as error:
                log.warning("heartbeat_failed", error=type(error).__name__)

    async def _end_worker(self) -> None:
        log.error("worker_hangs", silence=self._charge.patience)
        for number in (signal.SIGUSR1, signal.SIGKILL):
            if os.getppid() == self._charge.parent:
                os.kill(self._charge.parent, number)
                await asyncio.sleep(LAST_WORDS)


async def main() -> None:
    """Read the charge, then do it."""
    words = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(words), sys.stdin
    )
    line = await words.readline()
    if not line:
        return
    charge = Charge(**from_json(line))
    configure_logging(charge.log_format, charge.log_level)  # type: ignore[arg-type] # the worker's
    await StandbyProcess(charge, words).run()
    # At once: a reconnect under way in nats-py can swallow its cancellation and keep the loop, and
    # with it a process whose worker is gone.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    # They are for the worker: it drains, and needs its leases until it is done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    asyncio.run(main())

"""The lease on a delivery: as long as it is held, no other worker gets the request."""

import asyncio
from types import TracebackType
from typing import Self

import structlog

from consumer.ports.bus import Renewable
from consumer.tasks import cancel_and_wait

log = structlog.get_logger()

# Ratio of ack_wait to the interval: three beats may be lost, to a server's restart or a GIL held
# by the model, and the fourth still comes in time.
BEATS_PER_ACK_WAIT = 5


class Lease:
    """Renews the lease on a delivery until the block ends.

    Attributes:
        delivery: The delivery that is held.
        interval: Seconds between two renewals.
    """

    def __init__(self, delivery: Renewable, *, ack_wait: float) -> None:
        self.delivery = delivery
        self.interval = ack_wait / BEATS_PER_ACK_WAIT
        self._beating: asyncio.Task[None] | None = None
        self._over = False  # in addition to the cancellation, which a renewal may swallow each time

    async def __aenter__(self) -> Self:
        self._over = False
        self._beating = asyncio.create_task(self._beat(), name="heartbeat")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over = True
        beating, self._beating = self._beating, None
        if beating is not None:
            await cancel_and_wait(beating)
        self.delivery.stop_renewing()

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._over:
            # The first one at once: the lease guard learns of the lease by it.
            next_beat = loop.time() + self.interval
            try:
                # A connection that takes nothing must not hold up the next sign of life.
                async with asyncio.timeout_at(next_beat):
                    await self.delivery.extend()
            except Exception as error:  # noqa: BLE001 - one beat may be lost, not all that follow
                log.warning("heartbeat_failed", error=type(error).__name__)
            if not self._over:
                await asyncio.sleep(next_beat - loop.time())

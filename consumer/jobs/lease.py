"""The lease on a delivery: while it is renewed, the server does not redeliver the request."""

import asyncio
from types import TracebackType
from typing import Self

import structlog

from consumer.background_tasks import cancel_and_wait
from consumer.ports.bus import Renewable

log = structlog.get_logger()

# Ratio of ack_wait to the interval. Three renewals may be lost, because the server restarts or the
# model holds the GIL, and the fourth one still arrives in time.
BEATS_PER_ACK_WAIT = 5


class Lease:
    """Renews the lease on a delivery until the block ends.

    Attributes:
        delivery: The delivery under the lease.
        interval: Seconds between two renewals.
    """

    def __init__(self, delivery: Renewable, *, ack_wait: float) -> None:
        self.delivery = delivery
        self.interval = ack_wait / BEATS_PER_ACK_WAIT
        self._heartbeat: asyncio.Task[None] | None = None
        self._ended = False  # in addition to the cancellation, which a renewal may suppress

    async def __aenter__(self) -> Self:
        self._ended = False
        self._heartbeat = asyncio.create_task(self._beat(), name="heartbeat")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended = True
        heartbeat, self._heartbeat = self._heartbeat, None
        if heartbeat is not None:
            await cancel_and_wait(heartbeat)
        self.delivery.stop_renewing()

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._ended:
            # The first renewal is sent at once: it registers the lease with the lease guard.
            next_beat = loop.time() + self.interval
            try:
                # A renewal that hangs must not delay the next one.
                async with asyncio.timeout_at(next_beat):
                    await self.delivery.extend()
            except Exception as error:  # noqa: BLE001 - one renewal may fail, the next may not
                log.warning("lease_renewal_failed", error=type(error).__name__)
            if not self._ended:
                await asyncio.sleep(next_beat - loop.time())

"""The pull loop: receives one delivery at a time from a durable, across restarts of the server.

`fetch` of nats-py does not notice a restart of the server until its timeout, swallows "409 Consumer
Deleted", and loses messages when it is cancelled. This loop therefore uses a core subscription. It
has a new inbox for each pull request, monitors idle heartbeats, and sends a new pull request right
after a reconnect. Nothing is cancelled: `stop` sets a flag.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable

import structlog
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error

from consumer.bus.connection import Bus, BusUnavailable, ConnectionClosed
from consumer.bus.delivery import DeliveryContext, JetStreamDelivery, is_delivery
from consumer.bus.server_texts import is_durable_missing, is_server_shutdown
from consumer.bus.topology import NANOSECONDS, Durable, TopologyError

log = structlog.get_logger()

IDLE_HEARTBEAT = 2.0  # seconds
EXPIRES = 20.0  # seconds until a pull request expires, at most
# Limit of the same as a fraction of `ack_wait`. When the machine of a worker is lost, or a forked
# process keeps its socket open, the server keeps the connection and the pull request. The pull
# request must expire before the lease on the worker's request. Otherwise the redelivery goes to the
# dead worker, and counts as one more attempt.
EXPIRES_PER_ACK_WAIT = 0.5
HEARTBEAT_TIMEOUT = 2.5 * IDLE_HEARTBEAT  # seconds without a message until a pull counts as lost
MAX_HEARTBEAT_TIMEOUTS = 2  # consecutive ones, until the loop forces a reconnect
PAUSE_REFUSED = 0.1  # seconds
PAUSE_MISSING = 0.5  # seconds


class PullLoop:
    """Pulls deliveries of one durable.

    Args:
        bus: The connection.
        durable: The durable consumer.
        ensure: Creates missing streams and the durable again.
        context: Services for the deliveries.

    Attributes:
        attached: Whether the server accepts pull requests for the durable.
    """

    def __init__(
        self,
        bus: Bus,
        durable: Durable,
        *,
        ensure: Callable[[], Awaitable[object]],
        context: DeliveryContext,
    ) -> None:
        self._bus = bus
        self._durable = durable
        self._ensure = ensure
        self._context = context
        self._inbox = bus.client.new_inbox()
        self._subscription: Subscription | None = None
        # None wakes the loop without a message: to stop, or to pull again.
        self._received: asyncio.Queue[Msg | None] = asyncio.Queue()
        self._stopping = False
        self._paused = False
        self._unsubscribing: asyncio.Future[None] | None = None
        self._pulls = 0
        self._expires = min(EXPIRES, EXPIRES_PER_ACK_WAIT * durable.ack_wait)
        self._is_pull_pending = False  # whether the server may still reply to the last pull request
        self._requeuing: set[asyncio.Task[None]] = set()
        self._heartbeat_timeouts = 0
        self._last_message_at = time.monotonic()
        self.attached = True  # `ensure` has succeeded before

    async def start(self) -> None:
        """Subscribe to the inbox of the pull requests."""
        self._subscription = await self._bus.client.subscribe(f"{self._inbox}.*", cb=self._take)
        self._bus.on_reconnect(self._pull_again)

    def stop(self) -> None:
        """Make `next` return None, and unsubscribe in the background."""
        self._stopping = True
        self._received.put_nowait(None)
        if self._subscription is not None and self._unsubscribing is None:
            self._unsubscribing = asyncio.ensure_future(self._unsubscribe())

    async def unsubscribe(self) -> None:
        """Stop and wait for the end of the subscription.

        After that, a requeued request cannot be delivered to this worker again.
        """
        self.stop()
        if self._unsubscribing is not None:
            await asyncio.wait({self._unsubscribing})

    def pause(self) -> None:
        """Send no pull request until `resume`; `next` continues to wait.

        A pending pull request is left to expire; `next` returns its delivery if there is one.
        """
        self._paused = True

    def resume(self) -> None:
        """Send pull requests again."""
        self._paused = False
        self._received.put_nowait(None)

    async def next(self) -> JetStreamDelivery | None:
        """Return the next delivery, or None when stopping.

        Raises:
            BusUnavailable: The client has closed the connection; the process must end.
        """
        while not self._stopping:
            if self._bus.closed.is_set():
                raise ConnectionClosed
            if not self._is_pull_pending and not self._paused and self._bus.connected:
                await self._pull()
            message = await self._receive()
            if message is None:
                continue
            if is_delivery(message):
                self.attached = True
                return JetStreamDelivery(message, self._context)
            if message.subject == self._current:  # else the status of an older pull request
                await self._handle_status(message)
        return None

    async def close(self) -> None:
        """Unsubscribe, and requeue deliveries that `next` has not returned. Never raises.

        Call it right after the last call of `next`, because the leases of these deliveries are not
        renewed.
        """
        await self.unsubscribe()
        while not self._received.empty():
            message = self._received.get_nowait()
            if message is not None and is_delivery(message):
                self._requeue(message)
        if self._requeuing:
            await asyncio.wait(self._requeuing, timeout=IDLE_HEARTBEAT)

    async def _unsubscribe(self) -> None:
        if self._subscription is None:
            return
        try:
            # Ends the interest in the pull request, then waits for messages in transit.
            await asyncio.wait_for(self._subscription.drain(), IDLE_HEARTBEAT)  # type: ignore[no-untyped-call]
        except (Error, TimeoutError, OSError) as error:
            log.warning("pull_unsubscribe_failed", error=type(error).__name__)

    @property
    def _current(self) -> str:
        return f"{self._inbox}.{self._pulls}"

    async def _take(self, message: Msg) -> None:
        if not is_delivery(message):
            self._received.put_nowait(message)
        elif self._is_pull_pending and not self._stopping:
            self._is_pull_pending = False
            self._received.put_nowait(message)
        else:
            # The reply to a pull request that counted as lost. While another job runs, its lease
            # would not be renewed.
            log.warning("unexpected_delivery")
            self._requeue(message)

    def _requeue(self, message: Msg) -> None:
        # In a separate task, so that the loop receives heartbeats during the confirmation.
        requeuing = asyncio.create_task(
            JetStreamDelivery(message, self._context).requeue(), name="requeue"
        )
        self._requeuing.add(requeuing)
        requeuing.add_done_callback(self._requeuing.discard)

    def _pull_again(self) -> None:
        self._is_pull_pending = False
        self._received.put_nowait(None)

    async def _pull(self) -> None:
        self._pulls += 1
        request = {
            "batch": 1,
            "expires": round(self._expires * NANOSECONDS),
            # The server accepts at most half of `expires`.
            "idle_heartbeat": round(min(IDLE_HEARTBEAT, self._expires / 2) * NANOSECONDS),
        }
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._durable.stream}.{self._durable.name}"
        # Set before the publish: with a full send buffer, the reply may arrive before it returns.
        self._is_pull_pending = True
        self._last_message_at = time.monotonic()
        try:
            await self._bus.client.publish(
                subject, json.dumps(request).encode(), reply=self._current
            )
        except (Error, OSError) as error:
            log.warning("pull_failed", error=type(error).__name__)
            self._is_pull_pending = False
            await asyncio.sleep(PAUSE_MISSING)

    async def _receive(self) -> Msg | None:
        left = self._last_message_at + HEARTBEAT_TIMEOUT - time.monotonic()
        try:
            message = await asyncio.wait_for(self._received.get(), max(0.0, left))
        except TimeoutError:
            await self._on_heartbeat_timeout()
            return None
        if message is not None:
            self._last_message_at = time.monotonic()
            self._heartbeat_timeouts = 0
        return message

    async def _on_heartbeat_timeout(self) -> None:
        self._is_pull_pending = False
        if self._paused or not self._bus.connected:
            # No message can arrive; `resume` or the reconnect wakes the loop.
            self._last_message_at = time.monotonic()
            return
        self._heartbeat_timeouts += 1
        log.warning("pull_heartbeat_missed", times=self._heartbeat_timeouts)
        if self._heartbeat_timeouts >= MAX_HEARTBEAT_TIMEOUTS:
            self._heartbeat_timeouts = 0
            await self._bus.client.force_reconnect()

    async def _handle_status(self, status: Msg) -> None:
        headers = status.headers or {}
        code, description = headers.get("Status", ""), headers.get("Description", "")
        if code == "100":  # idle heartbeat
            self.attached = True
            return
        if not code:  # not from the server: a status message always has a code
            log.warning("pull_status_unknown")
            return
        self._is_pull_pending = False
        if code in {"404", "408"}:  # no message; the pull request has expired
            self.attached = True
        elif is_durable_missing(code, description):
            log.warning("durable_missing", code=code, description=description)
            self.attached = False
            await self._restore()
        elif is_server_shutdown(description):
            # The connection is lost next. The durable exists when the server is back.
            await asyncio.sleep(PAUSE_REFUSED)
        else:
            log.warning("pull_refused", code=code, description=description)
            self.attached = False
            await asyncio.sleep(PAUSE_REFUSED)

    async def _restore(self) -> None:
        try:
            await self._ensure()
        except (BusUnavailable, TopologyError) as error:
            log.warning("durable_not_restored", reason=str(error))
            await asyncio.sleep(PAUSE_MISSING)
        else:
            # The server may know the durable and still refuse pull requests, for example while a
            # cluster elects a leader. The pause avoids a busy loop.
            await asyncio.sleep(PAUSE_REFUSED)

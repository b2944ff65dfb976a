"""The pull loop: one delivery at a time from the durable, whatever happens to the server.

nats-py's `fetch` stays blind for its whole timeout when the server restarts under it, swallows
"409 Consumer Deleted", and loses messages when it is cancelled. So this is a loop of its own on a
core subscription: a fresh inbox for each pull, idle heartbeats that are watched, a new pull at once
after a reconnect, and no cancellation anywhere: `stop` sets a flag.
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
EXPIRES = 20.0  # seconds that one pull stands at most
# Ratio of that to `ack_wait`. A worker whose machine is lost, or which a fork outlives, leaves its
# connection standing, and its pull with it: that must be over before the lease on its request is,
# or it takes the request again, into nobody's hands, and one more try is counted.
EXPIRES_PER_ACK_WAIT = 0.5
HEARTBEAT_TIMEOUT = (
    2.5 * IDLE_HEARTBEAT
)  # seconds without a word after which a pull is taken to be lost
MAX_HEARTBEAT_TIMEOUTS = (
    2  # in a row, after which the connection is taken to be dead although it looks alive
)
PAUSE_REFUSED = 0.1  # seconds
PAUSE_MISSING = 0.5  # seconds


class PullLoop:
    """Pulls deliveries of one durable.

    Args:
        bus: The connection.
        durable: What to pull from.
        ensure: Makes the streams and the durable again when they are gone.
        context: What its deliveries need.
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
        self._standing = False  # whether the last pull may still be answered
        self._requeuing: set[asyncio.Task[None]] = set()
        self._silences = 0
        self._heard = time.monotonic()
        self.attached = True  # whether the server takes pulls; it knew the durable when ensured

    async def start(self) -> None:
        """Listen for what pulls give."""
        self._subscription = await self._bus.client.subscribe(f"{self._inbox}.*", cb=self._take)
        self._bus.on_reconnect(self._pull_again)

    def stop(self) -> None:
        """Make `next` return None, and withdraw the standing pull."""
        self._stopping = True
        self._received.put_nowait(None)
        if self._subscription is not None and self._unsubscribing is None:
            self._unsubscribing = asyncio.ensure_future(self._unsubscribe())

    async def unsubscribe(self) -> None:
        """The same; when it returns, nothing that is given back can come to this worker again."""
        self.stop()
        if self._unsubscribing is not None:
            await asyncio.wait({self._unsubscribing})

    def pause(self) -> None:
        """Send no pull until `resume`; `next` goes on waiting.

        A pull that stands is left to expire: what it still brings is returned by `next`.
        """
        self._paused = True

    def resume(self) -> None:
        """Pull again."""
        self._paused = False
        self._received.put_nowait(None)

    async def next(self) -> JetStreamDelivery | None:
        """The next delivery, or None when stopping.

        Raises:
            BusUnavailable: The client has given up; the process has to end.
        """
        while not self._stopping:
            if self._bus.closed.is_set():
                raise ConnectionClosed
            if not self._standing and not self._paused and self._bus.connected:
                await self._pull()
            message = await self._receive()
            if message is None:
                continue
            if is_delivery(message):
                self.attached = True
                return JetStreamDelivery(message, self._context)
            if message.subject == self._current:  # else the status of an older pull
                await self._handle_status(message)
        return None

    async def close(self) -> None:
        """Withdraw the standing pull, and give back what came too late to be handled.

        Call it as soon as `next` is not called any more: nobody renews those leases. Never raises.
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
            # Takes the interest away from the pull, then waits for what was under way.
            await asyncio.wait_for(self._subscription.drain(), IDLE_HEARTBEAT)  # type: ignore[no-untyped-call]
        except (Error, TimeoutError, OSError) as error:
            log.warning("pull_unsubscribe_failed", error=type(error).__name__)

    @property
    def _current(self) -> str:
        return f"{self._inbox}.{self._pulls}"

    async def _take(self, message: Msg) -> None:
        if not is_delivery(message):
            self._received.put_nowait(message)
        elif self._standing and not self._stopping:
            self._standing = False
            self._received.put_nowait(message)
        else:
            # The answer to a pull that was taken to be lost. Nobody would renew its lease here
            # while another job runs.
            log.warning("unexpected_delivery")
            self._requeue(message)

    def _requeue(self, message: Msg) -> None:
        # In a task of its own: until it is confirmed, heartbeats must be heard.
        requeuing = asyncio.create_task(
            JetStreamDelivery(message, self._context).requeue(), name="requeue"
        )
        self._requeuing.add(requeuing)
        requeuing.add_done_callback(self._requeuing.discard)

    def _pull_again(self) -> None:
        self._standing = False
        self._received.put_nowait(None)

    async def _pull(self) -> None:
        self._pulls += 1
        request = {
            "batch": 1,
            "expires": round(self._expires * NANOSECONDS),
            # The server takes no more than half of the other.
            "idle_heartbeat": round(min(IDLE_HEARTBEAT, self._expires / 2) * NANOSECONDS),
        }
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._durable.stream}.{self._durable.name}"
        # Before it is sent: behind a full buffer the answer may be here first.
        self._standing = True
        self._heard = time.monotonic()
        try:
            await self._bus.client.publish(
                subject, json.dumps(request).encode(), reply=self._current
            )
        except (Error, OSError) as error:
            log.warning("pull_failed", error=type(error).__name__)
            self._standing = False
            await asyncio.sleep(PAUSE_MISSING)

    async def _receive(self) -> Msg | None:
        left = self._heard + HEARTBEAT_TIMEOUT - time.monotonic()
        try:
            message = await asyncio.wait_for(self._received.get(), max(0.0, left))
        except TimeoutError:
            await self._on_heartbeat_timeout()
            return None
        if message is not None:
            self._heard = time.monotonic()
            self._silences = 0
        return message

    async def _on_heartbeat_timeout(self) -> None:
        self._standing = False
        if self._paused or not self._bus.connected:
            # Nothing can be received; `resume` or the reconnect wakes the loop.
            self._heard = time.monotonic()
            return
        self._silences += 1
        log.warning("pull_heartbeat_missed", times=self._silences)
        if self._silences >= MAX_HEARTBEAT_TIMEOUTS:
            self._silences = 0
            await self._bus.client.force_reconnect()

    async def _handle_status(self, status: Msg) -> None:
        headers = status.headers or {}
        code, description = headers.get("Status", ""), headers.get("Description", "")
        if code == "100":  # idle heartbeat
            self.attached = True
            return
        if not code:  # not from the server: a status line always has one
            log.warning("pull_status_unknown")
            return
        self._standing = False
        if code in {"404", "408"}:  # no message; the pull has expired
            self.attached = True
        elif is_durable_missing(code, description):
            log.warning("durable_missing", code=code, description=description)
            self.attached = False
            await self._restore()
        elif is_server_shutdown(description):
            # By SIGTERM: the connection is lost next, and the durable is there when it is back.
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
            # The server may know the durable and still not take pulls of it, for example while a
            # cluster elects a leader: the next pull must not follow at once.
            await asyncio.sleep(PAUSE_REFUSED)

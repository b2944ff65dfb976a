"""A delivery from JetStream: its settlement with a confirmation, its lease and its marks."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC

import structlog
from nats.aio.msg import Msg
from nats.errors import Error
from nats.js.errors import NotFoundError

from consumer.bus.attempt_marks import AttemptMark, AttemptMarks, retry_key
from consumer.bus.connection import Bus, BusUnavailable
from consumer.bus.lease_guard.guard import LeaseGuard
from consumer.ports.bus import Message
from generation_contracts.headers import earlier_attempts, earlier_deliveries

log = structlog.get_logger()

CONFIRM_TIMEOUT = 1.0  # seconds for one attempt; the server takes 0.2 ms
CONFIRM_PAUSE = 0.1  # seconds between two attempts
# Seconds for which a reachable server may fail to confirm a settlement. A redelivery afterwards is
# harmless, because the results stream stores only one result for each request.
SETTLE_TIMEOUT = 10.0
NANOSECONDS = 1_000_000_000


@dataclass(frozen=True)
class DeliveryContext:
    """The services that a delivery uses while it is in flight.

    Attributes:
        bus: The connection that received the delivery.
        ack_wait: Duration of a lease, in seconds.
        marks: The attempt marks on the messages of its stream.
        lease_guard: Renews its lease while this process cannot.
    """

    bus: Bus
    ack_wait: float
    marks: AttemptMarks
    lease_guard: LeaseGuard


class JetStreamDelivery:
    """One message of the pull consumer; implements `consumer.ports.bus.Delivery`."""

    def __init__(self, message: Msg, context: DeliveryContext) -> None:
        self._bus = context.bus
        self._message = message
        self._context = context
        self._connection = context.bus.connection
        metadata = message.metadata
        self.subject = message.subject
        self.body = message.data
        self.headers: Mapping[str, str] = message.headers or {}
        self.stream = metadata.stream
        self.stream_sequence = metadata.sequence.stream
        self.deliveries = metadata.num_delivered  # attempt marks refer to this number
        earlier = earlier_deliveries(self.headers)
        self.attempt = earlier + self.deliveries
        self.uncounted = earlier - earlier_attempts(self.headers)
        self.stored_at = metadata.timestamp.astimezone(UTC)

    async def ack(self) -> None:
        """Acknowledge the request; return when the server has confirmed it."""
        await self._settle(b"+ACK")

    async def nak(self) -> None:
        """Return the request for immediate redelivery; without a confirmation its lease expires.

        Never raises, because a process that shuts down calls it.
        """
        try:
            async with asyncio.timeout(SETTLE_TIMEOUT):
                await self._settle(b"-NAK")
        except (TimeoutError, BusUnavailable) as error:
            log.warning("nak_failed", error=type(error).__name__)

    async def nak_later(self, delay: float) -> None:
        """Return the request for redelivery after a delay in seconds, with a confirmation."""
        await self._settle(b'-NAK {"delay": %d}' % round(delay * NANOSECONDS))

    async def requeue(self) -> None:
        """Return the request for immediate redelivery, and mark the delivery as no attempt."""
        await self._mark(AttemptMark.REQUEUED)
        await self.nak()

    async def mark_uncounted(self) -> None:
        """Mark that this delivery is not an attempt, until `mark_counted`."""
        await self._mark(AttemptMark.UNCOUNTED)

    async def mark_counted(self) -> None:
        """Mark that this delivery is an attempt."""
        await self._mark(AttemptMark.COUNTED)

    async def _mark(self, kind: AttemptMark) -> None:
        await self._context.marks.mark_delivery(message_key(self), self.deliveries, kind)

    async def marked_uncounted(self) -> int:
        """Return how many deliveries of this message were not attempts; waits for the bus."""
        return await self._context.marks.count_uncounted(message_key(self), self.deliveries)

    async def mark_cancelled(self) -> None:
        """Mark the request as cancelled, for the next worker if this one dies first."""
        await self._context.marks.mark_cancelled(message_key(self))

    async def was_cancelled(self) -> bool:
        """Return whether the request was cancelled during an earlier delivery; wait for the bus."""
        if await self._context.marks.was_cancelled(message_key(self)):
            return True
        if self.attempt == self.deliveries:
            return False
        # The request was queued again under its id, which is the last token of its subject.
        return await self._context.marks.was_cancelled(retry_key(self.subject.rpartition(".")[2]))

    async def term(self, reason: str) -> None:
        """Terminate the request: it is never delivered again; waits for the confirmation."""
        # The method of nats-py takes no reason. The server publishes the reason in its advisory.
        await self._settle(f"+TERM {reason}".encode())

    async def extend(self) -> None:
        """Renew the lease."""
        guard = self._context.lease_guard
        # The guard gets two reports: the worker is alive, and the renewal was sent. Without the
        # second one, as during a lost connection, the guard renews the lease itself.
        guard.alive(self._message.reply, self._context.ack_wait)
        connected = self._bus.connected
        try:
            await self._bus.client.publish(self._message.reply, b"+WPI")
        except (Error, OSError) as error:
            # If the lease expires, the results stream still stores only one result.
            log.warning("lease_renewal_failed", error=type(error).__name__)
        else:
            # Without a connection nats-py only buffers the message.
            if connected and self._bus.connected:
                guard.renewed(self._message.reply)

    def stop_renewing(self) -> None:
        """Stop the renewals, by this process and by its lease guard."""
        self._context.lease_guard.stop_renewing(self._message.reply)

    async def _settle(self, payload: bytes) -> None:
        # The server confirms every kind of settlement that has a reply subject. It still accepts a
        # late one after a reconnect, so this method waits for an unreachable bus.
        unconfirmed = 0.0
        while unconfirmed < SETTLE_TIMEOUT:
            # Send nothing without a connection: nats-py would buffer each attempt and send all of
            # them at the reconnect. The second NAK would requeue a redelivery to another worker.
            await self._bus.wait_connected()
            started = time.monotonic()
            # After a reconnect, check first: a server that lost the delivery does not reply.
            uncertain = unconfirmed or self._connection != self._bus.connection
            if uncertain and await self._is_unknown_to_server():
                log.warning("delivery_unknown_to_server")
                return
            try:
                await self._bus.request(self._message.reply, payload, within=CONFIRM_TIMEOUT)
            except (Error, OSError) as error:
                log.warning("settlement_unconfirmed", error=type(error).__name__)
            else:
                return
            await asyncio.sleep(CONFIRM_PAUSE)
            unconfirmed += time.monotonic() - started
        log.error("settlement_abandoned")

    async def _is_unknown_to_server(self) -> bool:
        # The server persists deliveries with a delay, so a killed server loses the latest ones. A
        # durable that was created again has lost all of them. The server ignores settlements of
        # lost deliveries and delivers the request again.
        metadata = self._message.metadata
        try:
            async with self._bus.api_call(CONFIRM_TIMEOUT):
                info = await self._bus.jetstream.consumer_info(metadata.stream, metadata.consumer)
        except NotFoundError:
            return True
        except (Error, OSError):
            return False
        known: int = info.delivered.consumer_seq
        return known < metadata.sequence.consumer


def message_key(message: Message) -> str:
    """Return a unique key of a message; sequences alone repeat when a stream is created again."""
    return f"{message.stream_sequence}-{int(message.stored_at.timestamp()):x}"


def is_delivery(message: Msg) -> bool:
    """Return whether a message on the inbox of a pull is a delivery, else it is a status message.

    The reply subject of a delivery is `$JS.ACK.<stream>…` or, with the server option
    `js_ack_fc_v2`, `$JS.ACK.<domain>.<account>.<stream>…`; nats-py parses both.
    """
    try:
        _ = message.metadata
    except (Error, ValueError, OverflowError):
        return False
    return True

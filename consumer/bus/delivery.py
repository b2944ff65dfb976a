"""A delivery as JetStream hands it out, and its settlement confirmed by the server."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC

import structlog
from nats.aio.msg import Msg
from nats.errors import Error
from nats.js.errors import NotFoundError

from consumer.bus.attempt_marks import AttemptMark, AttemptMarks, retry_place
from consumer.bus.connection import Bus, BusUnavailable
from consumer.bus.lease_guard.guard import LeaseGuard
from consumer.ports.bus import Message
from generation_contracts.headers import earlier_attempts, earlier_deliveries

log = structlog.get_logger()

CONFIRM_TIMEOUT = 1.0  # seconds for one try; the server takes 0.2 ms
CONFIRM_PAUSE = 0.1  # seconds between two tries
# Seconds of a reachable server that does not confirm, and does not say why. Whatever becomes of the
# delivery then, the stored result is fenced.
GIVE_UP_AFTER = 10.0
NANOSECONDS = 1_000_000_000


@dataclass(frozen=True)
class DeliveryContext:
    """What a delivery needs while it is in flight.

    Attributes:
        bus: The connection that it came over.
        ack_wait: Seconds that its lease lasts.
        marks: The marks on the messages of its stream.
        standby: Renews its lease while this process cannot.
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
        self.deliveries = metadata.num_delivered  # marks are by this number
        earlier = earlier_deliveries(self.headers)
        self.attempt = earlier + self.deliveries
        self.uncounted = earlier - earlier_attempts(self.headers)
        self.stored_at = metadata.timestamp.astimezone(UTC)

    async def ack(self) -> None:
        """Settle as done, confirmed."""
        await self._settle(b"+ACK")

    async def nak(self) -> None:
        """Return the request at once, confirmed; else its lease runs out.

        Never raises: a process that is ending calls it.
        """
        try:
            async with asyncio.timeout(GIVE_UP_AFTER):
                await self._settle(b"-NAK")
        except (TimeoutError, BusUnavailable) as error:
            log.warning("not_given_back", error=type(error).__name__)

    async def nak_later(self, delay: float) -> None:
        """Have it delivered again in so many seconds, confirmed."""
        await self._settle(b'-NAK {"delay": %d}' % round(delay * NANOSECONDS))

    async def requeue(self) -> None:
        """Return the request at once; a mark says that the delivery was no attempt."""
        await self._mark(AttemptMark.REQUEUED)
        await self.nak()

    async def mark_uncounted(self) -> None:
        """Mark this delivery as no attempt, until `mark_counted`."""
        await self._mark(AttemptMark.UNCOUNTED)

    async def mark_counted(self) -> None:
        """Mark this delivery as an attempt after all."""
        await self._mark(AttemptMark.COUNTED)

    async def _mark(self, kind: AttemptMark) -> None:
        await self._context.marks.mark_delivery(place_of(self), self.deliveries, kind)

    async def marked_uncounted(self) -> int:
        """Return how many deliveries of this message were no attempts; waits for the bus."""
        return await self._context.marks.count_uncounted(place_of(self), self.deliveries)

    async def mark_cancelled(self) -> None:
        """Mark the request as cancelled, for the next worker if this one dies first."""
        await self._context.marks.mark_cancelled(place_of(self))

    async def was_cancelled(self) -> bool:
        """Return whether the request was cancelled at an earlier worker; waits for the bus."""
        if await self._context.marks.was_cancelled(place_of(self)):
            return True
        if self.attempt == self.deliveries:
            return False
        # It was queued again under its id, which is the last token of its subject.
        return await self._context.marks.was_cancelled(retry_place(self.subject.rpartition(".")[2]))

    async def term(self, reason: str) -> None:
        """Settle as never to be delivered again, confirmed."""
        # nats-py's own method takes no reason; the server puts this one into its advisory.
        await self._settle(f"+TERM {reason}".encode())

    async def extend(self) -> None:
        """Renew the lease."""
        guard = self._context.lease_guard
        # Two facts: this worker is alive, whatever becomes of the renewal; and the renewal is on
        # its way. The guard renews in its stead while this connection is away.
        guard.alive(self._message.reply, self._context.ack_wait)
        connected = self._bus.connected
        try:
            await self._bus.client.publish(self._message.reply, b"+WPI")
        except (Error, OSError) as error:
            # Nothing to do: the lease may run out, and the fence on the result holds all the same.
            log.warning("heartbeat_failed", error=type(error).__name__)
        else:
            # Without a connection nats-py has only kept it for later.
            if connected and self._bus.connected:
                guard.renewed(self._message.reply)

    def stop_renewing(self) -> None:
        """Renew the lease no more."""
        self._context.lease_guard.stop_renewing(self._message.reply)

    async def _settle(self, payload: bytes) -> None:
        # The server confirms every kind of settlement that has a reply subject. A late one is still
        # accepted after a reconnect, so an unreachable bus is waited for.
        unconfirmed = 0.0
        while unconfirmed < GIVE_UP_AFTER:
            # Nothing is sent before: nats-py would keep each try and send them all at the
            # reconnect, and the second nak takes the request from the worker that has it by then.
            await self._bus.reachable()
            started = time.monotonic()
            # After a reconnect at once: a server that has forgotten the delivery does not answer.
            doubtful = unconfirmed or self._connection != self._bus.connection
            if doubtful and await self._forgotten():
                log.warning("delivery_forgotten")
                return
            try:
                await self._bus.ask(self._message.reply, payload, within=CONFIRM_TIMEOUT)
            except (Error, OSError) as error:
                log.warning("settlement_unconfirmed", error=type(error).__name__)
            else:
                return
            await asyncio.sleep(CONFIRM_PAUSE)
            unconfirmed += time.monotonic() - started
        log.error("settlement_given_up")

    async def _forgotten(self) -> bool:
        # A server that was killed does not know of its last deliveries, which it writes down a
        # little later; nor does a durable that was made again. Both ignore what is said of such a
        # delivery, and the request comes again.
        metadata = self._message.metadata
        try:
            async with self._bus.question(CONFIRM_TIMEOUT):
                info = await self._bus.jetstream.consumer_info(metadata.stream, metadata.consumer)
        except NotFoundError:
            return True
        except (Error, OSError):
            return False
        known: int = info.delivered.consumer_seq
        return known < metadata.sequence.consumer


def place_of(message: Message) -> str:
    """What names a request's message for ever: a stream that is made again begins at 1 again."""
    return f"{message.stream_sequence}-{int(message.stored_at.timestamp()):x}"


def is_delivery(message: Msg) -> bool:
    """Whether a message on a pull's inbox is a delivery; else it is a status line.

    Its reply subject is `$JS.ACK.<stream>…` or, with the server's `js_ack_fc_v2`,
    `$JS.ACK.<domain>.<account>.<stream>…`; nats-py reads both.
    """
    try:
        _ = message.metadata
    except (Error, ValueError, OverflowError):
        return False
    return True

"""A request that was read from its stream, without a delivery and without a lease."""

from collections.abc import Mapping
from datetime import UTC, datetime

import structlog
from nats.js.api import RawStreamMsg
from nats.js.errors import APIError, NotFoundError

from consumer.bus.attempt_marks import AttemptMarks
from consumer.bus.connection import API_TIMEOUT, Bus
from consumer.bus.delivery import message_key
from generation_contracts.headers import earlier_attempts, earlier_deliveries

log = structlog.get_logger()


class RequestInStream:
    """A request without a lease; implements `consumer.ports.bus.QueuedRequest`.

    Settling it deletes it from its stream.

    Args:
        bus: A connection.
        stream: Name of the request stream.
        message: The stored message.
        deliveries: Number of its deliveries.
        marks: The marks on the messages of this stream.

    Attributes:
        settled: Whether the message has been deleted.
    """

    def __init__(
        self, bus: Bus, stream: str, message: RawStreamMsg, *, deliveries: int, marks: AttemptMarks
    ) -> None:
        self._bus = bus
        self._marks = marks
        self.subject = message.subject or ""
        self.body = message.data or b""
        # nats-py returns a Header object for a value that is not ASCII.
        self.headers: Mapping[str, str] = {
            name: str(text) for name, text in (message.headers or {}).items()
        }
        self.stream = stream
        self.stream_sequence = message.seq or 0
        self.deliveries = deliveries
        earlier = earlier_deliveries(self.headers)
        self.attempt = earlier + deliveries
        self.uncounted = earlier - earlier_attempts(self.headers)
        self.stored_at = (message.time or datetime.now(UTC)).astimezone(UTC)
        self.settled = False

    async def ack(self) -> None:
        """Delete the message; the caller has stored its terminal event."""
        await self._delete()

    async def term(self, reason: str) -> None:
        """Delete the message; the dead letter has the reason."""
        log.info("stored_request_removed", reason=reason)
        await self._delete()

    async def marked_uncounted(self) -> int:
        """Return how many deliveries of the message were not attempts; waits for the bus."""
        return await self._marks.count_uncounted(message_key(self), self.deliveries)

    async def mark_cancelled(self) -> None:
        """Mark the message as cancelled, for the worker that receives it next."""
        await self._marks.mark_cancelled(message_key(self))

    async def was_cancelled(self) -> bool:
        """Return whether the message is marked as cancelled; waits for the bus."""
        return await self._marks.was_cancelled(message_key(self))

    async def _delete(self) -> None:
        try:
            async with self._bus.api_call(API_TIMEOUT):
                await self._bus.jetstream.delete_msg(self.stream, self.stream_sequence)
        except APIError:
            # A worker may have settled the message; the server has no error code for that.
            if not await self._gone():
                raise
        self.settled = True

    async def _gone(self) -> bool:
        try:
            async with self._bus.api_call(API_TIMEOUT):
                await self._bus.jetstream.get_msg(self.stream, self.stream_sequence)
        except NotFoundError:
            return True
        return False

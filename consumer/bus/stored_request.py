"""A request as it lies in its stream, for whoever ends it without having been given it."""

from collections.abc import Mapping
from datetime import UTC, datetime

import structlog
from nats.js.api import RawStreamMsg
from nats.js.errors import APIError, NotFoundError

from consumer.bus.connection import API_TIMEOUT, Bus
from consumer.bus.delivery import place_of
from consumer.bus.notes import Notes
from generation_contracts.headers import earlier_attempts

log = structlog.get_logger()


class RequestInStream:
    """A message of a request stream without a delivery; implements `consumer.ports.Delivery`.

    To settle it is to delete it from its stream; until then it stays where it is.

    Attributes:
        settled: Whether it has been deleted.
    """

    def __init__(
        self,
        bus: Bus,
        stream: str,
        message: RawStreamMsg,
        deliveries: int,
        notes: Notes | None = None,
    ) -> None:
        self._bus = bus
        self._notes = notes
        self._deliveries = deliveries
        self.subject = message.subject or ""
        self.body = message.data or b""
        # nats-py has an object of its own for a header that is not ASCII.
        self.headers: Mapping[str, str] = {
            name: str(text) for name, text in (message.headers or {}).items()
        }
        self.stream = stream
        self.stream_sequence = message.seq or 0
        self.attempt = deliveries + earlier_attempts(self.headers)
        self.stored_at = (message.time or datetime.now(UTC)).astimezone(UTC)
        self.settled = False

    async def ack(self) -> None:
        """Delete it: its end is known."""
        await self._delete()

    async def term(self, reason: str) -> None:
        """Delete it; the reason is in the dead letter."""
        log.info("stored_request_removed", reason=reason)
        await self._delete()

    async def nak(self) -> None:
        """Leave it where it is."""

    async def release(self) -> None:
        """Leave it where it is."""

    async def discount(self) -> None:
        """Tries are over for it."""

    async def count(self) -> None:
        """They are."""

    async def releases(self) -> int:
        """Return how many deliveries were no attempts; 0 where the marks are not given."""
        if self._notes is None:
            return 0
        return await self._notes.releases(place_of(self), self._deliveries)

    async def withdraw(self) -> None:
        """Whoever looks at it here ends it at once."""

    async def withdrawn(self) -> bool:
        """Return whether it was cancelled while a worker had it; False without the marks."""
        return self._notes is not None and await self._notes.withdrawn(place_of(self))

    async def extend(self) -> None:
        """There is no lease."""

    def let_lapse(self) -> None:
        """There is no lease."""

    async def _delete(self) -> None:
        try:
            async with self._bus.question(API_TIMEOUT):
                await self._bus.jetstream.delete_msg(self.stream, self.stream_sequence)
        except APIError:
            # A worker may have settled it meanwhile; the server has no error of its own for that.
            if not await self._gone():
                raise
        self.settled = True

    async def _gone(self) -> bool:
        try:
            async with self._bus.question(API_TIMEOUT):
                await self._bus.jetstream.get_msg(self.stream, self.stream_sequence)
        except NotFoundError:
            return True
        return False

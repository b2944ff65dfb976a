"""Requests that the server delivers no more: they reached `max_deliver` and no worker had a word.

A worker counts the tries itself and puts a request aside with its whole context; what kills it
before it can count is delivered until `max_deliver`, and stays in the stream then, unseen. The
server says so in an advisory, which a stream keeps until a worker has seen to the request.
"""

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime

import structlog
from nats.errors import Error
from nats.js.api import RawStreamMsg
from nats.js.errors import NotFoundError
from pydantic import BaseModel, ValidationError

from consumer.bus.connection import API_TIMEOUT, Bus
from consumer.ports import Delivery

log = structlog.get_logger()

PAUSE = 0.5  # seconds between two tries to read a request


class _Advisory(BaseModel):
    """What is read of `io.nats.jetstream.advisory.v1.max_deliver`."""

    stream: str
    stream_seq: int
    deliveries: int


class StrandedDelivery:
    """A request without a delivery; implements `consumer.ports.Delivery`.

    To settle it is to delete it from its stream; until then it stays where it is.

    Attributes:
        settled: Whether it has been deleted.
    """

    def __init__(self, bus: Bus, stream: str, message: RawStreamMsg, deliveries: int) -> None:
        self._bus = bus
        self.subject = message.subject or ""
        self.body = message.data or b""
        # nats-py has an object of its own for a header that is not ASCII.
        self.headers: Mapping[str, str] = {
            name: str(text) for name, text in (message.headers or {}).items()
        }
        self.stream = stream
        self.stream_sequence = message.seq or 0
        self.attempt = deliveries
        self.stored_at = (message.time or datetime.now(UTC)).astimezone(UTC)
        self.settled = False

    async def ack(self) -> None:
        """Delete it: its end is known."""
        await self._delete()

    async def term(self, reason: str) -> None:
        """Delete it; the reason is in the dead letter."""
        log.info("stranded_request_removed", reason=reason)
        await self._delete()

    async def nak(self) -> None:
        """Leave it: its advisory comes again."""

    async def release(self) -> None:
        """Leave it: its advisory comes again."""

    async def releases(self) -> int:
        """What was given back on purpose does not matter any more."""
        return 0

    async def extend(self) -> None:
        """There is no lease."""

    def let_lapse(self) -> None:
        """There is no lease."""

    async def _delete(self) -> None:
        async with self._bus.question(API_TIMEOUT):
            await self._bus.jetstream.delete_msg(self.stream, self.stream_sequence)
        self.settled = True


async def find_stranded(bus: Bus, stream: str, advisory: Delivery) -> StrandedDelivery | None:
    """The request that an advisory is about, or None when it is gone; waits for the bus.

    Args:
        bus: A connection.
        stream: The request stream: an advisory that names another one is not followed.
        advisory: What the server has said.

    Raises:
        BusUnavailable: The client has given up; the process has to end.
    """
    try:
        about = _Advisory.model_validate_json(advisory.body)
    except ValidationError:
        log.warning("unreadable_advisory")
        return None
    while about.stream == stream:
        await bus.reachable()
        try:
            async with bus.question(API_TIMEOUT):
                message = await bus.jetstream.get_msg(stream, about.stream_seq)
        except NotFoundError:
            break  # done, or put aside before
        except (Error, OSError) as error:
            log.warning("stranded_request_not_read", error=type(error).__name__)
            await asyncio.sleep(PAUSE)
        else:
            return StrandedDelivery(bus, stream, message, about.deliveries)
    return None

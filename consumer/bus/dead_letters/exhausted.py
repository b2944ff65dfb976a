"""Finds requests that the server does not deliver any more, because they reached `max_deliver`.

Normally a worker counts the attempts and dead-letters a request itself. A request that kills each
worker before it can count, or that many shutdowns have requeued, is delivered until `max_deliver`.
Then it stays in its stream without further deliveries. The server publishes an advisory, which a
stream stores until a worker has finalized the request or published it again.
"""

import asyncio

import structlog
from nats.errors import Error
from nats.js.errors import NotFoundError
from pydantic import BaseModel, ValidationError

from consumer.bus.attempt_marks import AttemptMarks
from consumer.bus.connection import API_TIMEOUT, Bus
from consumer.bus.stored_request import RequestInStream
from consumer.ports.bus import Message

log = structlog.get_logger()

PAUSE = 0.5  # seconds between two attempts to read a request


class _Advisory(BaseModel):
    """The required fields of `io.nats.jetstream.advisory.v1.max_deliver`."""

    stream: str
    stream_seq: int
    deliveries: int


async def find_exhausted(
    bus: Bus, stream: str, advisory: Message, marks: AttemptMarks
) -> RequestInStream | None:
    """Return the request of an advisory, or None if it does not exist any more; waits for the bus.

    Args:
        bus: A connection.
        stream: The request stream; an advisory about another stream is ignored.
        advisory: The advisory from the server.
        marks: The marks on the messages of the request stream.

    Raises:
        BusUnavailable: The client has closed the connection; the process must end.
    """
    try:
        about = _Advisory.model_validate_json(advisory.body)
    except ValidationError:
        log.warning("advisory_not_readable")
        return None
    while about.stream == stream:
        await bus.wait_connected()
        try:
            async with bus.api_call(API_TIMEOUT):
                message = await bus.jetstream.get_msg(stream, about.stream_seq)
        except NotFoundError:
            break  # finalized, or published again
        except (Error, OSError) as error:
            log.warning("exhausted_request_not_read", error=type(error).__name__)
            await asyncio.sleep(PAUSE)
        else:
            return RequestInStream(bus, stream, message, deliveries=about.deliveries, marks=marks)
    return None

"""Requests that the server delivers no more, because they reached `max_deliver`.

A worker counts the attempts itself and dead-letters a request with its whole context. What kills a
worker before it can count is delivered until `max_deliver`, and so is a request that many drains
have requeued. It stays in the stream then, and no worker gets it. The server says so in an
advisory, which a stream keeps until a worker has ended the request or published it again.
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
    """What is read of `io.nats.jetstream.advisory.v1.max_deliver`."""

    stream: str
    stream_seq: int
    deliveries: int


async def find_exhausted(
    bus: Bus, stream: str, advisory: Message, marks: AttemptMarks
) -> RequestInStream | None:
    """The request that an advisory is about, or None when it is gone; waits for the bus.

    Args:
        bus: A connection.
        stream: The request stream: an advisory that names another one is not followed.
        advisory: What the server has said.
        marks: The marks on the messages of the request stream.

    Raises:
        BusUnavailable: The client has given up; the process has to end.
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
            break  # ended, or published again
        except (Error, OSError) as error:
            log.warning("exhausted_request_not_read", error=type(error).__name__)
            await asyncio.sleep(PAUSE)
        else:
            return RequestInStream(bus, stream, message, deliveries=about.deliveries, marks=marks)
    return None

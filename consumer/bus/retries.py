"""Moves requests whose next attempt is due from the retries stream to the request stream.

A NAK with a delay in the request stream would occupy one of the durable's `max_ack_pending` for the
delay, and could block every other request. Therefore a worker stores the request in the retries
stream and acknowledges the delivery. All workers of the queue move due requests back.
"""

import json
import re
from datetime import datetime

import structlog
from nats.errors import Error

from consumer.bus.connection import API_TIMEOUT, Bus
from consumer.bus.delivery import JetStreamDelivery
from consumer.bus.publishing import JetStreamEvents
from consumer.bus.topology import Durable
from consumer.ports.bus import MessageTooLarge, QueueFull
from generation_contracts.headers import RETRY_DELAY
from generation_contracts.subjects import is_request_id

log = structlog.get_logger()

PAUSE_FULL = 5.0  # seconds until the next attempt on a full request stream
PAUSE_TOO_LARGE = 60.0  # seconds; until an operator has raised the request stream's max_msg_size
PAUSE_UNANSWERED = 1.0  # seconds


class RetryMover:
    """Publishes requests again when their next attempt is due.

    Args:
        bus: The connection.
        queue: Queue of the requests.
        durable: The durable of the retries stream whose deliveries are passed to `move`.
        events: Publishes to the request stream.
    """

    def __init__(self, bus: Bus, queue: str, durable: Durable, events: JetStreamEvents) -> None:
        self._bus = bus
        self._queue = queue
        self._durable = durable
        self._events = events

    async def move(self, retry: JetStreamDelivery) -> None:
        """Publish a request to its subject again if it is due, else delay its delivery.

        Raises:
            BusUnavailable: The client has closed the connection; the process must end.
        """
        request_id = retry.subject.rpartition(".")[2]
        delay = str(retry.headers.get(RETRY_DELAY, ""))
        if not re.fullmatch(r"[0-9]{1,12}", delay, re.ASCII) or not is_request_id(request_id):
            # A sender can name this subject as a reply subject, and the server publishes there.
            log.warning("invalid_message_in_retries", subject=retry.subject)
            await retry.ack()
            return
        try:
            left = (retry.stored_at - await self._now()).total_seconds() + int(delay) / 1000
        except (Error, OSError) as error:
            log.warning("server_time_not_read", error=type(error).__name__)
            await retry.nak_later(PAUSE_UNANSWERED)
            return
        if left > 0:
            await retry.nak_later(left)
            return
        try:
            await self._events.publish_again(self._queue, retry, request_id=request_id)
        except QueueFull:
            await retry.nak_later(PAUSE_FULL)
        except MessageTooLarge:
            log.exception("retry_too_large")
            await retry.nak_later(PAUSE_TOO_LARGE)
        else:
            await retry.ack()

    async def _now(self) -> datetime:
        """Return the time of the server, because the clock of a worker may differ from it."""
        consumer = f"{self._durable.stream}.{self._durable.name}"
        async with self._bus.api_call(API_TIMEOUT):
            reply = await self._bus.client.request(
                f"$JS.API.CONSUMER.INFO.{consumer}", timeout=API_TIMEOUT
            )
        timestamp = json.loads(reply.data).get("ts")
        if timestamp is None:
            raise Error
        return datetime.fromisoformat(timestamp)

"""Requests that wait for their next attempt, in a stream of their own.

A NAK with a delay in the request stream would hold one of the durable's `max_ack_pending` for the
delay and block every other request. So a worker stores the request in the stream of retries and
acknowledges the delivery. Every worker of the task moves what is due back to the request subject.
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
from generation_contracts import Task
from generation_contracts.headers import RETRY_DELAY
from generation_contracts.subjects import is_request_id

log = structlog.get_logger()

PAUSE_FULL = 5.0  # seconds until a full request stream is tried again
PAUSE_TOO_LARGE = 60.0  # seconds; until an operator has raised the request stream's max_msg_size
PAUSE_UNANSWERED = 1.0  # seconds


class RetryMover:
    """Publishes requests again when their next attempt is due.

    Args:
        bus: The connection.
        task: Whose requests they are.
        durable: The durable of the retries, whose deliveries come here.
        events: The way to the request stream.
    """

    def __init__(self, bus: Bus, task: Task, durable: Durable, events: JetStreamEvents) -> None:
        self._bus = bus
        self._task = task
        self._durable = durable
        self._events = events

    async def move(self, retry: JetStreamDelivery) -> None:
        """Publish a request to its subject again, or have it delivered here when it is due.

        Raises:
            BusUnavailable: The client has given up; the process has to end.
        """
        request_id = retry.subject.rpartition(".")[2]
        delay = str(retry.headers.get(RETRY_DELAY, ""))
        if not re.fullmatch(r"[0-9]{1,12}", delay, re.ASCII) or not is_request_id(request_id):
            # An answer of the server to a reply subject of a sender's choice.
            log.warning("junk_among_retries", subject=retry.subject)
            await retry.ack()
            return
        try:
            left = (retry.stored_at - await self._now()).total_seconds() + int(delay) / 1000
        except (Error, OSError) as error:
            log.warning("time_not_known", error=type(error).__name__)
            await retry.nak_later(PAUSE_UNANSWERED)
            return
        if left > 0:
            await retry.nak_later(left)
            return
        try:
            await self._events.publish_again(self._task, retry, request_id=request_id)
        except QueueFull:
            await retry.nak_later(PAUSE_FULL)
        except MessageTooLarge:
            log.exception("retry_too_large")
            await retry.nak_later(PAUSE_TOO_LARGE)
        else:
            await retry.ack()

    async def _now(self) -> datetime:
        """The server's time: a worker's clock may differ from the one that stored the request."""
        about = f"{self._durable.stream}.{self._durable.name}"
        async with self._bus.question(API_TIMEOUT):
            answer = await self._bus.client.request(
                f"$JS.API.CONSUMER.INFO.{about}", timeout=API_TIMEOUT
            )
        said = json.loads(answer.data).get("ts")
        if said is None:
            raise Error
        return datetime.fromisoformat(said)

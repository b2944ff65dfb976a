"""The queue as one looks for a request in it, and the workers as one asks who has it."""

from collections.abc import AsyncIterator, Mapping

import structlog
from nats.errors import Error, NoRespondersError
from nats.js.api import RawStreamMsg
from nats.js.errors import NotFoundError

from consumer.bus.connection import API_TIMEOUT, Bus, BusUnavailable
from consumer.bus.stored_request import RequestInStream
from consumer.ports import Grip, StoredRequest
from generation_contracts import Subjects, Task

log = structlog.get_logger()

# Seconds for the worker that has a request to say so. Nobody says no; and the answer waits for a
# note in a stream, which takes a millisecond.
ANSWER_WITHIN = 0.8


class JetStreamQueue:
    """Implements `consumer.ports.Queue`.

    Args:
        bus: A connection.
        subjects: Where requests are.
        durables: Names of the durable consumers, by task.
    """

    def __init__(self, bus: Bus, subjects: Subjects, durables: Mapping[Task, str]) -> None:
        self._bus = bus
        self._subjects = subjects
        self._durables = durables

    async def find(self, request_id: str) -> list[StoredRequest]:
        """Every message in the request streams whose subject has the id.

        Raises:
            BusUnavailable: The server does not answer.
        """
        try:
            async with self._bus.question(API_TIMEOUT):
                return [
                    StoredRequest(
                        task, self._delivery(message, task), await self._untouched(message, task)
                    )
                    for task in Task
                    async for message in self._messages(task, request_id)
                ]
        except (Error, OSError, TimeoutError) as error:
            raise BusUnavailable(
                f"NATS: the queue cannot be read: {type(error).__name__}"
            ) from None

    async def _messages(self, task: Task, request_id: str) -> AsyncIterator[RawStreamMsg]:
        stream = self._subjects.requests_stream(task)
        subject = self._subjects.request(task, request_id)
        sequence = 0
        while True:
            try:
                message = await self._bus.jetstream.get_msg(
                    stream, sequence + 1, subject=subject, next=True
                )
            except NotFoundError:
                return
            yield message
            sequence = message.seq or 0

    def _delivery(self, message: RawStreamMsg, task: Task) -> RequestInStream:
        stream = self._subjects.requests_stream(task)
        return RequestInStream(self._bus, stream, message, deliveries=1)

    async def _untouched(self, message: RawStreamMsg, task: Task) -> bool:
        try:
            info = await self._bus.jetstream.consumer_info(
                self._subjects.requests_stream(task), self._durables[task]
            )
        except NotFoundError:
            return False  # another name than the usual one: the workers are asked
        return info.delivered is not None and (message.seq or 0) > info.delivered.stream_seq


class BroadcastWorkers:
    """Implements `consumer.ports.Workers`: all hear it, and only the one that has it answers."""

    def __init__(self, bus: Bus, subjects: Subjects) -> None:
        self._bus = bus
        self._subjects = subjects

    async def ask(self, request_id: str) -> Grip | None:
        """Ask whoever has a request to stop it."""
        try:
            async with self._bus.question(ANSWER_WITHIN):
                answer = await self._bus.client.request(
                    self._subjects.interrupt(request_id), timeout=ANSWER_WITHIN
                )
            return Grip(answer.data.decode())
        except (TimeoutError, NoRespondersError, ValueError):
            return None
        except (Error, OSError) as error:
            log.warning("workers_not_asked", error=type(error).__name__)
            return None

    async def tell(self, request_id: str) -> None:
        """The same without waiting for an answer."""
        try:
            await self._bus.client.publish(self._subjects.interrupt(request_id))
        except (Error, OSError) as error:
            log.warning("workers_not_told", error=type(error).__name__)

"""The sender's side of the bus: publish a request, hear its events, collect its result."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import structlog
from nats.aio.msg import Msg
from nats.errors import Error
from nats.errors import TimeoutError as BusTimeout
from nats.js.errors import APIError, NoStreamResponseError
from pydantic import ValidationError

from consumer.bus.codes import STREAM_FULL, TOO_LARGE_FOR_STREAM
from consumer.bus.connection import API_TIMEOUT, Bus, BusUnavailable
from consumer.bus.publishing import JetStreamEvents
from consumer.ports import MessageTooLarge, Unavailable
from generation_contracts import (
    ProgressEvent,
    Request,
    StartedEvent,
    Subjects,
    Task,
    TerminalEvent,
    decode_event,
    encode,
)
from generation_contracts.headers import MESSAGE_ID, wire_size

log = structlog.get_logger()

LOOK_EVERY = 2.0  # seconds; a result whose announcement was missed is found in the stream

AnyEvent = StartedEvent | ProgressEvent | TerminalEvent


class QueueFull(Unavailable):
    """The request stream takes no more; the request was not stored."""

    def __init__(self) -> None:
        super().__init__("the queue is full: try again later")


class Requester:
    """Publishes requests and hears what becomes of them.

    Args:
        bus: A connection.
        subjects: Where requests go and events come from.
    """

    def __init__(self, bus: Bus, subjects: Subjects) -> None:
        self._bus = bus
        self._subjects = subjects
        self._results = JetStreamEvents(bus, subjects, ensure=_leave_alone)

    async def submit(
        self, task: Task, request: Request, *, headers: Mapping[str, str] | None = None
    ) -> None:
        """Store a request durably; it must have an id, which makes a second submit harmless.

        Args:
            task: Whose queue.
            request: With an id.
            headers: In addition, or in the place of the usual `Nats-Msg-Id`.

        Raises:
            QueueFull: The stream is full.
            MessageTooLarge: The request does not fit the server's limit or the stream's.
            BusUnavailable: No server, or no stream for requests.
        """
        if request.request_id is None:
            raise ValueError("a request that is submitted has an id")
        body = encode(request)
        sent = {MESSAGE_ID: f"{task}.{request.request_id}", **(headers or {})}
        if wire_size(body, sent) > self._bus.client.max_payload:
            raise MessageTooLarge
        subject = self._subjects.request(task, request.request_id)
        try:
            await self._bus.jetstream.publish(subject, body, timeout=API_TIMEOUT, headers=sent)
        except NoStreamResponseError:
            raise BusUnavailable("NATS: there is no request stream; run `consumer apply`") from None
        except APIError as error:
            if error.err_code == STREAM_FULL:
                raise QueueFull from None
            if error.err_code == TOO_LARGE_FOR_STREAM:
                raise MessageTooLarge from None
            raise BusUnavailable(f"NATS: the request is refused: {error.description}") from None
        except (BusTimeout, Error, OSError):
            reason = self._bus.last_error or "no answer"
            raise BusUnavailable(f"NATS: the request is not confirmed: {reason}") from None

    @asynccontextmanager
    async def listening(
        self, task: Task, request_id: str
    ) -> AsyncIterator[AsyncIterator[AnyEvent]]:
        """Events of one request, up to and with its terminal one. Listen first, then submit.

        Raises:
            BusUnavailable: The connection is closed for good.
        """
        received: asyncio.Queue[AnyEvent] = asyncio.Queue()

        async def take(message: Msg) -> None:
            try:
                received.put_nowait(decode_event(message.data))
            except ValidationError:
                log.warning("unreadable_event", subject=message.subject)

        progress = await self._bus.client.subscribe(
            self._subjects.progress(task, request_id), cb=take
        )
        result = await self._bus.client.subscribe(self._subjects.result(task, request_id), cb=take)
        try:
            yield self._events(task, request_id, received)
        finally:
            if not self._bus.client.is_closed:
                await progress.unsubscribe()
                await result.unsubscribe()

    async def _events(
        self, task: Task, request_id: str, received: "asyncio.Queue[AnyEvent]"
    ) -> AsyncIterator[AnyEvent]:
        while not self._bus.closed.is_set():
            event: AnyEvent | None
            try:
                event = await asyncio.wait_for(received.get(), LOOK_EVERY)
            except TimeoutError:
                event = await self._results.find_result(task, request_id)
            if event is not None:
                yield event
            if isinstance(event, TerminalEvent):
                return
        raise BusUnavailable("NATS: the connection is closed")


async def _leave_alone() -> None:
    """A sender has no business with the streams."""

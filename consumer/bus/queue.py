"""Finds requests in their streams by id, and sends requests to all workers."""

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import structlog
from nats.errors import Error, NoRespondersError
from nats.js.api import RawStreamMsg
from nats.js.errors import NotFoundError
from pydantic_core import from_json, to_json

from consumer.bus.attempt_marks import AttemptMarks, retry_key
from consumer.bus.codes import STREAM_NOT_FOUND
from consumer.bus.connection import API_TIMEOUT, Bus, BusUnavailable
from consumer.bus.queue_directory import QueueDirectory
from consumer.bus.stored_request import RequestInStream
from consumer.ports.bus import IdLookup, Message, StopAck, StoredRequest
from generation_contracts import Subjects, Task

log = structlog.get_logger()

# Seconds to wait for the worker that has a request in progress. Workers without the request do not
# reply. The worker stores an attempt mark before it replies, which takes a millisecond.
STOP_TIMEOUT = 0.8
IN_PROGRESS_TIMEOUT = 0.3  # seconds to wait for a reply that does not need a mark
PAUSE = 0.1  # seconds between two attempts to read a stream

# Body of a request to all workers, so that the sending process does not reply to itself.
PROCESS = uuid4().hex.encode()


@dataclass(frozen=True)
class _Counts:
    """Message and consumer counts from STREAM.INFO.

    Attributes:
        subjects: Number of messages by subject, for the subjects of the filter.
        consumers: Number of consumers of the stream.
    """

    subjects: Mapping[str, int]
    consumers: int


class JetStreamQueue:
    """Implements `consumer.ports.bus.Queue`.

    Args:
        bus: A connection.
        subjects: Subjects of the installation.
        durables: Names of durable consumers that differ from the name of their queue.
        directory: Lists the queues; by default a new one on the same connection.
    """

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        durables: Mapping[str, str],
        directory: QueueDirectory | None = None,
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._durables = durables
        self._directory = directory or QueueDirectory(bus, subjects)

    async def names(self) -> Collection[str]:
        """Return the names of all queues; the last known ones if the server does not answer."""
        return (await self._directory.known()).keys()

    async def queue_for(self, task: Task, model: str | None) -> str | None:
        """Return the name of the queue for a model; None if no queue serves it. Waits for the bus.

        Raises:
            BusUnavailable: The client has closed the connection; the process must end.
        """
        while True:
            await self._bus.wait_connected()
            try:
                return await self._directory.queue_for(task, model)
            except BusUnavailable as error:
                log.warning("queues_not_listed", reason=str(error))
                await asyncio.sleep(PAUSE)

    async def find(self, request_id: str) -> IdLookup:
        """Return which queues have a request or a result under an id, without loading messages.

        Raises:
            BusUnavailable: The server does not answer.
        """
        # Sequentially: many concurrent cancellations are limited by the CPU, and three asyncio
        # tasks cost more CPU than the round trips.
        try:
            names = await self.names()
            requests = [n for n in names if (await self._requests(n, request_id)).subjects]
        except (Error, OSError, TimeoutError) as error:
            raise _unreadable(error) from None
        return IdLookup(frozenset(requests), await self.find_results(request_id))

    async def find_results(self, request_id: str) -> frozenset[str]:
        """Return the queues whose result subject for this id has a message.

        Raises:
            BusUnavailable: The server does not answer.
        """
        stream, prefix = self._subjects.results_stream, f"{self._subjects.root}.result."
        try:
            found = (await self._counts(stream, f"{prefix}*.{request_id}")).subjects
        except (Error, OSError, TimeoutError) as error:
            raise _unreadable(error) from None
        return frozenset(subject.removeprefix(prefix).partition(".")[0] for subject in found)

    async def oldest(self, queue: str, request_id: str) -> StoredRequest | None:
        """Load the oldest message of a request stream whose subject has the id.

        Raises:
            BusUnavailable: The server does not answer.
        """
        try:
            message = await self._first(queue, request_id)
            if message is None:
                return None
            never_delivered = await self._untouched(queue, message.seq or 0)
        except (Error, OSError, TimeoutError) as error:
            raise _unreadable(error) from None
        return StoredRequest(self._delivery(queue, message), never_delivered)

    async def older(self, queue: str, request_id: str, than: Message) -> RequestInStream | None:
        """Load the oldest message with the id in its subject, if it is older than `than`.

        Loads nothing if the message of `than` is the only one. Waits for the bus.

        Raises:
            BusUnavailable: The client has closed the connection; the process must end.
        """
        while True:
            await self._bus.wait_connected()
            try:
                stream, subject = self._location(queue, request_id)
                found = (await self._counts(stream, subject)).subjects.get(subject, 0)
                if found == int(than.subject == subject):
                    return None
                message = await self._oldest_of(stream, subject)
            except (BusUnavailable, Error, OSError, TimeoutError) as error:
                log.warning("queue_not_read", error=type(error).__name__)
                await asyncio.sleep(PAUSE)
            else:
                is_older = message is not None and (message.seq or 0) < than.stream_sequence
                return self._delivery(queue, message) if message and is_older else None

    async def owner(self, queue: str, request_id: str) -> str | None:
        """Return the digest that an id is reserved for since a retry of its request was stored.

        Raises:
            BusUnavailable: The client has closed the connection; the process must end.
        """
        return await self._marks(queue).owner(request_id)

    async def cancel_retry(self, queue: str, request_id: str) -> None:
        """Mark a request as cancelled for the worker of its next attempt. Never raises."""
        await self._marks(queue).mark_cancelled(retry_key(request_id))

    async def _requests(self, queue: str, request_id: str) -> _Counts:
        stream, subject = self._location(queue, request_id)
        return await self._counts(stream, subject)

    async def _counts(self, stream: str, subjects: str) -> _Counts:
        # The method of nats-py builds objects from the whole reply, which takes twice as long.
        query = to_json({"subjects_filter": subjects})
        reply = await self._bus.request(f"$JS.API.STREAM.INFO.{stream}", query, within=API_TIMEOUT)
        info: dict[str, Any] = from_json(reply)
        error = info.get("error", {})
        if error.get("err_code") == STREAM_NOT_FOUND:
            return _Counts({}, 0)
        if error:
            raise BusUnavailable(f"NATS: stream {stream}: {error.get('description')}")
        state = info["state"]
        return _Counts(state.get("subjects") or {}, state["consumer_count"])

    async def _first(self, queue: str, request_id: str) -> RawStreamMsg | None:
        return await self._oldest_of(*self._location(queue, request_id))

    async def _oldest_of(self, stream: str, subject: str) -> RawStreamMsg | None:
        try:
            async with self._bus.api_call(API_TIMEOUT):
                return await self._bus.jetstream.get_msg(stream, 1, subject=subject, next=True)
        except NotFoundError:
            return None

    async def _untouched(self, queue: str, sequence: int) -> bool:
        stream, durable = self._subjects.requests_stream(queue), self._durables.get(queue, queue)
        try:
            async with self._bus.api_call(API_TIMEOUT):
                info = await self._bus.jetstream.consumer_info(stream, durable)
        except NotFoundError:
            # A durable with a configured name may have delivered the message. Without any consumer
            # on the stream, no message has been delivered.
            return (await self._counts(stream, "")).consumers == 0
        return info.delivered is not None and sequence > info.delivered.stream_seq

    def _location(self, queue: str, request_id: str) -> tuple[str, str]:
        """Return the stream and the subject of a request."""
        return self._subjects.requests_stream(queue), self._subjects.request(queue, request_id)

    def _delivery(self, queue: str, message: RawStreamMsg) -> RequestInStream:
        stream = self._subjects.requests_stream(queue)
        marks = self._marks(queue)
        return RequestInStream(self._bus, stream, message, deliveries=1, marks=marks)

    def _marks(self, queue: str) -> AttemptMarks:
        return AttemptMarks(self._bus, self._subjects, queue)


class BroadcastWorkers:
    """Implements `consumer.ports.bus.Workers`: all workers receive a request, at most one replies.

    Args:
        bus: A connection.
        subjects: Subjects of the installation.
        task: Task of this worker.
        queue: Queue of this worker.
        durables: Names of durable consumers that differ from the name of their queue.
    """

    def __init__(
        self, bus: Bus, subjects: Subjects, *, queue: str, durables: Mapping[str, str]
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._stream = subjects.requests_stream(queue)
        self._durable = durables.get(queue, queue)
        self._stop_requests: set[asyncio.Task[StopAck | None]] = set()

    async def request_stop(self, request_id: str) -> "asyncio.Task[StopAck | None]":
        """Request all workers to stop a request; return a task that waits for the reply."""
        stopping = asyncio.create_task(self._request_stop(request_id), name="stop request")
        self._stop_requests.add(stopping)
        stopping.add_done_callback(self._stop_requests.discard)
        # The client writes the message before its first await. Messages that are sent after this
        # line therefore reach the server after it.
        await asyncio.sleep(0)
        return stopping

    async def _request_stop(self, request_id: str) -> StopAck | None:
        reply = await self._request(self._subjects.interrupt(request_id), b"", STOP_TIMEOUT)
        try:
            return None if reply is None else StopAck(reply.decode())
        except ValueError:
            log.warning("unknown_worker_reply")
            return None

    async def notify_stop(self, request_id: str) -> None:
        """Request all workers to stop a request, without a reply."""
        try:
            await self._bus.client.publish(self._subjects.interrupt(request_id))
        except (Error, OSError) as error:
            log.warning("workers_not_reached", error=type(error).__name__)

    async def is_in_progress(self, request_id: str) -> bool:
        """Return whether a worker in another process has a job with this id."""
        subject = self._subjects.holder(request_id)
        return await self._request(subject, PROCESS, IN_PROGRESS_TIMEOUT) is not None

    async def others_idle(self) -> bool:
        """Return whether the durable of this queue has a pull request of another worker."""
        try:
            async with self._bus.api_call(API_TIMEOUT):
                info = await self._bus.jetstream.consumer_info(self._stream, self._durable)
        except (Error, OSError) as error:
            log.warning("pull_requests_not_counted", error=type(error).__name__)
            return False
        return bool(info.num_waiting)

    async def _request(self, subject: str, body: bytes, within: float) -> bytes | None:
        try:
            return await self._bus.request(subject, body, within=within)
        except (TimeoutError, NoRespondersError):
            return None
        except (Error, OSError) as error:
            log.warning("workers_not_reached", error=type(error).__name__)
            return None


def _unreadable(error: Exception) -> BusUnavailable:
    return BusUnavailable(f"NATS: the queue cannot be read: {type(error).__name__}")

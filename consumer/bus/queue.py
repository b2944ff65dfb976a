"""Requests found in their streams by id, and questions to all workers at once."""

import asyncio
from collections.abc import Mapping
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
from consumer.bus.stored_request import RequestInStream
from consumer.ports.bus import IdLookup, Message, StopAck, StoredRequest
from generation_contracts import Subjects, Task

log = structlog.get_logger()

# Seconds in which a worker that has a request says so. A worker that does not have it sends no
# answer. The answer follows a note in a stream, which takes a millisecond.
STOP_TIMEOUT = 0.8
IN_PROGRESS_TIMEOUT = 0.3  # seconds for the same without the note
PAUSE = 0.1  # seconds between two attempts to read a stream

# Sent with a question, so that the process that asks does not answer it.
PROCESS = uuid4().hex.encode()


@dataclass(frozen=True)
class _Counts:
    """What STREAM.INFO says of a stream.

    Attributes:
        subjects: Number of messages, by subject; only of the subjects that were asked for.
        consumers: How many consumers the stream has.
    """

    subjects: Mapping[str, int]
    consumers: int


class JetStreamQueue:
    """Implements `consumer.ports.bus.Queue`.

    Args:
        bus: A connection.
        subjects: Where requests and results are.
        durables: Names of the durable consumers, by task.
    """

    def __init__(self, bus: Bus, subjects: Subjects, durables: Mapping[Task, str]) -> None:
        self._bus = bus
        self._subjects = subjects
        self._durables = durables
        self._marks = {task: AttemptMarks(bus, subjects, task) for task in Task}

    async def find(self, request_id: str) -> IdLookup:
        """Count what is stored under an id, in the request streams and under the result subjects.

        Raises:
            BusUnavailable: The server does not answer.
        """
        # One question after another: in a storm of cancellations the CPU is what is short, and
        # three tasks cost more than the round trips.
        try:
            requests = [t for t in Task if (await self._requests(t, request_id)).subjects]
        except (Error, OSError, TimeoutError) as error:
            raise _unreadable(error) from None
        return IdLookup(frozenset(requests), await self.find_results(request_id))

    async def find_results(self, request_id: str) -> frozenset[Task]:
        """Look which result subjects with this id have a message.

        Raises:
            BusUnavailable: The server does not answer.
        """
        stream, anywhere = self._subjects.results_stream, f"{self._subjects.root}.result.*."
        try:
            found = (await self._counts(stream, f"{anywhere}{request_id}")).subjects
        except (Error, OSError, TimeoutError) as error:
            raise _unreadable(error) from None
        return frozenset(t for t in Task if self._subjects.result(t, request_id) in found)

    async def oldest(self, task: Task, request_id: str) -> StoredRequest | None:
        """Load the oldest message of a request stream whose subject has the id.

        Raises:
            BusUnavailable: The server does not answer.
        """
        try:
            message = await self._first(task, request_id)
            if message is None:
                return None
            never_delivered = await self._untouched(task, message.seq or 0)
        except (Error, OSError, TimeoutError) as error:
            raise _unreadable(error) from None
        return StoredRequest(self._delivery(task, message), never_delivered)

    async def older(self, task: Task, request_id: str, than: Message) -> RequestInStream | None:
        """Load the oldest message with the id in its subject, if it comes before a delivery.

        No body is loaded where the delivery's own message is the only one.

        Raises:
            BusUnavailable: The client has given up; the process has to end.
        """
        while True:
            await self._bus.wait_connected()
            try:
                stream, subject = self._place(task, request_id)
                found = (await self._counts(stream, subject)).subjects.get(subject, 0)
                if found == int(than.subject == subject):
                    return None
                message = await self._oldest_of(stream, subject)
            except (BusUnavailable, Error, OSError, TimeoutError) as error:
                log.warning("queue_not_read", error=type(error).__name__)
                await asyncio.sleep(PAUSE)
            else:
                is_older = message is not None and (message.seq or 0) < than.stream_sequence
                return self._delivery(task, message) if message and is_older else None

    async def owner(self, task: Task, request_id: str) -> str | None:
        """Return the digest of the request that an id belongs to, where one waits or waited.

        Raises:
            BusUnavailable: The client has given up; the process has to end.
        """
        return await self._marks[task].owner(request_id)

    async def cancel_retry(self, task: Task, request_id: str) -> None:
        """Mark a request as cancelled for the worker that gets its next attempt."""
        await self._marks[task].mark_cancelled(retry_key(request_id))

    async def _requests(self, task: Task, request_id: str) -> _Counts:
        stream, subject = self._place(task, request_id)
        return await self._counts(stream, subject)

    async def _counts(self, stream: str, subjects: str) -> _Counts:
        # nats-py's own method builds objects from the whole answer, which takes twice as long.
        query = to_json({"subjects_filter": subjects})
        answer = await self._bus.request(f"$JS.API.STREAM.INFO.{stream}", query, within=API_TIMEOUT)
        info: dict[str, Any] = from_json(answer)
        error = info.get("error", {})
        if error.get("err_code") == STREAM_NOT_FOUND:
            return _Counts({}, 0)
        if error:
            raise BusUnavailable(f"NATS: stream {stream}: {error.get('description')}")
        state = info["state"]
        return _Counts(state.get("subjects") or {}, state["consumer_count"])

    async def _first(self, task: Task, request_id: str) -> RawStreamMsg | None:
        return await self._oldest_of(*self._place(task, request_id))

    async def _oldest_of(self, stream: str, subject: str) -> RawStreamMsg | None:
        try:
            async with self._bus.api_call(API_TIMEOUT):
                return await self._bus.jetstream.get_msg(stream, 1, subject=subject, next=True)
        except NotFoundError:
            return None

    async def _untouched(self, task: Task, sequence: int) -> bool:
        stream = self._subjects.requests_stream(task)
        try:
            async with self._bus.api_call(API_TIMEOUT):
                info = await self._bus.jetstream.consumer_info(stream, self._durables[task])
        except NotFoundError:
            # A durable with another name than the usual one may have delivered it. Where the
            # stream has no consumer at all, nothing has been delivered.
            return (await self._counts(stream, "")).consumers == 0
        return info.delivered is not None and sequence > info.delivered.stream_seq

    def _place(self, task: Task, request_id: str) -> tuple[str, str]:
        return self._subjects.requests_stream(task), self._subjects.request(task, request_id)

    def _delivery(self, task: Task, message: RawStreamMsg) -> RequestInStream:
        stream = self._subjects.requests_stream(task)
        return RequestInStream(self._bus, stream, message, deliveries=1, marks=self._marks[task])


class BroadcastWorkers:
    """Implements `consumer.ports.bus.Workers`: all workers receive a question, one answers at most.

    Args:
        bus: A connection.
        subjects: Where the questions go.
        task: The own one.
        durables: Names of the durable consumers, by task.
    """

    def __init__(
        self, bus: Bus, subjects: Subjects, *, task: Task, durables: Mapping[Task, str]
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._stream = subjects.requests_stream(task)
        self._durable = durables[task]
        self._asking: set[asyncio.Task[StopAck | None]] = set()

    async def request_stop(self, request_id: str) -> "asyncio.Task[StopAck | None]":
        """Ask all workers to stop a request; the task that is returned waits for the answer."""
        asking = asyncio.create_task(self._ask(request_id), name="interrupt")
        self._asking.add(asking)
        asking.add_done_callback(self._asking.discard)
        # The client writes the question before it first waits for anything: what is sent after
        # this line reaches the server after the question.
        await asyncio.sleep(0)
        return asking

    async def _ask(self, request_id: str) -> StopAck | None:
        answer = await self._question(self._subjects.interrupt(request_id), b"", STOP_TIMEOUT)
        try:
            return None if answer is None else StopAck(answer.decode())
        except ValueError:
            log.warning("unknown_worker_reply")
            return None

    async def notify_stop(self, request_id: str) -> None:
        """Ask all workers to stop a request, without an answer."""
        try:
            await self._bus.client.publish(self._subjects.interrupt(request_id))
        except (Error, OSError) as error:
            log.warning("workers_not_reached", error=type(error).__name__)

    async def is_in_progress(self, request_id: str) -> bool:
        """Whether a worker in another process has a job with this id."""
        subject = self._subjects.holder(request_id)
        return await self._question(subject, PROCESS, IN_PROGRESS_TIMEOUT) is not None

    async def others_idle(self) -> bool:
        """Whether the own durable has a pull of another worker."""
        try:
            async with self._bus.api_call(API_TIMEOUT):
                info = await self._bus.jetstream.consumer_info(self._stream, self._durable)
        except (Error, OSError) as error:
            log.warning("pull_requests_not_counted", error=type(error).__name__)
            return False
        return bool(info.num_waiting)

    async def _question(self, subject: str, body: bytes, within: float) -> bytes | None:
        try:
            return await self._bus.request(subject, body, within=within)
        except (TimeoutError, NoRespondersError):
            return None
        except (Error, OSError) as error:
            log.warning("workers_not_reached", error=type(error).__name__)
            return None


def _unreadable(error: Exception) -> BusUnavailable:
    return BusUnavailable(f"NATS: the queue cannot be read: {type(error).__name__}")

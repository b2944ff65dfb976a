"""A read-only view of the queues and results, for display: counts, positions and bodies.

The numbers come from the server. The numbers of a queue are cached for a second, so that a thousand
callers cost as much as one.

In addition to the permissions of a publisher, the user of this connection needs permission to
publish to:

    $JS.API.STREAM.LIST                                 names and tasks of all queues
    $JS.API.STREAM.INFO.<root>_REQUESTS_<QUEUE>         counts and subjects of queued requests
    $JS.API.STREAM.INFO.<root>_RETRIES
    $JS.API.STREAM.INFO.<root>_RESULTS                  subjects of ended requests
    $JS.API.CONSUMER.INFO.<root>_REQUESTS_<QUEUE>.<durable>
    $JS.API.STREAM.MSG.GET.<root>_REQUESTS_<QUEUE>      the position of one request in its queue
    $JS.API.STREAM.MSG.GET.<root>_RETRIES
    $JS.API.STREAM.MSG.GET.<root>_RESULTS
"""

import asyncio
import json
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any

from nats.errors import Error
from pydantic_core import from_json

from consumer.bus.cached_read import CachedRead
from consumer.bus.codes import CONSUMER_NOT_FOUND, STREAM_NOT_FOUND
from consumer.bus.connection import API_TIMEOUT, Bus, BusUnavailable
from consumer.bus.queue_directory import QueueDirectory
from consumer.bus.reading import StoredMessage, read_message
from consumer.bus.server_texts import is_permission_error
from generation_contracts import Subjects
from generation_contracts.queues import QueueInfo
from generation_contracts.subjects import is_request_id

AGE = 1.0  # seconds for which numbers are cached
LIST_TIMEOUT = 30.0  # seconds; the server needs several for a list of a million subjects
RECONNECT_TIMEOUT = 2.0  # seconds; a server restart takes less
MAX_DELETED = 10_000  # deleted messages, up to which their sequences are requested
MAX_CACHED = 10_000  # requests whose sequences are cached
_NOT_FOUND = frozenset({STREAM_NOT_FOUND, CONSUMER_NOT_FOUND})


@dataclass(frozen=True)
class QueueState:
    """State of one queue at one moment.

    Attributes:
        delivered: Sequence of the last message that was delivered to a worker.
        in_flight: Number of requests in flight.
        messages: Number of requests in the stream, including those in flight.
        retries: Number of requests in the retries stream, which wait for their next attempt.
        first: Sequence of the first message in the stream.
        deleted: Sequences of deleted messages after the first one, ascending.
    """

    delivered: int = 0
    in_flight: int = 0
    messages: int = 0
    retries: int = 0
    first: int = 0
    deleted: tuple[int, ...] = field(default=(), repr=False)

    @property
    def waiting(self) -> int:
        """Number of requests that are not in flight."""
        return max(0, self.messages - self.in_flight) + self.retries

    def before(self, sequence: int) -> int:
        """Return an upper bound of the requests before the message with a sequence.

        Requests in flight are included.
        """
        if sequence <= self.delivered:
            return max(0, min(self.in_flight - 1, self._stored_between(self.first, sequence)))
        first = max(self.delivered + 1, self.first)
        return self.in_flight + self._stored_between(first, sequence)

    def _stored_between(self, first: int, end: int) -> int:
        """Count the messages from sequence `first` up to, but not including, `end`."""
        deleted = bisect_left(self.deleted, end) - bisect_left(self.deleted, first)
        return max(0, end - first - deleted)


@dataclass(frozen=True)
class QueuePosition:
    """Position of a request in its queue.

    Attributes:
        stored_at: Time at which its message was stored, by the server's clock.
        delivered: Whether a worker has received it. The server does not show whether that worker
            has requeued it since.
        before: Upper bound of the requests before it, including those in flight.
    """

    stored_at: datetime
    delivered: bool
    before: int


class QueueView:
    """Reads queues and results.

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
        self._states: dict[str, CachedRead[QueueState]] = {}
        self._cache: OrderedDict[tuple[str, str], _CachedMessage] = OrderedDict()

    async def queues(self) -> Mapping[str, QueueInfo]:
        """Return all queues by name; the last known ones if the server does not answer."""
        return await self._directory.known()

    async def state(self, queue: str) -> QueueState:
        """Return the numbers of a queue, at most a second old.

        Raises:
            BusUnavailable: The server does not answer.
        """
        if queue not in self._states:
            self._states[queue] = CachedRead(partial(self._read_state, queue), age=AGE)
        return await self._states[queue].get()

    async def unfinished(self) -> Mapping[str, str]:
        """Return the ids of all requests that wait or run, with their queues.

        The server needs 2.5 microseconds for each id.

        Raises:
            BusUnavailable: The server does not answer.
        """
        subjects = self._subjects
        retries = (subjects.retries_stream, f"{subjects.root}.retry.")
        queues = await self.queues()
        requests = [(subjects.requests_stream(q), f"{subjects.root}.request.") for q in queues]
        found: dict[str, str] = {}
        # A request may move between the streams during the reads. Reading the retries first and
        # last finds it at least once.
        for stream, prefix in (retries, *requests, retries):
            found.update(_ids(await self._subjects_of(stream, f"{prefix}>"), prefix, queues))
        return found

    async def ended(self) -> Mapping[str, str]:
        """Return the ids of all requests that have a terminal event, with their queues.

        The server needs 2.5 microseconds for each id, and as much again for each page of 100,000:
        2 seconds for 300,000 results, 25 seconds for a million.

        Raises:
            BusUnavailable: The server does not answer.
        """
        subjects, prefix = self._subjects, f"{self._subjects.root}.result."
        found = await self._subjects_of(subjects.results_stream, f"{prefix}>")
        return _ids(found, prefix, await self.queues())

    async def position(self, queue: str, request_id: str) -> QueuePosition | None:
        """Find the position of a request that waits or runs.

        Returns:
            The position, or None if no message of this request is stored.

        Raises:
            BusUnavailable: The server does not answer.
        """
        state = await self.state(queue)
        cached = self._cache.get((queue, request_id))
        # The cached sequence of an undelivered message is valid; a retry gets a new sequence.
        if cached is None or cached.sequence <= state.delivered:
            cached = await self._cached_message(queue, request_id)
        if cached is not None:
            delivered = cached.sequence <= state.delivered
            return QueuePosition(cached.stored_at, delivered, state.before(cached.sequence))
        last = state.in_flight + state.waiting
        retry = await self._read_retry(queue, request_id)
        if retry is not None:
            return QueuePosition(retry.stored_at, delivered=False, before=last)
        # The request may have moved to the request stream between the two reads.
        cached = await self._cached_message(queue, request_id)
        if cached is None:
            return None
        return QueuePosition(cached.stored_at, delivered=False, before=last)

    async def body(self, queue: str, request_id: str) -> bytes | None:
        """Read the body of the oldest stored request with an id, or return None.

        Raises:
            BusUnavailable: The server does not answer.
        """
        message = await self._read_queued(queue, request_id)
        message = message or await self._read_retry(queue, request_id)
        message = message or await self._read_queued(queue, request_id)
        return None if message is None else message.body

    async def _cached_message(self, queue: str, request_id: str) -> "_CachedMessage | None":
        message = await self._read_queued(queue, request_id)
        if message is None:
            self._cache.pop((queue, request_id), None)
            return None
        cached = _CachedMessage(message.sequence, message.stored_at)
        self._cache[queue, request_id] = cached
        if len(self._cache) > MAX_CACHED:
            self._cache.popitem(last=False)
        return cached

    async def _read_queued(self, queue: str, request_id: str) -> StoredMessage | None:
        # The first message of the subject: workers do not run the copies after it.
        subject = self._subjects.request(queue, request_id)
        return await self._read(self._subjects.requests_stream(queue), subject, sequence=1)

    async def _read_retry(self, queue: str, request_id: str) -> StoredMessage | None:
        subject = self._subjects.retry(queue, request_id)
        return await self._read(self._subjects.retries_stream, subject)

    async def _read(
        self, stream: str, subject: str, sequence: int | None = None
    ) -> StoredMessage | None:
        await self._reconnected()
        try:
            return await read_message(self._bus, stream, subject=subject, sequence=sequence)
        except (Error, OSError, TimeoutError) as error:
            raise self._unavailable(f"STREAM.MSG.GET.{stream}", error) from None

    async def _read_state(self, queue: str) -> QueueState:
        subjects = self._subjects
        stream, retry = subjects.requests_stream(queue), subjects.retry(queue, "x")[:-1]
        durable = self._durables.get(queue, queue)
        consumer, info, retries = await asyncio.gather(
            self._call(f"CONSUMER.INFO.{stream}.{durable}"),
            self._call(f"STREAM.INFO.{stream}"),
            self._subjects_of(subjects.retries_stream, f"{retry}*"),
        )
        state = info.get("state", {})
        gaps = state.get("num_deleted", 0)
        if 0 < gaps <= MAX_DELETED:
            info = await self._call(f"STREAM.INFO.{stream}", {"deleted_details": True})
            state = info.get("state", {})
        return QueueState(
            # Before the first delivery, the server leaves out these fields.
            delivered=consumer.get("delivered", {}).get("stream_seq", 0),
            in_flight=consumer.get("num_ack_pending", 0),
            messages=state.get("messages", 0),
            retries=sum(retries.values()),
            first=state.get("first_seq", 0),
            deleted=tuple(state.get("deleted") or ()),
        )

    async def _subjects_of(self, stream: str, subjects: str) -> dict[str, int]:
        """Count the messages of a stream by subject."""
        found: dict[str, int] = {}
        offset = 0
        while True:
            query = {"subjects_filter": subjects, "offset": offset}
            page = await self._call(f"STREAM.INFO.{stream}", query, within=LIST_TIMEOUT)
            counts = page.get("state", {}).get("subjects") or {}
            found.update(counts)
            offset += len(counts)
            if not counts or offset >= page.get("total", 0):
                return found

    async def _call(
        self, subject: str, query: Mapping[str, Any] | None = None, *, within: float = API_TIMEOUT
    ) -> dict[str, Any]:
        """Call the JetStream API; return an empty dict if the stream or consumer is missing."""
        body = b"" if query is None else json.dumps(query).encode()
        await self._reconnected()
        try:
            reply = await self._bus.request(f"$JS.API.{subject}", body, within=within)
            value: dict[str, Any] = from_json(reply)
        except (Error, OSError, TimeoutError, ValueError) as error:
            raise self._unavailable(subject, error) from None
        problem = value.get("error")
        if problem is None:
            return value
        if problem.get("err_code") in _NOT_FOUND:
            return {}
        raise BusUnavailable(f"NATS: $JS.API.{subject}: {problem.get('description')}")

    async def _reconnected(self) -> None:
        if self._bus.connected:
            return
        try:
            async with asyncio.timeout(RECONNECT_TIMEOUT):
                await self._bus.wait_connected()
        except TimeoutError:
            raise BusUnavailable("NATS: not connected") from None

    def _unavailable(self, subject: str, error: Exception) -> BusUnavailable:
        # The server drops a request without permission and reports the reason asynchronously.
        refused = is_permission_error(self._bus.last_error)
        reason = self._bus.last_error if refused else str(error) or type(error).__name__
        return BusUnavailable(f"NATS: $JS.API.{subject}: {reason}")


@dataclass(frozen=True)
class _CachedMessage:
    """Cached sequence and time of a request's message in the request stream."""

    sequence: int
    stored_at: datetime


def _ids(subjects: Mapping[str, int], prefix: str, queues: Collection[str]) -> dict[str, str]:
    """Return the request ids in the subjects, with their queues."""
    found = {}
    for subject in subjects:
        queue, _, request_id = subject.removeprefix(prefix).partition(".")
        if queue in queues and is_request_id(request_id):
            found[request_id] = queue
    return found

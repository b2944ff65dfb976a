"""Reads dead letters from their stream: all of them without bodies, or one with its body."""

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

import structlog
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from nats.js.errors import APIError

from consumer.bus.codes import STREAM_NOT_FOUND
from consumer.bus.connection import API_TIMEOUT, Bus, BusUnavailable
from consumer.bus.delivery import is_delivery
from consumer.bus.reading import read_message
from generation_contracts import Subjects, Task
from generation_contracts.headers import (
    DEAD_LETTER_ATTEMPTS,
    DEAD_LETTER_CODE,
    DEAD_LETTER_REASON,
    DEAD_LETTER_REQUEST_ID,
    DEAD_LETTER_SUBJECT,
    DEAD_LETTER_TIME,
    DEAD_LETTER_TRUNCATED,
    DEAD_LETTER_WORKER,
    ORIGINAL_PREFIX,
)

log = structlog.get_logger()

BATCH = 256  # dead letters per pull request; each has at most 64 kB of headers
INACTIVE_THRESHOLD = (
    30.0  # seconds after which the server drops the consumer of a listing that died
)
_MESSAGE_SIZE = "Nats-Msg-Size"  # bytes of the body; set by the server for `headers_only`
_SEQUENCES = 2**64


class DeadLetterNotFound(Exception):  # noqa: N818 - a state of the stream
    """No dead letter has this sequence."""


@dataclass(frozen=True)
class StoredDeadLetter:
    """A dead letter: a request that no worker could handle.

    A text is empty if its header is missing.

    Attributes:
        sequence: Sequence of the message in the dead-letter stream.
        stored_at: Time at which that stream stored the message, aware.
        queue: Queue of the request, from the subject.
        headers: All headers of the message.
        size: Size of the body in bytes.
        body: Body of the request; None in a listing.
    """

    sequence: int
    stored_at: datetime
    queue: str
    headers: dict[str, str] = field(repr=False)
    size: int
    body: bytes | None = field(default=None, repr=False)

    @property
    def task(self) -> Task | None:
        """Task of a default queue; None for any other queue."""
        return Task(self.queue) if self.queue in set(Task) else None

    @property
    def request_id(self) -> str:
        """Id of the request."""
        return self.headers.get(DEAD_LETTER_REQUEST_ID, "")

    @property
    def code(self) -> str:
        """Code of the failure."""
        return self.headers.get(DEAD_LETTER_CODE, "")

    @property
    def reason(self) -> str:
        """Message of the failure."""
        return self.headers.get(DEAD_LETTER_REASON, "")

    @property
    def attempts(self) -> str:
        """Number of deliveries, in digits."""
        return self.headers.get(DEAD_LETTER_ATTEMPTS, "")

    @property
    def worker(self) -> str:
        """Name of the worker that has dead-lettered the request."""
        return self.headers.get(DEAD_LETTER_WORKER, "")

    @property
    def subject(self) -> str:
        """Subject that the request was published to."""
        return self.headers.get(DEAD_LETTER_SUBJECT, "")

    @property
    def requested_at(self) -> str:
        """Time at which the request was stored, as RFC 3339."""
        return self.headers.get(DEAD_LETTER_TIME, "")

    @property
    def truncated(self) -> bool:
        """Whether the dead letter has only the beginning of the body."""
        return DEAD_LETTER_TRUNCATED in self.headers

    @property
    def originals(self) -> dict[str, str]:
        """Headers of the request, with their original names."""
        return {
            name.removeprefix(ORIGINAL_PREFIX): text
            for name, text in self.headers.items()
            if name.startswith(ORIGINAL_PREFIX)
        }


class DeadLetters:
    """Reads the dead letters of one installation.

    Args:
        bus: A connection.
        subjects: The root determines the stream.
    """

    def __init__(self, bus: Bus, subjects: Subjects) -> None:
        self._bus = bus
        self._subjects = subjects
        self._stream = subjects.dead_letters_stream

    async def list_all(self) -> AsyncIterator[StoredDeadLetter]:
        """Iterate over all dead letters that exist at the start, oldest first, without bodies.

        Raises:
            BusUnavailable: The server does not reply, refuses, or has no such stream.
        """
        with describe_errors(self._bus, self._stream):
            async with self._bus.api_call(API_TIMEOUT):
                last = (await self._bus.jetstream.stream_info(self._stream)).state.last_seq
            async with self._bus.api_call(API_TIMEOUT):
                consumer = await self._bus.jetstream.add_consumer(
                    self._stream,
                    ConsumerConfig(
                        ack_policy=AckPolicy.NONE,
                        deliver_policy=DeliverPolicy.ALL,
                        headers_only=True,
                        inactive_threshold=INACTIVE_THRESHOLD,
                        mem_storage=True,
                    ),
                )
        async with aclosing(self._pulled(consumer.name)) as messages:
            async for message in messages:
                letter = self._from_listing(message)
                if letter.sequence > last:
                    return
                # A message without a code is not a dead letter: a sender can name this subject as
                # a reply subject, and the server publishes there.
                if letter.code:
                    yield letter

    async def read(self, sequence: int) -> StoredDeadLetter:
        """Read one dead letter with its body.

        Raises:
            DeadLetterNotFound: No dead letter has this sequence.
            BusUnavailable: As in `list_all`.
        """
        if not 0 < sequence < _SEQUENCES:
            raise DeadLetterNotFound
        with describe_errors(self._bus, self._stream):
            found = await read_message(self._bus, self._stream, sequence=sequence)
        if found is None:
            raise DeadLetterNotFound
        return StoredDeadLetter(
            sequence=sequence,
            stored_at=found.stored_at,
            queue=self._queue(found.subject),
            headers=found.headers,
            size=len(found.body),
            body=found.body,
        )

    async def _pulled(self, consumer: str) -> AsyncGenerator[Msg]:
        # `fetch` of nats-py waits for its whole timeout if messages are missing. A pull request
        # with `no_wait` ends with the status 404, unless the batch is full.
        inbox = self._bus.client.new_inbox()
        subscription = await self._bus.client.subscribe(inbox)
        pull = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{consumer}"
        try:
            while True:
                with describe_errors(self._bus, self._stream):
                    request = b'{"batch":%d,"no_wait":true}' % BATCH
                    await self._bus.client.publish(pull, request, reply=inbox)
                for _ in range(BATCH):
                    with describe_errors(self._bus, self._stream):
                        async with self._bus.api_call(API_TIMEOUT):
                            message = await subscription.next_msg(timeout=API_TIMEOUT)
                    if not is_delivery(message):
                        _require_end(message)
                        return
                    yield message
        finally:
            await self._delete_consumer(consumer, subscription)

    async def _delete_consumer(self, consumer: str, subscription: Subscription) -> None:
        try:
            await subscription.unsubscribe()
            async with self._bus.api_call(API_TIMEOUT):
                await self._bus.jetstream.delete_consumer(self._stream, consumer)
        except (Error, OSError) as error:
            # The server deletes the consumer after `INACTIVE_THRESHOLD`.
            log.info("listing_consumer_not_deleted", error=type(error).__name__)

    def _from_listing(self, message: Msg) -> StoredDeadLetter:
        headers = dict(message.headers or {})
        size = int(headers.pop(_MESSAGE_SIZE, "0"))
        return StoredDeadLetter(
            sequence=message.metadata.sequence.stream,
            stored_at=message.metadata.timestamp.astimezone(UTC),
            queue=self._queue(message.subject),
            headers=headers,
            size=size,
        )

    def _queue(self, subject: str) -> str:
        return subject.removeprefix(f"{self._subjects.root}.dead.")


@contextmanager
def describe_errors(bus: Bus, stream: str) -> Iterator[None]:
    """Convert errors of API calls about a stream to `BusUnavailable` with a one-line text.

    Raises:
        BusUnavailable: The block has raised an error of nats-py or an OSError.
    """
    bus.last_error = ""
    try:
        yield
    except APIError as error:
        if error.err_code == STREAM_NOT_FOUND:
            raise _missing(stream) from None
        raise BusUnavailable(f"NATS: {stream}: {error.description or 'refused'}") from None
    except (Error, OSError) as error:
        # The server drops a request without permission and reports the reason asynchronously.
        reason = bus.last_error or ("no reply" if isinstance(error, TimeoutError) else error)
        raise BusUnavailable(f"NATS: {stream}: {reason}") from None


def _missing(stream: str) -> BusUnavailable:
    return BusUnavailable(f"NATS: there is no stream {stream}; run `consumer apply`")


def _require_end(status: Msg) -> None:
    headers = status.headers or {}
    if headers.get("Status") != "404":
        status_line = f"{headers.get('Status', '')} {headers.get('Description', '')}"
        reason = next(iter(status_line.splitlines()))
        raise BusUnavailable(f"NATS: the listing is incomplete: {reason}")

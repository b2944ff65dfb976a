"""Dead letters as the stream keeps them: all of them without their bodies, or one with its own."""

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

BATCH = 256  # letters asked for at once; each has at most 64 kB of headers
INACTIVE_THRESHOLD = (
    30.0  # seconds after which the server drops the consumer of a listing that died
)
_MESSAGE_SIZE = "Nats-Msg-Size"  # bytes of the body, where a consumer has left it out
_SEQUENCES = 2**64


class DeadLetterNotFound(Exception):  # noqa: N818 - a state of the stream
    """There is no letter under this sequence, or not any more."""


@dataclass(frozen=True)
class StoredDeadLetter:
    """A request that no worker could handle.

    The texts are empty where whoever wrote the letter has left a header out.

    Attributes:
        sequence: Its place in the stream of dead letters.
        stored_at: When that stream took it, aware.
        task: None where its subject names none that this version knows.
        headers: As they are stored.
        size: Bytes of the body.
        body: The request's bytes; None in a listing.
    """

    sequence: int
    stored_at: datetime
    task: Task | None
    headers: dict[str, str] = field(repr=False)
    size: int
    body: bytes | None = field(default=None, repr=False)

    @property
    def request_id(self) -> str:
        """The id under which the request has failed."""
        return self.headers.get(DEAD_LETTER_REQUEST_ID, "")

    @property
    def code(self) -> str:
        """The code of its failure."""
        return self.headers.get(DEAD_LETTER_CODE, "")

    @property
    def reason(self) -> str:
        """The message of its failure."""
        return self.headers.get(DEAD_LETTER_REASON, "")

    @property
    def attempts(self) -> str:
        """How often it was delivered, in digits."""
        return self.headers.get(DEAD_LETTER_ATTEMPTS, "")

    @property
    def worker(self) -> str:
        """Who has put it aside."""
        return self.headers.get(DEAD_LETTER_WORKER, "")

    @property
    def subject(self) -> str:
        """Where the request was published."""
        return self.headers.get(DEAD_LETTER_SUBJECT, "")

    @property
    def requested_at(self) -> str:
        """When the request was stored, as RFC 3339."""
        return self.headers.get(DEAD_LETTER_TIME, "")

    @property
    def truncated(self) -> bool:
        """Whether only the beginning of the body was kept."""
        return DEAD_LETTER_TRUNCATED in self.headers

    @property
    def originals(self) -> dict[str, str]:
        """The headers of the request, under their own names."""
        return {
            name.removeprefix(ORIGINAL_PREFIX): text
            for name, text in self.headers.items()
            if name.startswith(ORIGINAL_PREFIX)
        }


class DeadLetters:
    """The dead letters of one installation, to be read.

    Args:
        bus: A connection.
        subjects: The root decides the stream.
    """

    def __init__(self, bus: Bus, subjects: Subjects) -> None:
        self._bus = bus
        self._subjects = subjects
        self._stream = subjects.dead_letters_stream

    async def list_all(self) -> AsyncIterator[StoredDeadLetter]:
        """Every letter that is there when it begins, oldest first, without the bodies.

        Raises:
            BusUnavailable: The server does not answer, refuses, or has no such stream.
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
                # Without a code it is an answer of the server, to a sender's reply subject.
                if letter.code:
                    yield letter

    async def read(self, sequence: int) -> StoredDeadLetter:
        """One letter with its body.

        Raises:
            DeadLetterNotFound: It is not there.
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
            task=self._task(found.subject),
            headers=found.headers,
            size=len(found.body),
            body=found.body,
        )

    async def _pulled(self, consumer: str) -> AsyncGenerator[Msg]:
        # nats-py's own fetch waits its whole timeout for a message that does not come. A bare pull
        # that does not wait ends with 404, unless the batch is full.
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
                        _refuse_all_but_the_end(message)
                        return
                    yield message
        finally:
            await self._forget(consumer, subscription)

    async def _forget(self, consumer: str, subscription: Subscription) -> None:
        try:
            await subscription.unsubscribe()
            async with self._bus.api_call(API_TIMEOUT):
                await self._bus.jetstream.delete_consumer(self._stream, consumer)
        except (Error, OSError) as error:
            # The server drops it by itself a little later.
            log.info("listing_consumer_not_deleted", error=type(error).__name__)

    def _from_listing(self, message: Msg) -> StoredDeadLetter:
        headers = dict(message.headers or {})
        size = int(headers.pop(_MESSAGE_SIZE, "0"))
        return StoredDeadLetter(
            sequence=message.metadata.sequence.stream,
            stored_at=message.metadata.timestamp.astimezone(UTC),
            task=self._task(message.subject),
            headers=headers,
            size=size,
        )

    def _task(self, subject: str) -> Task | None:
        return next((task for task in Task if self._subjects.dead_letter(task) == subject), None)


@contextmanager
def describe_errors(bus: Bus, stream: str) -> Iterator[None]:
    """Make one clear line of whatever keeps the server from answering about a stream.

    Raises:
        BusUnavailable: With that line.
    """
    bus.last_error = ""
    try:
        yield
    except APIError as error:
        if error.err_code == STREAM_NOT_FOUND:
            raise _missing(stream) from None
        raise BusUnavailable(f"NATS: {stream}: {error.description or 'refused'}") from None
    except (Error, OSError) as error:
        # The server drops what is not permitted; the reason goes to the error callback.
        reason = bus.last_error or ("no answer" if isinstance(error, TimeoutError) else error)
        raise BusUnavailable(f"NATS: {stream}: {reason}") from None


def _missing(stream: str) -> BusUnavailable:
    return BusUnavailable(f"NATS: there is no stream {stream}; run `consumer apply`")


def _refuse_all_but_the_end(status: Msg) -> None:
    headers = status.headers or {}
    if headers.get("Status") != "404":
        status_line = f"{headers.get('Status', '')} {headers.get('Description', '')}"
        reason = next(iter(status_line.splitlines()))
        raise BusUnavailable(f"NATS: the listing has been cut off: {reason}")

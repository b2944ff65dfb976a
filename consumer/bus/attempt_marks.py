"""Attempt marks: which deliveries of a request are not attempts, and which requests are cancelled.

The server counts every delivery. Without marks, three rollouts of the workers would dead-letter a
long request as if it had killed three workers. Marks are stored in these cases:

- A worker that shuts down marks the delivery before it requeues the request. The next worker
  subtracts marked deliveries from the server's number.
- A worker marks each delivery that it handles in parallel with others. If the worker dies, the
  cause may be any of them.
- A worker that receives a stop request marks the request as cancelled before it replies. If the
  worker dies, the next worker does not run the request.
- A request that waits for its next attempt is in no request stream. A mark with the digest of its
  content reserves its id, so that no other request can use the id.

The server replies to any reply subject, so senders can make it publish to the subjects of marks.
Therefore a mark has a header that no reply of the server has, each subject stores one message, and
a message without the header is deleted before a mark is stored. Readers request only the exact
subjects of possible marks, so other messages below these subjects cost nothing.
"""

import asyncio
from enum import StrEnum

import structlog
from nats.errors import Error
from nats.js.errors import APIError, NotFoundError

from consumer.bus.codes import WRONG_LAST_SEQUENCE
from consumer.bus.connection import Bus
from consumer.bus.reading import read_message
from generation_client.submitting import NO_PUB_ACK
from generation_contracts import Subjects
from generation_contracts.headers import EXPECTED_LAST_SUBJECT_SEQUENCE, MARK

log = structlog.get_logger()

WRITE_TIMEOUT = 0.5  # seconds; the writing process shuts down, or a caller waits for the mark
READ_TIMEOUT = 1.0  # seconds for one attempt; the server takes 0.3 ms
READ_PAUSE = 0.1  # seconds between two attempts
READS = 64  # concurrent reads; a request has three subjects for each of its deliveries
_CANCELLED = "cancelled"
_OWNER = "owner"


class AttemptMark(StrEnum):
    """Kinds of marks on a delivery. Each is the last token of a subject: repeats are harmless."""

    REQUEUED = "released"  # requeued on purpose: not an attempt
    UNCOUNTED = "discounted"  # in parallel with others: not an attempt, unless marked as counted
    COUNTED = "counted"  # alone from then on: an attempt, unless marked as requeued


class AttemptMarks:
    """The marks on the messages of one stream. `key` identifies a message, see `message_key`.

    Args:
        bus: The connection.
        subjects: Subjects of the installation.
        queue: Queue of the messages.
        of: Name of the stream, as a subject token; empty for the request stream.
    """

    def __init__(self, bus: Bus, subjects: Subjects, queue: str, *, of: str = "") -> None:
        self._bus = bus
        self._stream = subjects.releases_stream
        self._attempts = ".".join(filter(None, (subjects.releases(queue), of)))
        self._cancelled = ".".join(filter(None, (subjects.cancellation_marks(queue), of)))

    async def mark_delivery(self, key: str, attempt: int, kind: AttemptMark) -> None:
        """Mark a delivery of a message. Never raises.

        If the mark cannot be written, the delivery counts as an attempt.

        Args:
            key: Key of the message; a second copy of the request has another key.
            attempt: The server's number of the delivery.
            kind: Kind of the mark.
        """
        await self._write(f"{self._attempts}.{key}.{attempt}.{kind}", kind)

    async def count_uncounted(self, key: str, deliveries: int) -> int:
        """Return how many of the first `deliveries` were not attempts; waits for the bus.

        Raises:
            BusUnavailable: The client has closed the connection; the process must end.
        """
        marks = [
            (f"{self._attempts}.{key}.{number}.{kind}", kind)
            for number in range(1, deliveries + 1)
            for kind in AttemptMark
        ]
        marked: list[bool] = []
        for first in range(0, len(marks), READS):
            batch = marks[first : first + READS]
            marked += await asyncio.gather(*(self._is_marked(*mark) for mark in batch))
        kinds = [kind for _, kind in marks]
        size = len(AttemptMark)
        return sum(
            _is_uncounted({kinds[n] for n in range(first, first + size) if marked[n]})
            for first in range(0, len(marks), size)
        )

    async def mark_cancelled(self, key: str) -> None:
        """Mark a message as cancelled. Never raises.

        If the mark cannot be written and this worker dies before it stops the request, the next
        worker runs the request.
        """
        await self._write(f"{self._cancelled}.{key}", _CANCELLED)

    async def was_cancelled(self, key: str) -> bool:
        """Return whether a message is marked as cancelled; waits for the bus.

        Raises:
            BusUnavailable: The client has closed the connection; the process must end.
        """
        return await self._is_marked(f"{self._cancelled}.{key}", _CANCELLED)

    async def mark_owner(self, request_id: str, digest: str) -> None:
        """Reserve a request id for the request with this digest. The first mark is final.

        Never raises. If the mark cannot be written, another request can use the id.
        """
        await self._write(f"{self._attempts}.{_OWNER}.{request_id}", f"{_OWNER} {digest}")

    async def owner(self, request_id: str) -> str | None:
        """Return the digest that a request id is reserved for; waits for the bus.

        Raises:
            BusUnavailable: The client has closed the connection; the process must end.
        """
        mark = await self._mark(f"{self._attempts}.{_OWNER}.{request_id}")
        kind, _, digest = mark.partition(" ")
        return digest if kind == _OWNER else None

    async def _write(self, subject: str, mark: str) -> None:
        # Repeat while senders occupy the subject with other messages.
        try:
            async with self._bus.api_call(WRITE_TIMEOUT):
                while not await self._stored(subject, mark):
                    found = await read_message(
                        self._bus, self._stream, subject=subject, timeout=WRITE_TIMEOUT
                    )
                    if found is not None and MARK in found.headers:
                        return
                    if found is not None:
                        await self._bus.jetstream.delete_msg(self._stream, found.sequence)
        except (Error, OSError, *NO_PUB_ACK) as error:
            log.warning("mark_not_written", error=type(error).__name__)

    async def _stored(self, subject: str, mark: str) -> bool:
        headers = {MARK: mark, EXPECTED_LAST_SUBJECT_SEQUENCE: "0"}
        try:
            await self._bus.jetstream.publish(subject, timeout=WRITE_TIMEOUT, headers=headers)
        except APIError as error:
            if error.err_code not in WRONG_LAST_SEQUENCE:
                raise
            return False
        return True

    async def _is_marked(self, subject: str, mark: str) -> bool:
        return await self._mark(subject) == mark

    async def _mark(self, subject: str) -> str:
        """Return the content of a mark; empty if it does not exist."""
        while True:
            await self._bus.wait_connected()
            try:
                found = await read_message(
                    self._bus, self._stream, subject=subject, timeout=READ_TIMEOUT
                )
            except NotFoundError:
                return ""  # the stream was deleted, and the marks with it
            except (Error, OSError) as error:
                log.warning("marks_not_read", error=type(error).__name__)
                await asyncio.sleep(READ_PAUSE)
            else:
                return "" if found is None else found.headers.get(MARK, "")


def retry_key(request_id: str) -> str:
    """Return the key of a request that waits for its next attempt and has no message yet."""
    return f"retry.{request_id}"


def _is_uncounted(kinds: set[AttemptMark]) -> bool:
    return AttemptMark.REQUEUED in kinds or (
        AttemptMark.UNCOUNTED in kinds and AttemptMark.COUNTED not in kinds
    )

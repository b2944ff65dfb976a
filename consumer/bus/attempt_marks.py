"""Attempt marks: which deliveries of a request do not count, and which requests are cancelled.

The server counts deliveries, whatever has become of them: three rollouts of the workers would end a
long request as if it had killed them. So a worker that ends marks the delivery before it requeues
the request, and the next worker subtracts marked deliveries from the server's number. A worker also
marks a delivery that it handles in parallel with others: if it dies, no one knows which of them
killed it. And a worker that is asked to stop a request marks it as cancelled before it answers: if
it dies first, the next one does not run the request.

A request that waits for its next attempt is in no request stream. So its id is marked with the
digest of what it asks for: no other request may take the id meanwhile.

Senders can make the server publish to these subjects: it answers to any reply subject. So a mark
has a header that no answer of the server has, each subject keeps one message, and a message without
the header is deleted where a mark belongs. Only the subjects that can exist are read: what else is
stored below them costs nothing.
"""

import asyncio
from enum import StrEnum

import structlog
from nats.errors import Error
from nats.js.errors import APIError, NotFoundError

from consumer.bus.codes import OCCUPIED
from consumer.bus.connection import Bus
from consumer.bus.reading import read_message
from generation_client.submitting import NO_PUB_ACK
from generation_contracts import Subjects, Task
from generation_contracts.headers import EXPECTED_LAST_SUBJECT_SEQUENCE, MARK

log = structlog.get_logger()

WRITE_TIMEOUT = 0.5  # seconds; the process that writes the mark is ending, or a caller waits for it
READ_TIMEOUT = 1.0  # seconds for one attempt; the server takes 0.3 ms
READ_PAUSE = 0.1  # seconds between two attempts
READS = 64  # at a time: a request has three subjects for each of its deliveries
_CANCELLED = "cancelled"
_OWNER = "owner"


class AttemptMark(StrEnum):
    """What a delivery is marked as; each is the last token of a subject, so twice is once."""

    REQUEUED = "released"  # requeued on purpose: not an attempt
    UNCOUNTED = "discounted"  # in parallel with others: not an attempt, unless it is counted
    COUNTED = "counted"  # alone from here on: an attempt, unless it is released


class AttemptMarks:
    """The marks on the messages of one stream; `place` names a message, as one token of a subject.

    Args:
        bus: The connection.
        subjects: Where the marks are kept.
        task: Whose messages they are.
        of: Names another stream than that of the requests; its sequences are its own.
    """

    def __init__(self, bus: Bus, subjects: Subjects, task: Task, *, of: str = "") -> None:
        self._bus = bus
        self._stream = subjects.releases_stream
        self._attempts = ".".join(filter(None, (subjects.releases(task), of)))
        self._cancelled = ".".join(filter(None, (subjects.cancellation_marks(task), of)))

    async def mark_delivery(self, place: str, attempt: int, kind: AttemptMark) -> None:
        """Mark a delivery of a message. Never raises.

        Where the mark cannot be written, the delivery counts as an attempt.

        Args:
            place: The message's: a second copy of the request has another.
            attempt: The server's number of the delivery.
            kind: What it is.
        """
        await self._write(f"{self._attempts}.{place}.{attempt}.{kind}", kind)

    async def count_uncounted(self, place: str, deliveries: int) -> int:
        """Return how many of so many deliveries were no attempts; waits for the bus.

        Raises:
            BusUnavailable: The client has given up; the process has to end.
        """
        wanted = [
            (f"{self._attempts}.{place}.{number}.{kind}", kind)
            for number in range(1, deliveries + 1)
            for kind in AttemptMark
        ]
        marked: list[bool] = []
        for first in range(0, len(wanted), READS):
            some = wanted[first : first + READS]
            marked += await asyncio.gather(*(self._is_marked(*one) for one in some))
        kinds = [kind for _, kind in wanted]
        size = len(AttemptMark)
        return sum(
            _is_uncounted({kinds[n] for n in range(first, first + size) if marked[n]})
            for first in range(0, len(wanted), size)
        )

    async def mark_cancelled(self, place: str) -> None:
        """Mark a message as cancelled. Never raises.

        Where the mark cannot be written, and this worker dies before it has stopped, the next one
        runs the request.
        """
        await self._write(f"{self._cancelled}.{place}", _CANCELLED)

    async def was_cancelled(self, place: str) -> bool:
        """Return whether a message is marked as cancelled; waits for the bus.

        Raises:
            BusUnavailable: The client has given up; the process has to end.
        """
        return await self._is_marked(f"{self._cancelled}.{place}", _CANCELLED)

    async def mark_owner(self, request_id: str, digest: str) -> None:
        """Mark a request id as belonging to what a request asks for. The first mark stands.

        Never raises. Where the mark cannot be written, another request can take the id.
        """
        await self._write(f"{self._attempts}.{_OWNER}.{request_id}", f"{_OWNER} {digest}")

    async def owner(self, request_id: str) -> str | None:
        """Return the digest that a request id is marked with; waits for the bus.

        Raises:
            BusUnavailable: The client has given up; the process has to end.
        """
        mark = await self._mark(f"{self._attempts}.{_OWNER}.{request_id}")
        kind, _, digest = mark.partition(" ")
        return digest if kind == _OWNER else None

    async def _write(self, subject: str, mark: str) -> None:
        # Again, as long as senders fill the subject with something else in between.
        try:
            async with self._bus.question(WRITE_TIMEOUT):
                while not await self._stored(subject, mark):
                    found = await read_message(
                        self._bus, self._stream, subject=subject, timeout=WRITE_TIMEOUT
                    )
                    if found is not None and MARK in found.headers:
                        return
                    if found is not None:
                        await self._bus.jetstream.delete_msg(self._stream, found.sequence)
        except (Error, OSError, *NO_PUB_ACK) as error:
            log.warning("note_not_written", error=type(error).__name__)

    async def _stored(self, subject: str, mark: str) -> bool:
        headers = {MARK: mark, EXPECTED_LAST_SUBJECT_SEQUENCE: "0"}
        try:
            await self._bus.jetstream.publish(subject, timeout=WRITE_TIMEOUT, headers=headers)
        except APIError as error:
            if error.err_code not in OCCUPIED:
                raise
            return False
        return True

    async def _is_marked(self, subject: str, mark: str) -> bool:
        return await self._mark(subject) == mark

    async def _mark(self, subject: str) -> str:
        """What stands in a mark; empty where there is none."""
        while True:
            await self._bus.reachable()
            try:
                found = await read_message(
                    self._bus, self._stream, subject=subject, timeout=READ_TIMEOUT
                )
            except NotFoundError:
                return ""  # the marks are gone with their stream
            except (Error, OSError) as error:
                log.warning("notes_not_read", error=type(error).__name__)
                await asyncio.sleep(READ_PAUSE)
            else:
                return "" if found is None else found.headers.get(MARK, "")


def retry_place(request_id: str) -> str:
    """What names a request that waits for its next attempt: its next message is not there yet."""
    return f"retry.{request_id}"


def _is_uncounted(kinds: set[AttemptMark]) -> bool:
    return AttemptMark.REQUEUED in kinds or (
        AttemptMark.UNCOUNTED in kinds and AttemptMark.COUNTED not in kinds
    )

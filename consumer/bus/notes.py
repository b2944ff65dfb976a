"""Notes on requests that are still in their stream: given back on purpose, or withdrawn.

The server counts deliveries, whatever has become of them: three rollouts of the workers would end a
long request as if it had killed them. So a worker that ends writes a note before it gives a request
back, and whoever gets it next takes the notes from the server's number.

And a worker that is told to stop a request writes that down before it answers: should it die before
it has stopped, the next one reads the note instead of running the request.
"""

import asyncio

import structlog
from nats.errors import Error
from nats.js.errors import NotFoundError

from consumer.bus.connection import Bus
from generation_client.submitting import NO_PUB_ACK
from generation_contracts import Subjects, Task
from generation_contracts.headers import MESSAGE_ID

log = structlog.get_logger()

NOTE_WITHIN = 0.5  # seconds; the process that writes the note is ending, or somebody waits for it
READ_TIMEOUT = 1.0  # seconds for one try; the server takes 0.3 ms
READ_PAUSE = 0.1  # seconds between two tries


class Notes:
    """The notes on the messages of one stream; `place` names a message, as one token of a subject.

    Args:
        bus: The connection.
        subjects: Where the notes are kept.
        task: Whose messages they are.
        of: Names another stream than that of the requests; its sequences are its own.
    """

    def __init__(self, bus: Bus, subjects: Subjects, task: Task, *, of: str = "") -> None:
        self._bus = bus
        self._stream = subjects.releases_stream
        self._released = ".".join(filter(None, (subjects.releases(task), of)))
        self._withdrawn = ".".join(filter(None, (subjects.withdrawals(task), of)))

    async def release(self, place: str, attempt: int) -> None:
        """Write down that a delivery of a message is given back. Never raises.

        Where the note cannot be written the request is given back all the same, and this delivery
        of it will count as a try.

        Args:
            place: The message's: a second copy of the request has another.
            attempt: The server's number of the delivery, which makes a second note of it harmless.
        """
        await self._write(f"{self._released}.{place}", str(attempt))

    async def releases(self, place: str) -> int:
        """How many deliveries of a message have been given back on purpose; waits for the bus.

        Raises:
            BusUnavailable: The client has given up; the process has to end.
        """
        return await self._count(f"{self._released}.{place}")

    async def withdraw(self, place: str) -> None:
        """Write down that a message is withdrawn. Never raises.

        Where the note cannot be written, a worker that dies before it has stopped has a successor
        that runs the request.
        """
        await self._write(f"{self._withdrawn}.{place}", "withdrawn")

    async def withdrawn(self, place: str) -> bool:
        """Whether a message has been withdrawn; waits for the bus.

        Raises:
            BusUnavailable: The client has given up; the process has to end.
        """
        return await self._count(f"{self._withdrawn}.{place}") > 0

    async def _write(self, subject: str, once: str) -> None:
        try:
            async with self._bus.question(NOTE_WITHIN):
                await self._bus.jetstream.publish(
                    subject, timeout=NOTE_WITHIN, headers={MESSAGE_ID: f"{subject}.{once}"}
                )
        except (Error, OSError, *NO_PUB_ACK) as error:
            log.warning("note_not_written", error=type(error).__name__)

    async def _count(self, subject: str) -> int:
        while True:
            await self._bus.reachable()
            try:
                async with self._bus.question(READ_TIMEOUT):
                    info = await self._bus.jetstream.stream_info(
                        self._stream, subjects_filter=subject
                    )
            except NotFoundError:
                return 0  # the notes are gone with their stream
            except (Error, OSError) as error:
                log.warning("notes_not_read", error=type(error).__name__)
                await asyncio.sleep(READ_PAUSE)
            else:
                return int((info.state.subjects or {}).get(subject, 0))

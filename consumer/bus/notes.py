"""Notes on requests that are still in their stream: given back on purpose, or withdrawn.

The server counts deliveries, whatever has become of them: three rollouts of the workers would end a
long request as if it had killed them. So a worker that ends writes a note before it gives a request
back, and whoever gets it next takes those deliveries from the server's number. The same goes for a
request that a worker has in hand with others: should it die then, nobody knows of which.

And a worker that is told to stop a request writes that down before it answers: should it die before
it has stopped, the next one reads the note instead of running the request.
"""

import asyncio
from collections import defaultdict
from enum import StrEnum

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


class NoTry(StrEnum):
    """What is noted of one delivery; each is the last token of a subject, so twice is once."""

    RELEASED = "released"  # given back on purpose: it was no try
    DISCOUNTED = "discounted"  # in hand with others: it is none, unless it is counted
    COUNTED = "counted"  # in hand alone from here on: it is one, unless it is released


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

    async def attempt(self, place: str, attempt: int, kind: NoTry) -> None:
        """Write down what a delivery of a message is. Never raises.

        Where the note cannot be written, things go on all the same: what is given back then will
        count as a try.

        Args:
            place: The message's: a second copy of the request has another.
            attempt: The server's number of the delivery.
            kind: What it is.
        """
        await self._write(f"{self._released}.{place}.{attempt}.{kind}")

    async def releases(self, place: str) -> int:
        """How many deliveries of a message were no tries; waits for the bus.

        Raises:
            BusUnavailable: The client has given up; the process has to end.
        """
        noted: defaultdict[str, set[str]] = defaultdict(set)
        for subject in await self._subjects(f"{self._released}.{place}.>"):
            *_, attempt, kind = subject.split(".")
            noted[attempt].add(kind)
        return sum(_was_no_try(kinds) for kinds in noted.values())

    async def withdraw(self, place: str) -> None:
        """Write down that a message is withdrawn. Never raises.

        Where the note cannot be written, a worker that dies before it has stopped has a successor
        that runs the request.
        """
        await self._write(f"{self._withdrawn}.{place}")

    async def withdrawn(self, place: str) -> bool:
        """Whether a message has been withdrawn; waits for the bus.

        Raises:
            BusUnavailable: The client has given up; the process has to end.
        """
        return bool(await self._subjects(f"{self._withdrawn}.{place}"))

    async def _write(self, subject: str) -> None:
        try:
            async with self._bus.question(NOTE_WITHIN):
                await self._bus.jetstream.publish(
                    subject, timeout=NOTE_WITHIN, headers={MESSAGE_ID: subject}
                )
        except (Error, OSError, *NO_PUB_ACK) as error:
            log.warning("note_not_written", error=type(error).__name__)

    async def _subjects(self, wanted: str) -> list[str]:
        while True:
            await self._bus.reachable()
            try:
                async with self._bus.question(READ_TIMEOUT):
                    info = await self._bus.jetstream.stream_info(
                        self._stream, subjects_filter=wanted
                    )
            except NotFoundError:
                return []  # the notes are gone with their stream
            except (Error, OSError) as error:
                log.warning("notes_not_read", error=type(error).__name__)
                await asyncio.sleep(READ_PAUSE)
            else:
                return list(info.state.subjects or {})


def _was_no_try(kinds: set[str]) -> bool:
    return NoTry.RELEASED in kinds or (NoTry.DISCOUNTED in kinds and NoTry.COUNTED not in kinds)

"""Notes of deliveries that were given back on purpose, so that they are not counted as tries.

The server counts deliveries, whatever has become of them: three rollouts of the workers would end a
long request as if it had killed them. So a worker that ends writes a note before it gives a request
back, and whoever gets it next takes the notes from the server's number.
"""

import asyncio

import structlog
from nats.errors import Error
from nats.js.errors import NotFoundError

from consumer.bus.connection import NO_PUB_ACK, Bus
from generation_contracts.headers import MESSAGE_ID

log = structlog.get_logger()

NOTE_WITHIN = 0.5  # seconds; the process that writes the note is ending
READ_TIMEOUT = 1.0  # seconds for one try; the server takes 0.3 ms
READ_PAUSE = 0.1  # seconds between two tries


class Releases:
    """The notes of one durable's requests.

    Args:
        bus: The connection.
        stream: Keeps the notes.
        subject: What their subjects begin with.
    """

    def __init__(self, bus: Bus, *, stream: str, subject: str) -> None:
        self._bus = bus
        self._stream = stream
        self._subject = subject

    async def note(self, place: str, attempt: int) -> None:
        """Write down that a delivery of a message is given back. Never raises.

        Args:
            place: The message's, one token: a second copy of the request has another.
            attempt: The server's number of the delivery, which makes a second note of it harmless.
        """
        subject = f"{self._subject}.{place}"
        try:
            async with self._bus.question(NOTE_WITHIN):
                await self._bus.jetstream.publish(
                    subject, timeout=NOTE_WITHIN, headers={MESSAGE_ID: f"{subject}.{attempt}"}
                )
        except (Error, OSError, *NO_PUB_ACK) as error:
            # The request is given back all the same; this delivery of it will count as a try.
            log.warning("release_not_noted", error=type(error).__name__)

    async def count(self, place: str) -> int:
        """How many deliveries of a message have been given back on purpose; waits for the bus.

        Raises:
            BusUnavailable: The client has given up; the process has to end.
        """
        subject = f"{self._subject}.{place}"
        while True:
            await self._bus.reachable()
            try:
                async with self._bus.question(READ_TIMEOUT):
                    info = await self._bus.jetstream.stream_info(
                        self._stream, subjects_filter=subject
                    )
            except NotFoundError:
                return 0  # the notes are gone with their stream: every delivery counts
            except (Error, OSError) as error:
                log.warning("releases_not_read", error=type(error).__name__)
                await asyncio.sleep(READ_PAUSE)
            else:
                return int((info.state.subjects or {}).get(subject, 0))

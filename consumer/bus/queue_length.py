"""The length of a queue, for a sender that has just stored a request."""

import json
from dataclasses import dataclass

from nats.errors import Error

from consumer.bus.connection import Bus, BusUnavailable

QUERY_TIMEOUT = 1.0  # seconds; a server without this permission for the user does not reply


@dataclass(frozen=True)
class QueueLength:
    """Reads the length of the queue of one task.

    The server's reply has counts and the configuration of the durable, but no ids and no bodies of
    requests, so senders may have the permission for it:
    `$JS.API.CONSUMER.INFO.<root>_REQUESTS_<TASK>.<durable>`.

    Attributes:
        bus: A connection.
        stream: Name of the stream of requests.
        durable: Name of the durable consumer of the workers.
    """

    bus: Bus
    stream: str
    durable: str

    async def before(self) -> int:
        """Return how many requests wait or run, without one: the request that was stored just now.

        Requests that wait for their next attempt are not counted.

        Raises:
            BusUnavailable: The server does not reply, for example because the user may not ask.
        """
        subject = f"$JS.API.CONSUMER.INFO.{self.stream}.{self.durable}"
        try:
            reply = json.loads(await self.bus.request(subject, b"", within=QUERY_TIMEOUT))
            waiting, running = reply["num_pending"], reply["num_ack_pending"]
        except (Error, OSError, ValueError, KeyError, TimeoutError) as error:
            raise BusUnavailable(
                f"NATS: the length of the queue is unknown: {type(error).__name__}"
            ) from None
        return max(0, int(waiting) + int(running) - 1)

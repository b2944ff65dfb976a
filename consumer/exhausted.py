"""Requests that reached `max_deliver`: another attempt where one is left, else their end.

The server counts every delivery towards `max_deliver`, also those that drains have requeued. What
has attempts left is published again with the attempts so far; everything else is dead-lettered.
"""

from collections.abc import Awaitable, Callable

import structlog

from consumer.admission import Admission
from consumer.ports import Delivery, Events, MessageTooLarge, QueueFull
from generation_contracts import InvalidRequest

log = structlog.get_logger()


class Exhausted:
    """Decides what becomes of them.

    Args:
        admission: How requests are read.
        events: The way to the bus.
        put_aside: Ends a request without running it.
        max_attempts: How many a request has.
    """

    def __init__(
        self,
        admission: Admission,
        events: Events,
        *,
        put_aside: Callable[[Delivery], Awaitable[None]],
        max_attempts: int,
    ) -> None:
        self._admission = admission
        self._events = events
        self._put_aside = put_aside
        self._max_attempts = max_attempts

    async def end(self, delivery: Delivery) -> bool:
        """Publish the request again or end it, then delete its message.

        A crash in between is harmless: the advisory comes again, and a second copy of the request
        is only answered.

        Returns:
            False where the request stream has no place for it now: call again later.
        """
        attempts = delivery.attempt - await delivery.releases()
        left = attempts < self._max_attempts and self._is_request(delivery)
        # A cancelled request ends here: its mark is that of this message, not of a copy.
        if left and not await delivery.withdrawn():
            try:
                await self._publish_again(delivery, attempts)
            except QueueFull:
                return False
            except MessageTooLarge:
                log.warning("too_large_to_publish_again")
            else:
                return True
        await self._put_aside(delivery)
        return True

    async def _publish_again(self, delivery: Delivery, attempts: int) -> None:
        request_id = self._admission.open(delivery).request_id
        await self._events.publish_again(
            self._admission.task, delivery, request_id=request_id, attempts=attempts
        )
        log.info("published_again", request_id=request_id, attempts=attempts)
        await delivery.ack()

    def _is_request(self, delivery: Delivery) -> bool:
        try:
            self._admission.request(delivery)
        except InvalidRequest:
            return False
        return True

"""Subscriptions to the events of all requests: transient progress events and results."""

from collections.abc import Callable
from contextlib import suppress

from nats.aio.msg import Msg
from nats.errors import Error

from consumer.bus.connection import Bus, BusUnavailable
from generation_client import AnyEvent, UnsupportedMessage
from generation_client.lookup import read_event
from generation_contracts import Subjects, TerminalEvent

# Bytes of received events that are not handled yet; nats-py drops events beyond this limit. A
# dropped result is still in the results stream.
MAX_PENDING_BYTES = 16 * 2**20


class EventFeed:
    """Receives the events of all requests.

    Args:
        bus: A connection.
        subjects: Subjects of the installation.
        is_watched: Returns whether to read the progress events of the request with this id.
        on_progress: Called with queue and id for each progress event, also of unwatched requests.
        on_event: Called with each event and its size in bytes, in the order of publication.
    """

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        *,
        is_watched: Callable[[str], bool],
        on_progress: Callable[[str, str], None],
        on_event: Callable[[AnyEvent, int], None],
    ) -> None:
        self._bus = bus
        self._root = subjects.root
        self._is_watched = is_watched
        self._on_progress = on_progress
        self._on_event = on_event

    async def open(self) -> None:
        """Subscribe; a reconnect renews the subscriptions.

        Raises:
            BusUnavailable: The connection is closed.
        """
        for kind, take in (("progress", self._take_progress), ("result", self._take_result)):
            try:
                await self._bus.client.subscribe(
                    f"{self._root}.{kind}.>", cb=take, pending_bytes_limit=MAX_PENDING_BYTES
                )
            except (Error, OSError) as error:
                raise BusUnavailable(f"NATS: no events: {type(error).__name__}") from None

    async def _take_progress(self, message: Msg) -> None:
        queue, request_id = self._named(message)
        self._on_progress(queue, request_id)
        if self._is_watched(request_id):
            self._take(message, terminal=False)

    async def _take_result(self, message: Msg) -> None:
        self._take(message, terminal=True)

    def _named(self, message: Msg) -> tuple[str, str]:
        """Return the queue and the request id from the subject."""
        _, queue, request_id = message.subject.removeprefix(self._root).rsplit(".", 2)
        return queue, request_id

    def _take(self, message: Msg, *, terminal: bool) -> None:
        queue, request_id = self._named(message)
        # A caller that waits for a result of a later version gets an error from its lookup.
        with suppress(UnsupportedMessage):
            event = read_event(message.data, queue, request_id)
            if event is not None and isinstance(event, TerminalEvent) == terminal:
                self._on_event(event, len(message.data))

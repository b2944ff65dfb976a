"""All events as they are published: progress, which is not stored, and results."""

from collections.abc import Callable
from contextlib import suppress

from nats.aio.msg import Msg
from nats.errors import Error

from consumer.bus.connection import Bus, BusUnavailable
from generation_client import AnyEvent, UnsupportedMessage
from generation_client.lookup import read_event
from generation_contracts import Subjects, Task, TerminalEvent

# Bytes of events that wait in this process; nats-py drops what comes beyond. A dropped result is
# found in the results stream.
MOST_BYTES = 16 * 2**20

_TASKS = frozenset(Task)


class EventFeed:
    """Receives the events of all requests.

    Args:
        bus: A connection.
        subjects: Where events are published.
        wanted: Whether the progress of a request is to be read, by its id.
        note_run: Called with the task and the id of every request that makes progress, wanted or
            not.
        receive: Called with each event and its size in bytes, in the order of their publication.
    """

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        *,
        wanted: Callable[[str], bool],
        note_run: Callable[[Task, str], None],
        receive: Callable[[AnyEvent, int], None],
    ) -> None:
        self._bus = bus
        self._root = subjects.root
        self._wanted = wanted
        self._note_run = note_run
        self._receive = receive

    async def open(self) -> None:
        """Subscribe; a reconnect renews the subscriptions.

        Raises:
            BusUnavailable: The connection is closed.
        """
        for kind, take in (("progress", self._take_progress), ("result", self._take_result)):
            try:
                await self._bus.client.subscribe(
                    f"{self._root}.{kind}.>", cb=take, pending_bytes_limit=MOST_BYTES
                )
            except (Error, OSError) as error:
                raise BusUnavailable(f"NATS: no events: {type(error).__name__}") from None

    async def _take_progress(self, message: Msg) -> None:
        task, request_id = self._named(message)
        if task in _TASKS:
            self._note_run(Task(task), request_id)
        if self._wanted(request_id):
            self._take(message, terminal=False)

    async def _take_result(self, message: Msg) -> None:
        self._take(message, terminal=True)

    def _named(self, message: Msg) -> tuple[str, str]:
        """Return the task and the id that the subject names."""
        _, task, request_id = message.subject.removeprefix(self._root).rsplit(".", 2)
        return task, request_id

    def _take(self, message: Msg, *, terminal: bool) -> None:
        task, request_id = self._named(message)
        if task not in _TASKS:
            return
        # A caller that waits for a result of a later version gets an error from its own lookup.
        with suppress(UnsupportedMessage):
            event = read_event(message.data, Task(task), request_id)
            if event is not None and isinstance(event, TerminalEvent) == terminal:
                self._receive(event, len(message.data))
